"""What may be done to weights that belong to another model: reading them, and no more."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.model.circuits import EffectiveWeights
from tl_loops.model.weights import PhysicalWeights

_ORIGINAL = "change the original model, and call tl_loops.loop on it again: no weight is copied"


class BorrowedWeights(PhysicalWeights):
    """Access to weights that a model shares with a HookedTransformer, whose they are."""

    def _refuse(self, what: str) -> NoReturn:
        raise LoopedSemanticsError(f"{what}: the weights are the original model's; {_ORIGINAL}")

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> "BorrowedWeights":
        """Only to where the weights are already, since they are shared with the original.

        Raises:
            LoopedSemanticsError: Another device or type.
        """
        args = tuple(arg for arg in args if not isinstance(arg, bool))
        parse: Any = vars(torch._C)["_nn"]._parse_to  # what nn.Module.to itself calls
        device, dtype, _, _ = parse(*args, **kwargs)
        weight = self.embed.W_E
        elsewhere = device is not None and torch.empty(0, device=device).device != weight.device
        if elsewhere or dtype not in (None, weight.dtype):
            self._refuse(f"moving or casting to {dtype or device}")
        return self

    def process_weights_(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: process the original.

        Raises:
            LoopedSemanticsError: Always.
        """
        self._refuse("folding or centring")

    def load_and_process_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: load into the original.

        Raises:
            LoopedSemanticsError: Always.
        """
        self._refuse("load_and_process_state_dict")

    def save_pretrained(self, directory: str | Path) -> NoReturn:
        """Not supported: save the original, and loop it again.

        Raises:
            LoopedSemanticsError: Always.
        """
        self._refuse(f"saving to {directory}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: load the original, and call :func:`tl_loops.loop`.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            "a model with repeated blocks is made from one that is loaded: "
            "tl_loops.loop(HookedTransformer.from_pretrained(name), start, stop, n_iterations)"
        )

    # Circuits read weights under names that not every block has.

    def tl_parameters(self) -> EffectiveWeights:
        """Weight matrices with the norms next to them folded in.

        Raises:
            LoopedSemanticsError: The blocks have no MLP, experts, or norms after their branches
                under the names of norms before them.
        """
        self._check_plain_blocks("tl_parameters")
        return super().tl_parameters()

    def all_composition_scores(self, mode: str, iterations_apart: int = 1) -> Tensor:
        """Composition of heads; see ``tl_loops.model.circuits``.

        Raises:
            LoopedSemanticsError: As :meth:`tl_parameters`, or with a query-key norm.
        """
        self._check_plain_blocks("all_composition_scores")
        if self.cfg.use_qk_norm:
            raise LoopedSemanticsError(
                "all_composition_scores does not know the query-key norm of this model: compose "
                "model.OV and model.QK of the blocks in question"
            )
        return super().all_composition_scores(mode, iterations_apart)

    def _check_plain_blocks(self, what: str) -> None:
        cfg = self.cfg
        for unlike, why in (
            (cfg.attn_only, "has no MLP"),
            (cfg.num_experts, "has experts in the place of an MLP"),
            (cfg.block_norm == "post_branch", "norms its branches' outputs and not their inputs"),
        ):
            if unlike:
                raise LoopedSemanticsError(
                    f"{what} is not exact for a block that {why}: read model.blocks instead"
                )
