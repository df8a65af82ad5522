"""The graph of a run: which component can send to which along the residual stream."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.attribution.components import Component, receivers_of, senders_of
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import one_index

_PARTS = ("query", "key", "value")
_MORE_READ = {
    "attn_gate": "a head's gate reads the stream, too",
    "inner_norms": "the heads of a block are normed together, so a head reads those beside it, too",
    "first_pass_window": "a head reads keys and values of iteration 0, too",
    "kv_sharing": "a head reads keys and values of other iterations",
}
"""Config fields with which a head reads more than the query, key and value of its own block."""


@dataclass(frozen=True)
class EdgeGraph:
    """The components of a run and every edge there is between them.

    An edge from u to v is the path along the residual stream alone: past the norms on it, the norm
    between iterations, the injection and the norm before the coda, but through no other attention
    or MLP. Unfolded, a component at another iteration is another node. Folded, a layer's component
    is one node in all iterations, and an edge stands for all edges between two such nodes, within
    an iteration and from one to a later one.

    Attributes:
        senders: Components that write to the stream, in the order of the run.
        receivers: Components that read it, in the order of the run; the logits are the last.
        n_iterations: Iterations of the run.
        folded: Whether edges are counted, chosen and removed over all iterations together.
        parallel: Whether a block's MLP reads what its attention reads.
    """

    senders: tuple[Component, ...]
    receivers: tuple[Component, ...]
    n_iterations: int
    folded: bool = False
    parallel: bool = False

    @classmethod
    @checked
    def of(
        cls, model: Model, *, heads: bool = False, split_qkv: bool = False, folded: bool = False
    ) -> "EdgeGraph":
        """The graph of a looped model at its present number of iterations.

        Args:
            model: A looped model.
            heads: Tell heads apart.
            split_qkv: Tell queries, keys and values of a receiving head apart; needs ``heads``.
            folded: One node for a layer in all iterations.

        Raises:
            NoLoopError: The model has no loop.
            ValueError: ``split_qkv`` without ``heads``.
            LoopedSemanticsError: ``split_qkv`` where a head reads more than its query, key and
                value.
        """
        layout = require_layout(model)
        if split_qkv and not heads:
            raise ValueError("split_qkv tells apart what a head reads: also pass heads=True")
        if split_qkv and getattr(model.cfg, "qk_norm", None) == "full":
            raise LoopedSemanticsError(
                "in this model the norm of queries and keys is over all heads "
                "(cfg.qk_norm='full'), so that a head reads the queries of the others, too: leave "
                "out split_qkv"
            )
        for field, read in _MORE_READ.items():
            if split_qkv and getattr(model.cfg, field, None):
                raise LoopedSemanticsError(
                    f"in this model {read} (cfg.{field}), so that its query, key and value are not "
                    "all that it reads: leave out split_qkv"
                )
        return cls(
            senders_of(model, layout, heads),
            receivers_of(model, layout, heads, split_qkv),
            layout.n_iterations,
            folded,
            bool(getattr(model.cfg, "parallel_attn_mlp", False)),
        )

    @cached_property
    def exists(self) -> Bool[Tensor, "sender receiver"]:
        """Whether the sender comes before the receiver."""
        sent = torch.tensor([self._moment(c) for c in self.senders])
        read = torch.tensor([self._moment(c) for c in self.receivers])
        return sent[:, None] < read

    @cached_property
    def feeds(self) -> Bool[Tensor, "receiver sender"]:
        """Whether what the receiver reads goes into the sender's output."""
        heads = Counter((c.block, c.kind) for c in self.receivers)
        queries = Counter(c.block for c in self.senders if c.kind == "head")
        places = [
            {(c.block, c.kind, c.head)}
            if c.kind not in _PARTS
            # A head of grouped keys and values is read by several heads.
            else {
                (c.block, "head", head)
                for head in range(queries[c.block])
                if head // (queries[c.block] // heads[c.block, c.kind]) == c.head
            }
            for c in self.receivers
        ]
        return torch.tensor(
            [[(c.block, c.kind, c.head) in place for c in self.senders] for place in places]
        )

    @cached_property
    def edge_classes(self) -> Int[Tensor, "sender receiver"]:
        """A number for each edge, the same for all that stand for one; -1 where there is none."""
        classes = torch.full(self.exists.shape, -1)
        if not self.folded:
            classes[self.exists] = torch.arange(int(self.exists.sum()))
            return classes
        sent, read = (
            [folded_label(c) for c in components] for components in (self.senders, self.receivers)
        )
        known: dict[tuple[str, str], int] = {}
        for s, r in self.exists.nonzero().tolist():
            classes[s, r] = known.setdefault((sent[s], read[r]), len(known))
        return classes

    @property
    def n_edges(self) -> int:
        """Number of edges; of a folded graph, of folded edges."""
        return int(self.edge_classes.max()) + 1

    @checked
    def node_of(self, receiver: int) -> str:
        """Label of the node that a receiver is part of: of ``"r3.L1H4.query"``, ``"r3.L1H4"``."""
        component = self.receivers[one_index("receiver", receiver, len(self.receivers))]
        return component.label.removesuffix(f".{component.kind}")

    def _moment(self, component: Component) -> float:
        """When a component reads and writes, in the order of the run."""
        if component.block is None:
            return -1.0 if component.kind == "embed" else float("inf")
        return component.block + (0.5 if component.kind == "mlp" and not self.parallel else 0.0)


def folded_label(component: Component) -> str:
    """The label of a component without its iteration: ``"r.L1H4"`` of ``"r3.L1H4"``."""
    if component.iteration is None:
        return component.label
    return component.label.replace(f"r{component.iteration}", "r", 1)
