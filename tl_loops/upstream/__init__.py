"""The only place that touches TransformerLens internals.

Everything that the library takes from TransformerLens comes through here, so that a new release of
it concerns this package alone. Written for the lines 3.9, which has HookedTransformer, and 4.x,
which has TransformerBridge in its place.
"""

from transformer_lens import ActivationCache, FactoredMatrix, HookedRootModule
from transformer_lens.cache.key_value_cache import (
    TransformerLensKeyValueCache as KeyValueCache,
)
from transformer_lens.cache.key_value_cache_entry import (
    TransformerLensKeyValueCacheEntry as KeyValueCacheEntry,
)
from transformer_lens.utilities import (
    SOFTCAP_DISABLED,
    SUPPORTED_ACTIVATIONS,
    USE_DEFAULT_VALUE,
    Slice,
    apply_softcap,
    composition_scores,
    get_attention_mask,
    lm_cross_entropy_loss,
    sample_logits,
)
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from tl_loops.later import at_end
from tl_loops.upstream.annotations import Cache, Prompts, PromptsShown, TextOrTokens
from tl_loops.upstream.bridges import is_bridge, shown_too_late
from tl_loops.upstream.classes import BaseConfig, HookedTransformer, Output, TransformerBase
from tl_loops.upstream.defaults import LocallyOverridenDefaults, given
from tl_loops.upstream.from_pretrained import install_from_pretrained, uninstall_from_pretrained
from tl_loops.upstream.guards import install_guards, uninstall_guards
from tl_loops.upstream.hook_points import (
    AnyHookPoint,
    HookPoint,
    copy_hooks,
    has_editing_hooks,
    has_hooks,
    unshared,
)
from tl_loops.upstream.inputs import (
    TRUNCATE_TEXT,
    ModelInput,
    attention_needs,
    check_ids,
    check_length,
    check_mask,
    model_input,
    number_of_ids,
)
from tl_loops.upstream.interrupts import CONTEXTS, left_as_it_was
from tl_loops.upstream.made_caches import install_made_caches, uninstall_made_caches
from tl_loops.upstream.module import Module
from tl_loops.upstream.refusal import refuse_where_wrong
from tl_loops.upstream.root import can_restart, complete_norm, init_root
from tl_loops.upstream.slices import SliceLike, as_slice
from tl_loops.upstream.temporary_hooks import TemporaryHooks
from tl_loops.upstream.text import TextMethods
from tl_loops.upstream.tokenizers import as_given, remember, set_tokenizer
from tl_loops.upstream.version import HAS_HOOKED_TRANSFORMER, warn_if_untried

__all__ = [
    "CONTEXTS",
    "HAS_HOOKED_TRANSFORMER",
    "POST_NORM_ARCHITECTURES",
    "SOFTCAP_DISABLED",
    "SUPPORTED_ACTIVATIONS",
    "TRUNCATE_TEXT",
    "USE_DEFAULT_VALUE",
    "ActivationCache",
    "AnyHookPoint",
    "BaseConfig",
    "Cache",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "HookedTransformer",
    "KeyValueCache",
    "KeyValueCacheEntry",
    "LocallyOverridenDefaults",
    "ModelInput",
    "Module",
    "Output",
    "Prompts",
    "PromptsShown",
    "Slice",
    "SliceLike",
    "TransformerBase",
    "apply_softcap",
    "as_slice",
    "can_restart",
    "copy_hooks",
    "check_ids",
    "check_mask",
    "check_length",
    "complete_norm",
    "composition_scores",
    "get_attention_mask",
    "given",
    "has_editing_hooks",
    "has_hooks",
    "init_root",
    "install_from_pretrained",
    "install_guards",
    "install_made_caches",
    "is_bridge",
    "left_as_it_was",
    "lm_cross_entropy_loss",
    "attention_needs",
    "model_input",
    "number_of_ids",
    "refuse_where_wrong",
    "sample_logits",
    "set_tokenizer",
    "shown_too_late",
    "as_given",
    "TemporaryHooks",
    "TextMethods",
    "TextOrTokens",
    "remember",
    "uninstall_from_pretrained",
    "uninstall_guards",
    "uninstall_made_caches",
    "unshared",
    "warn_if_untried",
]

at_end(__name__)
