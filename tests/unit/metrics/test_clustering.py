"""Cosine clustering on states whose cosines are known, and the biases that its null shows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.clustering import cosine_clustering, shuffled_cosine_clustering

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(n_entities=6, n_queries=5, spread=0.1, d_model=64, seed=0):
    entity = torch.arange(n_entities).repeat_interleave(n_queries)
    return randn(seed, n_entities, d_model)[entity] + spread * randn(
        seed + 1, len(entity), d_model
    ), entity


class TestCohesion:
    def test_equal_states_have_cohesion_one(self):
        result = cosine_clustering(torch.eye(3, 8).repeat_interleave(4, 0), torch.arange(12) // 4)
        torch.testing.assert_close(result.cohesion, torch.tensor(1.0))
        assert result.alignment is None and result.entities.tolist() == [0, 1, 2]

    def test_two_states_at_an_angle(self):
        angle = 1.0
        hidden = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        entity = torch.tensor([7, 7])
        loo = cosine_clustering(hidden, entity).cohesion
        assert loo.item() == pytest.approx(math.cos(angle))
        with_self = cosine_clustering(hidden, entity, leave_one_out=False).cohesion
        assert with_self.item() == pytest.approx(math.cos(angle / 2))

    def test_the_centroid_is_the_plain_mean(self):
        """A long state pulls the centroid towards itself."""
        hidden = torch.tensor([[10.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        entity = torch.zeros(3, dtype=torch.long)
        got = cosine_clustering(hidden, entity, leave_one_out=False).cohesion
        cosine = torch.nn.functional.cosine_similarity(hidden, hidden.mean(0), dim=-1)
        torch.testing.assert_close(got, cosine.mean())

    def test_one_query_is_undefined_unless_it_meets_itself(self):
        hidden, entity = randn(0, 3, 8), torch.tensor([0, 0, 1])
        loo = cosine_clustering(hidden, entity)
        assert loo.entity_cohesion[1].isnan() and not loo.entity_cohesion[0].isnan()
        torch.testing.assert_close(loo.cohesion, loo.entity_cohesion[0])
        biased = cosine_clustering(hidden, entity, leave_one_out=False)
        assert biased.entity_cohesion[1].item() == pytest.approx(1.0)

    def test_self_inclusion_inflates_independent_directions(self):
        """About 1/sqrt(n) with the query in its centroid, 0 without."""
        hidden, entity = randn(0, 400, 2000), torch.arange(100).repeat_interleave(4)
        biased = cosine_clustering(hidden, entity, leave_one_out=False).cohesion
        assert biased.item() == pytest.approx(0.5, abs=0.02)
        assert cosine_clustering(hidden, entity).cohesion.item() == pytest.approx(0.0, abs=0.02)

    def test_a_common_direction_is_removed_by_centering(self):
        hidden, entity = randn(0, 400, 64), torch.arange(100).repeat_interleave(4)
        hidden[:, 0] += 100
        assert cosine_clustering(hidden, entity).cohesion > 0.9
        assert abs(cosine_clustering(hidden, entity, mean_center=True).cohesion) < 0.05

    def test_centering_keeps_real_clusters(self):
        hidden, entity = clustered(n_entities=40)
        assert cosine_clustering(hidden + 5, entity, mean_center=True).cohesion > 0.95

    def test_macro_mean_weighs_entities_alike(self):
        hidden = torch.cat([torch.eye(2)[[0, 0]], torch.eye(2)[[0, 1]], torch.eye(2)[[0, 1]]])
        entity = torch.tensor([0, 0, 1, 1, 1, 1])
        result = cosine_clustering(hidden, entity)
        torch.testing.assert_close(result.cohesion, result.entity_cohesion.mean())
        assert result.entity_cohesion[0].item() == pytest.approx(1.0)


class TestAlignment:
    def test_compares_other_queries_with_the_centroid(self):
        hidden = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        other = torch.tensor([[1.0, 1.0], [0.0, 5.0], [-1.0, 0.0]])
        result = cosine_clustering(
            hidden, torch.tensor([0, 0, 1, 1]), other, torch.tensor([0, 1, 0])
        )
        expected = torch.tensor([(2**-0.5 - 1) / 2, 1.0])
        torch.testing.assert_close(result.entity_alignment, expected)
        torch.testing.assert_close(result.alignment, expected.mean())

    def test_means_run_over_entities_that_have_both(self):
        hidden, entity = clustered(4, 3)
        other, other_entity = randn(5, 3, 64), torch.tensor([1, 3, 99])
        result = cosine_clustering(hidden, entity, other, other_entity)
        assert result.entity_cohesion.isnan().tolist() == [True, False, True, False]
        assert result.entity_alignment.isnan().tolist() == [True, False, True, False]

    def test_an_entity_without_a_cohesion_has_no_alignment(self):
        hidden, entity = randn(0, 3, 8), torch.tensor([0, 0, 1])
        result = cosine_clustering(hidden, entity, randn(1, 2, 8), torch.tensor([0, 1]))
        assert result.entity_alignment.isnan().tolist() == [False, True]
        torch.testing.assert_close(result.alignment, result.entity_alignment[0])

    def test_no_shared_entity_gives_nan(self):
        result = cosine_clustering(
            randn(0, 2, 4), torch.tensor([0, 0]), randn(1, 1, 4), torch.tensor([5])
        )
        assert result.cohesion.isnan() and result.alignment.isnan()

    def test_centering_uses_the_in_distribution_mean(self):
        hidden, entity = clustered()
        other, shift = hidden + 0.01, 3 * randn(9, 64)
        plain = cosine_clustering(hidden, entity, other, entity, mean_center=True)
        moved = cosine_clustering(hidden + shift, entity, other + shift, entity, mean_center=True)
        torch.testing.assert_close(plain.alignment, moved.alignment, atol=1e-4, rtol=0)


class TestBatches:
    def test_leading_axes_are_measured_one_by_one(self):
        entity = torch.tensor([0, 1, 0, 1, 0])
        hidden, other = randn(0, 2, 3, 5, 8), randn(1, 2, 3, 2, 8)
        result = cosine_clustering(hidden, entity, other, torch.tensor([1, 0]))
        assert result.cohesion.shape == (2, 3) and result.entity_alignment.shape == (2, 3, 2)
        alone = cosine_clustering(hidden[1, 2], entity, other[1, 2], torch.tensor([1, 0]))
        torch.testing.assert_close(result.cohesion[1, 2], alone.cohesion)
        torch.testing.assert_close(result.alignment[1, 2], alone.alignment)

    def test_a_zero_state_is_undefined(self):
        hidden, entity = clustered(3, 3)
        hidden[0] = 0
        assert cosine_clustering(hidden, entity).entity_cohesion.isnan().tolist() == [
            True,
            False,
            False,
        ]

    def test_bfloat16_is_measured_in_float32(self):
        hidden, entity = clustered()
        assert cosine_clustering(hidden.bfloat16(), entity).cohesion.dtype == torch.float32

    @laws
    @given(seeds, st.floats(0.01, 100))
    def test_scale_and_order_do_not_matter(self, seed, factor):
        hidden, entity = randn(seed, 9, 4).double(), torch.arange(9) % 3
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            cosine_clustering(hidden, entity).entity_cohesion,
            cosine_clustering(factor * hidden[order], entity[order]).entity_cohesion,
        )


class TestNull:
    def test_real_clusters_stand_out(self):
        hidden, entity = clustered()
        null, alignment = shuffled_cosine_clustering(hidden, entity, seed=0, n_shuffles=50)
        assert null.shape == (50,) and alignment is None
        assert cosine_clustering(hidden, entity).cohesion > null.max() + 0.3

    def test_shares_the_bias_of_self_inclusion(self):
        hidden, entity = randn(0, 40, 500), torch.arange(10).repeat_interleave(4)
        null, _ = shuffled_cosine_clustering(hidden, entity, 0, 20, leave_one_out=False)
        measured = cosine_clustering(hidden, entity, leave_one_out=False).cohesion
        assert measured.item() == pytest.approx(null.mean().item(), abs=0.02)

    def test_shuffles_both_label_sets(self):
        hidden, entity = clustered()
        null, alignment = shuffled_cosine_clustering(hidden, entity, 0, 50, hidden, entity)
        assert alignment.shape == (50,)
        assert cosine_clustering(hidden, entity, hidden, entity).alignment > alignment.max() + 0.3
        again, _ = shuffled_cosine_clustering(hidden, entity, 0, 50, hidden, entity)
        assert torch.equal(null, again)


def test_refuses_bad_input():
    hidden, entity = clustered()
    with pytest.raises(ValueError, match="belong together"):
        cosine_clustering(hidden, entity, hidden)
    with pytest.raises(ValueError, match="n_shuffles"):
        shuffled_cosine_clustering(hidden, entity, 0, 0)
