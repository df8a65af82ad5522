"""Hook points and modules that cost little where nothing listens, and are torch's all the same."""

import copy
import io
from typing import Any

import pytest
import torch
import transformer_lens.hook_points
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tests.models import tiny_model, tiny_tokens
from tl_loops.upstream import HookPoint, Module, copy_hooks

pytestmark = pytest.mark.both_lines


def double(*args: Any) -> Any:
    """A hook of any of torch's kinds that doubles what it may change: the last tensor it gets."""
    value = args[-1]
    return tuple(2 * v for v in value) if isinstance(value, tuple) else 2 * value


@pytest.mark.parametrize(
    ("register", "changes"),
    [
        ("register_forward_hook", "value"),
        ("register_forward_pre_hook", "value"),
        ("register_full_backward_hook", "gradient"),
        ("register_full_backward_pre_hook", "gradient"),
    ],
)
def test_every_kind_of_torch_hook_is_heard(register, changes):
    point, x = HookPoint(), torch.tensor([3.0], requires_grad=True)
    assert point(x) is x
    hook = (lambda _, grads, *rest: double(grads)) if changes == "gradient" else double
    handle = getattr(point, register)(hook)
    copied = HookPoint()
    copy_hooks(point, copied)
    for heard in (point, copied):
        x.grad = None
        out = heard(x)
        out.sum().backward()
        assert (out.item(), x.grad.item()) == ((6.0, 2.0) if changes == "value" else (3.0, 2.0))
    handle.remove()
    assert point(x) is x


def test_hooks_on_all_modules_are_heard():
    point, seen = HookPoint(), []
    with register_module_forward_hook(lambda module, given, out: seen.append(module)):
        point(torch.zeros(1))
    point(torch.zeros(1))
    assert seen == [point]


def test_a_forward_of_its_own_is_called():
    point = HookPoint()
    point.forward = lambda x: -x  # as tools do that wrap modules
    assert point(torch.ones(1)).item() == -1.0


def test_it_is_a_hook_point_of_transformer_lens():
    assert isinstance(HookPoint(), transformer_lens.hook_points.HookPoint)
    model = tiny_model("huginn")
    assert all(type(point) is HookPoint for point in model.hook_dict.values())


class Pair(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.rest = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def found(pair: Pair) -> list[Any]:
    """The first part, as each way of looking finds it."""
    return [pair.first, getattr(pair, "first"), dict(pair.named_children())["first"]]  # noqa: B009


def replaced_by_setattr(pair: Pair, new: nn.Module) -> Pair:
    pair.first = new  # type: ignore[assignment]
    return pair


def replaced_by_add_module(pair: Pair, new: nn.Module) -> Pair:
    pair.add_module("first", new)
    return pair


def replaced_after_deletion(pair: Pair, new: nn.Module) -> Pair:
    del pair.first
    assert not hasattr(pair, "first") and "first" not in dict(pair.named_children())
    pair.register_module("first", new)
    return pair


def deep_copied(pair: Pair, new: nn.Module) -> Pair:
    return copy.deepcopy(replaced_by_setattr(pair, new))


def saved_and_loaded(pair: Pair, new: nn.Module) -> Pair:
    file = io.BytesIO()
    torch.save(replaced_by_setattr(pair, new), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        replaced_by_setattr,
        replaced_by_add_module,
        replaced_after_deletion,
        deep_copied,
        saved_and_loaded,
    ],
)
def test_a_part_is_the_same_however_it_is_looked_for(change):
    x, new = torch.ones(1, 2), nn.Linear(2, 2)
    pair = change(Pair(), new)
    first, *others = found(pair)
    assert all(other is first for other in others)
    torch.testing.assert_close(pair(x), new(x))
    assert list(pair.state_dict()) == ["first.weight", "first.bias"]


def test_a_part_can_become_nothing_and_a_parameter():
    pair = Pair()
    pair.rest = None  # type: ignore[assignment]
    assert pair.rest is None
    pair.first = nn.Parameter(torch.ones(1))  # type: ignore[assignment]
    assert isinstance(pair.first, nn.Parameter) and not list(pair.children())


def test_unrolled_blocks_have_parts_of_their_own():
    model = tiny_model("huginn")
    n_core, start = model.cfg.n_core, model.layout.n_prelude
    first, second = model.blocks[start], model.blocks[start + n_core]
    assert first.attn is not second.attn and first.hook_resid_pre is not second.hook_resid_pre
    assert first.attn.W_Q is second.attn.W_Q
    seen = []
    with second.attn.hook_z.register_forward_hook(lambda point, *_: seen.append(point.name)):
        model(tiny_tokens())
    assert seen == [f"blocks.{start + n_core}.attn.hook_z"]
