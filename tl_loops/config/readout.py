"""What ends an iteration, and what stands between the loop and the logits: said once, as data."""

from dataclasses import dataclass

from tl_loops.errors import LoopedSemanticsError


@dataclass(frozen=True)
class Readout:
    """From the last core block of an iteration to the logits.

    After the core blocks of an iteration comes the final norm, if it is applied ``between``
    iterations. After the last iteration: the final norm if it is applied ``before_coda``, the
    coda's blocks, the final norm, the unembedding. Without a coda the norm that ends the last
    iteration is the final norm itself, which is then not applied a second time.

    Attributes:
        between: Whether the final norm ends every iteration (Ouro).
        before_coda: Whether the final norm is also applied once after the loop (Huginn).
        final: Whether there is a final norm.
        n_coda: Blocks after the loop.
        n_iterations: Passes through the core.
        injected: Whether the prelude's output enters every iteration.
        remixed: Whether a mechanism makes the state that leaves an iteration from more than what
            its last block gives.
        sums_states: Whether the sum of all states leaves the loop, and no single one.
        stacks: The stack that each iteration calls, for models with two.
    """

    between: bool
    before_coda: bool
    final: bool
    n_coda: int
    n_iterations: int
    injected: bool = False
    remixed: bool = False
    sums_states: bool = False
    stacks: tuple[str, ...] | None = None

    @property
    def final_is_between(self) -> bool:
        """Whether the norm that ends the last iteration is the final norm itself."""
        return self.between and self.n_coda == 0

    @property
    def reads_states(self) -> bool:
        """Whether a state alone gives logits: no coda and no norm in its place follow the loop."""
        return not self.n_coda and not self.before_coda

    def iteration_norm(self, iteration: int) -> str | None:
        """The norm that ends an iteration, by its hook names' prefix; ``None``: there is none."""
        if not self.between:
            return None
        last = iteration == self.n_iterations - 1
        return "ln_final" if last and self.n_coda == 0 else f"iter.{iteration}.norm"

    def is_normed(
        self, kind: str, core: bool, iteration: int | None, layer: int | None = None
    ) -> bool:
        """Whether the norm between iterations is the last thing that happened to a residual.

        Args:
            kind: ``"state_out"``, ``"state_in"``, ``"injected"``, or a residual of a block.
            core: Whether it stands in the loop.
            iteration: Where in the loop.
            layer: Of a block in the loop.
        """
        if not self.between:
            return False
        if kind == "state_out":
            return True
        if self.stacks is not None and core:
            # A call reads the sum of both states.
            return kind == "state_in" and self.stacks[iteration or 0] in self.stacks[:iteration]
        first = kind == "injected" or (kind == "resid_pre" and layer == 0)
        enters = kind == "state_in" or (first and not self.injected)
        return enters and core and bool(iteration)

    def left_by_loop(self, n_layers: int) -> str:
        """The hook point that holds what the final norm (or the norm before it) reads.

        Args:
            n_layers: Unrolled depth.
        """
        if not self.n_coda and self.sums_states:
            return "hook_halted_state"
        if not self.n_coda and self.remixed:
            return f"iter.{self.n_iterations - 1}.hook_state_out"
        return f"blocks.{n_layers - 1}.hook_resid_post"

    # What cannot be read out.

    def require_single_state(self) -> None:
        """Refuse to read one state as what leaves the loop, where the sum of all of them does.

        Raises:
            LoopedSemanticsError: It does.
        """
        if self.sums_states:
            raise LoopedSemanticsError(
                "with halting='act' the sum of all states leaves the loop, weighted by "
                "cache['halting', t], so no single state is read out: use logit_lens, or run the "
                "model with n_iterations=t + 1 for an earlier end"
            )

    def require_no_coda(self) -> None:
        """Refuse to read a state out as it is where a coda follows.

        Raises:
            LoopedSemanticsError: There is a coda.
        """
        if self.n_coda:
            raise LoopedSemanticsError(
                "a coda stands between the states and the logits of this model: run it with "
                "n_iterations=t + 1, or use the coda lens of tl_loops.lens"
            )

    def require_exit(self, iteration: int, instead: str) -> None:
        """Refuse to read out a call of the stack that is not read out.

        Args:
            iteration: The call.
            instead: What to do.

        Raises:
            LoopedSemanticsError: There are two stacks, and it calls the other one.
        """
        if self.stacks is not None and self.stacks[iteration] != self.stacks[-1]:
            raise LoopedSemanticsError(
                f"iteration {iteration} is a call of stack {self.stacks[iteration]}, but the state "
                f"of {self.stacks[-1]} is read out; {instead}"
            )
