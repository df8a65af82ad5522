"""``cfg.readout`` says what the model does: its hook points, their order, its numbers."""

from itertools import product

import pytest
import torch

from tests.closeness import assert_close
from tests.models import SIZES
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import ConfigError, LoopedSemanticsError
from tl_loops.model.looped import LoopedTransformer

OPTIONS = {
    "norm": (
        {},
        dict(norm_between_iterations=True),
        dict(norm_between_iterations=True, own_norm_between_iterations=True),
        dict(norm_before_coda=True),
        dict(final_norm=False),
    ),
    "coda": (dict(n_coda=0), dict(n_coda=1), dict(n_coda=1, linear_before_coda=True)),
    "loop": (
        dict(n_iterations=3),
        dict(n_iterations=3, injection="add"),
        dict(n_iterations=3, exit_gate=True, halting="act"),
        dict(n_iterations=3, state_gate_rank=2),
        dict(n_iterations=3, hyper_connections=2),
        dict(n_iterations=4, stacks=("L", "H")),
    ),
    "type": (dict(normalization_type="RMS"), dict(normalization_type="LN")),
}


def _allowed() -> list[LoopedTransformerConfig]:
    configs = []
    for chosen in product(*OPTIONS.values()):
        if "LN" in chosen[-1].values() and chosen[-2] != dict(n_iterations=3):
            continue  # The type of the norm matters to no mechanism of the loop.
        fields = {name: value for part in chosen for name, value in part.items()}
        try:
            configs.append(LoopedTransformerConfig(n_prelude=1, n_core=2, **SIZES, **fields))
        except ConfigError:
            continue
    return configs


CONFIGS = _allowed()
NAMES = [str(number) for number in range(len(CONFIGS))]


@pytest.fixture(scope="module", params=CONFIGS, ids=NAMES)
def run(request):
    """A model with gains that are not 1, its logits, its cache, and its hook points in order."""
    model = LoopedTransformer(request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.ln_final.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        tokens = torch.randint(0, model.cfg.d_vocab, (2, 5), generator=generator)
        logits, cache = model.run_with_cache(tokens)
    return model, tokens, logits, cache


def _after(model, x, steps):
    """What the unembedding gives after some steps."""
    layout = model.layout
    for step in steps:
        if step.kind == "norm":
            x = model.ln_final(x)
        elif step.kind == "linear":
            x = model.coda_in(x)
        else:
            x = model(x, start_at_layer=layout.coda_start, stop_at_layer=layout.n_layers)
    return model.unembed(x)


def _end(readout):
    """The steps after the hook point that ends the blocks, or the loop."""
    before = () if readout.has_coda else readout.before_coda
    return (*before, *readout.final_steps(normed=readout.last_is_normed))


def _close(found, expected):
    assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_many_combinations_are_allowed():
    assert len(CONFIGS) > 40


@torch.no_grad()
def test_the_steps_from_the_last_state_give_the_logits(run):
    model, _, logits, cache = run
    readout = model.cfg.readout
    last = model.cfg.n_iterations - 1
    name = "hook_halted_state" if readout.sums_states else f"iter.{last}.hook_state_out"
    _close(_after(model, cache[name], readout.steps(normed=readout.is_normed("state_out"))), logits)


@torch.no_grad()
def test_the_last_hook_gives_the_logits(run):
    model, _, logits, cache = run
    readout = model.cfg.readout
    _close(_after(model, cache[readout.last_hook], _end(readout)), logits)


@torch.no_grad()
def test_the_steps_fire_in_their_order(run):
    model, _, _, cache = run
    readout, names = model.cfg.readout, list(cache)
    norms = [s.prefix for s in readout.steps(normed=False) if s.kind == "norm"]
    fired = [names.index(f"{prefix}.hook_scale") for prefix in norms]
    assert fired == sorted(fired)
    expected = {f"iter.{t}.norm" for t in range(model.cfg.n_iterations)}
    has = {name.removesuffix(".hook_scale") for name in names if name.endswith("norm.hook_scale")}
    of_iterations = {readout.iteration_norm(t) for t in range(model.cfg.n_iterations)}
    assert has & expected == of_iterations - {None, "ln_final"}
    assert ("ln_coda.hook_scale" in names) == ("ln_coda" in norms)


@torch.no_grad()
def test_a_point_after_the_norm_holds_what_the_norm_gave(run):
    model, _, _, cache = run
    readout, layout = model.cfg.readout, model.layout
    for t in range(layout.n_iterations):
        first = layout.index(iteration=t, layer=0)
        points = {
            "state_in": (f"iter.{t}.hook_state_in", None),
            "injected": (f"iter.{t}.hook_injected", None),
            "resid_pre": (f"blocks.{first}.hook_resid_pre", 0),
            "state_out": (f"iter.{t}.hook_state_out", None),
        }
        normed = []
        for s in range(layout.n_iterations):
            prefix = readout.iteration_norm(s)
            if prefix is not None:
                x = cache[f"{prefix}.hook_normalized"]
                norm = model.iter[s].norm if hasattr(model.iter[s], "norm") else model.ln_final
                assert (norm.w is None) == readout.own_norm_between_iterations
                x = x if norm.w is None else x * norm.w
                normed.append(x if norm.b is None else x + norm.b)
        for kind, (name, layer) in points.items():
            holds = any(torch.equal(cache[name], x) for x in normed)
            assert readout.is_normed(kind, "core", t, layer) == holds, (kind, t)


@torch.no_grad()
def test_a_state_is_read_out_or_refused_with_one_text(run):
    model, tokens, _, _ = run
    readout = model.cfg.readout
    reasons = []
    for refuse in (
        readout.refuse_sum_of_states,
        readout.refuse_coda,
        lambda: readout.refuse_fast_stack(0),
    ):
        try:
            refuse()
        except LoopedSemanticsError as error:
            reasons.append(str(error))
    if reasons:
        with pytest.raises(LoopedSemanticsError) as refused:
            model(tokens, exit_at=0)
        assert str(refused.value) == reasons[0]
    else:
        cache = model.run_with_cache(tokens)[1]
        steps = readout.steps(normed=readout.is_normed("state_out"))
        _close(model(tokens, exit_at=0), _after(model, cache["state_out", 0], steps))


@torch.no_grad()
def test_the_last_accumulated_row_gives_the_logits(run):
    model, _, logits, cache = run
    rows = cache.accumulated_resid(apply_ln=True)
    _close(model.unembed(rows[-1]), logits)


def test_another_number_of_iterations_moves_the_final_norm():
    readout = LoopedTransformerConfig(
        n_core=2, n_iterations=2, norm_between_iterations=True, **SIZES
    ).readout
    longer = readout.over(readout.layout.with_iterations(3))
    assert [readout.iteration_norm(t) for t in range(2)] == ["iter.0.norm", "ln_final"]
    assert [longer.iteration_norm(t) for t in range(3)] == [
        "iter.0.norm",
        "iter.1.norm",
        "ln_final",
    ]


def test_a_norm_of_its_own_has_no_weights_and_comes_with_every_iteration():
    fields = dict(norm_between_iterations=True, own_norm_between_iterations=True, n_core=2)
    model = LoopedTransformer(
        LoopedTransformerConfig(n_iterations=2, exit_gate=True, **fields, **SIZES)
    )
    plain = LoopedTransformerConfig(n_iterations=2, exit_gate=True, n_core=2, **SIZES)
    assert model.cfg.n_params == plain.n_params
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        for n_iterations in (1, 2, 5):
            logits, cache = model.run_with_cache(tokens, n_iterations=n_iterations)
            for t in range(n_iterations):
                state = cache["state_out", t]
                assert_close(state.pow(2).mean(-1), torch.ones(1, 6), rtol=1e-3, atol=1e-3)
            last = cache["state_out", n_iterations - 1]
            assert_close(logits, model.ln_final(last) @ model.W_U, rtol=1e-4, atol=1e-5)
            assert_close(
                model(tokens, n_iterations=6, exit_at=n_iterations - 1),
                logits,
                rtol=1e-4,
                atol=1e-5,
            )
        state_dict = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state_dict, assign=True)
        again = model(tokens)
        assert_close(again, model(tokens, exit_at=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="needs norm_between_iterations"):
        LoopedTransformerConfig(own_norm_between_iterations=True, **SIZES)
