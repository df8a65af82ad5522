"""Dory: checkpoints in the format of transformers against its equations in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import attend, draw, rotate, write
from tests.models import tiny_tokens
from tl_loops import CheckpointError, LoopedSemanticsError
from tl_loops.circuits import EdgeGraph
from tl_loops.lens import coda_lens, logit_lens
from tl_loops.model.check import check_model
from tl_loops.model.looped import LoopedTransformer
from tl_loops.patching import activation_patch

TOKENS = tiny_tokens(pos=9)
CLOSE = dict(rtol=1e-5, atol=1e-5)
D, E, HEADS, KV_HEADS, D_MLP, VOCAB, UNIT, ALPHA = 32, 8, 4, 2, 40, 50, 0.05, 0.2
S, FULL = "sliding_attention", "full_attention"
CONFIG = dict(
    model_type="dory",
    vocab_size=VOCAB,
    hidden_size=D,
    intermediate_size=D_MLP,
    num_hidden_layers=5,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=E,
    max_position_embeddings=64,
    initializer_range=UNIT,
    ngpt_alpha_init=ALPHA,
    sliding_window=3,
    layer_types=[S, FULL, S, FULL, S],
    n_input_layers=2,
    n_output_layers=1,
    n_recurrent_loops=3,
    rope_parameters={
        S: dict(rope_type="default", rope_theta=100.0),
        FULL: dict(rope_type="default", rope_theta=5000.0),
    },
)
KINDS = {
    "both kinds of layers": {},
    "tied": dict(tie_word_embeddings=True),
    "windows everywhere": dict(layer_types=[S] * 5),
    "no window": dict(layer_types=[FULL] * 5),
    "one loop": dict(n_recurrent_loops=1),
    "no layer before the loop": dict(n_input_layers=0),
    "attentions and MLPs counted apart": dict(
        layer_types=[kind for k in (S, FULL, S, FULL, S) for kind in (k, "mlp")],
        num_hidden_layers=10,
        n_input_layers=4,
        n_recurrent_layers=4,
        n_output_layers=2,
    ),
}


def shapes(config):
    q, kv = HEADS * E, KV_HEADS * E
    found = {"model.embed_tokens.weight": (VOCAB, D), "lm_head.logit_scale": (VOCAB,)}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (VOCAB, D)
    for layer in range(5):
        key = f"model.layers.{layer}"
        found |= {
            f"{key}.self_attn.q_proj.weight": (q, D),
            f"{key}.self_attn.k_proj.weight": (kv, D),
            f"{key}.self_attn.v_proj.weight": (kv, D),
            f"{key}.self_attn.gate_proj.weight": (q, D),
            f"{key}.self_attn.o_proj.weight": (D, q),
            f"{key}.self_attn.sqk": (q,),
            f"{key}.self_attn.s_gate": (q,),
            f"{key}.mlp.gate_proj.weight": (D_MLP, D),
            f"{key}.mlp.up_proj.weight": (D_MLP, D),
            f"{key}.mlp.down_proj.weight": (D, D_MLP),
            f"{key}.mlp.suv_gate": (D_MLP,),
            f"{key}.mlp.suv_up": (D_MLP,),
            f"{key}.lambda_1": (D,),
            f"{key}.lambda_2": (D,),
        }
    return found


def drawn(config):
    """Random weights; scales around their units, some of them negative."""
    weights = draw(shapes(config))
    for key, weight in weights.items():
        if not key.endswith("weight"):
            unit = 1.0 if "suv" in key else UNIT
            weights[key] = unit * (1 + 2 * weight)
    weights["lm_head.logit_scale"] *= 5
    return weights


def sphere(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


class Stated:
    """The published model in plain torch, with layers counted once."""

    def __init__(self, config, weights):
        self.cfg, self.w = config, weights
        self.kinds = [kind for kind in config["layer_types"] if kind != "mlp"]

    def linear(self, x, key):
        return F.linear(x, self.w[f"{key}.weight"])

    def attention(self, number, x):
        key, kind = f"model.layers.{number}.self_attn", self.kinds[number]
        q, k, v = (self.linear(x, f"{key}.{n}_proj").unflatten(-1, (-1, E)) for n in "qkv")
        base = self.cfg["rope_parameters"][kind]["rope_theta"]
        q, k = rotate(sphere(q), base), rotate(sphere(k), base)
        q = q * (self.w[f"{key}.sqk"] * E**0.5 / UNIT).square().view(HEADS, E)
        age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        allowed = age >= 0
        if kind == S:
            allowed = allowed & (age < self.cfg["sliding_window"])
        z = attend(q, k, v, allowed).flatten(-2)
        logits = self.linear(x, f"{key}.gate_proj")
        z = z * torch.sigmoid(logits * (self.w[f"{key}.s_gate"] * D**0.25 / UNIT).square())
        return self.linear(sphere(z), f"{key}.o_proj")

    def mlp(self, number, x):
        key = f"model.layers.{number}.mlp"
        gate = self.linear(x, f"{key}.gate_proj") * self.w[f"{key}.suv_gate"] * D**0.5
        up = self.linear(x, f"{key}.up_proj") * self.w[f"{key}.suv_up"] * D**0.5
        return self.linear(sphere(F.silu(gate) * up), f"{key}.down_proj")

    def layers(self, first, last, x):
        for number in range(first, last):
            for branch, rate in ((self.attention, "lambda_1"), (self.mlp, "lambda_2")):
                x = sphere(x)
                r = (self.w[f"model.layers.{number}.{rate}"] * ALPHA / UNIT).abs()
                x = (1 - r) * x + r * sphere(branch(number, x))
        return x

    def __call__(self, tokens):
        halves = 2 if "mlp" in self.cfg["layer_types"] else 1
        begin = self.cfg["n_input_layers"] // halves
        end = 5 - self.cfg["n_output_layers"] // halves
        x = self.layers(0, begin, self.w["model.embed_tokens.weight"][tokens])
        e = sphere(x)
        for _ in range(self.cfg["n_recurrent_loops"]):
            x = self.layers(begin, end, sphere(x) + e)
        x = sphere(self.layers(end, 5, x))
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return F.linear(x, head) * self.w["lm_head.logit_scale"] / UNIT


def load(directory, config, weights, **options):
    write(directory, config, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(
            directory, device="cpu", **{"dtype": torch.float64, **options}
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("dory"), CONFIG, drawn(CONFIG))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_published_equations(kind, tmp_path):
    config = {**CONFIG, **KINDS[kind]}
    weights = drawn(config)
    model = load(tmp_path, config, weights)
    expected = Stated(config, {key: w.double() for key, w in weights.items()})(TOKENS)
    assert expected.std() > 0.05
    assert_close(model(TOKENS), expected, **CLOSE)
    cached, _ = model.run_with_cache(TOKENS)
    assert_close(cached, expected, **CLOSE)
    past, pieces = model.make_kv_cache(2), [TOKENS[:, :4], *TOKENS[:, 4:].split(1, dim=1)]
    decoded = torch.cat([model(piece, past_kv_cache=past) for piece in pieces], dim=1)
    assert_close(decoded, expected, **CLOSE)


def test_generation_with_and_without_a_cache(model):
    greedy = dict(max_new_tokens=8, do_sample=False, verbose=False, return_type="tokens")
    greedy["stop_at_eos"] = False
    prompt = TOKENS[:, :5]
    text = model.generate(prompt, **greedy)
    for _ in range(8):
        following = model(prompt)[:, -1].argmax(-1, keepdim=True)
        prompt = torch.cat([prompt, following], dim=1)
    assert torch.equal(text, prompt)
    assert torch.equal(model.generate(TOKENS[:, :5], use_past_kv_cache=False, **greedy), prompt)


def test_every_promise_is_kept_and_gradients_reach_every_weight(tmp_path):
    model = load(tmp_path, CONFIG, drawn(CONFIG), dtype=torch.float32)
    assert not [finding for finding in check_model(model) if finding.status == "failed"]
    model(TOKENS, return_type="loss").backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_decompositions_sum_to_the_stream_at_every_place(model):
    _, cache = model.run_with_cache(TOKENS)
    depth = model.cfg.n_layers
    for layer in range(1, depth + 1):
        stream = cache["resid_pre", layer] if layer < depth else cache["resid_post", depth - 1]
        for shown in ("whole", "parts", "by_iteration"):
            assert_close(cache.decompose_resid(layer, injection=shown).sum(0), stream, **CLOSE)
        apart = cache.get_full_resid_decomposition(layer, expand_neurons=True)
        assert_close(apart.sum(0), stream, **CLOSE)


def test_the_normed_injection_alone_is_what_enters_an_iteration(model):
    fired = []
    _, cache = model.run_with_cache(TOKENS)
    e = cache["hook_injection"]
    names = ["ln_injection.hook_scale", "iter.1.ln_state.hook_scale"]
    with model.hooks(fwd_hooks=[(name, lambda x, hook: fired.append(hook.name)) for name in names]):
        term = model.injection.prepare(e)
        for t in range(3):
            s = cache["state_in", t]
            entered = model.injection(s, term)
            assert_close(entered, sphere(s) + sphere(e), **CLOSE)
            assert_close(entered, cache["injected", t], **CLOSE)
            scale = (s.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            assert_close(cache[f"iter.{t}.ln_state.hook_scale"], scale, **CLOSE)
        assert not fired  # the hook points are those of a run
        model(TOKENS)
    assert fired == names


def test_the_unembedding_is_the_stored_weight_and_readouts_hold_the_scales(model):
    logits, cache = model.run_with_cache(TOKENS)
    assert model.W_U is model.unembed.W_U
    scale = model.unembed.token_scale
    assert (scale < 0).any() and (scale > 0).any()
    read = cache["ln_final.hook_normalized"] @ model.W_U
    assert_close(read * scale, logits, **CLOSE)
    assert not torch.allclose(read, logits, rtol=0.1)
    # Attribution: components sum to the logit, and to the difference of two.
    answer, other = TOKENS, TOKENS.flip(1)
    parts = cache.decompose_resid()
    taken = logits.gather(-1, answer[..., None])[..., 0]
    assert_close(cache.logit_attrs(parts, answer).sum(0), taken, **CLOSE)
    against = taken - logits.gather(-1, other[..., None])[..., 0]
    assert_close(cache.logit_attrs(parts, answer, other).sum(0), against, **CLOSE)
    for token in (7, torch.tensor(7), torch.tensor([7])):
        assert_close(model.tokens_to_residual_directions(token), model.W_U[:, 7] * scale[7])
    # Lenses end at the logits.
    for lens in (logit_lens, coda_lens):
        assert_close(lens(model, TOKENS, keep_logits=True).logits[-1], logits, **CLOSE)
    rows = cache.accumulated_resid(apply_ln=True)
    assert_close(rows[-1] @ model.W_U * scale, logits, **CLOSE)
    # Weights with what stands next to them.
    effective = model.tl_parameters()["unembed.W_U"]
    x = cache["resid_post", -1] / cache["ln_final.hook_scale"]
    assert_close(x @ effective, logits, **CLOSE)


def test_patching_everything_gives_the_clean_logits(model):
    clean, cache = model.run_with_cache(TOKENS)
    cells = activation_patch(
        model,
        TOKENS.flip(1),
        cache,
        lambda logits: logits[0, -1, 3],
        activation="resid_pre",
        axes=("block",),
        progress=False,
    )
    before, target = model(TOKENS.flip(1))[0, -1, 3], clean[0, -1, 3]
    assert not torch.allclose(before, target, rtol=0.1)
    assert_close(cells[[0, 1, -1]], target.expand(3), **CLOSE)
    # Within the loop e enters again, which is still that of the other tokens.
    assert not torch.allclose(cells[2], target, rtol=1e-3)


def test_a_saved_model_is_the_loaded_one(tmp_path):
    model = load(tmp_path, CONFIG, drawn(CONFIG), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="tokenizer"):
        again = LoopedTransformer.from_pretrained_no_processing(tmp_path / "saved", device="cpu")
    assert again.cfg == model.cfg
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_what_is_not_exact_raises(model):
    with pytest.raises(LoopedSemanticsError, match="leave out split_qkv"):
        EdgeGraph.of(model, heads=True, split_qkv=True)
    with pytest.raises(LoopedSemanticsError, match="coda stands between"):
        model(TOKENS, exit_at=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(recurrent_kv_cache_mode="first_loop"), "must be one of 'per_loop', 'last_loop'"),
        (dict(layer_types=[S] * 4), "for each of 5 layers"),
        (dict(layer_types=["chunked_attention"] * 5), "must name 'sliding_attention' or"),
        (dict(layer_types="all"), "must be a list"),
        (dict(layer_types=[S, "mlp"] * 2 + [S]), "an attention and an 'mlp' in turn"),
        (dict(n_output_layers=3), "with at least 1 in the loop"),
        (dict(n_recurrent_layers=1), "must be 5 in all"),
        (dict(sliding_window=0), "sliding_window"),
        (dict(ngpt_alpha_init=0.0), "ngpt_alpha_init"),
        (dict(rope_parameters={S: dict(rope_type="default", rope_theta=1e4)}), "rope_parameters"),
    ],
)
def test_what_the_family_does_not_know_raises(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        LoopedTransformer.from_pretrained(write(tmp_path, {**CONFIG, **changes}, {}))


def test_scaled_rotation_raises(tmp_path):
    scaled = copy.deepcopy(CONFIG)
    scaled["rope_parameters"][FULL] |= dict(rope_type="yarn")
    with pytest.raises(CheckpointError, match="rope_type 'yarn', which is not implemented"):
        LoopedTransformer.from_pretrained(write(tmp_path, scaled, {}))
