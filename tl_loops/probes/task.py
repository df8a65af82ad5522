"""Task probes: what a linear probe reads of a label, at each iteration and layer, with controls."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.metrics.linear_probes import Fit, fit_linear_probes, wilson_interval
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short
from tl_loops.probes.labels import Label, LabelSplit, check_fit, split_labels
from tl_loops.probes.results import SavedResult, frame_by_place
from tl_loops.probes.states import PromptStates

if TYPE_CHECKING:
    import pandas


@prints_short
@dataclass(frozen=True, eq=False)
class TaskProbes(SavedResult):
    """A linear probe for a label at each iteration and layer, and how it does on other prompts.

    ``iteration`` and ``layer`` count along :attr:`iterations` and :attr:`layers`.

    Attributes:
        weight: [iteration, layer, class, width], float64, for the states as they are: the class of
            a state is the largest of ``state @ weight.T + bias``.
        bias: [iteration, layer, class].
        held_out: Which of the states' prompts were tested on, [held_out].
        labels: Their classes, as indices into :attr:`classes`, [held_out].
        predictions: The classes that the probes give them, [iteration, layer, held_out].
        controls: Accuracy on held-out prompts where all labels are shuffled, for each shuffle,
            [shuffle, iteration, layer].
        train_accuracy: Accuracy on the prompts that were fitted, [iteration, layer].
        transfer: Accuracy on held-out prompts of the probe that was fitted at one iteration and
            tested at another, [fitted, tested, layer].
        majority: Accuracy of always naming the class that most fitted prompts have.
        n_train: Number of prompts that were fitted.
        classes: The labels, in order.
        activation: What was read.
        iterations: Number of each iteration.
        layers: Number of each layer.
        points: Short label of each place, iteration by iteration.
        fit: ``"ridge"`` or ``"logistic"``.
        ridge: The penalty.
    """

    _kind = "task_probes"

    weight: Float[Tensor, "iteration layer class width"]
    bias: Float[Tensor, "iteration layer class"]
    held_out: Int[Tensor, "held_out"]
    labels: Int[Tensor, "held_out"]
    predictions: Int[Tensor, "iteration layer held_out"]
    controls: Float[Tensor, "shuffle iteration layer"]
    train_accuracy: Float[Tensor, "iteration layer"]
    transfer: Float[Tensor, "fitted tested layer"]
    majority: float
    n_train: int
    classes: tuple[Label, ...]
    activation: str
    iterations: tuple[int, ...]
    layers: tuple[int, ...]
    points: tuple[str, ...]
    fit: str
    ridge: float

    @property
    def accuracy(self) -> Float[Tensor, "iteration layer"]:
        """Share of held-out prompts whose class is named right."""
        return (self.predictions == self.labels).double().mean(-1)

    @property
    def control(self) -> Float[Tensor, "iteration layer"]:
        """Mean accuracy over the shuffles of the labels."""
        return self.controls.mean(0)

    @property
    def selectivity(self) -> Float[Tensor, "iteration layer"]:
        """Accuracy minus control (after 1909.03368, with shuffled labels as the control task)."""
        return self.accuracy - self.control

    @checked
    def interval(self, confidence: float = 0.95) -> Float[Tensor, "iteration layer 2"]:
        """Wilson's confidence interval of the accuracy, over held-out prompts.

        Raises:
            ValueError: The confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
        return wilson_interval(self.accuracy, len(self.labels), confidence)

    @checked
    def predict(self, states: PromptStates) -> Int[Tensor, "iteration layer prompt"]:
        """The class that each probe gives each prompt, as an index into :attr:`classes`.

        Raises:
            ValueError: The states are of other places.
        """
        for name in ("activation", "iterations", "layers"):
            if getattr(self, name) != getattr(states, name):
                raise ValueError(
                    f"the probes are of {name} {getattr(self, name)}, the states of "
                    f"{getattr(states, name)}"
                )
        if states.values.shape[-1] != self.weight.shape[-1]:
            raise ValueError(
                f"the probes read {self.weight.shape[-1]} dimensions, but the states have "
                f"{states.values.shape[-1]}"
            )
        scores = states.values.double() @ self.weight.mT + self.bias.unsqueeze(-2)
        return scores.argmax(-1)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per iteration and layer.

        Columns: ``point`` (its label), ``iteration``, ``layer``, ``accuracy``, ``low`` and ``high``
        (its interval at 95%), ``control``, ``selectivity``, ``majority``, ``train_accuracy``.
        """
        interval = self.interval()
        columns = {
            "accuracy": self.accuracy,
            "low": interval[..., 0],
            "high": interval[..., 1],
            "control": self.control,
            "selectivity": self.selectivity,
            "majority": torch.full_like(self.control, self.majority),
            "train_accuracy": self.train_accuracy,
        }
        return frame_by_place(self, columns)

    def transfer_to_frame(self) -> "pandas.DataFrame":
        """One row per pair of iterations and layer: ``fitted``, ``tested``, ``layer``, accuracy."""
        import pandas

        rows = [
            (a, b, layer, float(self.transfer[i, j, k]))
            for i, a in enumerate(self.iterations)
            for j, b in enumerate(self.iterations)
            for k, layer in enumerate(self.layers)
        ]
        return pandas.DataFrame(rows, columns=["fitted", "tested", "layer", "accuracy"])


@checked
@torch.no_grad()
@full_precision
def task_probes(
    states: PromptStates,
    labels: Any,
    *,
    train: Bool[Tensor, "prompt"] | None = None,
    train_fraction: float = 0.7,
    seed: int = 0,
    fit: Fit = "ridge",
    ridge: float = 0.01,
    n_shuffles: int = 10,
) -> TaskProbes:
    """Fit a linear probe for a label at each iteration and layer, and test it on held-out prompts.

    Features are standardised by the fitted prompts; all is worked in float64. The control fits the
    same probe to labels shuffled among the fitted prompts, and tests it on labels shuffled among
    the held-out ones: what a probe of this size gets from nothing.

    Args:
        states: Of :func:`gather_states`.
        labels: One for each prompt: texts, integers or booleans.
        train: True for each prompt to fit on, False for each to test on; ``None``: drawn. Give it
            where prompts are alike, so that those that are stand on one side.
        train_fraction: Share of each class that is drawn to fit on.
        seed: Fixes the draw and the shuffles.
        fit: ``"ridge"``: least squares to one-hot labels, in closed form. ``"logistic"``:
            multinomial logistic regression by L-BFGS.
        ridge: L2 penalty on the weights of standardised features, per prompt.
        n_shuffles: How often the labels are shuffled for the control.

    Returns:
        The probes, with their accuracy, its interval, control and transfer matrices.

    Raises:
        ValueError: Labels that do not fit the prompts, of one class, with NaN; too few prompts of a
            class; states that are not finite; an option out of range.

    Source: linear probes 1610.01644, selectivity 1909.03368; transfer between iterations
    2604.09870.
    """
    check_fit(fit, ridge, train_fraction)
    check_finite(states)
    n_prompts = states.values.shape[2]
    split = split_labels(labels, n_prompts, train, train_fraction, seed, n_shuffles)
    T, n_layers, _, width = states.values.shape
    n_classes = len(split.classes)
    weight = torch.zeros(T, n_layers, n_classes, width, dtype=torch.float64)
    bias = torch.zeros(T, n_layers, n_classes, dtype=torch.float64)
    predictions = torch.zeros(T, T, n_layers, len(split.held_out), dtype=torch.long)
    controls = torch.zeros(n_shuffles, T, n_layers, dtype=torch.float64)
    train_accuracy = torch.zeros(T, n_layers, dtype=torch.float64)
    for layer in range(n_layers):
        for t in range(T):
            x = states.values[t, layer].double()
            fitted = fit_linear_probes(x[split.train], split.train_labels, n_classes, fit, ridge)
            train_accuracy[t, layer], controls[:, t, layer] = _scored(x, fitted, split)
            weight[t, layer], bias[t, layer] = fitted[0][0], fitted[1][0]
        held_out = states.values[:, layer, split.held_out].double()
        for t in range(T):
            scores = held_out @ weight[t, layer].T + bias[t, layer]
            predictions[t, :, layer] = scores.argmax(-1)
    right = predictions == split.held_out_labels[0]
    own = torch.arange(T)
    return TaskProbes(
        weight=weight,
        bias=bias,
        held_out=split.held_out,
        labels=split.held_out_labels[0],
        predictions=predictions[own, own],
        controls=controls,
        train_accuracy=train_accuracy,
        transfer=right.double().mean(-1),
        majority=split.majority,
        n_train=len(split.train),
        classes=split.classes,
        activation=states.activation,
        iterations=states.iterations,
        layers=states.layers,
        points=states.points,
        fit=fit,
        ridge=ridge,
    )


def check_finite(states: PromptStates) -> None:
    """Raise for states that hold NaN or infinity.

    Raises:
        ValueError: The message names the place and the prompt.
    """
    finite = states.values.isfinite().all(-1)
    if not bool(finite.all()):
        t, layer, prompt = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the state of prompt {states.prompts[prompt]} at {states.label(t, layer)} holds NaN "
            "or inf: leave that prompt out"
        )


def _scored(x: Tensor, fitted: tuple[Tensor, Tensor], split: LabelSplit) -> tuple[Tensor, Tensor]:
    """Accuracy on the fitted prompts, and of the shuffled probes on the held-out ones."""
    weight, bias = fitted
    train = (x[split.train] @ weight[0].T + bias[0]).argmax(-1)
    shuffled = (x[split.held_out] @ weight[1:].mT + bias[1:].unsqueeze(1)).argmax(-1)
    return (
        (train == split.train_labels[0]).double().mean(),
        (shuffled == split.held_out_labels[1:]).double().mean(-1),
    )
