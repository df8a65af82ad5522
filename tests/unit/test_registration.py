"""HookedTransformer.from_pretrained knows looped names, and everything else stays as it was."""

from pathlib import Path

import pytest
from transformer_lens import HookedTransformer

import tl_loops
from tl_loops import LoopedSemanticsError, LoopedTransformer, UnknownModelError

CHECKPOINT = Path(__file__).parents[1] / "parity" / "fixtures" / "ouro"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def registered():
    tl_loops.register()
    yield
    tl_loops.register()


def test_a_directory_loads_as_a_hooked_transformer():
    model = HookedTransformer.from_pretrained(str(CHECKPOINT), n_iterations=2, device="cpu")
    assert isinstance(model, LoopedTransformer)
    assert isinstance(model, HookedTransformer)
    assert model.cfg.notation == "(0, 3⊗2, 0)"
    again = HookedTransformer.from_pretrained_no_processing(str(CHECKPOINT), device="cpu")
    assert again.cfg.n_iterations == 4


def test_registering_is_idempotent_and_reversible():
    original = tl_loops.upstream.HookedTransformer.from_pretrained
    tl_loops.register()
    assert HookedTransformer.from_pretrained == original
    tl_loops.unregister()
    tl_loops.unregister()
    upstream = HookedTransformer.__dict__["from_pretrained"]
    assert "transformer_lens" in upstream.__func__.__code__.co_filename
    with pytest.raises(Exception, match=r"not found|not supported|Valid|valid"):
        HookedTransformer.from_pretrained("ouro-1.4b-not-a-model")
    assert isinstance(
        LoopedTransformer.from_pretrained(CHECKPOINT, device="cpu"), LoopedTransformer
    )


def test_other_names_reach_transformer_lens(monkeypatch):
    seen = []

    def note(name):
        seen.append(name)
        raise ValueError("reached TransformerLens")

    monkeypatch.setattr("transformer_lens.loading_from_pretrained.get_official_model_name", note)
    with pytest.raises(ValueError, match="reached TransformerLens"):
        HookedTransformer.from_pretrained("gpt2")
    assert seen == ["gpt2"]


def test_subclasses_are_left_alone(monkeypatch):
    class Mine(HookedTransformer):
        pass

    monkeypatch.setattr(
        "transformer_lens.loading_from_pretrained.get_official_model_name",
        lambda name: (_ for _ in ()).throw(ValueError("reached TransformerLens")),
    )
    with pytest.raises(ValueError, match="reached TransformerLens"):
        Mine.from_pretrained("huginn-0125")


def test_unknown_names_are_refused_with_near_matches():
    with pytest.raises(UnknownModelError, match=r"ouro-1\.4b"):
        LoopedTransformer.from_pretrained("ouro-1.5b")


@pytest.mark.parametrize(
    "arguments",
    [
        dict(first_n_layers=2),
        dict(checkpoint_index=1),
        dict(n_devices=2),
        dict(hf_model=object()),
        dict(refactor_factored_attn_matrices=True),
    ],
)
def test_arguments_without_meaning_are_refused(arguments):
    with pytest.raises(LoopedSemanticsError):
        LoopedTransformer.from_pretrained(CHECKPOINT, device="cpu", **arguments)


def test_bad_iterations_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LoopedTransformer.from_pretrained(CHECKPOINT, n_iterations=0, device="cpu")


def test_dtype_and_context_length():
    model = LoopedTransformer.from_pretrained(
        CHECKPOINT, dtype="bfloat16", n_ctx=16, default_prepend_bos=False, device="cpu"
    )
    assert str(model.cfg.dtype) == "torch.bfloat16"
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
    assert (model.cfg.n_ctx, model.cfg.default_prepend_bos) == (16, False)
