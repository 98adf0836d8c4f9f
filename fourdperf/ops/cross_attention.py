"""cross_attention: many independent queries against one shared memory of keys and values, softmax(q k^T scale) v.

    s[b, h, i, j] = scale sum_d q[b, i, h, d] k[b, j, h, d]
    out[b, i, h, :] = sum_j softmax_j(s[b, h, i, :])[j] v[b, j, h, :]          (j runs over the keys that are not padding)

Shapes: q (B, Q, H, D), k (B, K, H, D), v (B, K, H, E) -> (B, Q, H, E): heads after tokens, as a linear layer leaves them
(`linear(x).unflatten(-1, (H, D))`), so that no transposition is paid. Any strides, nothing is copied first; the output is
contiguous. Any sizes of head: 64, 80, 88, 96, 104, 112, 128 of the ViT family, odd ones, and E unlike D.

key_padding_mask (B, K), bool, True = padding: that key takes no part. It may hold anything, NaN included, and gets
gradient zero; it costs nothing either, for the native kernel leaves it out before it starts. A row without any key gives
zeros, and zero gradients.

Dtypes: float64, float32, bfloat16, float16, one for all three. Scores, softmax and sums are float64 for float64 and
float32 for the rest; the bfloat16 kernels round the softmax weights to bfloat16 before they multiply the values, as
FlashAttention does. Under autocast float32 inputs are cast as scaled_dot_product_attention casts them. Memory is
O(tokens), forward and backward. On the CPU every query is computed for itself: its result does not depend on the queries
beside it, nor on the number of threads, bit for bit. First derivatives are native; second derivatives are exact, by plain
torch operations on the full (Q, K) matrix.

Other conventions:
    F.scaled_dot_product_attention, (B, H, N, D)    cross_attention(q.transpose(1, 2), ...).transpose(1, 2); views suffice
    its boolean attn_mask, True = takes part        key_padding_mask = ~attn_mask, for masks (B, 1, 1, K) -> (B, K)
    nn.MultiheadAttention(key_padding_mask=)        the same mask
    flax MultiHeadDotProductAttention, (..., N, H, D)   the same layout; its mask is True = takes part
    A mask per query, causal masks, dropout and grouped queries cannot be reached: use SDPA or FlexAttention.

Raises ValueError for tensors that are not 4-D and floating, shapes, dtypes or devices that do not fit together, a mask that
is not boolean or not (B, K), or a backend that cannot run.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
"""

import torch

from fourdperf.ops.backends import (
    DTYPE_CODES,
    Backend,
    choose,
    define,
    eager_why_not,
    native_why_not,
    triton_why_not,
    where,
)
from fourdperf.ops.checks import autocasts, check_floating, check_same, no_autocast, require

_HALF = (torch.bfloat16, torch.float16)


def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(q k^T scale) v. See the module for maths, dtypes and errors.

    Args:
        q: queries, (B, Q, H, D).
        k: keys, (B, K, H, D).
        v: values, (B, K, H, E).
        key_padding_mask: (B, K) bool, True where a key is padding.
        scale: factor of the scores; None means 1 / sqrt(D).
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (B, Q, H, E), contiguous, of the dtype of the inputs.

    Example, a decoder layer:
        heads = cross_attention(query(x).unflatten(-1, (H, -1)), key(m).unflatten(-1, (H, -1)), value(m).unflatten(-1, (H, -1)))
        x = x + out(heads.flatten(-2))
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        require(x.ndim == 4, f"{name} must be (batch, tokens, heads, channels), got shape {tuple(x.shape)}")
    if autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    batch, _, heads, size = q.shape
    keys = k.shape[1]
    require(
        k.shape[0] == batch and k.shape[2] == heads and k.shape[3] == size,
        f"k must be (B, K, H, D) with the B, H, D of q, which has shape {tuple(q.shape)}, got {tuple(k.shape)}",
    )
    require(
        v.shape[0] == batch and v.shape[1] == keys and v.shape[2] == heads,
        f"v must be (B, K, H, E) with the B, K, H of k, which has shape {tuple(k.shape)}, got {tuple(v.shape)}",
    )
    mask = key_padding_mask
    if mask is not None:
        require(
            isinstance(mask, torch.Tensor) and mask.dtype == torch.bool,
            f"key_padding_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}",
        )
        require(
            mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] == keys,
            f"key_padding_mask must be (B, K) = {(batch, keys)}, got {tuple(mask.shape)}",
        )
        require(mask.device == q.device, f"key_padding_mask must be on the device of q ({q.device}), got {mask.device}")
    scale = max(size, 1) ** -0.5 if scale is None else float(scale)
    return choose("cross_attention", BACKENDS, (q, k, v, mask, scale), backend)(q, k, v, mask, scale)


# ---- eager


def cross_attention_eager(q, k, v, key_padding_mask=None, scale=None):
    """The reference in plain torch; arguments as in `cross_attention`. Builds the (B, H, Q, K) matrix."""
    dtype = q.dtype
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    with no_autocast(q.device.type):
        q, k, v = (x.float() if dtype in _HALF else x for x in (q, k, v))
        if key_padding_mask is not None:  # padding may hold NaN
            k, v = (x.masked_fill(key_padding_mask[:, :, None, None], 0) for x in (k, v))
        weights = _weights(q, k, key_padding_mask, scale)
        return torch.einsum("bhqk,bkhe->bqhe", weights, v).to(dtype).contiguous()


def _weights(q, k, mask, scale):
    """Softmax of the scores (B, H, Q, K), zero for padding."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is None:
        return scores.softmax(-1)
    mask = mask[:, None, None, :]
    return scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(mask, 0)


def _second_order(c_q, c_k, c_v, d_out, q, k, v, mask, scale):
    """Gradients of <c_q, d_q> + <c_k, d_k> + <c_v, d_v> with respect to d_out, q, k, v, in plain torch."""
    dtype = q.dtype
    c_q, c_k, c_v, d_out, q, k, v = (x.float() if dtype in _HALF else x for x in (c_q, c_k, c_v, d_out, q, k, v))
    if mask is not None:
        c_k, c_v, k, v = (x.masked_fill(mask[:, :, None, None], 0) for x in (c_k, c_v, k, v))
    scores = lambda x, y: torch.einsum("bqhd,bkhd->bhqk", x, y)
    to_queries = lambda w, x: torch.einsum("bhqk,bkhd->bqhd", w, x)
    to_keys = lambda w, x: torch.einsum("bhqk,bqhd->bkhd", w, x)
    mean = lambda x: (p * x).sum(-1, keepdim=True)
    p = _weights(q, k, mask, scale)
    d_p = scores(d_out, v)
    d_s = p * (d_p - mean(d_p))
    c_s = scale * (scores(c_q, k) + scores(q, c_k))  # cotangent of d_s
    c_d_p = p * (c_s - mean(c_s))
    c_p = c_s * (d_p - mean(d_p)) - mean(c_s) * d_p + scores(d_out, c_v)
    c_scores = p * (c_p - mean(c_p)) * scale
    grads = (
        to_queries(c_d_p, v) + to_queries(p, c_v),
        to_queries(c_scores, k) + scale * to_queries(d_s, c_k),
        to_keys(c_scores, q) + scale * to_keys(d_s, c_q),
        to_keys(c_d_p, d_out),
    )
    return tuple(x.to(dtype) for x in grads)


# ---- schema, fake, autograd, vmap

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, float scale) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor stats, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)


def _fake(q, k, v, mask, scale):
    batch, queries, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, heads, 2, queries, dtype=dtype)


def _backward_fake(d_out, q, k, v, mask, stats, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _folded(size, args, in_dims):
    """The tensors of `args` with the mapped axis folded into the batch, which leads (B, ...)."""
    for x, dim in zip(args, in_dims):
        if isinstance(x, torch.Tensor):
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            yield x.flatten(0, 1)
        else:
            yield x


def _define(name, forward, backward):
    """The op `name` and its backward on one kernel each."""

    def setup_backward(ctx, inputs, output):
        d_out, q, k, v, mask, _, ctx.scale = inputs
        ctx.save_for_backward(d_out, q, k, v, mask)

    def second_order(ctx, c_q, c_k, c_v):
        d_out, q, k, v, mask = ctx.saved_tensors
        grads = _second_order(c_q, c_k, c_v, d_out, q, k, v, mask, ctx.scale)
        return *grads, None, None, None

    def backward_vmap(info, in_dims, *args):
        grads = d_op(*_folded(info.batch_size, args, in_dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in grads), (0, 0, 0)

    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, mask, output[1])
        ctx.mark_non_differentiable(output[1])

    def first_order(ctx, d_out, _):
        q, k, v, mask, stats = ctx.saved_tensors
        return *d_op(d_out, q, k, v, mask, stats, ctx.scale), None, None

    def vmap(info, in_dims, *args):
        outputs = op(*_folded(info.batch_size, args, in_dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)

    d_op = define(
        name + _BACKWARD_SCHEMA,
        fake=_backward_fake,
        setup_context=setup_backward,
        backward=second_order,
        vmap=backward_vmap,
        CPU=backward,
        CUDA=backward,
    )
    op = define(
        name + _SCHEMA,
        fake=_fake,
        setup_context=setup_context,
        backward=first_order,
        vmap=vmap,
        CPU=forward,
        CUDA=forward,
    )
    return lambda *args: op(*args)[0]


# ---- native and Triton


def _pointers(q, k, v, mask):
    mask = None if mask is None else mask.contiguous()
    sizes = (q.shape[0], q.shape[1], k.shape[1], *q.shape[2:], v.shape[3])
    return mask, (
        q.data_ptr(),
        q.stride(),
        k.data_ptr(),
        k.stride(),
        v.data_ptr(),
        v.stride(),
        0 if mask is None else mask.data_ptr(),
        sizes,
    )


def _native(q, k, v, mask, scale):
    library, launch = where(q)
    out, stats = _fake(q, k, v, mask, scale)
    mask, pointers = _pointers(q, k, v, mask)
    library.cross_attention(*pointers, scale, DTYPE_CODES[q.dtype], out.data_ptr(), stats.data_ptr(), launch)
    return out, stats


def _native_backward(d_out, q, k, v, mask, stats, scale):
    library, launch = where(q)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    mask, pointers = _pointers(q, k, v, mask)
    stats = stats.contiguous()
    library.cross_attention_backward(
        *pointers,
        scale,
        DTYPE_CODES[q.dtype],
        stats.data_ptr(),
        d_out.data_ptr(),
        d_out.stride(),
        d_q.data_ptr(),
        d_k.data_ptr(),
        d_v.data_ptr(),
        launch,
    )
    return d_q, d_k, d_v


def _triton(q, k, v, mask, scale):
    from fourdperf.kernels.cross_attention import forward

    out, stats = _fake(q, k, v, mask, scale)
    forward(q, k, v, mask, scale, out, stats)
    return out, stats


def _triton_backward(d_out, q, k, v, mask, stats, scale):
    from fourdperf.kernels.cross_attention import backward

    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backward(d_out, q, k, v, mask, scale, stats.contiguous(), *grads)
    return grads


def _native_why_not(q, *rest):
    if q.device.type == "cuda":
        return "the native kernel runs on cpu; on cuda Triton serves, whose compiler knows each architecture's tensor cores"
    return native_why_not(q)


def _triton_args_why_not(q, k, v, *rest):
    if max(q.shape[3], v.shape[3]) > 256:
        return "heads of more than 256 channels do not fit its tiles"
    return None


BACKENDS = (
    Backend("native", _define("cross_attention", _native, _native_backward), _native_why_not),
    Backend(
        "triton", _define("cross_attention_triton", _triton, _triton_backward), triton_why_not, _triton_args_why_not
    ),
    Backend("eager", cross_attention_eager, eager_why_not),
)
