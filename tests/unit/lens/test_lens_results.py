"""Results of lenses: arrangement by iteration, flips, tracking of entities, fidelity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close as close
from tests.models import tiny_model, tiny_tokens
from tl_loops.lens import (
    EntityTracks,
    adjacent_agreement,
    coda_lens,
    logit_kurtosis,
    logit_lens,
    participation_ratio,
    rank_jumps,
    track_entities,
    transport_similarity,
)
from tl_loops.lens.points import select_points
from tl_loops.metrics.readout import token_probability, token_rank

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("huginn", initializer_range=0.15)


@pytest.fixture
def tokens():
    return tiny_tokens()


# --- by iteration ---


def test_core_points_by_iteration_are_a_grid(model, tokens):
    result = logit_lens(model, tokens)
    grid = result.by_iteration(result.entropy)
    assert grid.shape == (3, 2, 2, 9)
    for t in range(3):
        for layer in range(2):
            index = result.index(f"iter.{t}.{layer}.hook_resid_post")
            assert index == result.index(f"r{t}.{layer}")
            close(grid[t, layer], result.entropy[index])
    close(grid, model.layout.by_iteration(result.entropy))


def test_states_by_iteration_have_no_layer(model, tokens):
    result = coda_lens(model, tokens)
    close(result.by_iteration(result.entropy), result.entropy)


def test_flips_and_saturation_are_those_of_the_predictions(model, tokens):
    result = logit_lens(model, tokens, points="core", n_iterations=6)
    predictions = model.layout.with_iterations(6)
    top = result.predictions.reshape(6, predictions.n_core, 2, 9)
    assert torch.equal(result.answer_flips(), (top[1:] != top[:-1]).sum(0))
    saturation = result.saturation_iteration()
    for t in range(6):
        stays = (top[t:] == top[-1]).all(0)
        assert torch.equal(stays, saturation <= t)


def test_mixed_points_have_no_grid(model, tokens):
    points = ["iter.0.0.hook_resid_post", "iter.1.1.hook_resid_post"]
    with pytest.raises(ValueError, match=r"r0\.0, r1\.1"):
        logit_lens(model, tokens, points=points).answer_flips()
    with pytest.raises(ValueError, match="expected 2"):
        logit_lens(model, tokens, points=points).by_iteration(torch.zeros(3))


def test_a_point_that_was_not_read_has_no_index(model, tokens):
    with pytest.raises(KeyError, match="it read at r0, r1, r2"):
        coda_lens(model, tokens).index("r3")


def test_agreement_counts_the_models_own_prediction(model, tokens):
    result = logit_lens(model, tokens, top_k=4, track={"answer": 0})
    assert result.agreement()[-1].all()
    assert torch.equal(result.agreement(), result.predictions == model(tokens).argmax(-1))
    for k in (2, 4):
        assert (result.agreement(k) >= result.agreement(k - 1)).all()
        in_top = (result.top_tokens[..., :k] == result.final_predictions.unsqueeze(-1)).any(-1)
        assert torch.equal(result.agreement(k), in_top)
    with pytest.raises(ValueError, match="top_k=5"):
        result.agreement(5)


# --- entities ---


def test_entities_are_followed_at_their_own_positions(model, tokens):
    tracks = track_entities(
        model,
        tokens,
        {"bridge": torch.tensor([3, 4]), "target": 9},
        positions={"bridge": torch.tensor([[2], [5]])},
        lens=None,
        points="states",
    )
    logits = coda_lens(model, tokens, keep_logits=True).logits
    assert tracks.positions.tolist() == [[2, 5], [8, 8]]
    assert tracks.lens == "coda" and tracks.labels == ["r0", "r1", "r2"]
    assert torch.equal(tracks.rank[0, :, 0], token_rank(logits[:, 0, 2], 3))
    assert torch.equal(tracks.rank[0, :, 1], token_rank(logits[:, 1, 5], 4))
    close(tracks.probability[1], token_probability(logits[:, :, -1], 9))


def test_entities_at_the_last_token_of_a_padded_prompt(model):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    tracks = track_entities(model, tiny_tokens(pos=4), {"a": 3}, attention_mask=mask)
    assert tracks.positions.tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("entities", "positions", "message"),
    [
        ({}, None, "entities is empty"),
        ({"a": 3}, {"b": 1}, "positions names 'b'"),
        ({"a": 3}, {"a": [1, 2]}, "one per prompt, got 2"),
        ({"a": 3}, {"a": 99}, "9 positions"),
        ({"a": 99}, None, "tracked 'a'"),
    ],
)
def test_bad_entities_are_refused(model, tokens, entities, positions, message):
    with pytest.raises(ValueError, match=message):
        track_entities(model, tokens, entities, positions=positions)


def tracks_of(model, ranks):
    """Tracks with given ranks [entity][point][batch]."""
    rank = torch.tensor(ranks)
    points = select_points(model, "blocks")[: rank.shape[1]]
    names = ("bridge", "answer")[: rank.shape[0]]
    nowhere = torch.zeros(rank.shape[0], rank.shape[2], dtype=torch.long)
    return EntityTracks(names, "coda", points, nowhere, rank, rank / rank.max())


def test_trajectories_that_cross(model):
    bridge = [[5, 1, 9], [2, 1, 1], [1, 1, 2], [4, 1, 3]]
    answer = [[9, 2, 1], [7, 2, 5], [3, 2, 1], [1, 2, 4]]
    tracks = tracks_of(model, [bridge, answer])
    # Prompt 0: the answer passes the bridge in the last step; 1: never; 2: it loses its lead.
    assert tracks.leads_from("answer", "bridge").tolist() == [3, -1, -1]
    assert tracks.leads_from("bridge", "answer").tolist() == [-1, 0, 3]
    assert tracks.first_point().tolist() == [[2, 0, 1], [3, -1, 0]]
    assert tracks.first_point(max_rank=2).tolist() == [[1, 0, 1], [3, 0, 0]]
    close(tracks.accuracy()[0], torch.tensor([1 / 3, 2 / 3, 2 / 3, 1 / 3]))
    expected = math.log10(5 * 1 * 9) / 3
    assert tracks.mean_log_rank()[0, 0].item() == pytest.approx(expected)
    with pytest.raises(KeyError, match="bridge, answer"):
        tracks.leads_from("answer", "question")


def test_a_tie_is_no_lead(model):
    tracks = tracks_of(model, [[[3], [2]], [[3], [2]]])
    assert tracks.leads_from("answer", "bridge").tolist() == [-1]


def test_rank_jumps_are_decades():
    ranks = torch.tensor([[1, 10], [100, 10], [10, 1000]])
    close(rank_jumps(ranks), torch.tensor([[2.0, 0.0], [1.0, 2.0]]))
    assert rank_jumps(ranks[:1]).shape == (0, 2)
    with pytest.raises(ValueError, match="count from 1"):
        rank_jumps(torch.tensor([0, 1]))


# --- fidelity ---


def test_similarity_of_transports():
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    other = torch.zeros(4, 4)
    other[0, 1], other[1, 0] = a[1, 0], -a[0, 1]
    similarity = transport_similarity(torch.stack([a, 3 * a, -a, other]))
    close(similarity[0], torch.tensor([1.0, 1.0, -1.0, 0.0]), atol=1e-6, rtol=0)
    close(similarity, similarity.T)
    assert transport_similarity(torch.zeros(1, 2, 2)).isnan().all()


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 5), scale=st.floats(1e-3, 1e3))
def test_participation_ratio_counts_equal_singular_values(rank, scale):
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(rank)).double()).Q
    matrix = scale * q[:, :rank] @ q[:, :rank].T
    assert participation_ratio(matrix).item() == pytest.approx(rank)


def test_kurtosis_of_logits():
    logits = torch.randn(3, 40000, generator=torch.Generator().manual_seed(0))
    assert logit_kurtosis(logits).abs().max() < 0.2
    # One of V ids stands out: 1 / (p (1 - p)) - 6 with p = 1 / V (as an excess).
    one = torch.zeros(100)
    one[7] = 5.0
    assert logit_kurtosis(one).item() == pytest.approx(1 / (0.01 * 0.99) - 6, rel=1e-4)
    two_sided = torch.tensor([1.0, -1.0, 50.0])
    assert logit_kurtosis(two_sided, 2).item() == pytest.approx(-2.0)


def test_agreement_of_neighbours():
    assert adjacent_agreement(torch.tensor([[1, 1, 2, 2, 2], [1, 2, 3, 4, 5]])).tolist() == [
        0.75,
        0.0,
    ]
    assert adjacent_agreement(torch.tensor([3])).isnan()
