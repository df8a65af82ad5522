"""Nanbeige 4.2: a looped Llama with the final norm after every pass."""

from typing import Any

from tl_loops.errors import CheckpointError
from tl_loops.families.base import Family, KnownModel, Released, checked
from tl_loops.families.shared import llama
from tl_loops.families.shared.rotary import rotary_fields


def _derive(released: Released) -> dict[str, Any]:
    llama.check_layer_types(released)
    weights = released.get("loop_loss_weights") or []
    if not isinstance(weights, list):
        raise CheckpointError(f"'loop_loss_weights' must be a list, found {weights!r}")
    # The list decides over the number: one weight for each pass but the last.
    loops = len(weights) + 1 if weights else released.get("num_loops")
    loops = checked("num_loops", 1 if loops is None else loops, int)
    if loops < 1:
        raise CheckpointError(f"'num_loops' must be at least 1, found {loops}")
    if released.get("kv_channels") not in (None, llama.head_width(released)):
        raise CheckpointError(
            f"'kv_channels' is {released['kv_channels']!r}, but 'head_dim' is "
            f"{llama.head_width(released)}"
        )
    skips = checked("skip_loop_final_norm", released.get("skip_loop_final_norm") or False, bool)
    return {
        "d_head": llama.head_width(released),
        "n_iterations": loops,
        "norm_between_iterations": not skips,
        **rotary_fields(released),
    }


_RELEASED = {
    "vocab_size": 166144,
    "hidden_size": 3072,
    "intermediate_size": 10752,
    "num_hidden_layers": 22,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 70_000_000.0,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "num_loops": 2,
}

NANBEIGE = Family(
    name="nanbeige",
    paper="",
    model_types=("nanbeige",),
    architectures=("NanbeigeForCausalLM",),
    fields=llama.LOOPED_FIELDS,
    fixed=llama.LOOPED_FIXED,
    flags={
        **llama.FLAGS,
        "qk_layernorm": (False,),
        "enable_double_loop_split": (False,),
        "loop_middle_layers": (0,),
        "loop_share_kv": (False,),
        "enable_depth_attention": (False,),
        "enable_hyper_connection": (False,),
        "enable_mhc": (False,),
        "enable_h_res_identity": (False,),
        "mhc_identity_nohresparam": (False,),
        "mhc_diff_for_loop": (False,),
        "emb_neighbor_num": (),
        "emb_split_num": (),
        "ngram_vocab_size_ratio": (),
        "ngram_embedding_hidden_size": (),
        "ngram_insert_all_layers": (False,),
        "insert_ngram_layer_idx": ([],),
    },
    without_effect={
        **dict.fromkeys(("sliding_window", "max_window_layers"), "no layer has a window"),
    },
    derive=_derive,
    tensors=llama.looped_stack,
    tied=llama.TIED,
    known=(
        KnownModel("Nanbeige/Nanbeige4.2-3B", ("nanbeige4.2-3b",), _RELEASED, tuple(_RELEASED)),
        KnownModel(
            "Nanbeige/Nanbeige4.2-3B-Base", ("nanbeige4.2-3b-base",), _RELEASED, tuple(_RELEASED)
        ),
    ),
)
