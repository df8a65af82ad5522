"""An infinite value gives no number that looks plausible: NaN, or an error."""

import pytest
import torch

from tl_loops import metrics

STATES = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))


def with_infinity(values, place):
    values = values.clone()
    values[place] = torch.inf
    return values


def test_states():
    broken = with_infinity(STATES, (2, 1, 4))
    ratio = metrics.two_scale_ratio([broken, STATES])
    assert ratio[0, 1].isnan() and ratio[0, [0, 2]].isfinite().all()
    for result in (
        metrics.successive_difference(broken, agg="none", relative=True),
        metrics.fixed_point_distance(broken, agg="none", relative=True),
        metrics.step_angles(broken),
        metrics.acceleration(broken, normalize="state"),
    ):
        assert result[:, 1].isnan().any() and not result.isinf().any()
        assert result[:, [0, 2]].isfinite().all()


def test_an_infinite_gate_is_a_probability_of_one():
    gates = with_infinity(torch.zeros(4, 2), (1, 0))
    assert metrics.exit_distribution(gates)[:, 0].tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_logits(value):
    logits = torch.zeros(2, 5)
    logits[0, 3] = value
    calls = (
        lambda: metrics.token_rank(logits, 1),
        lambda: metrics.token_probability(logits, 1),
        lambda: metrics.predicted_tokens(logits),
        lambda: metrics.output_entropy(logits),
        lambda: metrics.kl_divergence(logits, torch.zeros(2, 5)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="NaN or inf"):
            call()
    masked = torch.tensor([1.0, -torch.inf, 0.0])
    assert metrics.token_rank(masked, 1) == 3 and metrics.output_entropy(masked).isfinite()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_attention_between_steps(value):
    attention = torch.eye(4)
    attention[2, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.critical_steps(attention)
