"""Prediction and suppression neurons: closed forms, invariances, and what is folded."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.feedforward import plain_model
from tl_loops.metrics.neurons import (
    NeuronStatistics,
    classify_neurons,
    neuron_vocabulary_statistics,
    prediction_suppression_neurons,
)

torch.set_num_threads(1)
few = settings(deadline=None, max_examples=25)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fields(statistics):
    return torch.stack([statistics.variance, statistics.skew, statistics.kurtosis])


def k_hot_unembedding(k, d_vocab, dtype=torch.float32):
    """Columns along the first axis for k ids and along the second for the rest."""
    W_U = torch.zeros(2, d_vocab, dtype=dtype)
    W_U[0, :k] = 1
    W_U[1, k:] = 1
    return W_U


@pytest.mark.parametrize("k", [1, 100, 1000, 4600, 25128])
def test_k_hot_closed_form(k):
    d_vocab = 50257
    p = k / d_vocab
    statistics = neuron_vocabulary_statistics(
        torch.tensor([[3.0, 0.0]]), k_hot_unembedding(k, d_vocab)
    )
    assert statistics.variance.item() == pytest.approx(p * (1 - p), rel=1e-4)
    assert statistics.skew.item() == pytest.approx(
        (1 - 2 * p) / math.sqrt(p * (1 - p)), rel=1e-3, abs=1e-3
    )
    assert statistics.kurtosis.item() == pytest.approx(1 / (p * (1 - p)) - 3, rel=1e-3)


@pytest.mark.parametrize(("k", "kurtosis"), [(1, 50255), (100, 500.6), (1000, 48.3), (4600, 9.0)])
def test_k_hot_published_numbers(k, kurtosis):
    statistics = neuron_vocabulary_statistics(
        torch.tensor([[1.0, 0.0]], dtype=torch.float64), k_hot_unembedding(k, 50257)
    )
    assert statistics.kurtosis.dtype == torch.float64
    assert statistics.kurtosis.item() == pytest.approx(kurtosis, rel=5e-3)


def test_isotropic_vocabulary():
    # One coordinate of a uniform unit vector in d dimensions: variance 1/d, kurtosis 3d / (d + 2).
    d_model = 16
    statistics = neuron_vocabulary_statistics(normal(3, d_model), normal(d_model, 200_000, seed=1))
    assert torch.allclose(statistics.variance, torch.tensor(1 / d_model), rtol=0.02)
    assert torch.allclose(statistics.skew, torch.tensor(0.0), atol=0.02)
    expected = torch.tensor(3 * d_model / (d_model + 2))  # not excess: 3 for wide models
    assert torch.allclose(statistics.kurtosis, expected, rtol=0.02)


def test_definition_written_out():
    W_out, W_U = normal(2, 5, 7, dtype=torch.float64), normal(7, 40, seed=1, dtype=torch.float64)
    statistics = neuron_vocabulary_statistics(W_out, W_U)
    for layer in range(2):
        for neuron in range(5):
            w = W_out[layer, neuron].numpy()
            v = [w @ u / np.linalg.norm(w) / np.linalg.norm(u) for u in W_U.numpy().T]
            z = (v - np.mean(v)) / np.std(v)
            expected = [np.var(v), np.mean(z**3), np.mean(z**4)]
            got = fields(statistics)[:, layer, neuron]
            assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64))


@few
@given(seed=st.integers(0, 10_000), d_vocab=st.integers(3, 60))
def test_sign_flip_swaps_prediction_and_suppression(seed, d_vocab):
    W_out, W_U = normal(6, 8, seed=seed), normal(8, d_vocab, seed=seed + 1)
    there = neuron_vocabulary_statistics(W_out, W_U)
    back = neuron_vocabulary_statistics(-W_out, W_U)
    assert torch.allclose(back.skew, -there.skew, rtol=1e-4, atol=1e-5)
    assert torch.allclose(back.kurtosis, there.kurtosis, rtol=1e-4)
    assert torch.allclose(back.variance, there.variance, rtol=1e-4)
    classes, flipped = classify_neurons(there, 2.5), classify_neurons(back, 2.5)
    assert torch.equal(classes.prediction, flipped.suppression)
    assert torch.equal(classes.suppression, flipped.prediction)


@few
@given(
    seed=st.integers(0, 10_000),
    neuron_scale=st.floats(1e-30, 1e30),
    column_scale=st.floats(1e-6, 1e6),
)
def test_scale_of_neurons_and_of_columns_does_not_matter(seed, neuron_scale, column_scale):
    W_out, W_U = normal(4, 8, seed=seed), normal(8, 50, seed=seed + 1)
    scales = torch.ones(50)
    scales[::3] = column_scale
    expected = neuron_vocabulary_statistics(W_out, W_U)
    scaled = neuron_vocabulary_statistics(W_out * neuron_scale, W_U * scales)
    assert torch.allclose(fields(scaled), fields(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_chunks_do_not_matter(chunk_size):
    W_out, W_U = normal(3, 7, 8), normal(8, 9000, seed=1)
    mask = torch.arange(9000) % 5 > 0
    expected = neuron_vocabulary_statistics(W_out, W_U, vocab_mask=mask)
    got = neuron_vocabulary_statistics(W_out, W_U, vocab_mask=mask, chunk_size=chunk_size)
    assert got.skew.shape == (3, 7)
    assert torch.allclose(fields(got), fields(expected), rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_does_not_grow_with_the_number_of_neurons():
    W_U = normal(4, 2000)
    with LargestTensor() as largest:
        neuron_vocabulary_statistics(normal(500, 4), W_U, chunk_size=10)
    assert largest.numel == 10 * 2000
    with LargestTensor() as largest:  # by default, 2**24 scores at a time
        neuron_vocabulary_statistics(normal(3000, 2), normal(2, 8000))
    assert 2**23 < largest.numel <= 2**24


def test_vocabulary_padding_is_excluded():
    W_out, W_U = normal(6, 8), normal(8, 50, seed=1)
    padded = torch.cat([W_U, torch.ones(8, 14)], dim=1)
    expected = fields(neuron_vocabulary_statistics(W_out, W_U))
    masked = neuron_vocabulary_statistics(W_out, padded, vocab_mask=torch.arange(64) < 50)
    assert torch.allclose(fields(masked), expected, rtol=1e-4, atol=1e-5)
    with_padding = fields(neuron_vocabulary_statistics(W_out, padded))
    assert not torch.allclose(with_padding, expected, rtol=0.05, atol=0.05)


def test_zero_neuron_is_undefined_and_in_no_class():
    W_out = normal(2, 8)
    W_out[1] = 0
    statistics = neuron_vocabulary_statistics(W_out, normal(8, 50, seed=1))
    assert fields(statistics)[:, 1].isnan().all()
    assert fields(statistics)[:, 0].isfinite().all()
    classes = classify_neurons(statistics, kurtosis_threshold=0, variance_threshold=0)
    assert not (classes.prediction | classes.suppression | classes.partition)[1]
    assert (classes.prediction | classes.suppression)[0] and classes.partition[0]


def test_equal_cosines_have_no_shape():
    # Every column is the same direction, at other lengths: rounding must not pass for skew.
    W_U = normal(64, 1) * torch.linspace(0.1, 3, 40)
    statistics = neuron_vocabulary_statistics(normal(20, 64, seed=1), W_U)
    assert (statistics.variance == 0).all()
    assert statistics.skew.isnan().all() and statistics.kurtosis.isnan().all()
    assert not classify_neurons(statistics, 0).prediction.any()


def test_zero_column_is_refused_by_id():
    W_U = normal(8, 50)
    W_U[:, 7] = 0
    with pytest.raises(ValueError, match=r"1 column\(s\), the first are \[7\].*vocab_mask"):
        neuron_vocabulary_statistics(normal(2, 8), W_U)
    without = neuron_vocabulary_statistics(normal(2, 8), W_U, vocab_mask=torch.arange(50) != 7)
    assert fields(without).isfinite().all()


def test_bad_weights_and_options_are_refused():
    W_out = normal(4, 8)
    W_out[2, 1] = float("nan")
    with pytest.raises(ValueError, match="W_out has NaN"):
        neuron_vocabulary_statistics(W_out, normal(8, 50))
    with pytest.raises(ValueError, match="no vocabulary entry"):
        neuron_vocabulary_statistics(
            normal(4, 8), normal(8, 50), vocab_mask=torch.zeros(50, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="chunk_size=0"):
        neuron_vocabulary_statistics(normal(4, 8), normal(8, 50), chunk_size=0)


def test_norm_weights_are_folded_where_they_act():
    W_out, W_U = normal(3, 5, 8), normal(8, 50, seed=1)
    gamma_final, gamma_post = normal(8, seed=2).abs(), normal(3, 8, seed=3).abs()
    folded = neuron_vocabulary_statistics(W_out, W_U, gamma_final, gamma_post)
    by_hand = neuron_vocabulary_statistics(W_out * gamma_post[:, None], W_U * gamma_final[:, None])
    assert torch.allclose(fields(folded), fields(by_hand), rtol=1e-4, atol=1e-5)
    plain = neuron_vocabulary_statistics(W_out, W_U)
    assert not torch.allclose(fields(folded), fields(plain), rtol=0.05)
    one_for_all = neuron_vocabulary_statistics(W_out, W_U, gamma_post=gamma_post[0])
    by_hand = neuron_vocabulary_statistics(W_out * gamma_post[0], W_U)
    assert torch.allclose(fields(one_for_all), fields(by_hand), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_are_measured_in_float32():
    W_out, W_U = normal(4, 8).bfloat16(), normal(8, 50, seed=1).bfloat16()
    statistics = neuron_vocabulary_statistics(W_out, W_U)
    assert statistics.kurtosis.dtype == torch.float32
    expected = neuron_vocabulary_statistics(W_out.float(), W_U.float())
    assert torch.equal(fields(statistics), fields(expected))


def test_classes_use_strict_thresholds():
    statistics = NeuronStatistics(
        variance=torch.tensor([0.005, 0.0051, 0.0, 0.0]),
        skew=torch.tensor([1.0, 1.0, -1.0, 0.0]),
        kurtosis=torch.tensor([10.0, 10.1, 11.0, 11.0]),
    )
    classes = classify_neurons(statistics)
    assert classes.prediction.tolist() == [False, True, False, False]
    assert classes.suppression.tolist() == [False, False, True, False]
    assert classes.partition.tolist() == [False, True, False, False]


def planted_model(**cfg):
    """Two physical layers: one prediction, two suppression neurons, one zero, the rest diffuse."""
    W_U = torch.cat([torch.zeros(1, 200), normal(3, 200, seed=1)])
    W_U[:, :3] = torch.tensor([1.0, 0, 0, 0])[:, None]
    up = torch.tensor([1.0, 0, 0, 0])
    diffuse = torch.tensor([0, 1.0, 0, 0])
    W_out = torch.stack(
        [
            torch.stack([up, diffuse, diffuse, torch.zeros(4)]),
            torch.stack([-up, -2 * up, diffuse, diffuse]),
        ]
    )
    return SimpleNamespace(
        cfg=SimpleNamespace(normalization_type="RMS", **cfg),
        W_out=W_out,
        W_U=W_U,
        ln_final=SimpleNamespace(w=torch.ones(4)),
    )


def test_planted_neurons_are_counted_per_physical_layer():
    result = prediction_suppression_neurons(planted_model())
    assert result.prediction_count.tolist() == [1, 0]
    assert result.suppression_count.tolist() == [0, 2]
    assert result.prediction_fraction.tolist() == [0.25, 0]
    assert result.suppression_fraction.tolist() == [0, 0.5]
    assert result.partition_count.tolist() == [3, 4]
    assert result.partition_fraction.tolist() == [0.75, 1]
    assert result.statistics.kurtosis.shape == (2, 4)
    assert result.classes.prediction[0].tolist() == [True, False, False, False]
    assert result.options["center"] is False
    assert result.options["n_vocabulary_entries"] == 200


def test_thresholds_and_vocab_size_reach_the_statistics():
    model = planted_model()
    strict = prediction_suppression_neurons(model, kurtosis_threshold=1000)
    assert strict.prediction_count.sum() == 0
    smaller = prediction_suppression_neurons(model, vocab_size=120)
    expected = neuron_vocabulary_statistics(model.W_out, model.W_U[:, :120])
    assert torch.allclose(smaller.statistics.kurtosis, expected.kurtosis, rtol=1e-4, equal_nan=True)
    assert smaller.options["n_vocabulary_entries"] == 120
    for bad in (0, 201):
        with pytest.raises(ValueError, match=f"vocab_size={bad}, expected 1 to d_vocab=200"):
            prediction_suppression_neurons(model, vocab_size=bad)


def test_final_norm_weight_is_folded_unless_switched_off():
    model = planted_model()
    model.ln_final.w = torch.tensor([1.0, 3.0, 0.2, 1.0])
    expected = neuron_vocabulary_statistics(model.W_out, model.W_U * model.ln_final.w[:, None])
    folded = prediction_suppression_neurons(model).statistics
    assert torch.allclose(fields(folded), fields(expected), rtol=1e-4, equal_nan=True)
    unfolded = prediction_suppression_neurons(model, fold_final_norm=False).statistics
    expected = neuron_vocabulary_statistics(model.W_out, model.W_U)
    assert torch.allclose(fields(unfolded), fields(expected), rtol=1e-4, equal_nan=True)


def test_scales_of_logits_are_folded_into_the_columns():
    model = planted_model()
    scale = torch.cat([torch.full((3,), -2.0), 0.5 + torch.rand(197)])
    model.unembed = SimpleNamespace(token_scale=scale)
    scaled = prediction_suppression_neurons(model, center=True).statistics
    expected = neuron_vocabulary_statistics(model.W_out, model.W_U * scale, center=True)
    assert torch.allclose(fields(scaled), fields(expected), rtol=1e-4, equal_nan=True)
    plain = neuron_vocabulary_statistics(model.W_out, model.W_U, center=True)
    assert not torch.allclose(scaled.kurtosis, plain.kurtosis, rtol=0.01, equal_nan=True)
    # A column that is turned round is written against: the planted neurons change their kind.
    result = prediction_suppression_neurons(model)
    assert result.prediction_count.tolist() == [0, 2]
    assert result.suppression_count.tolist() == [1, 0]


def test_post_norm_needs_its_weight():
    model = planted_model()
    weight = torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    result = prediction_suppression_neurons(model, fold_post_norm=True, post_norm_weight=weight)
    expected = neuron_vocabulary_statistics(model.W_out, model.W_U, gamma_post=weight)
    assert torch.allclose(fields(result.statistics), fields(expected), rtol=1e-4, equal_nan=True)
    assert result.options["fold_post_norm"] is True
    for arguments in ({"fold_post_norm": True}, {"post_norm_weight": weight}):
        with pytest.raises(ValueError, match="go together"):
            prediction_suppression_neurons(model, **arguments)


@pytest.mark.parametrize("cfg", [{"attn_only": True}, {"num_experts": 4}])
def test_models_without_dense_neurons_are_refused(cfg):
    with pytest.raises(ValueError, match="no dense MLP"):
        prediction_suppression_neurons(planted_model(**cfg))


def hooked_transformer(normalization_type):
    model = plain_model(
        n_layers=3,
        d_model=16,
        n_ctx=8,
        d_head=8,
        n_heads=2,
        d_mlp=20,
        d_vocab=60,
        act_fn="gelu",
        normalization_type=normalization_type,
        seed=0,
    )
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(normal(*parameter.shape, seed=seed))
        model.ln_final.w.abs_()
    return model


def test_plain_layernorm_model_before_and_after_weight_processing():
    model = hooked_transformer("LN")
    raw = prediction_suppression_neurons(model)
    uncentered = prediction_suppression_neurons(model, center=False)
    model.process_weights_(
        fold_ln=True,
        center_writing_weights=True,
        center_unembed=True,
        refactor_factored_attn_matrices=False,
    )
    processed = prediction_suppression_neurons(model)
    assert raw.statistics.skew.shape == (3, 20)
    assert torch.allclose(
        fields(raw.statistics), fields(processed.statistics), rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(fields(uncentered.statistics), fields(raw.statistics), rtol=0.05)
    assert raw.options["center"] and processed.options["center"]
    assert raw.options["final_norm_had_weight"]
    assert not processed.options["final_norm_had_weight"]
    assert not raw.statistics.kurtosis.requires_grad


def test_rms_model_is_not_centered():
    model = hooked_transformer("RMS")
    result = prediction_suppression_neurons(model)
    expected = neuron_vocabulary_statistics(model.W_out, model.W_U, model.ln_final.w)
    assert torch.equal(fields(result.statistics), fields(expected))
    assert result.options["center"] is False
