"""What HookedTransformer gives a looped model by inheritance is right, or refused."""

import warnings
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, VARIATIONS, any_model, tiny_config, tiny_model, tiny_tokens
from tl_loops import HookNameError, LoopedSemanticsError, LoopedTransformer
from tl_loops.upstream import KeyValueCache

TOKENS = tiny_tokens()
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[*ARCHITECTURES, *VARIATIONS], scope="module")
def model(request):
    return any_model(request.param)


@pytest.fixture(scope="module")
def speaking():
    """A model with a tokenizer of its own making."""
    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    return LoopedTransformer(tiny_config("layer_norm"), tokenizer=fast).eval()


def blank(model):
    """A model of the same architecture with other weights."""
    other = LoopedTransformer(model.cfg)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(9))
    return other.eval()


def load(model, state_dict, **flags):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.load_and_process_state_dict(state_dict, **flags)


# State dicts.


@pytest.mark.parametrize("kind", ["state_dict", "physical_state_dict"])
def test_loading_and_processing_keeps_the_logits(model, kind):
    other = blank(model)
    assert not torch.allclose(other(TOKENS), model(TOKENS))
    load(other, getattr(model, kind)())
    assert_close(other(TOKENS), model(TOKENS), **CLOSE)
    if model.cfg.norm_has_weight and model.cfg.normalization_type == "RMS":
        if model.cfg.block_norm != "post_branch":
            assert torch.equal(other.blocks[0].ln1.w, torch.ones(model.cfg.d_model))


def test_a_state_dict_of_other_iterations_loads(model):
    other = blank(model)
    with model.iterations(5):
        load(other, model.state_dict(), fold_ln=False, fold_value_biases=False)
    assert other.cfg.n_iterations == model.cfg.n_iterations
    assert_close(other(TOKENS), model(TOKENS))


def test_weights_that_differ_between_iterations_are_refused():
    model = tiny_model("retrofitted")
    before = model(TOKENS)
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_dict["blocks.3.attn.W_O"] += 1.0
    with pytest.raises(ValueError, match=r"blocks\.3\.attn\.W_O differs from blocks\.1\.attn"):
        load(model, state_dict)
    del state_dict["blocks.3.attn.W_O"], state_dict["blocks.1.attn.W_O"]
    del state_dict["blocks.5.attn.W_O"]
    with pytest.raises(ValueError, match=r"missing: core\.0\.attn\.W_O"):
        load(model, state_dict)
    odd = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.7.")}
    with pytest.raises(ValueError, match="no whole number of iterations"):
        load(model, odd)
    assert torch.equal(model(TOKENS), before)


def test_a_tied_unembedding_must_be_the_embedding():
    model = tiny_model("huginn")
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_dict["unembed.W_U"] += 1.0
    with pytest.raises(ValueError, match=r"unembed\.W_U differs from embed\.W_E"):
        load(model, state_dict)


@pytest.mark.parametrize(
    "name, instead",
    [
        ("fold_layer_norm", "process_weights_"),
        ("fold_value_biases", "process_weights_"),
        ("center_writing_weights", "leave it out"),
        ("center_unembed", r"logits\.mean"),
        ("refactor_factored_attn_matrices", r"model\.QK"),
        ("fill_missing_keys", "load_physical_state_dict"),
    ],
)
def test_processing_a_state_dict_is_refused(name, instead):
    model = tiny_model("ouro")
    with pytest.raises(LoopedSemanticsError, match=instead):
        getattr(model, name)(model.state_dict())


def test_refactoring_while_loading_is_refused_before_loading():
    model = tiny_model("ouro")
    before = model(TOKENS)
    with pytest.raises(LoopedSemanticsError, match=r"model\.QK"):
        load(model, blank(model).state_dict(), refactor_factored_attn_matrices=True)
    assert torch.equal(model(TOKENS), before)


# Embedding.


def test_the_first_residual_stream_starts_the_model(model):
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    for attention_mask in (None, mask):
        residual, tokens, shortformer, used = model.input_to_embed(
            TOKENS, attention_mask=attention_mask
        )
        assert torch.equal(tokens, TOKENS) and shortformer is None
        again = model(residual, start_at_layer=0, attention_mask=used, tokens=tokens)
        assert_close(again, model(TOKENS, attention_mask=attention_mask), **CLOSE)
        embed = model.hook_embed(model.embed(TOKENS))
        other, _ = model.get_residual(embed, 0, attention_mask=used)
        assert_close(other, residual)
    assert torch.equal(
        model.get_residual(embed, 0, return_shortformer_pos_embed=False),
        model.get_residual(embed, 0)[0],
    )
    one, _, _, _ = model.input_to_embed(TOKENS[0])
    assert_close(one[0], model.input_to_embed(TOKENS)[0][0])


def test_text_becomes_the_first_residual_stream(speaking):
    residual, tokens, _, mask = speaking.input_to_embed(["a b c", "d"], padding_side="left")
    assert torch.equal(tokens, speaking.to_tokens(["a b c", "d"], padding_side="left"))
    with_text = speaking(["a b c", "d"], padding_side="left")
    assert_close(speaking(residual, start_at_layer=0, attention_mask=mask), with_text, **CLOSE)


def test_positions_behind_a_key_value_cache(model):
    past = KeyValueCache.init_cache(model.cfg, torch.device("cpu"), 2)
    assert model.get_pos_offset(None, 2) == 0 and model.get_pos_offset(past, 2) == 0
    model(TOKENS[:, :5], past_kv_cache=past)
    assert model.get_pos_offset(past, 2) == 5
    embed = model.embed(TOKENS[:, 5:])
    full, _ = model.get_residual(model.embed(TOKENS), 0)
    assert_close(model.get_residual(embed, 5)[0], full[:, 5:])
    mask = torch.ones_like(TOKENS)
    assert_close(model.get_residual(embed, 5, attention_mask=mask)[0], full[:, 5:])
    with pytest.raises(LoopedSemanticsError, match="itself: call model"):
        model.input_to_embed(TOKENS, past_kv_cache=past)


# Generation and readout.


def test_streamed_generation_is_generation(model):
    options = dict(do_sample=False, stop_at_eos=False, verbose=False, max_new_tokens=6)
    expected = model.generate(TOKENS, return_type="tokens", **options)
    for cached in (True, False):
        pieces = model.generate_stream(
            TOKENS, max_tokens_per_yield=4, use_past_kv_cache=cached, **options
        )
        assert torch.equal(torch.cat(list(pieces), dim=1), expected)


def test_residual_directions_read_the_final_norm(model):
    logits, cache = model.run_with_cache(TOKENS)
    norm = cache["ln_final.hook_normalized"]
    norm = norm if model.ln_final.w is None else norm * model.ln_final.w
    norm = norm if model.ln_final.b is None else norm + model.ln_final.b
    expected = logits.gather(-1, TOKENS[..., None])[..., 0] - model.b_U[TOKENS]
    directions = model.tokens_to_residual_directions(TOKENS)
    assert_close((norm * directions).sum(-1), expected, **CLOSE)
    scale = model.unembed.token_scale
    one = model.W_U[:, 7] if scale is None else model.W_U[:, 7] * scale[7]
    assert torch.equal(model.tokens_to_residual_directions(7), one)


def test_loss_is_that_of_the_logits(model):
    log_probs = model(TOKENS).log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert_close(model(TOKENS, return_type="loss", loss_per_token=True), expected, **CLOSE)
    assert_close(model.loss_fn(model(TOKENS), TOKENS), expected.mean(), **CLOSE)


def test_weights_as_properties(model):
    assert model.W_E is model.embed.W_E
    stored = dict(model.physical_named_parameters()).get("unembed.W_U", model.W_E)
    assert model.W_U.data_ptr() == stored.data_ptr()
    assert model.b_U is model.unembed.b_U
    W_QK = torch.einsum("lhde,lhfe->lhdf", model.W_Q, model.W_K)
    assert_close(model.QK.AB, W_QK, **CLOSE)
    assert_close(model.OV.AB, torch.einsum("lhde,lhef->lhdf", model.W_V, model.W_O), **CLOSE)
    assert model.n_params_total == model.cfg.n_params
    assert model.n_params_total == sum(p.numel() for p in model.physical_state_dict().values())
    if model.cfg.positional_embedding_type == "standard":
        assert torch.equal(model.W_E_pos, torch.cat([model.W_E, model.W_pos]))


STACKS = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
}


def test_stacks_are_the_physical_weights(model):
    blocks = model.physical_blocks().values()
    assert len(blocks) == model.cfg.n_physical_layers
    for part, names in STACKS.items():
        for name in names:
            stack = getattr(model, name)
            if name == "W_gate" and not model.cfg.gated_mlp:
                assert stack is None
                continue
            expected = [getattr(getattr(block, part), name) for block in blocks]
            assert torch.equal(stack, torch.stack(expected))


def test_weights_are_drawn_by_the_seed():
    first, second = LoopedTransformer(tiny_config("huginn")), blank(tiny_model("huginn"))
    assert not torch.equal(first.W_O, second.W_O)
    state = torch.get_rng_state()
    second.init_weights()
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.physical_state_dict().items():
        assert torch.equal(weight, second.physical_state_dict()[name])


def test_devices_by_name_go_through_to(monkeypatch):
    model = tiny_model("ouro")
    asked = []
    monkeypatch.setattr(LoopedTransformer, "to", lambda self, *to: asked.append(str(to[0])))
    for move in (model.cpu, model.cuda, partial(model.cuda, 1), model.mps):
        move()
    assert asked == ["cpu", "cuda", "cuda:1", "mps"]
    monkeypatch.undo()
    model.cfg.device = "meta"
    model.move_model_modules_to_device()
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_token_methods_need_only_the_tokenizer(speaking):
    tokens = speaking.to_tokens("a b c")
    assert tokens.shape == (1, 4) and speaking.to_str_tokens("a b c") == ["<bos>", "a", "b", "c"]
    assert speaking.to_string(tokens[0, 1:]) == "a b c"
    assert speaking.to_single_str_token(speaking.to_single_token("c")) == "c"
    assert speaking.get_token_position("b", "a b c") == 2


def test_a_data_point_comes_from_the_dataset_that_was_set(speaking):
    with pytest.raises(LoopedSemanticsError, match=r"set model\.dataset"):
        speaking.sample_datapoint()
    with pytest.raises(LoopedSemanticsError, match="sample_datapoint"):
        speaking.load_sample_training_dataset()
    speaking.dataset = [{"text": "a b"}]
    assert speaking.sample_datapoint() == "a b"
    assert torch.equal(speaking.sample_datapoint(tokenize=True), speaking.to_tokens("a b"))


# Hooks.


def test_attached_hooks_are_listed_by_every_name(model):
    name = model.layout.hook_name("pattern", iteration=1, layer=0)
    alias = model.layout.alias(name)

    def nothing(x, hook):
        return None

    try:
        model.add_perma_hook(alias, nothing)
        model.add_hook("iter.1.hook_state_out", nothing)
        assert set(model.list_hooks()) == {name, "iter.1.hook_state_out"}
        assert set(model.list_hooks(alias)) == set(model.list_hooks([name])) == {name}
        assert set(model.list_hooks(lambda n: n == name)) == {name}
        model.reset_hooks()
        assert set(model.list_hooks()) == {name}
        assert model.list_hooks(including_permanent=False) == {}
        model.clear_contexts()
        model.remove_all_hook_fns(including_permanent=True)
        assert model.list_hooks() == {}
        with pytest.raises(HookNameError):
            model.list_hooks("iter.99.0.attn.hook_pattern")
    finally:
        model.reset_hooks(including_permanent=True)


def test_a_checked_hook_is_added_to_its_point(model):
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    assert point in list(model.hook_points())
    seen = []
    model.check_and_add_hook(point, "blocks.0.hook_resid_pre", lambda x, hook: seen.append(1))
    try:
        model(TOKENS)
    finally:
        model.reset_hooks()
    assert seen == [1]


def test_caching_everything_or_something_into_a_dictionary(model):
    everything, something = {}, {}
    try:
        model.cache_all(everything)
        model(TOKENS)
        model.reset_hooks()
        model.cache_some(something, lambda name: name.endswith("hook_state_out"))
        model(TOKENS)
    finally:
        model.reset_hooks()
    _, expected = model.run_with_cache(TOKENS)
    assert set(everything) == set(expected.keys())
    assert len(something) == model.cfg.n_iterations
    for name, tensor in something.items():
        assert_close(tensor, expected[name])


def test_switches_of_optional_hook_points_do_not_change_the_numbers(model):
    expected = model(TOKENS)
    switches = ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"]
    switches.append(
        "ungroup_grouped_query_attention" if model.cfg.n_key_value_heads else "use_attn_in"
    )
    for switch in switches:
        getattr(model, f"set_{switch}")(True)
        assert_close(model(TOKENS), expected, **CLOSE)
        getattr(model, f"set_{switch}")(False)
    if model.cfg.n_key_value_heads:
        with pytest.raises(AssertionError, match="split_qkv_input"):
            model.set_use_attn_in(True)
