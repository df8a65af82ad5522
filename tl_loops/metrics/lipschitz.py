"""How far an attention pattern can move when its input moves: Prop. 4.2 of arXiv 2604.11791.

The proposition bounds ||softmax(A(X)) - softmax(A(X'))|| by L_sm (2 B kappa / sqrt(d)) ||X - X'||,
where X is what the attention reads (after its norm), kappa = ||W_Q W_K^T|| and B = max(||X||,
||X'||). Here each norm is chosen so that the inequality is a theorem for real models, with biases,
grouped queries and rotary embeddings: L_sm = 1/2 (arXiv 2510.23012) holds row by row and therefore
for the Frobenius norm, which measures every difference. Masked scores are constants, so causal and
padding masks leave the bounds valid.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision

_SOFTMAX_LIPSCHITZ = 0.5


@full_precision
def attention_lipschitz_bound(
    x: Float[Tensor, "*batch pos d_model"],
    x_other: Float[Tensor, "*batch pos d_model"],
    W_Q: Float[Tensor, "head d_model d_head"],
    W_K: Float[Tensor, "key_head d_model d_head"],
    b_Q: Float[Tensor, "head d_head"] | None = None,
    b_K: Float[Tensor, "key_head d_head"] | None = None,
    rotary: bool = True,
    attn_scale: float | int | None = None,
) -> Float[Tensor, "*batch head"]:
    """Upper bound on ||pattern(x) - pattern(x_other)||_F of each head, from the weights.

    A rotation breaks the single matrix W_Q W_K^T. It keeps the norm of each row, hence the
    Frobenius norm of Q and K, but not their spectral norm. With rotary embeddings, of all or some
    dimensions,

        bound = 1/2 (2 B ||W_Q|| ||W_K|| + sqrt(T) (||W_Q|| ||b_K|| + ||W_K|| ||b_Q||))
                ||x - x_other||_F / attn_scale,  B = max(||x||_F, ||x_other||_F);

    without them, where b_K shifts whole rows of scores and the softmax does not see it,

        bound = 1/2 (2 B ||W_Q W_K^T|| + sqrt(T) ||W_K b_Q||)
                ||x - x_other||_F / attn_scale,  B = max(||x||_2, ||x_other||_2).

    Norms of weights are spectral. Not valid for query-key norms, which are not bilinear: use
    `attention_lipschitz_bound_from_qk`.

    Args:
        x: what the attention reads, after its norm, `[..., pos, d_model]`.
        x_other: the same at the other iteration or input.
        W_Q: query weights, in TransformerLens's layout.
        W_K: key weights; with grouped queries fewer heads, each shared by consecutive query heads.
        b_Q: query bias.
        b_K: key bias.
        rotary: whether queries and keys are rotated by position.
        attn_scale: what the scores are divided by; sqrt(d_head) if None.

    Returns:
        `[..., head]`, >= 0.

    Raises:
        ValueError: If the number of query heads is no multiple of the number of key heads.
    """
    dtype = statistic_dtype(x)
    x, x_other, W_Q, W_K = (v.to(dtype) for v in (x, x_other, W_Q, W_K))
    n_heads, _, d_head = W_Q.shape
    W_K = _per_query_head(W_K, n_heads, dim=0)
    b_Q = W_Q.new_zeros(n_heads, d_head) if b_Q is None else b_Q.to(dtype)
    b_K = (
        W_K.new_zeros(n_heads, d_head)
        if b_K is None
        else _per_query_head(b_K, n_heads, 0).to(dtype)
    )

    root_t = x.shape[-2] ** 0.5
    if rotary:
        norm_q, norm_k = _spectral(W_Q), _spectral(W_K)
        kappa = norm_q * norm_k
        bias = root_t * (norm_q * b_K.norm(dim=-1) + norm_k * b_Q.norm(dim=-1))
        size = torch.maximum(x.norm(dim=(-2, -1)), x_other.norm(dim=(-2, -1)))
    else:
        kappa = _spectral(W_Q @ W_K.mT)
        bias = root_t * torch.einsum("hmd,hd->hm", W_K, b_Q).norm(dim=-1)
        size = torch.maximum(_spectral(x), _spectral(x_other))
    moved = (x - x_other).norm(dim=(-2, -1))[..., None]
    scale = d_head**0.5 if attn_scale is None else attn_scale
    return _SOFTMAX_LIPSCHITZ * (2 * size[..., None] * kappa + bias) * moved / scale


@full_precision
def attention_lipschitz_bound_from_qk(
    q: Float[Tensor, "*batch pos head d_head"],
    k: Float[Tensor, "*batch pos key_head d_head"],
    q_other: Float[Tensor, "*batch pos head d_head"],
    k_other: Float[Tensor, "*batch pos key_head d_head"],
    attn_scale: float | int | None = None,
) -> Float[Tensor, "*batch head"]:
    """Upper bound on ||pattern - pattern_other||_F of each head, from the rotated Q and K.

    bound = 1/2 (||K||_2 ||Q - Q'||_F + ||Q'||_2 ||K - K'||_F) / attn_scale. It holds whatever made
    the queries and keys: rotation, biases, query-key norms; and it is tighter than the bound from
    the weights.

    Args:
        q: queries, rotated and normed where the model does so, `[..., pos, head, d_head]`
            (`hook_rot_q`).
        k: keys; with grouped queries fewer heads, each shared by consecutive query heads
            (`hook_rot_k`).
        q_other: queries at the other iteration or input.
        k_other: keys at the other iteration or input.
        attn_scale: what the scores are divided by; sqrt(d_head) if None.

    Returns:
        `[..., head]`, >= 0.

    Raises:
        ValueError: If the number of query heads is no multiple of the number of key heads.
    """
    dtype = statistic_dtype(q)
    n_heads, d_head = q.shape[-2:]
    q, q_other = (v.to(dtype).transpose(-2, -3) for v in (q, q_other))
    k, k_other = (
        _per_query_head(v.to(dtype).transpose(-2, -3), n_heads, dim=-3) for v in (k, k_other)
    )
    moved_q, moved_k = ((a - b).norm(dim=(-2, -1)) for a, b in ((q, q_other), (k, k_other)))
    scale = d_head**0.5 if attn_scale is None else attn_scale
    return _SOFTMAX_LIPSCHITZ * (_spectral(k) * moved_q + _spectral(q_other) * moved_k) / scale


@full_precision
def attention_lipschitz_ratio(
    pattern: Float[Tensor, "*batch head dest src"],
    pattern_other: Float[Tensor, "*batch head dest src"],
    bound: Float[Tensor, "*batch head"],
) -> Float[Tensor, "*batch head"]:
    """What share of the bound the patterns really moved, ||pattern - pattern_other||_F / bound.

    At most 1, up to the rounding of the patterns (1e-5 in float32). Usually far below: the bound
    is loose.

    Args:
        pattern: `[..., head, dest, src]`.
        pattern_other: the same at the other iteration or input.
        bound: what one of the two bound functions returned.

    Returns:
        `[..., head]`; 0 where nothing moved and nothing could, inf where something moved that
        could not.

    Raises:
        ValueError: `bound` is not one number per head.
    """
    dtype = statistic_dtype(pattern)
    moved = (pattern.to(dtype) - pattern_other.to(dtype)).norm(dim=(-2, -1))
    if bound.shape != moved.shape:
        raise ValueError(
            f"bound has shape {list(bound.shape)}, expected one number per head, "
            f"{list(moved.shape)}"
        )
    return torch.where(moved == 0, 0.0, moved / bound)


def _spectral(matrices: Tensor) -> Tensor:
    """Largest singular value of `[..., row, column]`."""
    finite = matrices.isfinite().all(-1).all(-1)
    norms = torch.linalg.matrix_norm(torch.where(finite[..., None, None], matrices, 0.0), ord=2)
    return torch.where(finite, norms, torch.nan)  # the decomposition itself raises


def _per_query_head(keys: Tensor, n_heads: int, dim: int) -> Tensor:
    """Repeat each key head for the query heads that share it."""
    n_key_heads = keys.shape[dim]
    if not n_key_heads or n_heads % n_key_heads:
        raise ValueError(
            f"{n_heads} query heads cannot share {n_key_heads} key heads; expected a multiple"
        )
    return keys.repeat_interleave(n_heads // n_key_heads, dim=dim)
