"""The circuit of the embedded model explains its composition: one hop per iteration."""

import pytest
import torch

from tests.closeness import assert_close
from tl_loops import LoopedTransformer, circuits, tasks

torch.set_num_threads(1)


class Task:
    """Prompts of three hops of which the second leads astray in the reference."""

    def __init__(self):
        self.model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
        pairs = []
        for prompt in tasks.fact_chain_prompts(12, n_hops=3, seed=4):
            try:
                pairs.append((prompt, tasks.corrupt(prompt, 2)))
            except ValueError:
                continue
        pairs = pairs[:8]
        self.tokens = self.model.to_tokens([p.text for p, _ in pairs])
        self.others = self.model.to_tokens([q.text for _, q in pairs])
        rows = torch.arange(len(pairs))
        right, wrong = (
            torch.tensor([self.model.to_single_token(p.answer) for p in of])
            for of in zip(*pairs, strict=True)
        )
        self.metric = lambda x: (x[rows, -1, right] - x[rows, -1, wrong]).mean()
        with torch.no_grad():
            _, self.cache = self.model.run_with_cache(self.others)

    def __call__(self, function, *args, **options):
        arguments = (self.model, self.tokens, self.metric, *args, "paired", self.cache)
        return function(*arguments, progress=False, **options)


@pytest.fixture(scope="module")
def task():
    return Task()


@pytest.fixture(scope="module")
def scores(task):
    return task(circuits.score, n_steps=5)


@torch.no_grad()
def test_a_small_circuit_is_faithful_and_reads_one_hop_per_iteration(task, scores):
    circuit = circuits.prune(scores, 140)
    curve = task(circuits.faithfulness_curve, scores, n_edges=[20, 140, 300])
    assert_close(curve.values[-1], torch.ones(()), atol=0.02, rtol=0)
    assert curve.values[1] > 0.9 and curve.values[0] < 0.2
    assert curve.area > 0.85
    assert curve.metrics[1] == task(circuits.faithfulness, circuit).metrics[0]

    # The path of the hop: fact -> second hop in iteration 1 -> third hop in iteration 2 -> answer.
    strongest = {(a.label, b.label) for a, b, _ in circuit.edges()[:4]}
    assert ("p0_attn_out", "r1.0_attn_out") in strongest
    assert ("r1.0_attn_out", "r2.0_attn_out") in strongest

    needed = task(circuits.minimality, circuit, by="iteration")
    drop = dict(zip(needed.labels, needed.values.tolist(), strict=True))
    assert drop["iteration 1"] > 0.9 and drop["iteration 2"] > 0.9
    assert all(abs(v) < 0.25 for k, v in drop.items() if k not in ("iteration 1", "iteration 2"))

    gaps = task(circuits.completeness, circuit, by="iteration")
    assert gaps.labels[0] == "nothing"
    assert_close(gaps.values[0], curve.values[1] - 1, atol=1e-5, rtol=1e-5, size=1.0)


@torch.no_grad()
def test_intervening_on_the_loop_does_what_the_circuit_says(task):
    """Without the attention of layer 0 in iteration 1 the difference is gone, in 5 it stays."""
    full = task.metric(task.model(task.tokens))
    base = task.metric(task.model(task.others))
    left = {}
    for t in (1, 2, 5):
        name = f"iter.{t}.0.hook_attn_out"
        other = task.cache[name]
        logits = task.model.run_with_hooks(
            task.tokens, fwd_hooks=[(name, lambda x, hook, other=other: other)]
        )
        left[t] = float((task.metric(logits) - base) / (full - base))
    assert left[1] < 0.1 and left[2] < 0.35 and left[5] > 0.95
