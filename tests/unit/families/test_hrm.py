"""HRM and TRM: checkpoints in the released key format against the published equations."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import attend, draw, rms, rotate, write
from tests.models import tiny_config, tiny_model, tiny_tokens
from tl_loops import CheckpointError, ConfigError, LoopedSemanticsError, LoopProfile, measure
from tl_loops.families.hrm import HRM, TRM
from tl_loops.families.registry import recognise
from tl_loops.model.check import check_model
from tl_loops.model.looped import LoopedTransformer

CLOSE = dict(rtol=1e-6, atol=1e-6)
D, HEADS, VOCAB, N_PUZZLES, SEQ_LEN, D_MLP = 32, 4, 11, 3, 9, 256
COMMON = dict(
    H_cycles=2,
    L_cycles=2,
    L_layers=2,
    hidden_size=D,
    num_heads=HEADS,
    expansion=4,
    pos_encodings="rope",
    halt_max_steps=2,
    halt_exploration_prob=0.1,
    puzzle_emb_ndim=2 * D,
    vocab_size=VOCAB,
    seq_len=SEQ_LEN,
    num_puzzle_identifiers=N_PUZZLES,
)
HRM_CONFIG = dict(COMMON, H_layers=2)
TRM_CONFIG = dict(COMMON, H_layers=0, puzzle_emb_len=4, mlp_t=False)
CONFIGS = {"hrm": HRM_CONFIG, "trm": TRM_CONFIG}
PREFIX = "_orig_mod.model.inner."


def shapes(config):
    found = {
        "embed_tokens.embedding_weight": (VOCAB, D),
        "puzzle_emb.weights": (N_PUZZLES, 2 * D),
        "H_init": (D,),
        "L_init": (D,),
        "lm_head.weight": (VOCAB, D),
        "q_head.weight": (2, D),
        "q_head.bias": (2,),
    }
    for stack in ("H", "L") if config["H_layers"] else ("L",):
        for layer in range(config["L_layers"]):
            key = f"{stack}_level.layers.{layer}"
            found |= {
                f"{key}.self_attn.qkv_proj.weight": (3 * D, D),
                f"{key}.self_attn.o_proj.weight": (D, D),
                f"{key}.mlp.gate_up_proj.weight": (2 * D_MLP, D),
                f"{key}.mlp.down_proj.weight": (D, D_MLP),
            }
    return {f"{PREFIX}{key}": shape for key, shape in found.items()}


def stated(config, weights, inputs, puzzles, n_segments):
    """The output logits after some segments, by the published equations."""
    w = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    eps, length = 1e-5, config.get("puzzle_emb_len", 2)
    prefix = F.pad(w["puzzle_emb.weights"][puzzles], (0, (length - 2) * D))
    prefix = prefix.unflatten(-1, (length, D))
    x = torch.cat([prefix, w["embed_tokens.embedding_weight"][inputs]], dim=1) * D**0.5

    def level(stack, z):
        for layer in range(config["L_layers"]):
            key = f"{stack}_level.layers.{layer}"
            qkv = F.linear(z, w[f"{key}.self_attn.qkv_proj.weight"]).unflatten(-1, (3 * HEADS, -1))
            q, k, v = qkv.split(HEADS, dim=2)
            out = attend(rotate(q, 1e4), rotate(k, 1e4), v, None).flatten(-2)
            z = rms(z + F.linear(out, w[f"{key}.self_attn.o_proj.weight"]), eps=eps)
            gate, up = F.linear(z, w[f"{key}.mlp.gate_up_proj.weight"]).chunk(2, dim=-1)
            z = rms(z + F.linear(F.silu(gate) * up, w[f"{key}.mlp.down_proj.weight"]), eps=eps)
        return z

    high, low = w["H_init"].expand_as(x), w["L_init"].expand_as(x)
    slow = "H" if config["H_layers"] else "L"
    for _ in range(n_segments * config["H_cycles"]):
        for _ in range(config["L_cycles"]):
            low = level("L", low + high + x)
        high = level(slow, high + low)
    return F.linear(high, w["lm_head.weight"])[:, length:]


def tokens_of(model, inputs, puzzles, length):
    """Input tokens behind those that name the puzzle."""
    rows = VOCAB + 2 * puzzles[:, None] + torch.arange(2)
    zeros = torch.full((len(inputs), length - 2), VOCAB + model.cfg.n_extra_tokens)
    return torch.cat([rows, zeros, inputs], dim=1)


@pytest.fixture(params=CONFIGS)
def loaded(request, tmp_path):
    config = CONFIGS[request.param]
    # Larger weights make the loop chaotic, so that rounding would decide.
    weights = draw(shapes(config), scale=0.1)
    write(tmp_path, config, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(
            tmp_path, device="cpu", dtype=torch.float64
        )
    weights = {key: weight.double() for key, weight in weights.items()}
    inputs = tiny_tokens(pos=SEQ_LEN) % VOCAB
    puzzles = torch.tensor([2, 0])
    length = config.get("puzzle_emb_len", 2)
    tokens = tokens_of(model, inputs, puzzles, length)
    return config, model, weights, (inputs, puzzles), tokens, length


def test_logits_are_those_of_the_published_equations(loaded, tmp_path):
    config, model, weights, puzzle, tokens, length = loaded
    assert model.cfg.n_iterations == 2 * 2 * 3
    for segments in (2, 1, 3):
        expected = stated(config, weights, *puzzle, segments)
        logits = model(tokens, n_iterations=6 * segments)
        assert logits.shape[-1] == VOCAB
        assert_close(logits[:, length:], expected, **CLOSE)
    cached, _ = model.run_with_cache(tokens)
    assert_close(cached[:, length:], stated(config, weights, *puzzle, 2), **CLOSE)
    with pytest.warns(UserWarning):
        folded = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert_close(folded(tokens), model(tokens), **CLOSE)


def test_left_padding_changes_nothing(loaded):
    config, model, weights, puzzle, tokens, length = loaded
    padded = F.pad(tokens, (3, 0), value=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    logits = model(padded, attention_mask=mask)[:, 3 + length :]
    assert_close(logits, stated(config, weights, *puzzle, 2), **CLOSE)


def test_one_stack_or_two(loaded):
    config, model, *_ = loaded
    cycle = ("L", "L", "H")
    assert model.layout.stacks == cycle * 4
    low, high = model.blocks[0], model.blocks[model.layout.index(iteration=2, layer=0)]
    same = low.attn.W_Q is high.attn.W_Q
    assert same == (config is TRM_CONFIG) == model.cfg.shared_stacks
    assert model.cfg.n_physical_layers == (2 if same else 4)
    assert model.cfg.n_params == sum(p.numel() for p in model.parameters())


def test_what_sees_everything_is_not_decoded_token_by_token(loaded):
    _, model, _, _, tokens, _ = loaded
    settings = dict(max_new_tokens=1, stop_at_eos=False, verbose=False, do_sample=False)
    with pytest.raises(LoopedSemanticsError, match="sees every other"):
        model.generate(tokens, **settings)
    new = model.generate(tokens, use_past_kv_cache=False, **settings)[:, -1]
    assert torch.equal(new, model(tokens)[:, -1].argmax(-1))


def test_every_promise_is_kept_and_gradients_reach_every_weight(loaded):
    _, model, _, _, tokens, _ = loaded
    model(tokens).square().mean().backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    findings = [f for f in check_model(model.float()) if f.name != "gradients"]
    assert not [finding for finding in findings if finding.status == "failed"], findings


def test_a_saved_model_is_the_same(loaded, tmp_path):
    _, model, _, _, tokens, _ = loaded
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="tokenizer"):
        again = LoopedTransformer.from_pretrained_no_processing(
            tmp_path / "saved", device="cpu", dtype=torch.float64
        )
    assert torch.equal(again(tokens), model(tokens))
    profile = measure(model, list(tokens), metrics=("successive_difference",), progress=False)
    assert not profile.to_frame().empty
    profile.save(tmp_path / "profile.json")
    assert LoopProfile.load(tmp_path / "profile.json").layout == model.layout


def test_recognition_by_config_and_keys():
    assert recognise(HRM_CONFIG, "config.json", lambda: shapes(HRM_CONFIG)) is HRM
    assert recognise(TRM_CONFIG, "config.json", lambda: shapes(TRM_CONFIG)) is TRM
    nested = {"arch": HRM_CONFIG, "vocab_size": VOCAB}
    assert recognise(nested, "config.json", lambda: shapes(HRM_CONFIG)) is HRM


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (TRM, {"mlp_t": True}, "'mlp_t' is True"),
        (HRM, {"pos_encodings": "learned"}, "'pos_encodings' is 'learned'"),
        (HRM, {"H_layers": 4}, "'H_layers' is 4, which is not implemented"),
        (HRM, {"puzzle_emb_ndim": 33}, "'puzzle_emb_ndim' is 33"),
        (TRM, {"puzzle_emb_len": 1}, "'puzzle_emb_len' is 1, but"),
        (HRM, {"H_cycles": 0}, "must be at least 1"),
        (HRM, {"num_heads": 5}, "multiple of 'num_heads'"),
        (HRM, {"expansion": None}, "'expansion' must be of type float"),
        (HRM, {"seq_len": None}, "required field 'seq_len' is missing"),
    ],
)
def test_other_mathematics_is_refused_by_name(family, changes, message):
    config = HRM_CONFIG if family is HRM else TRM_CONFIG
    with pytest.raises(CheckpointError, match=message):
        family.config_fields({**config, **changes}, "config.json")


def test_pickles_are_refused_with_what_to_do(tmp_path):
    write(tmp_path, HRM_CONFIG, draw(shapes(HRM_CONFIG)))
    (tmp_path / "model.safetensors").rename(tmp_path / "step_100.pt")
    with pytest.raises(
        CheckpointError, match=r"only as step_100\.pt.*safetensors\.torch\.save_file"
    ):
        LoopedTransformer.from_pretrained(tmp_path)


def test_a_model_may_read_its_last_block_out_as_it_is():
    model = tiny_model("retrofitted", final_norm=False)
    tokens = tiny_tokens()
    logits, cache = model.run_with_cache(tokens)
    assert_close(logits, cache["resid_post", -1] @ model.W_U)
    attributions = cache.logit_attrs(cache.decompose_resid(), 3).sum(0)
    assert_close(attributions, logits[..., 3], rtol=1e-4, atol=1e-5)
    assert "logits = x W_U" in model.cfg.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shared_stacks=True), "shared_stacks and slow_injection need stacks"),
        (dict(final_norm=False, norm_before_coda=True), "final_norm=False excludes"),
        (dict(n_extra_tokens=3, extra_token_slices=2), "must be a multiple of"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("retrofitted", **changes)
