"""Every tool that takes ``shard`` and ``checkpoint``: one process, several, and a killed one."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_loops.runs.in_batches as in_batches
from tests.models import tiny_model
from tl_loops import LoopProfile, exit_curve, map_prompts, measure, merge_shards
from tl_loops.attribution import attribution_patch, edge_attribution
from tl_loops.circuits import (
    Circuit,
    EdgeGraph,
    Faithfulness,
    PartEffects,
    completeness,
    faithfulness,
    faithfulness_curve,
    minimality,
    score,
)
from tl_loops.errors import CheckpointError
from tl_loops.lens import LensResult, coda_lens, fit_jacobian_lens
from tl_loops.patching import (
    MassiveSite,
    Site,
    ablate,
    ablate_massive,
    activation_patch,
    patch_exit_gate,
    path_patch,
    transplant_sites,
    transplant_states,
)
from tl_loops.probes import gather_states

torch.set_num_threads(1)


@cache
def model() -> Any:
    return tiny_model("ouro", n_iterations=2)


@cache
def pair() -> tuple[Tensor, Any]:
    tokens = torch.randint(0, 50, (2, 1, 5), generator=torch.Generator().manual_seed(1))
    return tokens[0], model().run_with_cache(tokens[1])[1]


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (n,), generator=generator) for n in (7, 4, 7, 3, 7)]


def logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3].mean() - logits[:, -1, 4].mean()


def patched(tool: Callable, *given: Any, metric: Any = logit, **options: Any) -> Callable:
    def call(**split: Any) -> Tensor:
        result = tool(model(), *given, metric, **options, **split)
        return result.scores if hasattr(result, "scores") else result

    return call


def circuit() -> Circuit:
    return Circuit.whole(EdgeGraph.of(model()))


@cache
def edge_scores() -> Any:
    return score(model(), pair()[0], logit, "paired", pair()[1], by="gradient", progress=False)


def moments(result: Any) -> Tensor:
    if isinstance(result, Faithfulness):
        return result.metrics
    if isinstance(result, PartEffects):
        return result.values
    if isinstance(result, LensResult):
        track = result.tracked["three"]
        kept = [result.tokens, result.predictions, result.entropy, result.kl_from_previous,
                track.rank, track.probability]  # fmt: skip
        return torch.cat([tensor.double().reshape(-1) for tensor in kept])
    tensors = [t for m in result.moments.values() for t in m.tensors().values()]
    return torch.cat([t.double().reshape(-1) for t in tensors])


TOOLS: dict[str, Callable[..., Any]] = {
    "measure": lambda **split: measure(
        model(), prompts(), ("sink_score", "fixed_point_cosine"), batch_size=2, progress=False,
        **split,
    ),
    "exit_curve": lambda **split: exit_curve(
        model(), prompts(), batch_size=2, progress=False, **split
    ),
    "activation_patch": lambda **split: patched(
        activation_patch, *pair(), axes=("block", "pos"), batch_size=4, progress=False
    )(**split),
    "ablate": lambda **split: patched(
        ablate, pair()[0], axes=("iteration", "head"), batch_size=3, progress=False
    )(**split),
    "patch_exit_gate": lambda **split: patched(
        patch_exit_gate, *pair(), metric=lambda gates: gates[:, :, -1].sum(),
        axes=("block",), batch_size=2, progress=False,
    )(**split),
    "transplant_states": lambda **split: patched(
        transplant_states, *pair(), batch_size=1, progress=False
    )(**split),
    "transplant_sites": lambda **split: transplant_sites(
        model(), *pair(), logit, [Site("q", 0, 0), Site("q", 1, 1)], batch_size=1, progress=False,
        **split,
    ),
    "attribution_patch": lambda **split: patched(
        attribution_patch, *pair(), method="integrated_inputs", n_steps=4
    )(**split),
    "read_lens": lambda **split: coda_lens(
        model(), torch.stack([p for p in prompts() if len(p) == 7]), batch_size=1, top_k=2,
        track={"three": 3}, **split,
    ),
    "map_prompts": lambda **split: torch.stack([
        torch.tensor(torch.nan) if one is None else one
        for one in map_prompts(
            model(), lambda pair: model()(pair[0])[0, -1, pair[1]],
            [(tokens, k) for k, tokens in enumerate(prompts())], "a logit", progress=False, **split,
        )
    ]),
    **{
        f"score {by}{' folded' if folded else ''}": lambda by=by, folded=folded, **split: score(
            model(), pair()[0], logit, "paired", pair()[1], by=by, folded=folded, n_steps=2,
            batch_size=4, progress=False, **split,
        ).scores
        for by, folded in (("integrated_inputs", False), ("exact", False), ("exact", True))
    },
    "gather_states": lambda **split: gather_states(
        model(), prompts(), "state_out", batch_size=2, progress=False, **split
    ).values,
    "edge_attribution": lambda **split: patched(edge_attribution, *pair(), progress=False)(**split),
    **{
        name: lambda tool=tool, given=given, **split: tool(
            model(), pair()[0], logit, given(), "paired", pair()[1], batch_size=2, progress=False,
            **split,
        )
        for name, (tool, given) in {
            "faithfulness": (faithfulness, lambda: [circuit(), circuit().without("r0.0_mlp_out")]),
            "faithfulness_curve": (faithfulness_curve, edge_scores),
            "minimality": (partial(minimality, by="layer"), lambda: circuit()),
            "completeness": (completeness, lambda: circuit()),
        }.items()
    },
    "path_patch": lambda **split: path_patch(
        model(), *pair(), logit, [Site("z", t, 0) for t in (0, 1, 1, 0)],
        ["logits", Site("resid_pre", -1, 1)], batch_size=1, progress=False, **split,
    ),
    "ablate_massive": lambda **split: ablate_massive(
        model(), pair()[0], logit, [MassiveSite(b, "", 0, b, 3, 9.0) for b in (0, 1, 2)], "mean",
        batch_size=1, progress=False, **split,
    ),
    "fit_jacobian_lens": lambda **split: fit_jacobian_lens(
        model(), prompts(), batch_size=2, progress=False, **split
    ).jacobians,
}  # fmt: skip
MERGING = ("measure", "exit_curve")
BY_FILES = [name for name in TOOLS if name not in MERGING]


def numbers(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else moments(result)


def same(a: Any, b: Any) -> bool:
    return torch.equal(numbers(a).nan_to_num(nan=-7.0), numbers(b).nan_to_num(nan=-7.0))


@pytest.mark.parametrize("tool", TOOLS)
def test_shards_give_the_bits_and_the_file_of_one_process(tool, tmp_path):
    call = TOOLS[tool]
    whole = call(checkpoint=tmp_path / "whole.ckpt")
    assert not numbers(whole).isinf().any() and same(whole, call())
    for k in range(3):
        call(shard=(k, 3), checkpoint=tmp_path / "run.ckpt")
    files = sorted(tmp_path.glob("run.?of3.ckpt"))
    assert len(files) == 3
    merge_shards(files, tmp_path / "merged.ckpt")
    assert (tmp_path / "merged.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()
    assert same(call(checkpoint=tmp_path / "merged.ckpt"), whole)


@pytest.mark.parametrize("tool", TOOLS)
def test_an_interrupted_shard_goes_on_alone(tool, tmp_path, monkeypatch):
    call = TOOLS[tool]
    append, calls = in_batches.append_batch, 0

    def interrupted(*given: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return append(*given)

    with monkeypatch.context() as patch:
        patch.setattr(in_batches, "append_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(checkpoint=tmp_path / "run.ckpt")
    call(checkpoint=tmp_path / "run.ckpt")
    call(checkpoint=tmp_path / "whole.ckpt")
    assert (tmp_path / "run.ckpt").read_bytes() == (tmp_path / "whole.ckpt").read_bytes()


@pytest.mark.parametrize("tool", MERGING)
def test_results_of_shards_merge_by_themselves(tool):
    call = TOOLS[tool]
    shards = [call(shard=f"{k}/2") for k in range(2)]
    merged = shards[1].merge(shards[0])
    assert merged.shard is None and same(merged, call())
    with pytest.raises(CheckpointError, match=r"1/2 of the run of shard 0/2 are missing"):
        shards[0].merge()
    with pytest.raises(CheckpointError, match="are both shard 1/2"):
        shards[0].merge(shards[1], shards[1])
    with pytest.raises(ValueError, match=r"whole"):
        shards[0].merge(shards[1], call())


@pytest.mark.parametrize("tool", ["activation_patch", "ablate"])
def test_cells_of_other_shards_are_undefined(tool, tmp_path):
    whole = TOOLS[tool]()
    part = TOOLS[tool](shard=(0, 2), checkpoint=tmp_path / "run.ckpt")
    known = ~part.isnan()
    assert known.any() and not known.all()
    assert torch.equal(part[known], whole[known])


@pytest.mark.parametrize("tool", BY_FILES)
def test_a_shard_that_nothing_keeps_is_no_use(tool):
    with pytest.raises(ValueError, match="shard 0/2 needs checkpoint="):
        TOOLS[tool](shard=(0, 2))


def test_a_shard_of_a_lens_is_about_its_own_prompts(tmp_path):
    call, given = TOOLS["read_lens"], {"checkpoint": tmp_path / "run.ckpt"}
    whole, part = call(), call(shard=(1, 2), **given)
    assert torch.equal(part.tokens, whole.tokens[[1]])
    assert torch.equal(part.predictions, whole.predictions[:, [1]])
    assert torch.equal(part.tracked["three"].rank, whole.tracked["three"].rank[:, [1]])
    with pytest.raises(ValueError, match="shard 3/4 has no prompt"):
        call(shard="3/4", **given)


# What is another run.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(metric=lambda logits: logits[:, -1, 3].mean()), "metric is"),
        (dict(axes=("block",)), "options is axes="),
        (dict(batch_size=3), "cells is"),
        (dict(activation="mlp_out"), "another kind of run: patch resid_pre"),
        (dict(tokens=torch.tensor([[1, 2, 3, 4, 5]])), "prompts is"),
    ],
)
def test_a_grid_of_another_run_is_named(changed, message, tmp_path):
    tokens, cache = pair()
    given = dict(metric=logit, axes=("block", "pos"), batch_size=4, tokens=tokens)

    def call(tokens: Tensor, metric: Any, **options: Any) -> Tensor:
        path = tmp_path / "run.ckpt"
        return activation_patch(
            model(), tokens, cache, metric, progress=False, checkpoint=path, **options
        )

    before = call(**given)
    content = (tmp_path / "run.ckpt").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        call(**{**given, **changed})
    assert (tmp_path / "run.ckpt").read_bytes() == content
    assert torch.equal(call(**given), before)


def test_shards_of_other_prompts_or_another_model_are_named(tmp_path):
    def shard(k: int, given: list[Tensor], weight: float = 0.0) -> LoopProfile:
        changed = tiny_model("ouro", n_iterations=2)
        with torch.no_grad():
            changed.blocks[0].attn.W_Q[0, 0, 0] += weight
        return measure(changed, given, "residual_norm", progress=False, shard=(k, 2))

    first = shard(0, prompts())
    with pytest.raises(CheckpointError, match="shard 1/2 belongs to another run: prompts is"):
        first.merge(shard(1, prompts()[::-1]))
    with pytest.raises(CheckpointError, match="shard 1/2 belongs to another run: weights is"):
        first.merge(shard(1, prompts(), weight=1e-3))


def test_a_grid_with_gradients_is_kept_in_no_file(tmp_path):
    tokens, cache = pair()
    with pytest.raises(ValueError, match="keep numbers, not gradients"):
        activation_patch(
            model(), tokens, cache, logit, gradients=True, checkpoint=tmp_path / "run.ckpt"
        )


def test_a_function_of_another_name_or_of_other_prompts_is_another_run(tmp_path):
    def call(prompts: list, what: str) -> list:
        given = {"checkpoint": tmp_path / "run.ckpt", "progress": False}
        return map_prompts(model(), lambda p: p["tokens"].float().sum(), prompts, what, **given)

    given = [{"tokens": p, "answer": "a"} for p in prompts()]
    before = call(given, "sum")
    assert [float(one) for one in before] == [float(p["tokens"].sum()) for p in given]
    with pytest.raises(CheckpointError, match="what is 'sum' there and 'total'"):
        call(given, "total")
    with pytest.raises(CheckpointError, match="another run: prompts is"):
        call([*given[:-1], {**given[-1], "answer": "b"}], "sum")
    with pytest.raises(TypeError, match="prompt 0 is or holds a set"):
        call([{"tokens": {1}}], "sum")
    with pytest.raises(TypeError, match="must give a tensor, got int for prompt 0"):
        map_prompts(model(), len, ["a"], "length", progress=False)


# Files of shards.


def test_a_shard_is_saved_as_a_shard_and_nothing_else(tmp_path):
    call = TOOLS["measure"]
    shards = [call(shard=(k, 2)) for k in range(2)]
    with pytest.raises(ValueError, match=r"shard 0/2 of a run, no result: save it as .*a\.shard"):
        shards[0].save(tmp_path / "a.json")
    for k, one in enumerate(shards):
        one.save(tmp_path / f"{k}.shard")
    loaded = [LoopProfile.load(tmp_path / f"{k}.shard") for k in range(2)]
    assert "shard 0/2, " in repr(loaded[0]) and same(loaded[0], shards[0])
    merged = loaded[0].merge(loaded[1])
    merged.save(tmp_path / "merged.json")
    call().save(tmp_path / "whole.json")
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"1\.shard belongs to another run"):
        other = measure(model(), prompts(), "sink_score", progress=False, shard=(1, 2))
        other.save(tmp_path / "1.shard")
        loaded[0].merge(LoopProfile.load(tmp_path / "1.shard"))
