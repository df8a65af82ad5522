"""What each iteration asks of the shared weights: gradients by iteration, in one backward pass."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.training.losses import token_losses
from tl_loops.upstream import left_as_it_was


@checked
@left_as_it_was
def iteration_gradients(
    model: Model, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "iteration weight"]:
    """The gradient of the next-token loss with respect to the core's weights, through each pass.

    Row t is what iteration t alone asks of the weights of the core's blocks, as if its blocks had
    weights of their own; the rows sum to the gradient that training sees. Their norms and
    cosines say whether all iterations pull the same way. What stands between the iterations (the
    injection's map, gains) is not part of it.

    Args:
        model: A looped model; its own gradients are not touched.
        tokens: At least 2 positions.

    Returns:
        [iteration, weight], all core weights in one line, in the order of the blocks' parameters.

    Raises:
        NoLoopError: The model has no loop.

    Source: 2602.10097, the step-decomposed gradients φ_t.
    """
    layout = require_layout(model)
    aliases: dict[str, Tensor] = {}
    by_iteration: list[list[Tensor]] = []
    with torch.enable_grad():
        for t in range(layout.n_iterations):
            by_iteration.append([])
            for index in layout.iteration_blocks(t):
                for name, parameter in model.blocks[index].named_parameters():
                    alias = parameter.detach().clone().requires_grad_()
                    aliases[f"blocks.{index}.{name}"] = alias
                    by_iteration[-1].append(alias)
        logits = functional_call(model, aliases, (tokens,), tie_weights=False)  # pyright: ignore[reportArgumentType]  # a Protocol of a module
        loss = token_losses(logits, tokens).mean()
        flat = [alias for row in by_iteration for alias in row]
        gradients = torch.autograd.grad(loss, flat, allow_unused=True)
    filled = iter(
        torch.zeros_like(a) if g is None else g for a, g in zip(flat, gradients, strict=True)
    )
    return torch.stack([torch.cat([next(filled).flatten() for _ in row]) for row in by_iteration])
