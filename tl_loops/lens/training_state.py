"""The state of a training: what a step changes, and the file that lets a killed one go on."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import CheckpointError
from tl_loops.runs.batch_file import RunDescription, SavedRun, read_file
from tl_loops.runs.shards import WHOLE

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""


class TrainingState:
    """Parameters, Adam's moments, the losses so far and the draws to come.

    Args:
        parameters: What is trained.
        learning_rate: At the first step; it falls linearly to 0.
        losses: Filled step by step, [step, ...].
        generator: Source of the draws.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rate: float,
        losses: Float[Tensor, "step *rest"],
        generator: torch.Generator,
    ):
        self.parameters, self.learning_rate = list(parameters), learning_rate
        self.losses, self.generator, self.n_done = losses, generator, 0
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)

    def step(self, losses: Float[Tensor, "*rest"]) -> None:
        """Make one step with the gradients that the parameters hold."""
        left = 1.0 - self.n_done / self.losses.shape[0]
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * left
        self.optimizer.step()
        self.losses[self.n_done] = losses
        self.n_done += 1

    def save(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all.

        Args:
            path: Of the file.
            identity: What decides the result, in JSON's types.

        Raises:
            OSError: The file cannot be written; what it held before stays.
        """
        tensors = {"losses": self.losses, "generator": self.generator.get_state()}
        kept = self.optimizer.state
        for number, parameter in enumerate(self.parameters):
            tensors[f"{number}.parameter"] = parameter
            for name in _MOMENTS if parameter in kept else ():
                tensors[f"{number}.{name}"] = kept[parameter][name]
        SavedRun(self._run(identity), WHOLE, {self.n_done: tensors}, str(path)).save(path)

    def _run(self, identity: Mapping[str, Any]) -> RunDescription:
        # The state after a step is the one batch of its file, under the number of steps done.
        return RunDescription("training", identity, self.losses.shape[0] + 1, {})

    @torch.no_grad()
    def go_on(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Take up the state of a file; without one, write the present state.

        Raises:
            CheckpointError: The file is damaged, or of another run.
        """
        found = read_file(path)
        if found is None:
            self.save(path, identity)  # a path that fails, fails now
            return
        self._run(identity).check_same(found.run, "this call", str(path))
        n_done, tensors = next(iter(found.batches.items()), (0, {}))
        names = ["parameter", *(_MOMENTS if n_done else ())]
        wanted = {f"{i}.{name}" for i in range(len(self.parameters)) for name in names}
        if set(tensors) != wanted | {"losses", "generator"}:
            raise CheckpointError(
                f"{path} does not hold the state of this training; delete it or give another path"
            )
        self.n_done = n_done
        self.losses.copy_(tensors["losses"])
        self.generator.set_state(tensors["generator"])
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"{number}.parameter"])
            if n_done:
                self.optimizer.state[parameter] = {
                    name: tensors[f"{number}.{name}"].to(
                        parameter.device if name != "step" else "cpu"
                    )
                    for name in _MOMENTS
                }
