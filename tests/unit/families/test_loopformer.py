"""LoopFormer: a checkpoint in the released format against the published equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import attend, causal, draw, rms, write
from tests.models import tiny_config, tiny_tokens
from tl_loops import CheckpointError, ConfigError, LoopedSemanticsError, exit_curve
from tl_loops.families.loopformer import LOOPFORMER
from tl_loops.model.check import check_model
from tl_loops.model.looped import LoopedTransformer
from tl_loops.patching import activation_patch
from tl_loops.upstream import KeyValueCache

TOKENS = tiny_tokens(pos=9)
CLOSE = dict(rtol=1e-6, atol=1e-6)
D, HEADS, D_MLP, VOCAB, N_LAYER, N_CTX = 32, 4, 40, 50, 2, 24
CONFIG = dict(
    model_type="loopformer",
    block_size=N_CTX,
    vocab_size=VOCAB,
    n_layer=N_LAYER,
    n_head=HEADS,
    n_embd=D,
    dropout=0.0,
    bias=False,
    intermediate_dim=D_MLP,
)
EPS = torch.finfo(torch.float32).eps


EMBEDDERS = ("time_embedder", "dt_embedder")


def shapes(embedders=EMBEDDERS):
    found = {
        "transformer.wte.weight": (VOCAB, D),
        "transformer.wpe.weight": (N_CTX, D),
        "transformer.norm_f.weight": (D,),
    }
    for embedder in embedders:
        found |= {
            f"{embedder}.mlp.0.weight": (D, 256),
            f"{embedder}.mlp.0.bias": (D,),
            f"{embedder}.mlp.2.weight": (D, D),
            f"{embedder}.mlp.2.bias": (D,),
        }
    for layer in range(N_LAYER):
        key = f"transformer.h.blocks.{layer}"
        found |= {
            f"{key}.attn.c_attn.weight": (3 * D, D),
            f"{key}.attn.c_proj.weight": (D, D),
            f"{key}.mlp.c_fc.weight": (D_MLP, D),
            f"{key}.mlp.c_proj.weight": (D, D_MLP),
            f"{key}.adaLN_modulation.1.weight": (4 * D, D),
            f"{key}.adaLN_modulation.1.bias": (4 * D,),
        }
    return found


def embed_time(weights, embedder, t):
    freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    sinusoids = torch.cat([torch.cos(t * freqs), torch.sin(t * freqs)]).double()
    key = f"{embedder}.mlp"
    hidden = F.silu(F.linear(sinusoids, weights[f"{key}.0.weight"], weights[f"{key}.0.bias"]))
    return F.linear(hidden, weights[f"{key}.2.weight"], weights[f"{key}.2.bias"])


def of_time_and_step(weights, t, n_iterations):
    dt = 1 / n_iterations
    return embed_time(weights, "time_embedder", t * dt) + embed_time(weights, "dt_embedder", dt)


def stated(weights, tokens, n_iterations, condition=of_time_and_step):
    """The logits by the published equations, with equal steps."""
    n_pos = tokens.shape[1]
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:n_pos]
    for t in range(n_iterations):
        c = condition(weights, t, n_iterations)
        for layer in range(N_LAYER):
            w = {
                key.removeprefix(f"transformer.h.blocks.{layer}."): value
                for key, value in weights.items()
                if key.startswith(f"transformer.h.blocks.{layer}.")
            }
            mod = F.linear(F.silu(c), w["adaLN_modulation.1.weight"], w["adaLN_modulation.1.bias"])
            gate_attn, gate_mlp, scale_attn, scale_mlp = mod.chunk(4)
            read = rms(x, eps=EPS) * (1 + scale_attn)
            q, k, v = F.linear(read, w["attn.c_attn.weight"]).split(D, dim=-1)
            q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
            z = attend(q, k, v, causal(n_pos)).flatten(-2)
            x = x + gate_attn * F.linear(z, w["attn.c_proj.weight"])
            read = rms(x, eps=EPS) * (1 + scale_mlp)
            hidden = F.gelu(F.linear(read, w["mlp.c_fc.weight"]))
            x = x + gate_mlp * F.linear(hidden, w["mlp.c_proj.weight"])
    return F.linear(
        rms(x, weights["transformer.norm_f.weight"], EPS), weights["transformer.wte.weight"]
    )


@pytest.fixture
def loaded(tmp_path):
    weights = draw(shapes())
    write(tmp_path, CONFIG, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(
            tmp_path, device="cpu", dtype=torch.float64
        )
    # Eight steps of random gates amplify rounding, so that equations are compared in float64.
    return model, {key: weight.double() for key, weight in weights.items()}


def test_logits_are_those_of_the_published_equations(loaded, tmp_path):
    model, weights = loaded
    assert model.cfg.notation == "(0, 2⊗8, 0)"
    for n_iterations in (8, 1, 3):
        expected = stated(weights, TOKENS, n_iterations)
        assert_close(model(TOKENS, n_iterations=n_iterations), expected, **CLOSE)
        cached, _ = model.run_with_cache(TOKENS, n_iterations=n_iterations)
        assert_close(cached, expected, **CLOSE)
    with pytest.warns(UserWarning):
        folded = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert_close(folded(TOKENS), stated(weights, TOKENS, 8), **CLOSE)


def load(directory, config, weights):
    write(directory, config, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(
            directory, device="cpu", dtype=torch.float64
        )
    return model, {key: weight.double() for key, weight in weights.items()}


@pytest.mark.parametrize("model_type", ["tmlt", "tmlt_ee"])
def test_modulation_by_the_number_of_the_iteration_is_the_published_one(tmp_path, model_type):
    config = {**CONFIG, "model_type": model_type}
    model, weights = load(tmp_path, config, draw(shapes(("time_embedder",))))
    assert model.cfg.time_conditioning == "iteration"

    def of_iteration(weights, t, n_iterations):
        return embed_time(weights, "time_embedder", float(t))

    for n_iterations in (8, 1, 3):
        expected = stated(weights, TOKENS, n_iterations, of_iteration)
        assert_close(model(TOKENS, n_iterations=n_iterations), expected, **CLOSE)
    findings = [finding for finding in check_model(model) if finding.status == "failed"]
    assert not findings
    # An iteration does not know how many there are, so the states on the way are exits.
    curve = exit_curve(model, [TOKENS[0]], progress=False)
    for t in (0, 4):
        loss = model(TOKENS[:1], return_type="loss", n_iterations=t + 1)
        assert_close(curve.loss[t].to(loss), loss, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="tokenizer"):
        again = LoopedTransformer.from_pretrained_no_processing(
            tmp_path / "saved", device="cpu", dtype=torch.float64
        )
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", ["true", 2, "step"])
def test_other_conditions_are_refused(kind):
    with pytest.raises(ConfigError, match="time_conditioning must be one of"):
        tiny_config("weightless", n_prelude=0, time_conditioning=kind)


@pytest.mark.parametrize(
    ("prefix", "model_type"), [("", "base_loop"), ("gpt.", "base_loop"), ("", "base_loop_ee")]
)
def test_the_loop_without_modulation_is_the_published_one(tmp_path, prefix, model_type):
    wanted = {k: s for k, s in shapes().items() if "embedder" not in k and "adaLN" not in k}
    for layer in range(N_LAYER):
        wanted |= {f"transformer.h.blocks.{layer}.norm_{i}.weight": (D,) for i in (1, 2)}
    weights = draw(wanted)
    config = {**CONFIG, "model_type": model_type}
    write(tmp_path, config, {f"{prefix}{key}": weight for key, weight in weights.items()})
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(
            tmp_path, device="cpu", dtype=torch.float64
        )
    assert model.cfg.notation == "(0, 2⊗8, 0)" and not model.cfg.time_conditioning
    weights = {key: weight.double() for key, weight in weights.items()}
    for n_iterations in (8, 3):
        x = weights["transformer.wte.weight"][TOKENS] + weights["transformer.wpe.weight"][:9]
        for _ in range(n_iterations):
            for layer in range(N_LAYER):
                key = f"transformer.h.blocks.{layer}"
                read = rms(x, weights[f"{key}.norm_1.weight"], EPS)
                q, k, v = F.linear(read, weights[f"{key}.attn.c_attn.weight"]).split(D, dim=-1)
                q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
                z = attend(q, k, v, causal(9)).flatten(-2)
                x = x + F.linear(z, weights[f"{key}.attn.c_proj.weight"])
                read = rms(x, weights[f"{key}.norm_2.weight"], EPS)
                hidden = F.gelu(F.linear(read, weights[f"{key}.mlp.c_fc.weight"]))
                x = x + F.linear(hidden, weights[f"{key}.mlp.c_proj.weight"])
        x = rms(x, weights["transformer.norm_f.weight"], EPS)
        expected = F.linear(x, weights["transformer.wte.weight"])
        assert_close(model(TOKENS, n_iterations=n_iterations), expected, **CLOSE)


def test_a_repeated_head_is_accepted(tmp_path):
    weights = draw(shapes())
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    write(tmp_path, CONFIG, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(
            tmp_path, device="cpu", dtype=torch.float64
        )
    weights = {key: weight.double() for key, weight in weights.items()}
    assert_close(model(TOKENS), stated(weights, TOKENS, 8), **CLOSE)


def test_cached_decoding_padding_and_split_inputs_change_nothing(loaded):
    model, weights = loaded
    expected = stated(weights, TOKENS, 8)
    past = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    pieces = [TOKENS[:, :4], *TOKENS[:, 4:].split(1, dim=1)]
    decoded = torch.cat([model(piece, past_kv_cache=past) for piece in pieces], dim=1)
    assert_close(decoded, expected, **CLOSE)
    padded = F.pad(TOKENS, (4, 0), value=7)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    assert_close(model(padded, attention_mask=mask)[:, 4:], expected, **CLOSE)
    model.set_use_split_qkv_input(True)
    assert_close(model(TOKENS), expected, **CLOSE)
    model.set_use_split_qkv_input(False)


def test_every_promise_is_kept_and_gradients_reach_every_weight(loaded):
    model, _ = loaded
    findings = list(check_model(model))
    assert not [finding for finding in findings if finding.status == "failed"], findings
    model(TOKENS, return_type="loss").backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_starting_anywhere_is_one_pass(loaded):
    model, _ = loaded
    logits, cache = model.run_with_cache(TOKENS)
    for index in (1, 6, 15):
        assert_close(model(cache["resid_pre", index], start_at_layer=index), logits, **CLOSE)
    assert_close(model(cache["state_in", 3], start_at_iteration=3), logits, **CLOSE)


def test_an_edited_condition_acts_in_its_iteration(loaded):
    model, _ = loaded
    _, cache = model.run_with_cache(TOKENS)
    assert cache["condition", 2].shape == (2, 1, D)
    swap = [("iter.2.hook_condition", lambda c, hook: cache["condition", 5])]
    with model.hooks(swap):
        _, edited = model.run_with_cache(TOKENS)
    assert_close(edited["state_out", 1], cache["state_out", 1])
    gates = [f"iter.{t}.0.modulation.hook_attn_gate" for t in (2, 5)]
    assert_close(edited[gates[0]], cache[gates[1]])
    assert not torch.allclose(edited["state_out", 2], cache["state_out", 2], atol=1e-3)


def test_layers_sum_to_the_stream_and_finer_parts_are_refused(loaded):
    model, _ = loaded
    _, cache = model.run_with_cache(TOKENS)
    assert_close(cache.decompose_resid().sum(0), cache["resid_post", -1], **CLOSE)
    for tool in (cache.stack_head_results, cache.stack_neuron_results):
        with pytest.raises(LoopedSemanticsError, match="gated by the iteration"):
            tool()
    with pytest.raises(LoopedSemanticsError, match="scaled by the iteration"):
        model.all_composition_scores("Q")
    with pytest.raises(LoopedSemanticsError, match="scaled by the iteration"):
        model.tl_parameters()["blocks.0.attn.W_Q"]
    with pytest.raises(LoopedSemanticsError, match="know how many iterations there are"):
        exit_curve(model, [TOKENS[0]], progress=False)


def test_patching_equals_the_definition(loaded):
    model, _ = loaded
    corrupted = tiny_tokens(pos=9, seed=5)

    def metric(logits):
        return logits[:, -1, 3].mean()

    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        found = activation_patch(
            model, corrupted, cache, metric, "resid_pre", ("iteration", "layer"), progress=False
        )
        for t, layer in ((0, 0), (3, 1), (7, 1)):
            hook = (f"iter.{t}.{layer}.hook_resid_pre", lambda x, hook: cache[hook.name])
            expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[hook]))
            assert_close(found[t, layer], expected, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "'bias' is True"),
        ({"tie_word_embeddings": False}, "'tie_word_embeddings' is False"),
        ({"n_head": 5}, "multiple of 'n_head'"),
        ({"intermediate_dim": None}, "required field 'intermediate_dim' or"),
    ],
)
def test_other_mathematics_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        LOOPFORMER.config_fields({**CONFIG, **changes}, "config.json")


@pytest.mark.parametrize("changes", [dict(n_coda=1), dict(block_norm="sandwich")])
def test_conditioned_blocks_are_all_in_the_loop(changes):
    sizes = dict(n_prelude=0, n_coda=0, time_conditioning=True, injection=None)
    with pytest.raises(ConfigError, match="all in the loop"):
        tiny_config("retrofitted", **{**sizes, **changes})


def test_describe_states_the_modulation():
    text = tiny_config("weightless", n_prelude=0, time_conditioning=True).describe()
    assert "c = time(t / T) + step(1 / T)" in text
    text = tiny_config("weightless", n_prelude=0, time_conditioning="iteration").describe()
    assert "c = time(t);" in text
