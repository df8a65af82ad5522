"""HookedTransformer.from_pretrained knows looped names, and everything else stays as it was."""

import warnings
from pathlib import Path

import pytest

import tl_loops
from tests.feedforward import only_before_4, only_from_4, plain_model
from tl_loops import HookedTransformer, LoopedSemanticsError, LoopedTransformer, UnknownModelError
from tl_loops.upstream import warn_if_untried

CHECKPOINT = Path(__file__).parents[2] / "parity" / "fixtures" / "ouro"
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
    with pytest.raises(ValueError, match=r"Valid official model names|boot_transformers"):
        HookedTransformer.from_pretrained("ouro-1.4b")
    assert isinstance(
        LoopedTransformer.from_pretrained(CHECKPOINT, device="cpu"), LoopedTransformer
    )


@only_before_4
def test_other_names_reach_transformer_lens(monkeypatch):
    seen = []

    def note(name):
        seen.append(name)
        raise ValueError("reached TransformerLens")

    monkeypatch.setattr("transformer_lens.loading_from_pretrained.get_official_model_name", note)
    with pytest.raises(ValueError, match="reached TransformerLens"):
        HookedTransformer.from_pretrained("gpt2")
    assert seen == ["gpt2"]


@only_before_4
def test_subclasses_are_left_alone(monkeypatch):
    class Mine(HookedTransformer):
        pass

    monkeypatch.setattr(
        "transformer_lens.loading_from_pretrained.get_official_model_name",
        lambda name: (_ for _ in ()).throw(ValueError("reached TransformerLens")),
    )
    with pytest.raises(ValueError, match="reached TransformerLens"):
        Mine.from_pretrained("huginn-0125")


@only_before_4
def test_the_class_is_transformer_lens_own():
    import transformer_lens

    assert HookedTransformer is transformer_lens.HookedTransformer


@only_from_4
def test_other_names_are_told_what_takes_the_place_of_hooked_transformer():
    for load in (
        HookedTransformer.from_pretrained,
        HookedTransformer.from_pretrained_no_processing,
    ):
        with pytest.raises(UnknownModelError, match=r"TransformerBridge\.boot_transformers"):
            load("gpt2")
    with pytest.raises(UnknownModelError, match=r"TransformerBridge\.boot_transformers"):
        HookedTransformer({"n_layers": 2})


@pytest.mark.parametrize("tried", ["3.9.0", "3.9.2", "4.3.0", "4.3.1.dev2"])
def test_a_tried_transformer_lens_gives_no_warning(tried):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untried(tried)


@pytest.mark.parametrize("untried", ["3.8.1", "4.0.0", "4.2.1", "4.4.0", "5.0.0rc1"])
def test_an_untried_transformer_lens_gives_one_warning_with_the_range(untried):
    with pytest.warns(UserWarning, match=r"3\.9\.x and 4\.3\.x") as caught:
        warn_if_untried(untried)
    assert len(caught) == 1 and untried in str(caught[0].message)


def test_only_one_package_imports_what_transformer_lens_may_remove():
    package = Path(tl_loops.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name not in ("upstream", "bridge"):
            assert "import transformer_lens" not in path.read_text(), path
            assert "from transformer_lens" not in path.read_text(), path


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


@only_from_4
def test_looping_a_bridge_of_an_unknown_kind_is_refused():
    model = plain_model(n_layers=2, d_model=8, d_head=4, n_ctx=8, d_vocab=9, act_fn="gelu", seed=0)
    with pytest.raises(
        LoopedSemanticsError,
        match=r"TransformerBridge of gpt2, llama.*got one with NativeArchitectureAdapter",
    ):
        tl_loops.loop(model, 0, 1, 2)
