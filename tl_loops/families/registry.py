"""All families, and the checkpoints that load by name.

A new family is one new file and one entry of ``FAMILIES``.
"""

from collections.abc import Callable, Collection

from tl_loops.errors import CheckpointError, shortened
from tl_loops.families.base import Family, Released
from tl_loops.families.dory import DORY
from tl_loops.families.gpt2 import GPT2
from tl_loops.families.gpt_neox import GPT_NEOX
from tl_loops.families.hrm import HRM, TRM
from tl_loops.families.hrm_text import HRM_TEXT, HRM_TEXT_SPLIT
from tl_loops.families.huginn import HUGINN
from tl_loops.families.ifm import IFM_LOOPEDLM
from tl_loops.families.iquest import IQUEST_LOOP
from tl_loops.families.llama import LLAMA, MISTRAL
from tl_loops.families.loopformer import BASE_LOOP, LOOPFORMER, TMLT
from tl_loops.families.loopus import LOOPUS
from tl_loops.families.nanbeige import NANBEIGE
from tl_loops.families.nanochat import NANOCHAT_RECURSIVE
from tl_loops.families.native import NATIVE
from tl_loops.families.olmo2 import OLMO2
from tl_loops.families.ouro import OURO
from tl_loops.families.parcae import PARCAE
from tl_loops.families.qwen import QWEN2, QWEN3
from tl_loops.families.refused import refusal
from tl_loops.families.retrofitted import RETROFITTED_LLAMA, RETROFITTED_OLMO

# Of families that share a model type, the first whose tensors are there is taken.
FAMILIES: tuple[Family, ...] = (
    NATIVE,
    HUGINN,
    OURO,
    RETROFITTED_OLMO,
    RETROFITTED_LLAMA,
    PARCAE,
    NANOCHAT_RECURSIVE,
    HRM_TEXT,
    HRM_TEXT_SPLIT,
    NANBEIGE,
    DORY,
    IQUEST_LOOP,
    LOOPUS,
    LOOPFORMER,
    BASE_LOOP,
    TMLT,
    IFM_LOOPEDLM,
    HRM,
    TRM,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    GPT2,
    GPT_NEOX,
)


def is_looped_config(released: Released) -> bool:
    """Whether a ``config.json`` names a family of looped models."""
    return any(family.matches(released) for family in FAMILIES if not family.feedforward)


def feedforward_family(name: str) -> Family:
    """The family of feedforward models of a name.

    Raises:
        CheckpointError: There is none.
    """
    known = {family.name: family for family in FAMILIES if family.feedforward}
    if name not in known:
        raise CheckpointError(
            f"there is no family {shortened(name)} of feedforward models; those whose blocks can "
            f"be looped are {', '.join(known)}"
        )
    return known[name]


def recognise(released: Released, where: str, stored_keys: Callable[[], Collection[str]]) -> Family:
    """The family of a checkpoint.

    Args:
        released: Content of ``config.json``.
        where: That file, for messages.
        stored_keys: Gives the keys of the stored tensors; called only where several families
            share the model type.

    Raises:
        CheckpointError: The config names no looped family, or one that is known not to load, or
            the tensors fit none of those that it may be.
    """
    candidates = [family for family in FAMILIES if family.matches(released)]
    if not candidates:
        reason = refusal(released)
        if reason is not None:
            raise CheckpointError(f"{where}: {reason}")
        known = sorted({kind for family in FAMILIES for kind in family.model_types})
        raise CheckpointError(
            f"{where} is of no known family: 'model_type' is "
            f"{released.get('model_type')!r}, 'architectures' is "
            f"{released.get('architectures')!r}; expected a model type among {', '.join(known)}. "
            "Where its blocks are those of a feedforward family, say so and state the loop: "
            "loop={'family': 'llama', 'n_prelude': ..., 'n_core': ..., 'n_iterations': ...}"
        )
    if len(candidates) == 1:
        return candidates[0]
    keys = stored_keys()
    for family in candidates:
        if family.has_tensors is not None and family.has_tensors(keys):
            return family
    names = ", ".join(family.name for family in candidates)
    raise CheckpointError(
        f"{where} may be of the families {names}, which the keys of the stored tensors tell apart, "
        f"but these fit none of them: {', '.join(sorted(keys)[:5]) or 'none could be read'}"
    )
