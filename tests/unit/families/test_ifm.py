"""IFM LoopedLM: checkpoints in xLLM's format against the published equations, for every kind."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import attend, causal, draw, rms, write
from tests.models import tiny_tokens
from tl_loops import CheckpointError, LoopedSemanticsError
from tl_loops.families.ifm import IFM_LOOPEDLM
from tl_loops.families.registry import recognise
from tl_loops.loading.catalogue import find_known
from tl_loops.mechanisms.initial_state import example_phase
from tl_loops.model.check import check_model
from tl_loops.model.looped import LoopedTransformer
from tl_loops.upstream import KeyValueCache

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "ifm_loopedlm" / "config.json"
RELEASED = json.loads(FIXTURE.read_text())
TOKENS = tiny_tokens()
D, E, D_MLP, VOCAB = 32, 8, 48, 50
CLOSE = dict(rtol=1e-5, atol=1e-5)
PLAIN = dict(arch="transformer", loop_start_layer=0, loop_end_layers=None)

KINDS = {
    "p2 huginn": {},
    "p2 huginn-linear": dict(
        huginn_input_injection="linear", huginn_recurrent_exit_norm="parameterless_rms"
    ),
    "p2 parcae": dict(huginn_prelude_norm="rms"),
    "p2 orthoinj": dict(huginn_prelude_orthogonal=True),
    "p2 d4": dict(PLAIN, loop_times=1),
    "p1 ouro": dict(PLAIN, loop_times=3),
    "p1 ouro-raw-injection": dict(PLAIN, loop_times=3, loop_input_injection="diagonal"),
    "p1 middle": dict(huginn_state_init="input", huginn_input_injection="none"),
    "p1 middle-prelude-injection": dict(huginn_state_init="input"),
    "p1 shared-hl": dict(huginn_hierarchical_state="shared_hl", loop_times=8),
    "p1 split-hl": dict(huginn_hierarchical_state="split_hl", loop_times=8),
    "p1 split-hl-x2": dict(
        huginn_hierarchical_state="split_hl", loop_times=8, huginn_split_module_repeats=2
    ),
    "shared-hl-x3": dict(huginn_hierarchical_state="shared_hl", huginn_split_module_repeats=3),
    "zero state, scaled, no gate": dict(huginn_state_init="zero", scale_emb=True, swiglu=False),
    "one key for each head": dict(
        num_kv_heads=None,
        apply_bias_term=False,
        huginn_coda_layers=1,
        num_layers=4,
        huginn_input_injection="linear",
    ),
}


def released(**changes):
    content = copy.deepcopy(RELEASED)
    content["model"] |= changes
    return content


def shapes(model):
    kv = (model["num_kv_heads"] or model["num_heads"]) * E
    found = {"embed.weight": (VOCAB, D), "output.output.weight": (VOCAB, D)}
    found["output.final_norm.weight"] = (D,)
    for layer in range(model["num_layers"]):
        key = f"layers.{layer}"
        found |= {
            f"{key}.attention.norm.weight": (D,),
            f"{key}.attention.wq.weight": (D, D),
            f"{key}.attention.wk.weight": (kv, D),
            f"{key}.attention.wv.weight": (kv, D),
            f"{key}.attention.wo.weight": (D, D),
            f"{key}.nffn.norm.weight": (D,),
            f"{key}.nffn.fc1.weight": (D_MLP, D),
            f"{key}.nffn.fc2.weight": (D, D_MLP),
        }
        if model["swiglu"]:
            found[f"{key}.nffn.fc3.weight"] = (D_MLP, D)
    looped = model["arch"] == "transformer"
    kind = model.get("loop_input_injection", "none") if looped else model["huginn_input_injection"]
    owner = "loop_input_injection_module" if looped else "input_injection"
    if kind == "diagonal":
        found[f"{owner}.A_log"] = found[f"{owner}.dt_bias"] = (D,)
        found[f"{owner}.input_adapter.weight"] = (D, D)
    if kind == "linear":
        found[f"{owner}.adapter.weight"] = (D, 2 * D)
        if model["apply_bias_term"]:
            found[f"{owner}.adapter.bias"] = (D,)
    if model.get("huginn_prelude_norm") == "rms":
        found["huginn_prelude_norm_module.weight"] = (D,)
    return found


def drawn(model):
    """Random weights; a norm stores the difference of its gain from 1."""
    weights = draw(shapes(model))
    return {k: w - 1.0 if "norm" in k else w for k, w in weights.items()}


def rotate(x, base, start):
    """Rotation of neighbouring dimensions, as complex numbers; the first position is ``start``."""
    freqs = base ** (-torch.arange(0, E, 2).double() / E)
    angles = torch.arange(start, start + x.shape[1]).double()[:, None] * freqs
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x)


class Stated:
    """The published model in plain torch.

    Pieces of a text are calls in turn: of earlier tokens a layer sees the keys and values of its
    last call there ("terminal"), among the tokens of a piece each call sees its own.
    """

    def __init__(self, model, weights, row=0):
        self.cfg, self.w, self.row = model, weights, row
        self.past, self.new, self.start = {}, {}, 0

    def norm(self, x, key):
        return rms(x, 1.0 + self.w[f"{key}.weight"], self.cfg["rmsnorm_eps"])

    def linear(self, x, key):
        return F.linear(x, self.w[f"{key}.weight"], self.w.get(f"{key}.bias"))

    def layer(self, number, x):
        key = f"layers.{number}"
        y = self.norm(x, f"{key}.attention.norm")
        q, k, v = (self.linear(y, f"{key}.attention.w{n}").unflatten(-1, (-1, E)) for n in "qkv")
        base = self.cfg["rope_base"]
        q, k = rotate(q, base, self.start), rotate(k, base, self.start)
        self.new[number] = (k, v)
        if number in self.past:
            k, v = (torch.cat(pair, 1) for pair in zip(self.past[number], (k, v), strict=True))
        z = attend(q, k, v, causal(k.shape[1])[self.start :]).flatten(-2)
        x = x + self.linear(z, f"{key}.attention.wo")
        y = self.norm(x, f"{key}.nffn.norm")
        hidden = F.silu(self.linear(y, f"{key}.nffn.fc1"))
        if self.cfg["swiglu"]:
            hidden = hidden * self.linear(y, f"{key}.nffn.fc3")
        return x + self.linear(hidden, f"{key}.nffn.fc2")

    def layers(self, first, last, x):
        for number in range(first, last):
            x = self.layer(number, x)
        return x

    def inject(self, owner, s, e):
        if f"{owner}.adapter.weight" in self.w:
            return self.linear(torch.cat([s, e], -1), f"{owner}.adapter")
        if f"{owner}.A_log" not in self.w:
            return s
        dt = F.softplus(self.w[f"{owner}.dt_bias"])
        v = s * torch.exp(-dt * torch.exp(self.w[f"{owner}.A_log"]))
        a = dt * self.linear(e, f"{owner}.input_adapter")
        if self.cfg.get("huginn_prelude_orthogonal"):
            v = v - (v * a).sum(-1, keepdim=True) / (a.square().sum(-1, keepdim=True) + 1e-6) * a
        return v + a

    def first(self, e):
        kind = self.cfg["huginn_state_init"]
        if kind != "normal":
            return e if kind == "input" else torch.zeros_like(e)
        i = torch.arange(D, dtype=torch.float32)
        p = torch.arange(self.start, self.start + e.shape[1], dtype=torch.float32)[:, None]
        x = i * 0.013579 + p * 0.021713 + torch.tensor(float(self.row)) * 0.037719 + 0.123457
        u = torch.sin(x) * 43758.5453123
        u = (u - u.floor()).clamp(1e-6, 1 - 1e-6)
        return (torch.erfinv(2 * u - 1) * math.sqrt(2 / D)).expand_as(e).to(e)

    def __call__(self, tokens):
        cfg, n = self.cfg, self.cfg["num_layers"]
        x = self.w["embed.weight"][tokens] * (D**0.5 if cfg["scale_emb"] else 1.0)
        if cfg["arch"] == "transformer":
            e = x
            for _ in range(cfg["loop_times"]):
                x = self.layers(0, n, self.inject("loop_input_injection_module", x, e))
        else:
            x = self.huginn(x, cfg["huginn_prelude_layers"], n - cfg["huginn_coda_layers"])
            x = self.layers(n - cfg["huginn_coda_layers"], n, x)
        for number, new in self.new.items():
            old = self.past.get(number, tuple(y[:, :0] for y in new))
            self.past[number] = tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True))
        self.start += tokens.shape[1]
        return self.linear(self.norm(x, "output.final_norm"), "output.output")

    def huginn(self, x, begin, end):
        e = self.layers(0, begin, x)
        if self.cfg.get("huginn_prelude_norm") == "rms":
            e = self.norm(e, "huginn_prelude_norm_module")
        kind = self.cfg.get("huginn_hierarchical_state", "none")
        if kind == "none":
            s = self.first(e)
            for _ in range(self.cfg["loop_times"]):
                s = self.layers(begin, end, self.inject("input_injection", s, e))
                if self.cfg.get("huginn_recurrent_exit_norm", "none") != "none":
                    s = rms(s, eps=self.cfg["rmsnorm_eps"])
            return s
        middle = begin + (end - begin) // 2
        high, low = ((begin, middle), (middle, end)) if kind == "split_hl" else 2 * ((begin, end),)
        z_h, z_l = e, self.first(e)
        for _ in range(2):
            for _ in range(3):
                z_l = self.call(*low, self.inject("input_injection", z_l + z_h, e))
            z_h = self.call(*high, self.inject("input_injection", z_h + z_l, e))
        return z_h

    def call(self, first, last, x):
        """One update of a state: its layers, run so often in a row."""
        for _ in range(self.cfg.get("huginn_split_module_repeats", 1)):
            x = self.layers(first, last, x)
        return x


def load(directory, content, weights, **options):
    write(directory, content, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(
            directory, device="cpu", **{"dtype": torch.float64, **options}
        )


@pytest.fixture(params=KINDS)
def loaded(request, tmp_path):
    content = released(**KINDS[request.param])
    weights = drawn(content["model"])
    model = load(tmp_path, content, weights)
    return model, content["model"], {key: weight.double() for key, weight in weights.items()}


def test_logits_are_those_of_the_published_equations(loaded):
    model, cfg, weights = loaded
    expected = Stated(cfg, weights)(TOKENS)
    assert expected.std() > 0.05
    # The hash of the initial state is float32, where another order of sines differs a little.
    assert_close(model(TOKENS), expected, **CLOSE)
    cached, _ = model.run_with_cache(TOKENS)
    assert_close(cached, expected, **CLOSE)
    past = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    pieces = [TOKENS[:, :4], *TOKENS[:, 4:].split(1, dim=1)]
    decoded = torch.cat([model(piece, past_kv_cache=past) for piece in pieces], dim=1)
    assert_close(decoded, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["p2 huginn", "p2 orthoinj"])
def test_shared_keys_are_the_terminal_keys_of_the_published_evaluation(tmp_path, kind):
    content = released(**KINDS[kind])
    weights = drawn(content["model"])
    model = load(tmp_path, content, weights)
    stated = Stated(content["model"], {key: weight.double() for key, weight in weights.items()})
    past = model.make_kv_cache(2, "shared")
    for piece in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:8], TOKENS[:, 8:]):
        last = model(piece, past_kv_cache=past)
        assert_close(last, stated(piece), **CLOSE)
    assert not torch.allclose(last, model(TOKENS)[:, 8:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "kind", ["p2 huginn-linear", "p2 parcae", "p2 orthoinj", "p1 split-hl", "p1 split-hl-x2"]
)
def test_every_promise_is_kept_and_gradients_reach_every_weight(tmp_path, kind):
    content = released(**KINDS[kind])
    model = load(tmp_path, content, drawn(content["model"]), dtype=torch.float32)
    failed = [finding for finding in check_model(model) if finding.status == "failed"]
    assert not failed
    model(TOKENS, return_type="loss").backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gains_are_one_plus_what_is_stored_in_the_type_of_the_model(tmp_path):
    content = released()
    weights = {key: w.bfloat16() for key, w in drawn(content["model"]).items()}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tmp_path, content, weights, dtype=dtype)
        for key, name in (
            ("output.final_norm", "ln_final.w"),
            ("layers.1.nffn.norm", "core.0.ln2.w"),
            ("layers.4.attention.norm", "coda.1.ln1.w"),
        ):
            stored = weights[f"{key}.weight"].to(dtype)
            assert torch.equal(model.physical_state_dict()[name], stored + 1.0)


def test_a_saved_model_is_the_loaded_one(tmp_path):
    content = released(**KINDS["p2 huginn-linear"])
    model = load(tmp_path, content, drawn(content["model"]), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="tokenizer"):
        again = LoopedTransformer.from_pretrained_no_processing(tmp_path / "saved", device="cpu")
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_rows_of_a_batch_and_examples_are_phases_of_the_hash(tmp_path):
    content = released()
    weights = drawn(content["model"])
    exact = {key: weight.double() for key, weight in weights.items()}
    model = load(tmp_path, content, weights)
    first = model(TOKENS)
    model.cfg.state_phase = float(torch.tensor(3.0) * 0.037719)
    assert_close(model(TOKENS), Stated(content["model"], exact, row=3)(TOKENS), **CLOSE)
    assert not torch.allclose(model(TOKENS), first, rtol=1e-3)
    model.cfg.state_phase = example_phase(7)
    of_example = model(TOKENS)
    assert_close(model(TOKENS[:1]), of_example[:1], **CLOSE)
    model.cfg.state_phase = 0.0
    assert torch.equal(model(TOKENS), first)


def test_the_norm_after_an_iteration_is_its_own(tmp_path):
    content = released(**KINDS["p2 huginn-linear"])
    model = load(tmp_path, content, drawn(content["model"]))
    _, cache = model.run_with_cache(TOKENS)
    for t in range(5):
        squares = cache["state_out", t].pow(2).mean(-1)
        assert_close(squares, torch.ones_like(squares), **CLOSE)
        last = model.layout.index(iteration=t, layer=1)
        assert_close(cache["state_out", t], rms(cache["resid_post", last]), **CLOSE)
    assert "iter.4.norm.hook_scale" in cache
    parts, labels = cache.decompose_resid(return_labels=True)
    assert_close(parts.sum(0), cache["resid_post", -1], **CLOSE)
    assert "r4_injection_bias" in labels
    with pytest.raises(LoopedSemanticsError, match="coda stands between"):
        model(TOKENS, exit_at=2)


def test_a_tokenizer_in_a_folder_of_its_own_is_found(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<bos>", "<eos>", "<unk>", "one", "two"])}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(
        tmp_path / "tokenizer"
    )
    content = released()
    write(tmp_path, content, drawn(content["model"]))
    model = LoopedTransformer.from_pretrained_no_processing(tmp_path, device="cpu")
    assert model.to_tokens("two one").tolist() == [[0, 4, 3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_experts=25), "'num_experts' is 25: blocks with a mixture of experts"),
        (dict(num_values=4), "'num_values' is 4: mixtures of value projections"),
        (dict(qknorm=True), "'qknorm' is True"),
        (dict(apply_rmsnorm=False), "'apply_rmsnorm' must be true"),
        (dict(rope_head_dim=4), "'rope_head_dim' is 4.*expected 8, the whole head"),
        (dict(output_size=40), "'output_size' is 40"),
        (dict(arch="gekko"), "'arch' is 'gekko'"),
        (dict(huginn_prelude_layers=3), "must sum to 'num_layers' = 5"),
        (dict(huginn_state_init="ones"), "'huginn_state_init' is 'ones'"),
        (dict(huginn_recurrent_exit_norm="rms"), "'huginn_recurrent_exit_norm' is 'rms'"),
        (
            dict(huginn_prelude_orthogonal=True, huginn_input_injection="linear"),
            "'huginn_prelude_orthogonal' needs",
        ),
        (
            dict(huginn_hierarchical_state="split_hl", huginn_split_module_repeats=0),
            "'huginn_split_module_repeats' is 0, expected a number from 1 to 1000",
        ),
        (
            dict(huginn_hierarchical_state="split_hl", huginn_recurrent_layers=3, num_layers=6),
            "even number of recurrent layers",
        ),
        (
            dict(arch="transformer", loop_input_injection="diagonal"),
            "injects the embedding past layers before the loop",
        ),
        (dict(arch="transformer", loop_end_layers=9), "'loop_end_layers' = 9"),
        (
            dict(arch="transformer", dense_prelude_input_injection="diagonal"),
            "'dense_prelude_input_injection' is 'diagonal'",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        IFM_LOOPEDLM.config_fields(released(**changes), "config.json")


def test_a_distilled_prefill_is_no_language_model():
    with pytest.raises(CheckpointError, match="two blocks of a distilled prefill"):
        IFM_LOOPEDLM.config_fields({**released(), "student": {"teacher": "x"}}, "config.json")


def test_it_is_recognised_without_a_model_type():
    assert recognise(RELEASED, "config.json", list) is IFM_LOOPEDLM
    with pytest.raises(CheckpointError, match="'model' must be a mapping"):
        IFM_LOOPEDLM.config_fields({"model": 3}, "config.json")


@pytest.mark.parametrize(
    ("name", "notation", "parameters"),
    # Activated parameters of part 1 give the published stops of 20 tokens for each of them.
    [
        ("loopedlm-p1-dense-d28-336b", "(0, 28⊗1, 0)", 1_496_667_648),
        ("loopedlm-p1-dense-d112-500b", "(0, 112⊗1, 0)", 3_676_915_200),
        ("loopedlm-p1-dense-huginn-500b", "(8, 12⊗8, 8)_I", 1_499_030_016),
        ("loopedlm-p1-dense-split-hl-x2-336b", "(8, (6⊗2)⊗8, 8)_I", 1_499_030_016),
        ("loopedlm-p2-huginn-s-fixed-r5", "(1, 2⊗5, 1)_I", 303_579_648),
        ("loopedlm-p2-huginn-l-learned-entropy0", "(1, 2⊗5, 1)_I", 2_488_338_432),
    ],
)
def test_known_sizes_are_the_published_ones(name, notation, parameters):
    entry = find_known(name)
    assert entry is not None
    cfg = entry.config()
    assert (cfg.notation, cfg.n_params) == (notation, parameters)
    stops = {1_496_667_648: 7137, 3_676_915_200: 17533, 1_499_030_016: 7148}
    if parameters in stops:
        assert math.ceil(20 * parameters / 4_194_304) == stops[parameters]
