"""The real tokens of a padded batch: every row is sliced to them before anything is computed.

Masking inside a formula would have to be got right in each formula (in means, logarithms of T,
thresholds); slicing makes padding invisible by construction, also when padded entries hold NaN.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def statistic_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which statistics of `tensor` are computed: float64 stays, other floats give float32.

    Args:
        tensor: floating point tensor.

    Returns:
        `torch.float64` or `torch.float32`.

    Raises:
        TypeError: `tensor` is not a real floating point tensor.
    """
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"got a {tensor.dtype} tensor, expected real floating point activations")
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def expand_mask(mask: Tensor, batch_shape: torch.Size, n_pos: int) -> Tensor:
    """Broadcast `mask` to `[*batch_shape, n_pos]`.

    Args:
        mask: Bool `[..., pos]`, True at real tokens; the leading axes broadcast.
        batch_shape: leading axes of the measured tensor.
        n_pos: number of positions of the measured tensor.

    Returns:
        A view of `mask` of shape `[*batch_shape, n_pos]`.

    Raises:
        TypeError: `mask` is not Bool.
        ValueError: its shape does not fit.
    """
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {mask.dtype}, expected torch.bool with True at real tokens; "
            "pass mask.bool() for a 0/1 attention mask"
        )
    try:
        return mask.expand(*batch_shape, n_pos)
    except RuntimeError:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, expected one that broadcasts to "
            f"{[*batch_shape, n_pos]} (batch axes, then positions)"
        ) from None


def valid_spans(mask: Tensor) -> list[tuple[int, int]]:
    """Start and stop of the real tokens of each row.

    Args:
        mask: Bool `[row, pos]`, True at real tokens, which are contiguous (left or right padding).

    Returns:
        One `(start, stop)` a row; the real tokens are `range(start, stop)`.

    Raises:
        ValueError: a row has no real token, or padding between real tokens.
    """
    previous = torch.zeros_like(mask)
    previous[:, 1:] = mask[:, :-1]
    n_runs = (mask & ~previous).sum(-1)
    length = mask.sum(-1)
    start = mask.to(torch.uint8).argmax(-1)
    spans = []
    for row, (first, count, runs) in enumerate(torch.stack([start, length, n_runs], -1).tolist()):
        if runs != 1:
            what = "no real token" if runs == 0 else f"{runs} separate runs of real tokens"
            raise ValueError(
                f"mask row {row} has {what}, expected one contiguous run (left or right padding)"
            )
        spans.append((first, first + count))
    return spans


def map_spans(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    mask: Tensor | None,
    core_ndim: int,
    position_dims: Sequence[int],
) -> Tensor:
    """Apply `function` to tensors that are sliced to the real tokens of each row.

    Rows with the same span are computed together. Without a mask, `function` sees the tensors as
    they are.

    Args:
        function: takes tensors `[*batch, *core]` and returns `[*batch, ...]`; it acts on each row
            alone and what it returns has no position axis.
        tensors: the measured tensors `[*batch, *core]`, with the same batch axes.
        mask: Bool, broadcasts to `[*batch, pos]`; None means that every token is real.
        core_ndim: number of trailing axes that are not batch axes.
        position_dims: the axes (negative) to slice.

    Returns:
        `[*batch, ...]`: what `function` gave for each row.

    Raises:
        TypeError: the mask is not Bool.
        ValueError: the mask does not fit the tensors or a row is not one run of real tokens.
    """
    if mask is None:
        return function(*tensors)
    batch_shape = tensors[0].shape[: tensors[0].ndim - core_ndim]
    n_pos = tensors[0].shape[position_dims[0]]
    rows_of_span: dict[tuple[int, int], list[int]] = {}
    mask = expand_mask(mask, batch_shape, n_pos)
    for row, span in enumerate(valid_spans(mask.reshape(-1, n_pos))):
        rows_of_span.setdefault(span, []).append(row)
    if not rows_of_span:
        raise ValueError(f"got batch axes {list(batch_shape)} with no row, expected at least one")

    results, order = [], []
    for (start, stop), rows in rows_of_span.items():
        parts = []
        for tensor in tensors:
            part = tensor.reshape(-1, *tensor.shape[tensor.ndim - core_ndim :])
            for dim in position_dims:
                part = part.narrow(dim, start, stop - start)
            parts.append(part if len(rows_of_span) == 1 else part[rows])
        results.append(function(*parts))
        order += rows
    stacked = torch.cat(results)
    in_row_order = stacked[torch.tensor(order, device=stacked.device).argsort()]
    return in_row_order.reshape(batch_shape + stacked.shape[1:])
