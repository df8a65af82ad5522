"""The task of ``tl-loops-tiny`` as training data, with the answers at every exit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.tasks import FactChainTask, Prompt, fact_chain_prompts
from tl_loops.training import UNTRAINED, TrainingBatch

MOST_HOPS = FactChainTask().max_hops


def asked(model: LoopedTransformer, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Tokens [prompt, pos] and answers [prompt]; all prompts have one length."""
    tokens = torch.cat([model.to_tokens(prompt.text) for prompt in prompts])
    return tokens, torch.tensor([model.to_single_token(prompt.answer) for prompt in prompts])


@dataclass(frozen=True)
class FactChains:
    """Training prompts, whose last position is trained.

    Attributes:
        model: Whose tokenizer reads them.
        hop_by_hop: Whether the person after min(t, k) hops is asked for after t iterations;
            otherwise the one after all k hops is, at every exit.
    """

    model: LoopedTransformer
    hop_by_hop: bool

    def draw(self, n: int, generator: torch.Generator) -> TrainingBatch:
        """Prompts of the training split."""
        seed = int(torch.randint(2**62, (), generator=generator))
        prompts = fact_chain_prompts(n, seed=seed, split="train")
        tokens, answers = asked(self.model, prompts)
        rows = MOST_HOPS if self.hop_by_hop else 1
        targets = torch.full((rows, *tokens.shape), UNTRAINED)
        targets[:, :, -1] = answers
        for t in range(rows - 1):
            people = [prompt.hops[min(t, prompt.n_hops - 1)] for prompt in prompts]
            targets[t, :, -1] = torch.tensor([self.model.to_single_token(who) for who in people])
        return TrainingBatch(tokens, targets)

    def identity(self) -> dict[str, Any]:
        """The task, and which answers are asked for."""
        return {"task": "fact chains", "hop_by_hop": self.hop_by_hop}
