"""The trained models that findings are about, each with prompts and a loss."""

from dataclasses import dataclass

import torch
from finding import SkippedError
from pretrained import load
from torch import Tensor
from trajectories import prompts as prompts_of

from tl_loops import LoopedTransformer
from tl_loops.tasks import fact_chain_prompts
from tl_loops.training import token_losses

EMBEDDED = ("tl-loops-text", "tl-loops-tiny")
PRETRAINED = "SmolLM2-135M"


@dataclass(frozen=True)
class Subject:
    """A model, its prompts, and what it should say.

    Attributes:
        model: The model.
        prompts: Tokens, each [1, pos].
        answers: The token after each prompt; ``None``: every token but the first is predicted.
    """

    model: LoopedTransformer
    prompts: list[Tensor]
    answers: list[int] | None = None

    def loss(self, logits: Tensor, prompt: int) -> Tensor:
        """Mean loss of one prompt in nats; of its answer alone where it has one.

        Args:
            logits: [1, pos, d_vocab]
            prompt: Its number.
        """
        if self.answers is None:
            return token_losses(logits, self.prompts[prompt]).mean()
        return -logits[0, -1].float().log_softmax(-1)[self.answers[prompt]]


def embedded(name: str, n_prompts: int, seed: int) -> Subject:
    """One of the embedded models with prompts of what it was trained on."""
    model = LoopedTransformer.from_pretrained_no_processing(name)
    tokens = [model.to_tokens(text) for text in prompts_of(name, n_prompts, seed)]
    if name == "tl-loops-text":
        return Subject(model, tokens)
    asked = fact_chain_prompts(n_prompts, seed=seed)
    return Subject(model, tokens, [model.to_single_token(prompt.answer) for prompt in asked])


def pretrained(n_prompts: int, seed: int) -> Subject:
    """SmolLM2 with the verses, without a token in front.

    Raises:
        SkippedError: It is not installed.
    """
    model, _ = load()
    texts = prompts_of("tl-loops-text", n_prompts, seed)
    return Subject(model, [model.to_tokens(text, prepend_bos=False) for text in texts])


def subjects(quick: bool, n_prompts: int, seed: int) -> tuple[dict[str, Subject], dict[str, str]]:
    """The models by name, and why others are not there.

    Args:
        quick: One embedded model alone.
        n_prompts: Of each.
        seed: Of the prompts of the task.
    """
    if quick:
        return {EMBEDDED[1]: embedded(EMBEDDED[1], n_prompts, seed)}, {}
    found = {name: embedded(name, n_prompts, seed) for name in EMBEDDED}
    try:
        found[PRETRAINED] = pretrained(n_prompts, seed)
    except SkippedError as reason:
        return found, {PRETRAINED: str(reason)}
    return found, {}


def zero(activation: Tensor, hook: object) -> Tensor:
    """A hook that takes an activation away."""
    return torch.zeros_like(activation)
