"""Results print short: shapes in place of numbers, and everything else in a few words."""

import dataclasses

import pytest
import torch

from tl_loops import LoopedTransformer, exit_curve, lens, metrics, tasks
from tl_loops.metrics.kmeans import kmeans
from tl_loops.printing import in_short, prints_short

MODEL = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
TEXTS = [prompt.text for prompt in tasks.fact_chain_prompts(2, n_hops=3)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(3, 4), "[3, 4] float32"),
        (torch.arange(9), "[9] int64"),
        (torch.tensor([1.5, float("nan")]), "[1.5, nan] float32"),
        (torch.tensor(0.12345678), "0.1235"),
        (torch.tensor(True), "True"),
        ({"loss": torch.zeros(9), "kl": 1}, "2 by name: loss, kl"),
        (tuple(f"iter.{t}.hook_state_out" for t in range(64)), "64, from 'iter.0.hook_state_out'"),
        ("x" * 200, "..."),
        ((), "()"),
    ],
)
def test_values_in_a_few_words(value, words):
    assert words in in_short(value) and len(in_short(value)) < 130


def test_a_dataclass_prints_a_line_for_each_field_that_is_shown():
    @prints_short
    @dataclasses.dataclass(frozen=True)
    class Result:
        mean: torch.Tensor
        hidden: int = dataclasses.field(repr=False, default=0)

    assert repr(Result(torch.zeros(2, 2))) == "Result\n  mean: [2, 2] float32"


def test_results_and_caches_print_short():
    _, cache = MODEL.run_with_cache(TEXTS)
    assert "LoopedActivationCache of 391 activations of (1, 2⊗8, 1): hook_embed" in repr(cache)
    results = [
        cache,
        lens.coda_lens(MODEL, TEXTS, positions="last"),
        exit_curve(MODEL, TEXTS, progress=False),
        lens.train_tuned_lens(MODEL, TEXTS, points="states", n_steps=1, progress=False),
        kmeans(torch.randn(9, 4), 2),
        metrics.massive_activations(torch.randn(2, 9, 64)),
    ]
    for result in results:
        assert len(repr(result)) < 600, repr(result)
        assert "tensor(" not in repr(result)
