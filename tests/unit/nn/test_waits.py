"""Where a value decides what the host does next, the host waits for a GPU: never once per block."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tl_loops.nn.attention
from tests.models import ARCHITECTURES, MECHANISMS, STACKS, tiny_model, tiny_tokens

READ_BY_THE_HOST = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
)


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host reads."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function in READ_BY_THE_HOST] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Only on the CPU attention looks for what is not finite, since only there it may get lost."""
    monkeypatch.setattr(tl_loops.nn.attention, "_fused_hides", lambda q, k, v: False)


def waits(run):
    with torch.no_grad(), Waits() as mode:
        run()
    assert mode.seen[False] > 20
    return mode.seen[True]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MECHANISMS, *STACKS])
def test_a_forward_pass_waits_as_often_with_few_iterations_as_with_many(architecture):
    model, tokens = tiny_model(architecture), tiny_tokens()
    many = model.cfg.n_iterations
    few = many if model.cfg.router else len(model.cfg.stacks or "1")
    scaled = [("state_out", lambda state, hook: 2 * state)]

    def hooked(n):
        hooks = [(f"iter.{t}.hook_{name}", hook) for name, hook in scaled for t in range(n)]
        return model.run_with_hooks(tokens, n_iterations=n, fwd_hooks=hooks)

    for run in (
        lambda n: model(tokens, n_iterations=n),
        lambda n: model(tokens, n_iterations=n, return_type="loss"),
        lambda n: model(tokens, n_iterations=n, attention_mask=torch.ones_like(tokens)),
        lambda n: model.run_with_cache(tokens, n_iterations=n),
        hooked,
    ):
        n_waits = waits(lambda: run(few))  # noqa: B023
        assert waits(lambda: run(many)) == n_waits <= 7  # noqa: B023


def test_decoding_waits_as_often_with_few_iterations_as_with_many():
    model, tokens = tiny_model("huginn"), tiny_tokens()
    options = dict(max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    n_waits = {
        n: waits(lambda: model.generate(tokens, n_iterations=n, **options))  # noqa: B023
        for n in (2, 6)
    }
    assert n_waits[2] == n_waits[6], n_waits
