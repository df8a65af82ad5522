"""Looped models that are published and do not load, with what is missing."""

from dataclasses import dataclass

from tl_loops.families.base import Released


@dataclass(frozen=True)
class Refused:
    """A published looped model that does not load.

    Attributes:
        name: What its authors call it.
        models: Repositories on the hub, as far as they are known.
        model_types: Values of ``model_type`` in ``config.json``, as far as they are known.
        architectures: Values in the list ``architectures`` there.
        reason: What is missing, as the end of "... do not load: ...".
    """

    name: str
    models: tuple[str, ...]
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    reason: str

    def matches(self, released: Released) -> bool:
        """Whether ``config.json`` names this model by model type or architecture."""
        architectures = released.get("architectures")
        named = architectures if isinstance(architectures, list) else []
        return released.get("model_type") in self.model_types or any(
            architecture in self.architectures for architecture in named
        )


REFUSED: tuple[Refused, ...] = (
    Refused(
        "Inkling-2",
        ("thinkingmachines/Inkling-2-Mini",),
        ("inkling2_loop", "inkling2_loop_text"),
        ("Inkling2LoopForCausalLM", "Inkling2LoopForConditionalGeneration"),
        "attention residuals over blocks of layers, gates of messages between passes, short "
        "convolutions, relative position biases, sliding windows and a mixture of experts are not "
        "implemented",
    ),
    Refused(
        "LoopCoder-V2",
        ("Multilingual-Multimodal-NLP/LoopCoder-V2",),
        ("iquestpltcoder",),
        ("IQuestPLTCoderForCausalLM",),
        "no modelling code was released, and public ports disagree on what the second pass reads: "
        "a·E + b·h of the same position, or of the position before it as the paper has it. That "
        "step, and a gate that reads the normed stream instead of the query, are not implemented",
    ),
    Refused(
        "LoopLM",
        ("harims95/LoopLM-135M-naive", "harims95/LoopLM-135M-naive-sft"),
        (),
        ("LoopLMForCausalLM",),
        "two versions of their training code are public, of the same tensors and with different "
        "numbers: in one each iteration leaves block(h + e), in the other h plus what the block "
        "adds to h + e, without e; which of them made the weights is not known, as the file that "
        "comes with the weights was not seen",
    ),
    Refused(
        "ALBERT",
        ("albert/albert-base-v2",),
        ("albert",),
        ("AlbertForMaskedLM", "AlbertModel"),
        "it is an encoder: embeddings of a smaller width with a projection, types of tokens and "
        "the head of a masked language model are not implemented",
    ),
)
"""What is told apart by ``config.json``; docs/families.md has further models, whose is unseen."""


def refusal(released: Released) -> str | None:
    """Why a published model does not load; ``None``: it is none of those known not to."""
    for refused in REFUSED:
        if refused.matches(released):
            return f"{refused.name} models do not load: {refused.reason}"
    return None
