"""A training run that survives a kill: weights, optimiser and log in one file, whole or not."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_loops.errors import CheckpointError
from tl_loops.layout.model import Model
from tl_loops.runs import storage
from tl_loops.runs.batch_file import RunDescription
from tl_loops.runs.identity import identity_of
from tl_loops.training.data import AdaptiveData, TrainingData
from tl_loops.training.log import TrainingLog
from tl_loops.training.settings import TrainingSettings
from tl_loops.writing import check_regular

_KIND = "training run"


@dataclass
class Progress:
    """What a run needs to go on.

    Attributes:
        n_done: Steps that are done.
        log: Of these steps.
        data: What batches are drawn from; of adaptive data the state is kept.
    """

    n_done: int
    log: TrainingLog
    data: TrainingData


def run_identity(
    model: Model,
    data: TrainingData,
    settings: TrainingSettings,
    evaluation: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the numbers of a run, its weights at the start among them."""
    return identity_of(
        model,
        data={"kind": type(data).__name__, **data.identity()},
        training=settings.identity(),
        evaluation=dict(evaluation),
        state_seed=getattr(model.cfg, "state_seed", None),
    )


def save_progress(
    path: str | os.PathLike[str],
    identity: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write a run; a kill at any moment leaves this state or the one before.

    Args:
        path: Of the file.
        identity: Of the run.
        parameters: By physical name.
        optimiser: Over these parameters.
        progress: How far it is.

    Raises:
        FileNotFoundError: The directory does not exist.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{key}.{name}"] = value
    for name, table in progress.log.tensors().items():
        tensors[f"log.{name}"] = table
    about = {
        "identity": dict(identity),
        "n_done": progress.n_done,
        "looks": progress.log.looks,
        "data": dict(progress.data.state()) if isinstance(progress.data, AdaptiveData) else None,
    }
    storage.save_artefact(Path(path), f"tl_loops {_KIND}", tensors, about)


def load_progress(
    path: str | os.PathLike[str],
    identity: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    n_steps: int,
    data: TrainingData,
) -> Progress | None:
    """Put weights, optimiser and data where the run was; nothing is changed if anything is wrong.

    Returns:
        How far the run is; ``None`` if there is no file.

    Raises:
        CheckpointError: The file is damaged, belongs to another run, or lacks a tensor.
    """
    if not check_regular(path).exists():
        return None
    try:
        tensors, about = storage.load_artefact(Path(path), f"tl_loops {_KIND}", [])
        n_done, theirs = int(about["n_done"]), dict(about["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint of a {_KIND} ({error}); delete it or give another "
            "path"
        ) from error
    here = RunDescription(_KIND, identity, n_steps, {})
    here.check_same(RunDescription(_KIND, theirs, n_steps, {}), "this run", str(path))
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        weight = tensors.get(f"weight.{name}")
        if weight is None or weight.shape != parameter.shape or weight.dtype != parameter.dtype:
            raise CheckpointError(
                f"{path} does not hold {name} as {list(parameter.shape)} of {parameter.dtype}; "
                "delete it or give another path"
            )
        state[parameter] = {
            key.split(".", 2)[1]: value
            for key, value in tensors.items()
            if key.startswith("optimiser.") and key.split(".", 2)[2] == name
        }
    try:
        log = TrainingLog.from_tensors(
            {key[4:]: value for key, value in tensors.items() if key.startswith("log.")}
        )
        log.looks = [(int(step), found) for step, found in about["looks"]]
        of_data = about["data"]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} holds no whole log of its run; delete it") from error
    if isinstance(data, AdaptiveData):
        data.load_state(of_data)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
    for parameter, values in state.items():
        if values:  # the count of steps stays on the CPU, where AdamW keeps it
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in values.items()
            }
    return Progress(n_done, log, data)
