"""Iterations that call one of two stacks, each with a state of its own (HRM, TRM)."""

from typing import Any

from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.initial_state import InitialState, initial_state_in_words, state_weights
from tl_loops.mechanisms.injection import injection_in_words
from tl_loops.mechanisms.mechanism import Config, Mechanism, OnPath, Part, Run, Setting
from tl_loops.mechanisms.tensors import Tensors
from tl_loops.upstream import unshared


class _TwoStates(Part):
    """An iteration is one call: it reads the sum of both states and replaces that of its stack.

    With an injection, calls of the fast stack read e, too. The residual stream between iterations
    is the state that the call before has left.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        self._states: dict[str, Tensor] = {}
        first = run.layout.coordinate(run.start) if run.start < run.layout.n_layers else None
        if first is not None and first.stack is not None and run.other_state is not None:
            self._states[self._other(first.stack)] = run.other_state

    def _other(self, stack: str) -> str:
        return next(name for name in self.run.cfg.stacks if name != stack)

    def begin(self, x: Tensor) -> Tensor:
        run, model = self.run, self.run.model
        slow = x
        if run.cfg.slow_initial_state == "learned":
            slow = model.slow_initial_state(x, run.context.positions)
        hook = model.hook_slow_initial_state
        self._states[run.cfg.slow_stack] = hook(unshared(slow, hook))
        return x

    def read(self, t: int, x: Tensor) -> Tensor:
        return self._states.setdefault(self.run.layout.stacks[t], x)

    def enter(self, t: int, state: Tensor) -> Tensor:
        other = self._states[self._other(self.run.layout.stacks[t])]
        hook = self.run.model.iter[t].hook_other_in
        return state + hook(unshared(other, hook))

    def left(self, t: int, state: Tensor, unhooked: Tensor) -> Tensor:
        self._states[self.run.layout.stacks[t]] = state
        return state


class _Stacks(Mechanism):
    name = "stacks"
    owners = ("slow_initial_state",)
    settings = (
        Setting(
            "stacks",
            tuple[str, ...] | None,
            None,
            'The two stacks, e.g. ``("L", "L", "L", "H")``, that the iterations of one cycle call '
            "(HRM). Each has ``n_core`` layers and a state of its own; an iteration is one call, "
            "which reads the sum of both states and replaces that of its stack. The stack that the "
            "cycle calls last is the slow one: its state is read out. ``n_iterations`` is a "
            "multiple of the cycle. ``None``: one stack, one state. With an injection e "
            "enters the calls of the other stack alone (HRM, TRM), unless ``slow_injection``.",
        ),
        Setting(
            "shared_stacks",
            bool,
            False,
            "Both stacks are the same layers (TRM); their states stay two.",
        ),
        Setting(
            "layer_repeats",
            int,
            1,
            "How often in a row a call runs its layers (IFM's split states). The injection and the "
            "other state enter once, before the first of them. ``n_core`` counts all blocks of a "
            "call, so it is a multiple.",
            at_least=1,
        ),
        Setting(
            "slow_injection",
            bool,
            False,
            "With an injection e enters the calls of the slow stack, too.",
            of_the_weights=False,
        ),
        Setting(
            "slow_initial_state",
            str,
            "embed",
            'The slow stack\'s state before iteration 0: ``"embed"`` (what the prelude, or the '
            'embedding, gives) or ``"learned"``. ``initial_state`` is the other\'s.',
            choices=("embed", "learned"),
        ),
    )
    points = (
        spec("hook_slow_initial_state", "run", "batch pos d_model", moment="loop"),
        spec("hook_other_in", "iteration", "batch pos d_model", moment="before"),
    )
    own_keys = "iterations of two stacks run other layers"

    def active(self, cfg: Config) -> bool:
        return cfg.stacks is not None

    def check(self, cfg: Config) -> None:
        stacks = cfg.stacks
        if stacks is None:
            if cfg.slow_initial_state != "embed" or cfg.shared_stacks or cfg.slow_injection:
                raise ConfigError(
                    "slow_initial_state, shared_stacks and slow_injection need stacks"
                )
            if cfg.layer_repeats != 1:
                raise ConfigError(
                    f"layer_repeats={cfg.layer_repeats} needs stacks: with one state, write more "
                    "iterations"
                )
            return
        names = [name for name in stacks if isinstance(name, str) and name.isidentifier()]
        if len(names) < len(stacks) or len(set(stacks)) != 2 or stacks.count(stacks[-1]) != 1:
            raise ConfigError(
                "stacks must name two stacks, the slow one once and last, "
                f"as ('L', 'L', 'H'), got {stacks!r}"
            )
        self.check_iterations(cfg, cfg.n_iterations)
        if cfg.slow_injection and cfg.injection is None:
            raise ConfigError("slow_injection needs an injection")

    def check_iterations(self, cfg: Config, n_iterations: int) -> None:
        if cfg.stacks is not None and n_iterations % len(cfg.stacks):
            raise ConfigError(
                f"n_iterations must be a multiple of {len(cfg.stacks)}, the calls of one cycle "
                f"{' '.join(cfg.stacks)}, got {n_iterations}"
            )

    def phrases(self, cfg: Config) -> dict[str, str]:
        slow_state = {"embed": "e", "learned": "learned vector"}[cfg.slow_initial_state]
        layers = ", both of the same layers" if cfg.shared_stacks else ""
        fast, slow = f"z{cfg.stacks[0]}", f"z{cfg.stacks[-1]}"
        norm = "norm(x)" if cfg.own_norm_between_iterations else "ln_final(x)"
        after = norm if cfg.norm_between_iterations else "x"
        into_fast, into_slow = f"x = {fast} + {slow}", f"x = {slow} + {fast}"
        if cfg.injection is not None:
            into_fast = injection_in_words(cfg, f"{fast} + {slow}")
        if cfg.slow_injection:
            into_slow = injection_in_words(cfg, f"{slow} + {fast}")
        repeats = cfg.layer_repeats
        run, cycles = f"{cfg.n_core // repeats} x block", cfg.n_iterations // len(cfg.stacks)
        run = run if repeats == 1 else f"{repeats} x ({run})"
        calls = [
            f"core     {cycles} x [ calls of {' '.join(cfg.stacks)} ], each call{layers}:",
            f"  {cfg.stacks[0]:<6} {into_fast}; {run}; {fast} = {after}",
            f"  {cfg.stacks[-1]:<6} {into_slow}; {run}; {slow} = {after}",
        ]
        return {
            "begin": f"{fast} {initial_state_in_words(cfg)}, {slow} = {slow_state}",
            "calls": "\n".join(calls),
            "state": slow,
        }

    def weights(self, cfg: Config) -> Tensors:
        return state_weights("slow_initial_state", cfg.slow_initial_state, cfg.d_model)

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"slow_initial_state": InitialState(cfg, cfg.slow_initial_state, device)}

    def part(self, run: Run) -> Part:
        return _TwoStates(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath(
            refused="this model has two stacks with a state each, so its residual stream is no "
            "single sum of components; patch iter.{t}.hook_state_in, hook_other_in or "
            "hook_state_out, or read cache.stack_activation('state_out')"
        )


STACKS = _Stacks()
