"""What a cache costs, and what loading costs on the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import tiny_model, tiny_tokens
from tl_loops import LoopedTransformer
from tl_loops.loading import files

torch.set_num_threads(1)


def held(cache) -> int:
    """Bytes of memory that a cache keeps alive, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in cache.values()}
    return sum(storage.nbytes() for storage in storages.values())


def shown(cache) -> int:
    """Bytes of the numbers that it shows."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cache.values())


@pytest.mark.parametrize("architecture", ["ouro", "huginn", "olmo_grouped"])
@pytest.mark.parametrize("name", ["resid_post", "pattern", "z", "v", "mlp_out"])
@pytest.mark.parametrize("positions", [None, -1, (2, 5)])
def test_a_cache_of_chosen_names_costs_what_it_keeps(architecture, name, positions):
    model = tiny_model(architecture)
    names = [model.layout.hook_name(name, iteration=1, layer=0)]
    options = {} if positions is None else {"pos_slice": positions}
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=names, **options)
    assert list(cache.keys()) == names
    assert held(cache) == shown(cache)
    _, whole = model.run_with_cache(tiny_tokens(), names_filter=names)
    dim = 2 if name == "pattern" else 1
    index = slice(None) if positions is None else slice(*positions) if positions != -1 else [-1]
    expected = whole[names[0]].movedim(dim, 0)[index].movedim(0, dim)
    assert torch.equal(cache[names[0]].reshape(expected.shape), expected)


def test_a_cache_can_be_kept_in_another_dtype():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    logits, cache = model.run_with_cache(tokens, dtype=torch.bfloat16)
    plain, whole = model.run_with_cache(tokens)
    assert torch.equal(logits, plain)
    for name, tensor in cache.items():
        assert torch.equal(tensor, whole[name].to(torch.bfloat16)), name
        assert tensor.dtype == torch.bfloat16
    model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")  # as before
    assert model.run_with_cache(tokens)[1]["resid_pre", 0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"floating point numbers, got torch\.int64"):
        model.run_with_cache(tokens, dtype=torch.int64)


def test_a_cache_can_be_kept_on_another_device():
    _, cache = tiny_model("ouro").run_with_cache(tiny_tokens(), device="meta")
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}


class LargestOnTheHost(TorchDispatchMode):
    """The largest tensor in the memory of the host, in bytes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return out


def test_weights_go_to_their_device_without_a_copy_on_the_host(monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 1024)
    with LargestOnTheHost() as host:
        model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert largest > 40_000 and host.most <= 8192
