"""Directions between two sets of prompts, and probes of pairs."""

import pytest
import torch

from tests.closeness import assert_close
from tests.models import tiny_model, tiny_tokens
from tl_loops import steering
from tl_loops.probes import (
    ConceptDirections,
    FlipTest,
    PairProbes,
    PromptStates,
    concept_directions,
    flip_test,
    gather_states,
    pair_probes,
    task_probes,
)

torch.set_num_threads(1)

N, WIDTH = 60, 8


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_sets(distance=4.0):
    """Positive and negative states, apart along axis t at iteration t."""
    positive, negative = randn(0, 3, 2, N, WIDTH), randn(1, 3, 2, N, WIDTH)
    for t in range(3):
        positive[t, ..., t] += distance
    return PromptStates.of(positive), PromptStates.of(negative)


@pytest.mark.parametrize("by", ["means", "probe"])
def test_sets_that_are_apart_are_separated_along_their_axis(by):
    found = concept_directions(*two_sets(), by=by)
    assert found.auc.min() > 0.98 and found.p_value.max() == 1 / 51
    assert found.null_auc.shape == (50, 3, 2)
    assert abs(float(found.null_auc.mean()) - 0.5) < 0.05
    if by == "means":  # the weight of a probe shrinks where the sets lie far apart
        assert (found.norm > 2 * found.null_norm.mean(0)).all()
    for t in range(3):
        assert found.vectors[t].abs().argmax(-1).tolist() == [t, t]
    cosine = found.cosine
    assert_close(cosine.diagonal(dim1=1, dim2=2), torch.ones(2, 3).double())
    assert_close(cosine, cosine.mT)
    assert cosine[:, 0, 1].abs().max() < 0.5


def test_the_mean_difference_is_that_of_the_fitted_prompts():
    positive, negative = two_sets()
    train = torch.arange(2 * N) % 3 != 0
    found = concept_directions(positive, negative, train=train)
    a, b = positive.values[:, :, train[:N]], negative.values[:, :, train[N:]]
    assert_close(found.vectors, a.mean(2) - b.mean(2))
    assert (found.n_train, found.n_held_out) == (80, 40)
    back = concept_directions(negative, positive, train=torch.cat([train[N:], train[:N]]))
    assert_close(back.vectors, -found.vectors)
    assert_close(back.auc, found.auc)


def test_no_difference_is_no_direction():
    positive, _ = two_sets()
    even = torch.arange(2 * N) % 2 == 0
    with pytest.raises(ValueError, match="the same at every place"):
        concept_directions(positive, positive, train=even)
    # At one place alone it is a zero vector, of which nothing is said.
    values = positive.values.clone()
    values[1] += 5.0
    found = concept_directions(PromptStates.of(values), positive, train=even)
    assert not found.vectors[0].any() and (found.auc[0] == 0.5).all()
    assert found.cosine[:, 0].isnan().all() and not found.cosine[:, 1, 1].isnan().any()
    assert found.auc[1].min() > 0.9


def test_sets_of_one_kind_are_not_separated():
    noise = randn(2, 1, 1, 800, 4)
    found = concept_directions(*(PromptStates.of(x) for x in noise.split(400, dim=2)))
    assert abs(float(found.auc) - 0.5) < 0.1 and float(found.p_value) > 0.02


def test_directions_steer_and_are_those_of_caches():
    model = tiny_model("retrofitted")
    tokens = [tiny_tokens(6, 7, seed=seed) for seed in (1, 2)]
    sets = [gather_states(model, list(t), "resid_post", progress=False) for t in tokens]
    train = torch.tensor([True] * 5 + [False]).repeat(2)
    found = concept_directions(*sets, train=train, n_shuffles=2)
    with torch.no_grad():
        caches = [model.run_with_cache(t[:5])[1] for t in tokens]
    expected = steering.difference_directions(model, *caches, "resid_post")
    assert_close(found.vectors, expected, rtol=1e-4, atol=1e-5)

    hooks = steering.steer(model, found.vectors, "resid_post", scale=2.0)
    steered = {}
    hooks += [(name, lambda x, hook: steered.update({hook.name: x})) for name, _ in hooks[:1]]
    with torch.no_grad():
        model.run_with_hooks(tokens[0], fwd_hooks=hooks)
    name = hooks[0][0]
    assert_close(steered[name], caches_of(model, tokens[0])[name] + 2 * found.vectors[0, 0])
    states = gather_states(model, list(tokens[0]), "state_out", progress=False)
    other = gather_states(model, list(tokens[1]), "state_out", progress=False)
    loop = concept_directions(states, other, n_shuffles=2)
    assert len(steering.steer(model, loop.vectors, "state_out")) == model.cfg.n_iterations


def caches_of(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def test_tables_files_and_what_raises(tmp_path):
    positive, negative = two_sets()
    found = concept_directions(positive, negative, n_shuffles=5)
    frame = found.to_frame()
    assert frame["auc"].tolist() == found.auc.flatten().tolist() and len(frame) == 6
    found.save(tmp_path / "directions")
    loaded = ConceptDirections.load(tmp_path / "directions")
    assert torch.equal(loaded.vectors, found.vectors) and loaded.by == "means"
    assert loaded.points == found.points and len(repr(found)) < 600
    with pytest.raises(ValueError, match="by must be"):
        concept_directions(positive, negative, by="pca")
    with pytest.raises(ValueError, match="positive has activation state, but negative has other"):
        concept_directions(positive, PromptStates.of(negative.values, "other"))
    with pytest.raises(ValueError, match="is 8 wide, but negative 5"):
        concept_directions(positive, PromptStates.of(negative.values[..., :5]))
    with pytest.raises(ValueError, match="class True has a single prompt"):
        concept_directions(positive.rows([0]), negative)


# --- pairs ---------------------------------------------------------------------------------------


def relational():
    """The preferred one is further along an axis than its partner, wherever the pair stands."""
    place = 20 * randn(3, 1, 1, 200, 1) * torch.eye(WIDTH)[0]
    better, worse = randn(4, 1, 1, 200, WIDTH), randn(5, 1, 1, 200, WIDTH)
    better[..., 0] += 8
    return PromptStates.of(better + place), PromptStates.of(worse + place)


def test_a_relation_is_read_from_differences_and_not_from_one_state():
    better, worse = relational()
    found = pair_probes(better, worse)
    assert float(found.accuracy) > 0.97
    assert abs(float(found.probes.control) - 0.5) < 0.08
    both = PromptStates.of(torch.cat([better.values, worse.values], dim=2))
    alone = task_probes(both, [1] * 200 + [0] * 200)
    assert float(alone.accuracy) < 0.75
    # A linear probe of differences is antisymmetric but for its bias.
    assert_close(found.flips.antisymmetry, torch.ones(1, 1).double())
    assert found.flips.flip_rate.min() > 0.95
    frame = found.to_frame()
    assert frame["flip_rate"].tolist() == found.flips.flip_rate.flatten().tolist()


def test_pairs_and_flip_tests_are_saved(tmp_path):
    found = pair_probes(*relational(), n_shuffles=2)
    found.save(tmp_path / "pairs")
    found.flips.save(tmp_path / "flips")
    loaded, flips = PairProbes.load(tmp_path / "pairs"), FlipTest.load(tmp_path / "flips")
    for part, expected in (
        (loaded.probes, found.probes),
        (loaded.flips, found.flips),
        (flips, found.flips),
    ):
        for name, value in vars(expected).items():
            again = getattr(part, name)
            assert torch.equal(again, value) if isinstance(value, torch.Tensor) else again == value
    assert loaded.to_frame().equals(found.to_frame())
    alone = flip_test(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, 1.0, 2.0]))
    alone.save(tmp_path / "flips")  # of one scorer: no axes
    assert torch.equal(FlipTest.load(tmp_path / "flips").bias, alone.bias)
    with pytest.raises(ValueError, match="holds 'flip_test', expected 'pair_probes'"):
        PairProbes.load(tmp_path / "flips")


def test_the_flip_test_of_scorers_that_are_known():
    a, b = randn(6, 4, 50), randn(7, 4, 50)
    exact = flip_test(a - b, b - a)
    assert (exact.flip_rate == 1).all() and nearly(exact.antisymmetry, 1.0)
    assert not exact.bias.any()
    biased = flip_test(a - b + 100, b - a + 100)
    assert (biased.flip_rate == 0).all() and nearly(biased.antisymmetry, 1.0)
    assert nearly(biased.bias, 100.0)
    first_alone = flip_test(a, b)  # looks at the first only
    assert first_alone.antisymmetry.abs().max() < 0.5
    same = flip_test(a + b, b + a)  # does not look at the order
    assert nearly(same.antisymmetry, -1.0) and not same.flip_rate.any()
    assert flip_test(torch.ones(5), -torch.ones(5)).antisymmetry.isnan()
    with pytest.raises(ValueError, match="at least one pair"):
        flip_test(a, b[:, :-1])


def nearly(values, expected):
    return bool(((values - expected).abs() <= 1e-5 * max(1.0, abs(expected))).all())


def test_pairs_that_do_not_fit():
    better, worse = relational()
    with pytest.raises(ValueError, match="got 200 preferred states but 199 others"):
        pair_probes(better, worse.rows(range(199)))
    with pytest.raises(ValueError, match="expected at least 4"):
        pair_probes(better.rows([0, 1]), worse.rows([0, 1]))
