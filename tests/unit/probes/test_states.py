"""States of prompts are those of the caches, at each prompt's own position."""

import pytest
import torch

from tests.closeness import assert_close
from tests.feedforward import only_before_4, plain_model
from tests.models import tiny_model, tiny_tokens
from tl_loops import loop
from tl_loops.errors import LoopedSemanticsError, NoLoopError
from tl_loops.probes import PromptStates, gather_states

torch.set_num_threads(1)

LENGTHS = (5, 7, 5, 4, 7)
SIZES = dict(d_model=16, d_head=8, n_heads=2, d_mlp=32, d_vocab=50, n_ctx=12, act_fn="gelu", seed=0)
PROMPTS = [tiny_tokens(1, n, seed=i)[0] for i, n in enumerate(LENGTHS)]


def from_caches(model, names, at):
    """[name, prompt, width], each prompt run alone."""
    rows = []
    with torch.no_grad():
        for tokens, position in zip(PROMPTS, at, strict=True):
            _, cache = model.run_with_cache(tokens[None])
            rows.append(torch.stack([cache[name][0, position].flatten() for name in names]))
    return torch.stack(rows, dim=1)


def gathered(model, *args, **options):
    return gather_states(model, PROMPTS, *args, progress=False, **options)


@pytest.mark.parametrize("name", ["retrofitted", "ouro", "hrm_text", "act"])
def test_states_of_iterations(name):
    model = tiny_model(name)
    found = gathered(model, "state_out", batch_size=2)
    T = model.cfg.n_iterations
    names = [f"iter.{t}.hook_state_out" for t in range(T)]
    assert_close(found.values[:, 0], from_caches(model, names, [-1] * 5), rtol=1e-4, atol=1e-5)
    assert found.iterations == tuple(range(T)) and found.layers == (0,)
    assert found.points == tuple(f"t{t}" for t in range(T)) and found.prompts == (0, 1, 2, 3, 4)


def test_blocks_by_iteration_and_layer_and_positions_of_their_own():
    model = tiny_model("retrofitted")
    at = [0, 6, -2, 3, 1]
    found = gathered(model, "resid_post", positions=at, iterations=[2, 0], layers=1)
    names = [f"blocks.{model.layout.index(iteration=t, layer=1)}.hook_resid_post" for t in (2, 0)]
    assert_close(found.values[:, 0], from_caches(model, names, at), rtol=1e-4, atol=1e-5)
    assert (found.iterations, found.layers) == ((2, 0), (1,))
    assert found.points == ("r2.1", "r0.1") and found.label(1, 0) == "r0.1"
    second = gathered(model, "resid_post", positions=1, iterations=[2, 0], layers=1)
    assert_close(second.values[..., 4, :], found.values[..., 4, :], rtol=1e-4, atol=1e-5)


def test_other_activations_phases_and_numbers_of_iterations():
    model = tiny_model("retrofitted")
    last = [-1] * 5
    heads = gathered(model, "z", iterations=0, layers=0)
    name = f"blocks.{model.layout.core_start}.attn.hook_z"
    assert heads.values.shape[-1] == model.cfg.n_heads * model.cfg.d_head
    assert_close(heads.values[0], from_caches(model, [name], last), rtol=1e-4, atol=1e-5)
    every = gathered(model, "mlp_out", phase="all")
    names = [f"blocks.{i}.hook_mlp_out" for i in range(model.cfg.n_layers)]
    assert_close(every.values[0], from_caches(model, names, last), rtol=1e-4, atol=1e-5)
    assert every.points == tuple(model.layout.labels())
    coda = gathered(model, phase="coda")
    name = f"blocks.{model.layout.coda_start}.hook_resid_post"
    assert_close(coda.values[0], from_caches(model, [name], last), rtol=1e-4, atol=1e-5)
    once = gathered(model, "injection")
    assert once.values.shape[:2] == (1, 1) and once.points == ("injection",)
    deep = gathered(model, "state_out", n_iterations=5)
    assert len(deep.iterations) == 5 and model.cfg.n_iterations != 5
    assert_close(deep.values[0], gathered(model, "state_out").values[0], rtol=1e-4, atol=1e-5)


def test_a_model_without_a_loop_has_one_iteration():
    model = plain_model(n_layers=3, **SIZES)
    found = gathered(model)
    names = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    assert_close(found.values[0], from_caches(model, names, [-1] * 5), rtol=1e-4, atol=1e-5)
    assert found.iterations == (0,) and len(found.layers) == model.cfg.n_layers
    with pytest.raises(ValueError, match="has no core"):
        gathered(model, phase="core")
    with pytest.raises(ValueError, match="no activation 'state_out'"):
        gathered(model, "state_out")
    with pytest.raises(NoLoopError):
        gathered(model, n_iterations=2)


def test_half_precision_gives_float32():
    model = tiny_model("retrofitted").to(torch.bfloat16)
    found = gathered(model, "state_out")
    assert found.values.dtype == torch.float32 and not found.values.requires_grad


def test_one_shard_is_about_its_prompts(tmp_path):
    model = tiny_model("ouro")
    whole = gathered(model, "state_out", batch_size=2)
    part = gathered(model, "state_out", batch_size=2, shard=(0, 2), checkpoint=tmp_path / "run")
    assert 0 < len(part.prompts) < 5 and list(part.prompts) == sorted(part.prompts)
    assert torch.equal(part.values, whole.rows(part.prompts).values)
    with pytest.raises(ValueError, match="has no prompt: there are"):
        gathered(model, shard=(4, 5), checkpoint=tmp_path / "other")


def test_files_and_rows(tmp_path):
    found = gathered(tiny_model("retrofitted"), "resid_mid")
    found.save(tmp_path / "states")
    loaded = PromptStates.load(tmp_path / "states")
    assert torch.equal(loaded.values, found.values)
    assert {n: v for n, v in vars(loaded).items() if n != "values"} == {
        n: v for n, v in vars(found).items() if n != "values"
    }
    assert loaded.rows([3, 1]).prompts == (3, 1)
    assert torch.equal(loaded.rows([3, 1]).values, found.values[:, :, [3, 1]])
    with pytest.raises(IndexError, match="no prompt 5"):
        found.rows(5)
    with pytest.raises(FileNotFoundError):
        PromptStates.load(tmp_path / "nothing")
    assert len(repr(found)) < 400


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation": "resid_past"}, "unknown activation 'resid_past'"),
        ({"activation": "pattern"}, "has no vector at a position"),
        ({"activation": "exit_gate"}, "no activation 'exit_gate'"),
        ({"activation": "state_out", "layers": 0}, "has no layers"),
        ({"activation": "state_out", "phase": "core"}, "has no phase"),
        ({"positions": "first"}, "positions must be"),
        ({"positions": [0, 0]}, "got 5 prompts but 2 positions"),
        ({"positions": 4}, "there is no token 4 in prompt 3: there are 4"),
        ({"iterations": 9}, "there is no iteration 9"),
        ({"layers": [0, 0]}, "names a value twice"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_what_raises(options, match):
    with pytest.raises((ValueError, IndexError), match=match):
        gathered(tiny_model("retrofitted"), **options)


def test_a_phase_without_blocks_and_loops_of_different_lengths():
    with pytest.raises(ValueError, match="has no prelude"):
        gathered(tiny_model("ouro"), phase="prelude")
    with pytest.raises(ValueError, match="prompts is empty"):
        gather_states(tiny_model("ouro"), [])


@only_before_4
def test_loops_of_different_lengths_go_by_block():
    looped = loop(plain_model(n_layers=5, **SIZES), loops=[(0, 1, 2), (1, 3, 2)])
    with pytest.raises(LoopedSemanticsError, match="go by unrolled block"):
        gathered(looped)
    assert gathered(looped, phase="all").values.shape[1] == looped.cfg.n_layers
    assert gathered(looped, "state_out").values.shape[0] == 4
