"""A looped model of one iteration and TransformerLens's model with the same weights."""

import os
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.upstream import set_tokenizer

N_WORDS = 23
N_CTX = 24
sample = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "12")),
    phases=[Phase.explicit, Phase.generate] if "FUZZ_QUICK" in os.environ else list(Phase),
)
"""A fixed sample; ``make fuzz`` asks for more."""


class Pair(NamedTuple):
    """Two models of the same numbers."""

    looped: Any
    plain: Any


@st.composite
def architectures(draw: Any) -> dict[str, Any]:
    """Fields that both configs have, by the names of the looped one."""
    heads = draw(st.sampled_from([2, 4]))
    d_head = draw(st.sampled_from([4, 6]))
    norm = draw(st.sampled_from(["RMS", "RMSPre", "LN", "LNPre"]))
    positions = draw(st.sampled_from(["rotary", "standard"]))
    shape = draw(st.sampled_from([(0, 2, 0), (1, 1, 1), (1, 2, 0), (0, 1, 2)]))
    fields = dict(
        zip(("n_prelude", "n_core", "n_coda"), shape, strict=True),
        n_heads=heads,
        d_head=d_head,
        d_model=draw(st.sampled_from([12, 16])),
        d_mlp=20,
        n_key_value_heads=draw(st.sampled_from([None, 1, heads // 2])),
        normalization_type=norm,
        positional_embedding_type=positions,
        act_fn=draw(st.sampled_from(["silu", "gelu", "gelu_new", "relu"])),
        gated_mlp=draw(st.booleans()),
        attn_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        unembed_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        post_embedding_ln=norm == "LN" and draw(st.booleans()),
        output_logits_soft_cap=draw(st.sampled_from([-1.0, 3.0])),
        attn_scale=draw(st.sampled_from([-1.0, 1.7])),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
        block_norm="pre" if norm != "RMS" else draw(st.sampled_from(["pre", "sandwich"])),
        seed=draw(st.integers(0, 3)),
    )
    if positions == "rotary":
        fields["rotary_dim"] = draw(st.sampled_from([d_head, 2, 4]))
        fields["rotary_layout"] = draw(st.sampled_from(["half", "interleaved"]))
        fields["rotary_base"] = draw(st.sampled_from([10000, 50]))
    return fields


def pair(fields: dict[str, Any], side: str = "right", dtype: torch.dtype = torch.float64) -> Pair:
    """Both models, on a tokenizer of words whose padding token is no other token."""
    made = _pair(tuple(fields.items()), dtype)
    for model in made:
        model.reset_hooks()
        model.tokenizer.padding_side = side
    return made


@lru_cache(maxsize=256)
def _pair(fields: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> Pair:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    common: dict[str, Any] = dict(fields)
    cfg = LoopedTransformerConfig(
        **common, n_ctx=N_CTX, d_vocab=N_WORDS, device="cpu", dtype=dtype, initializer_range=0.4
    )
    looped = LoopedTransformer(cfg, tokenizer=tokenizer()).eval()
    generator = torch.Generator().manual_seed(common["seed"])
    with torch.no_grad():
        for name, weight in looped.physical_named_parameters():
            if name.rsplit(".", 1)[-1].lstrip("_").startswith(("b", "w")):
                noise = 0.3 * torch.randn(weight.shape, generator=generator, dtype=dtype)
                weight.copy_(weight + noise)
    theirs = {
        key: value
        for key, value in common.items()
        if key in HookedTransformerConfig.__dataclass_fields__
    }
    theirs["use_normalization_before_and_after"] = common["block_norm"] == "sandwich"
    theirs["rotary_adjacent_pairs"] = common.get("rotary_layout") == "interleaved"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        plain_cfg = HookedTransformerConfig(
            **theirs, n_layers=cfg.n_layers, n_ctx=N_CTX, d_vocab=N_WORDS, device="cpu", dtype=dtype
        )
        plain_cfg.final_rms = common["normalization_type"] == "RMS"
        plain = HookedTransformer(plain_cfg).eval()
    set_tokenizer(plain, tokenizer(), None)
    weights = looped.state_dict()
    given = {}
    for name, tensor in plain.state_dict().items():
        if name.endswith((".mask", ".IGNORE", "rotary_sin", "rotary_cos")):
            given[name] = tensor
        else:
            if name not in weights:
                assert ".b" in name or "._b" in name, name
            given[name] = weights.get(name, torch.zeros_like(tensor))
    given["unembed.W_U"] = looped.W_U
    assert set(weights) <= set(given), sorted(set(weights) - set(given))
    plain.load_state_dict(given)
    return Pair(looped, plain)


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Words ``w0``, ``w1``, ... behind four special tokens, none of which stands for two things."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(N_WORDS - len(special)))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side=side,
    )


@st.composite
def prompts(draw: Any, batch: int | None = None) -> torch.Tensor:
    """Tokens [batch, pos] without special ones."""
    rows = draw(st.integers(1, 3)) if batch is None else batch
    length = draw(st.integers(2, 9))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, N_WORDS, (rows, length), generator=generator)


@st.composite
def texts(draw: Any) -> list[str]:
    """One to three texts of one to eight words."""
    words = st.lists(st.integers(0, N_WORDS - 5), min_size=1, max_size=8)
    rows = draw(st.lists(words, min_size=1, max_size=3))
    return [" ".join(f"w{i}" for i in row) for row in rows]


def close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """Equal within a tolerance relative to the size of what is compared; masked scores as well."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    infinite = theirs == -torch.inf
    assert torch.equal(ours == -torch.inf, infinite)
    ours, theirs = ours[~infinite], theirs[~infinite]
    if not theirs.numel():
        return
    size = float(theirs.detach().abs().max())
    worst = float((ours - theirs).detach().abs().max())
    assert worst <= tolerance * max(size, 1e-30), (worst, size)


def cached(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The cache of a run."""
    return model.run_with_cache(*args, **kwargs)[1]
