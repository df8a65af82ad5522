"""Step maps against their definition, and critical steps of maps that are worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.step_importance import critical_steps, step_attention

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def causal_pattern(seed, *shape):
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -torch.inf).softmax(-1)


class TestStepAttention:
    @pytest.mark.parametrize("length_normalize", [False, True])
    def test_matches_the_definition(self, length_normalize):
        pattern = causal_pattern(0, 2, 8, 8)
        ids = torch.tensor([-1, -1, 0, 0, 0, 1, 2, 2])
        got = step_attention(pattern, ids, length_normalize)
        for i in range(3):
            for j in range(3):
                block = pattern[:, ids == i][:, :, ids == j]
                mass = block.mean(-1) if length_normalize else block.sum(-1)
                torch.testing.assert_close(got[i, j], mass.mean())

    @laws
    @given(seeds)
    def test_rows_hold_what_the_prompt_leaves(self, seed):
        pattern, ids = causal_pattern(seed, 3, 7, 7).double(), torch.tensor([-1, -1, 0, 0, 1, 1, 2])
        got = step_attention(pattern, ids)
        to_prompt = pattern[..., :2].sum(-1).mean(0)
        for i in range(3):
            torch.testing.assert_close(got[i].sum(), 1 - to_prompt[ids == i].mean())
        whole = step_attention(pattern, torch.tensor([0, 0, 1, 1, 2, 2, 3]))
        torch.testing.assert_close(whole.sum(-1), torch.ones(4).double())

    def test_causal_maps_are_lower_triangular(self):
        got = step_attention(causal_pattern(0, 2, 6, 6), torch.tensor([0, 0, 1, 1, 2, 2]))
        assert (got.triu(1) == 0).all()

    def test_steps_may_be_scattered(self):
        pattern = causal_pattern(0, 1, 4, 4)
        got = step_attention(pattern, torch.tensor([0, 1, 0, 1]))
        assert got[0, 1].item() == pytest.approx(pattern[0, 2, 1].item() / 2)

    def test_batch_axes_are_kept(self):
        pattern, ids = causal_pattern(0, 4, 2, 3, 6, 6), torch.tensor([0, 0, 1, 1, 2, 2])
        got = step_attention(pattern, ids)
        assert got.shape == (4, 2, 3, 3)
        torch.testing.assert_close(got[1, 1], step_attention(pattern[1, 1], ids))

    def test_bfloat16_is_measured_in_float32(self):
        pattern = causal_pattern(0, 2, 4, 4).bfloat16()
        assert step_attention(pattern, torch.tensor([0, 0, 1, 1])).dtype == torch.float32

    def test_refuses_ids_that_do_not_fit(self):
        pattern = causal_pattern(0, 2, 4, 4)
        with pytest.raises(ValueError, match="3 step ids"):
            step_attention(pattern, torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match="no token belongs"):
            step_attention(pattern, torch.full((4,), -1))
        with pytest.raises(ValueError, match=r"\[1\]"):
            step_attention(pattern, torch.tensor([0, 0, 2, 2]))


class TestCriticalSteps:
    def test_a_chain_that_skips_a_step(self):
        """3 looks at 2, 2 looks at 0; 1 is a dead end."""
        attention = torch.tensor(
            [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.8, 0.02, 0.1, 0], [0.01, 0.02, 0.9, 0.05]]
        )
        result = critical_steps(attention, top_p=0.9)
        assert result.critical.tolist() == [True, False, True, True]
        assert result.retained_fraction == 0.75
        assert result.predecessors == ((), (), (0,), (2,))

    def test_top_p_keeps_the_fewest_that_reach_the_share(self):
        attention = torch.zeros(4, 4)
        attention[3, :3] = torch.tensor([0.2, 0.5, 0.3])
        for top_p, kept in (
            (0.5, (1,)),
            (0.51, (1, 2)),
            (0.8, (1, 2)),
            (0.9, (1, 2, 0)),
            (1.0, (1, 2, 0)),
        ):
            assert critical_steps(attention, top_p=top_p).predecessors[3] == kept

    def test_steps_without_attention_are_not_kept(self):
        attention = torch.tensor([[0.5, 0, 0], [0, 0.5, 0], [0.4, 0, 0.5]])
        result = critical_steps(attention, top_p=1.0)
        assert result.critical.tolist() == [True, False, True]
        alone = critical_steps(torch.eye(3), top_p=1.0)
        assert alone.critical.tolist() == [False, False, True]
        assert alone.retained_fraction == pytest.approx(1 / 3)

    def test_only_earlier_steps_are_predecessors(self):
        """Attention of a step to itself and to later ones does not count."""
        attention = torch.tensor([[0.1, 0.9, 0.9], [0.2, 0.7, 0.9], [0.3, 0.1, 0.6]])
        assert critical_steps(attention, top_p=0.7).predecessors[2] == (0,)

    def test_another_conclusion(self):
        attention = torch.ones(4, 4).tril()
        result = critical_steps(attention, top_p=1.0, conclusion=1)
        assert result.critical.tolist() == [True, True, False, False]

    def test_ties_go_to_the_earlier_step(self):
        attention = torch.ones(4, 4).tril()
        assert critical_steps(attention, top_p=0.3).predecessors[3] == (0,)

    @laws
    @given(seeds, st.floats(0.05, 0.95))
    def test_a_larger_share_keeps_more(self, seed, top_p):
        attention = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)).tril()
        few, many = (
            critical_steps(attention, top_p),
            critical_steps(attention, min(1.0, top_p + 0.05)),
        )
        assert (few.critical <= many.critical).all()
        for step, kept in enumerate(few.predecessors):
            if kept:
                covered = attention[step, list(kept)].double()
                total = attention[step, :step].double().sum()
                assert covered.sum() >= top_p * total * (1 - 1e-6)
                assert covered[:-1].sum() < top_p * total  # The last kept one was needed.

    def test_refuses_bad_options(self):
        with pytest.raises(ValueError, match="top_p"):
            critical_steps(torch.eye(3), top_p=0.0)
        with pytest.raises(ValueError, match="conclusion"):
            critical_steps(torch.eye(3), conclusion=3)
