"""What a mechanism of a loop may say of itself: everything about it is in one module.

A mechanism is something a loop does besides running its core blocks: where its state begins, how
the prelude's output enters, what gates, routes or ends an iteration. The config, its checks, its
description, the weights, the hook points, the model and the run go over the list in
:mod:`tl_loops.mechanisms` and name none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import HookSpec, Place
from tl_loops.mechanisms.block_parts import AttentionPart, BlockPart, Branch, Context, MLPPart
from tl_loops.mechanisms.tensors import Tensors

Config: TypeAlias = Any
"""A LoopedTransformerConfig. Its class takes fields from the mechanisms, so they cannot name it."""

Run: TypeAlias = Any
"""A :class:`tl_loops.nn.loop.run.StackRun`, which stands above the mechanisms."""


@dataclass(frozen=True)
class Setting:
    """One config field.

    Attributes:
        name: Its name.
        kind: Its type, as an annotation.
        default: Its default.
        about: What it means, for the config's documentation.
        choices: The values that it may take, where they are a few names.
        refused: Values that are known and not supported, with the reason.
        at_least: The smallest value, where it is a number.
        above: What it must be above, where it is a number.
        at_most: The largest value, where it is a number.
        unset: A number out of this range that stands for a value that is worked out.
        of_the_weights: Whether stored tensors fix it, so that loading cannot choose it.
        computes: Whether it decides what a run computes, so that ``describe()`` has to say it.
    """

    name: str
    kind: Any
    default: Any
    about: str
    choices: tuple[Any, ...] | None = None
    refused: Mapping[str, str] | None = None
    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    unset: int | float | None = None
    of_the_weights: bool = True
    computes: bool = True


@dataclass(frozen=True)
class OnPath:
    """What a mechanism does to the residual stream as an iteration begins, for decompositions.

    Attributes:
        adds: Hook points between iterations whose values are added to the stream.
        refused: Why the stream is no sum along one path from there on; ``None``: it still is.
    """

    adds: tuple[str, ...] = ()
    refused: str | None = None


LEAVES_LOOP = {"leaves the loop": "each says what leaves the loop"}
LEAVES_ITERATION = {"leaves an iteration": "each says what an iteration leaves"}
DECIDES_KEYS = {"keys": "each decides which keys there are"}
"""What at most one mechanism of a model decides."""

MIXES_STATES = (
    "halting, routing, gates or hyper-connections mix the states of this loop, so what reaches "
    "this place is no sum along one path: decompose a place before it (state_out=t with "
    "halting='act'), or patch"
)
"""Why a decomposition ends at a mechanism that mixes states, and what to do instead."""


class Part:
    """What one mechanism does in one run. Every method gives what it is given, unless overridden.

    An iteration enters the parts in reverse order of the list and leaves them in its order: what
    stands later in the list is further from the core.
    """

    def __init__(self, run: Run):
        self.run = run

    def begin(self, x: Tensor) -> Tensor:
        """From what the prelude (or the embedding) gives to the state before iteration 0."""
        return x

    def read(self, t: int, x: Tensor) -> Tensor:
        """The state that iteration ``t`` reads, before ``hook_state_in``."""
        return x

    def enter(self, t: int, state: Tensor) -> Tensor:
        """From the state (after ``hook_state_in``) towards what enters the first core block."""
        return state

    def layer_context(self, index: int, context: Any) -> Any:
        """The context of an unrolled block, for what its physical layer alone decides."""
        return context

    def context(self, t: int, layer: int, context: Any, x: Tensor) -> Any:
        """The context of a core block, after that of its layer."""
        return context

    def leave(self, t: int, state: Tensor) -> Tensor:
        """From what leaves the last core block towards the state that the iteration leaves."""
        return state

    def left(self, t: int, state: Tensor, unhooked: Tensor) -> Tensor:
        """After ``hook_state_out``; ``unhooked`` is what that hook point was given."""
        return state


class Mechanism:
    """One mechanism, as everything that others ask about it. A subclass says what differs.

    Attributes:
        name: The config field that turns it on, and its name in messages.
        settings: Its config fields.
        points: Its hook points.
        owners: The model's attributes that own its weights, in the order of the data flow.
        reads_out: Whether its weights stand after the unembedding in the order of the weights.
        with_stacks: Whether it works with two stacks.
        own_keys: Why its iterations cannot share keys and values; ``None``: they can.
    """

    name: str = ""
    settings: tuple[Setting, ...] = ()
    points: tuple[HookSpec, ...] = ()
    owners: tuple[str, ...] = ()
    reads_out: bool = False
    with_stacks: bool = True
    own_keys: str | None = None

    def active(self, cfg: Config) -> bool:
        """Whether a config asks for it: by default, whether its first field is set."""
        return bool(getattr(cfg, self.settings[0].name))

    def said(self, cfg: Config) -> str:
        """Its name in messages about this config."""
        return self.name

    # Checks.

    def check(self, cfg: Config) -> None:
        """Raise on values that do not go together; called also where it is not active.

        Raises:
            ConfigError: The message names the field and what to use instead.
        """

    def check_iterations(self, cfg: Config, n_iterations: int) -> None:
        """Raise on a number of iterations that it cannot run; called where it is active.

        Raises:
            ConfigError: The message says which it can.
        """

    def decides(self, cfg: Config) -> Mapping[str, str]:
        """What it decides, such as :data:`LEAVES_LOOP`: no two may decide the same."""
        return {}

    # What it is.

    def has_rows(self, cfg: Config) -> bool:
        """Whether some weight has a row of its own for every iteration."""
        return False

    def phrases(self, cfg: Config) -> dict[str, str]:
        """Formulas for the data flow by place.

        Places are ``"e"``, ``"begin"``, ``"enter"``, ``"leave"``, ``"after"`` and ``"coda"``.
        """
        return {}

    def describe(self, cfg: Config) -> list[str]:
        """Further lines of ``describe()``."""
        return []

    def points_of(self, cfg: Config, place: Place) -> tuple[HookSpec, ...]:
        """Its hook points at a place with this config."""
        return tuple(point for point in self.points if point.place == place)

    # Its weights.

    def norms(self, cfg: Config) -> tuple[str, ...]:
        """Names of norms of the model's width, with gains, that the model has for it."""
        return ()

    def weights(self, cfg: Config) -> Tensors:
        """Its weights beside the blocks and norms, by physical name."""
        return {}

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        """Its weights in a physical layer, counted through prelude, core and coda."""
        return {}

    def modules(
        self, cfg: Config, device: torch.device | str | None = None
    ) -> dict[str, nn.Module]:
        """The modules that own its weights beside the blocks, by the model's attribute."""
        return {}

    def block_modules(
        self, cfg: Config, number: int, device: torch.device | str | None = None
    ) -> dict[str, nn.Module]:
        """The modules of a physical layer, by name in the block: ``"attn.hook_gate"``."""
        return {}

    def iteration_modules(self, cfg: Config, iteration: int) -> dict[str, nn.Module]:
        """Modules without weights of one iteration, by name in it."""
        return {}

    def rotary_bases(self, cfg: Config) -> tuple[float, ...]:
        """Rotary bases besides ``rotary_base`` that some layers rotate by."""
        return ()

    def effective(self, block: Any, weight: str, W: Tensor) -> Tensor:
        """A weight of a block (``"W_Q"``, ``"W_out"``) as the block applies it."""
        return W

    def kept(self, block: Any, branch: Branch) -> Tensor | None:
        """The share of the stream that an add keeps, [d_model]; ``None``: all of it."""
        return None

    def added(self, block: Any, branch: Branch) -> Tensor | None:
        """The share of a branch's (normed) output that is added, [d_model]; ``None``: all."""
        return None

    def fold_attention_norm(self, block: Any, gain: Tensor) -> None:
        """Fold the gain of a block's pre-attention norm into weights of its own that read it."""

    def keeps_value_biases(self, cfg: Config) -> str | None:
        """Why ``b_V`` is no constant in what attention writes; ``None``: it is one."""
        return None

    # Its part in a run.

    def part(self, run: Run) -> Part | None:
        """Its part of one run; ``None``: it has none."""
        return None

    def block_part(self, block: Any, context: Context) -> BlockPart | None:
        """Its part of one call of a block; ``None``: it has none."""
        return None

    def attention_part(self, attention: Any, context: Context) -> AttentionPart | None:
        """Its part of one call of an attention; ``None``: it has none."""
        return None

    def mlp_part(self, mlp: Any) -> MLPPart | None:
        """Its part of one call of an MLP; ``None``: it has none."""
        return None

    def scales_branches(self, cfg: Config) -> bool:
        """Whether what the branches of a block read and write is scaled by the iteration."""
        return False

    def carries(self, cfg: Config) -> str | None:
        """What it takes from one iteration to the next besides the state; ``None``: nothing."""
        return None

    def remixes(self, cfg: Config) -> bool:
        """Whether the state that an iteration leaves is something else than its last block gives.

        The norm between iterations does not count.
        """
        return False

    def sums_states(self, cfg: Config) -> bool:
        """Whether the sum of all states leaves the loop, and no single one."""
        return False

    def path(self, cfg: Config) -> OnPath:
        """What it does to the residual stream as an iteration begins, for decompositions.

        One that mixes states raises, and so does one with a part of its own that does not say what
        it does, so that nothing is wrong in silence.
        """
        if type(self).part is Mechanism.part and not self.remixes(cfg):
            return OnPath()
        return OnPath(refused=f"{self.name}: {MIXES_STATES}")

    def path_after_loop(self, cfg: Config) -> OnPath:
        """What it does to the residual stream as it leaves the loop."""
        return OnPath()


def check_choice(name: str, setting: Setting, value: Any) -> None:
    """Raise on a value that a field may not have.

    Raises:
        ConfigError: The message names the field, the value and what is expected.
    """
    if setting.refused is not None and value in setting.refused:
        raise ConfigError(f"{name}={value!r} {setting.refused[value]}")
    if setting.choices is not None and value not in setting.choices:
        choices = ", ".join(map(repr, setting.choices))
        raise ConfigError(f"{name} must be one of {choices}, got {value!r}")
