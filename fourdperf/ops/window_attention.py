"""window_attention: 2-D windowed (neighbourhood) self-attention over a grid of tokens, frame by frame and head by head.

    out[i] = sum_j p[i, j] v[j],    p[i, :] = softmax_j(scale q[i] . k[j]),    j in window(i)

q, k, v: (B..., H, W, heads, D), one dtype; B... any number of axes (batch, frames), which never mix. `window` is (wy, wx) or
one int for both: the full width, odd or even. Along an axis the window of query y covers the keys

    y + a d,   a = -(w // 2) ... w - w // 2 - 1     (d: dilation; an even window reaches one further to the front)

and `border` says what happens where that leaves the frame:
    'mask'    keys outside are left out: a query in the corner sees about a quarter of the keys
    'shift'   the window slides inward (NATTEN's rule): every query sees exactly w keys an axis, or all where the axis has
              fewer; with dilation it slides among the keys of the query's own residue class (y mod d)
    'zero'    keys and values outside are zeros that take part in the softmax (what padding q, k, v's grid with zeros does)

extra_k, extra_v: (B..., E, heads, D), tokens that every query attends to besides (registers, an aspect-ratio token); their
leading axes broadcast against those of q, so (E, heads, D) serves all frames.

Layout: channels last, the heads next to last. The views of a fused projection, `qkv.unflatten(-1, (3, heads, D)).unbind(-3)`,
are taken as they are: any strides, no copy, as long as the last axis is dense and B... folds into one axis (otherwise they
are copied). The output is dense (B..., H, W, heads, D), ready for `.flatten(-2)` and the output projection.

Dtypes: float64, float32, bfloat16, float16; scores, softmax and sums are float32 for 16-bit types, with one rounding at the
end. Under autocast the inputs are cast to its dtype, as scaled_dot_product_attention does. The backward pass recomputes the
weights from the log of the softmax's denominator: memory is O(tokens) in both directions. It is deterministic on the CPU and on
CUDA. First derivatives only; eager can be differentiated again. Where the window covers the whole frame, the op is full
attention and torch's scaled_dot_product_attention runs it (backend 'sdpa').

Other conventions:
    natten.functional.na2d(q, k, v, kernel_size, dilation=d)     border="shift" (the same layout, window = kernel_size)
    zero-padded unfold (LocalAttention of D4RT ports)            border="zero"
    flash-attention's window_size=(left, right), masked          border="mask", window = left + right + 1, for left = right
                                                                 or left = right + 1
    Swin's partitions into disjoint windows                      another operation: reshape and use full attention
    q in the layout (..., heads, H, W, D)                        q.movedim(-4, -2): a view, no copy

Raises ValueError for a dtype that is not floating or not shared, shapes that do not match, a window or dilation below 1 (or
above 2^20), an unknown border, one of extra_k and extra_v without the other, or a backend that cannot run.

Source: Hassani et al., "Neighborhood Attention Transformer", 2023; "Faster Neighborhood Attention", 2024.
"""

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fourdperf.ops.backends import (
    DTYPE_CODES,
    Backend,
    _transform_why_not,
    choose,
    define,
    eager_why_not,
    native_why_not,
    triton_why_not,
    where,
)
from fourdperf.ops.checks import autocasts, check_choice, check_floating, check_same, no_autocast, require

BORDERS = ("mask", "shift", "zero")
_MOST = 2**20


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | Sequence[int],
    *,
    border: str = "mask",
    dilation: int | Sequence[int] = 1,
    scale: float | None = None,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of every token of a frame to the tokens around it. See the module for maths, layout, borders and errors.

    Args:
        q, k, v: (B..., H, W, heads, D).
        window: keys per axis, (wy, wx) or one int for both.
        border: 'mask', 'shift' or 'zero'.
        dilation: distance of neighbouring keys, (dy, dx) or one int for both.
        scale: of the scores; D ** -0.5 by default.
        extra_k, extra_v: (B..., E, heads, D), tokens that every query attends to besides.
        backend: 'sdpa', 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (B..., H, W, heads, D), dense, of the dtype of q.

    Example, a ViT block over (B, T, H, W, C) features with registers:
        q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).unbind(-3)
        x = x + self.proj(window_attention(q, k, v, 7, extra_k=register_k, extra_v=register_v).flatten(-2))
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
    require(q.ndim >= 4, f"q must be (B..., H, W, heads, D), got shape {tuple(q.shape)}")
    require((extra_k is None) == (extra_v is None), "extra_k and extra_v must be given together")
    tensors = {"k": k, "v": v} | ({} if extra_k is None else {"extra_k": extra_k, "extra_v": extra_v})
    for name in tensors.keys() - {"k", "v"}:
        check_floating(name, tensors[name])
    q, tensors = _autocast(q, tensors)
    for name, x in tensors.items():
        check_same(name, x, "q", q)
    for name in ("k", "v"):
        x = tensors[name]
        require(x.shape == q.shape, f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}")
    require(q.shape[-1] >= 1, f"q must have at least one element per head, got shape {tuple(q.shape)}")
    window, dilation = _pair("window", window), _pair("dilation", dilation)
    check_choice("border", border, BORDERS)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lead = q.shape[:-4]
    frames = math.prod(lead)
    q, k, v = (x.reshape(frames, *x.shape[-4:]) for x in (q, tensors["k"], tensors["v"]))
    if extra_k is not None:
        extra_k, extra_v = (_extra(name, tensors[name], lead, frames, q) for name in ("extra_k", "extra_v"))
        require(
            extra_k.shape == extra_v.shape,
            f"extra_v must have as many tokens as extra_k ({extra_k.shape[1]}), got {extra_v.shape[1]}",
        )
        if extra_k.shape[1] == 0:
            extra_k = extra_v = None
    args = (q, k, v, extra_k, extra_v, window, dilation, border, scale)
    return choose("window_attention", _ON_CUDA if q.is_cuda else BACKENDS, args, backend)(*args).reshape(
        *lead, *q.shape[1:]
    )


def _autocast(q, tensors):
    """As torch's attention: everything but float64 goes to the dtype of an autocast that is on."""
    kind = q.device.type
    if not autocasts(kind) or q.dtype == torch.float64:
        return q, tensors
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), {name: x.to(dtype) for name, x in tensors.items()}


def _pair(name, value):
    try:
        pair = tuple(map(operator.index, value if isinstance(value, Sequence) else (value, value)))
    except TypeError:
        pair = ()
    require(
        len(pair) == 2 and all(1 <= v <= _MOST for v in pair),
        f"{name} must be a whole number from 1 to 2^20, or two of them (along H, along W), got {value!r}",
    )
    return pair


def _extra(name, x, lead, frames, q):
    require(
        x.ndim >= 3 and x.shape[-2:] == q.shape[-2:],
        f"{name} must be (B..., E, {q.shape[-2]}, {q.shape[-1]}) to fit q, got shape {tuple(x.shape)}",
    )
    own = x.shape[:-3]
    fits = len(own) <= len(lead) and all(a in (1, b) for a, b in zip(own[::-1], lead[::-1]))
    require(fits, f"the leading axes of {name} must broadcast to those of q, {tuple(lead)}, got shape {tuple(x.shape)}")
    return x.expand(*lead, *x.shape[-3:]).reshape(frames, *x.shape[-3:])


# ---- eager


def window_attention_eager(q, k, v, extra_k, extra_v, window, dilation, border, scale):
    """The reference in plain torch: gathers the keys of every query, O(tokens x window) memory. q (frames, H, W, heads, D)."""
    frames, height, width, heads, dim = q.shape
    rows, rows_inside = _axis_keys(height, window[0], dilation[0], border, q.device)
    columns, columns_inside = _axis_keys(width, window[1], dilation[1], border, q.device)
    keys = rows.shape[1] * columns.shape[1]
    index = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(height * width, keys)
    inside = (rows_inside[:, None, :, None] & columns_inside[None, :, None, :]).reshape(height * width, 1, keys)
    with no_autocast(q.device.type):
        k, v = (x.flatten(1, 2)[:, index] for x in (k, v))  # (frames, tokens, keys, heads, D)
        if extra_k is not None:
            k, v = (
                torch.cat((x, e[:, None].expand(-1, height * width, -1, -1, -1)), 2)
                for x, e in ((k, extra_k), (v, extra_v))
            )
            inside = F.pad(inside, (0, extra_k.shape[1]), value=True)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = (torch.einsum("fnhd,fnkhd->fnhk", q.flatten(1, 2), k).to(wide) * scale).masked_fill(~inside, -math.inf)
        if border == "zero":  # so many keys of score 0 and value 0: one of score log(how many)
            zeros = window[0] * window[1] - inside[..., :keys].sum(-1, keepdim=True)
            scores = torch.cat((scores, zeros.to(wide).log().expand(frames, -1, heads, 1)), -1)
        weights = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
        return torch.einsum("fnhk,fnkhd->fnhd", weights, v).reshape(q.shape)


def _axis_keys(size, window, dilation, border, device):
    """Keys of every query along one axis, and which of them are inside: (size, keys)."""
    y = torch.arange(size, device=device)[:, None]
    residue, place = y % dilation, y // dilation
    count = (size - residue + dilation - 1) // dilation  # of the residue class
    if border == "shift":
        first = torch.minimum(place - window // 2, count - window).clamp_min(0)
        place = first + torch.arange(min(window, size), device=device)
    else:
        place = place + torch.arange(max(-(window // 2), -size), min(window - window // 2, size), device=device)
    inside = (place >= 0) & (place < count)
    return torch.where(inside, place * dilation + residue, 0), inside


# ---- full attention, where that is what it comes to


def _covers(size, window, dilation, border):
    if border == "shift":
        return dilation == 1 and window >= size or size <= 1
    return dilation == 1 and window - window // 2 >= size or size <= 1


def _sdpa_device_why_not(*tensors):
    return _transform_why_not()


def _sdpa_args_why_not(q, k, v, extra_k, extra_v, window, dilation, border, scale):
    if border == "zero":
        return "zeros outside the frame take part in the softmax"
    sizes = q.shape[1], q.shape[2]
    if not all(_covers(*axis, border) for axis in zip(sizes, window, dilation)):
        return f"a window of {window} does not show every query the whole frame of {tuple(sizes)}"
    return None


def _sdpa(q, k, v, extra_k, extra_v, window, dilation, border, scale):
    tokens = [x.flatten(1, 2) for x in (q, k, v)]
    if extra_k is not None:
        tokens[1:] = torch.cat((tokens[1], extra_k), 1), torch.cat((tokens[2], extra_v), 1)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tokens), scale=scale)
    return out.transpose(1, 2).reshape(q.shape)


# ---- schema, fake, autograd, vmap

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v, int[] window, int[] dilation, str border, float scale"
_SCHEMA = f"({_INPUTS}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = f"(Tensor d_out, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


def _outputs(q):
    """out (frames, H, W, heads, D) and lse (frames, heads, H, W)."""
    frames, height, width, heads, _ = q.shape
    lse = q.new_empty(
        (frames, heads, height, width), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    return q.new_empty(q.shape), lse


def _gradients(q, extra_k):
    """For q, k, v and the extra tokens (of size 0 where there are none)."""
    extra = (q.shape[0], 0 if extra_k is None else extra_k.shape[1], *q.shape[-2:])
    return tuple(q.new_empty(shape) for shape in (q.shape, q.shape, q.shape, extra, extra))


def _fake(q, *rest):
    return _outputs(q)


def _fake_backward(d_out, out, lse, q, k, v, extra_k, *rest):
    return _gradients(q, extra_k)


def _setup_context(ctx, inputs, output):
    q, k, v, extra_k, extra_v, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, extra_k, extra_v)


def _define(name, forward, backward):
    """The op `name` and its backward on kernels `forward(tensors, outputs, options)`, `backward(saved, gradients, options)`."""

    def implementation(q, k, v, extra_k, extra_v, *options):
        out, lse = _outputs(q)
        if q.numel():
            forward([_dense_heads(x) for x in (q, k, v, extra_k, extra_v)], out, lse, *options)
        return out, lse

    def backward_implementation(d_out, out, lse, q, k, v, extra_k, extra_v, *options):
        gradients = _gradients(q, extra_k)
        if q.numel():
            backward(
                [_dense_heads(x) for x in (d_out, q, k, v, extra_k, extra_v)],
                out.contiguous(),
                lse.contiguous(),
                gradients,
                *options,
            )
        else:
            for gradient in gradients:
                gradient.zero_()
        return gradients

    def twice(ctx, *gradients):
        raise RuntimeError("window_attention has no second derivative; backend='eager' has")

    def fold(tensors, in_dims, size):
        moved = [
            x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims)
        ]
        return [x if x is None else x.reshape(-1, *x.shape[2:]) for x in moved]

    def vmap(info, in_dims, *args):
        outputs = op(*fold(args[:5], in_dims, info.batch_size), *args[5:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)

    def vmap_backward(info, in_dims, *args):
        outputs = op_backward(*fold(args[:8], in_dims, info.batch_size), *args[8:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * 5

    def differentiate(ctx, d_out, d_lse):
        out, lse, q, k, v, extra_k, extra_v = ctx.saved_tensors
        d_q, d_k, d_v, d_extra_k, d_extra_v = op_backward(d_out, out, lse, q, k, v, extra_k, extra_v, *ctx.options)
        extra = (None, None) if extra_k is None else (d_extra_k, d_extra_v)
        return d_q, d_k, d_v, *extra, None, None, None, None

    op_backward = define(
        f"{name}_backward{_BACKWARD_SCHEMA}",
        fake=_fake_backward,
        setup_context=lambda ctx, inputs, output: None,
        backward=twice,
        vmap=vmap_backward,
        CPU=backward_implementation,
        CUDA=backward_implementation,
    )
    op = define(
        name + _SCHEMA,
        fake=_fake,
        setup_context=_setup_context,
        backward=differentiate,
        vmap=vmap,
        CPU=implementation,
        CUDA=implementation,
    )
    return lambda *args: op(*args)[0]


def _dense_heads(x):
    return x if x is None or x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


# ---- native and Triton


def _native_arguments(q, k, v, extra_k, extra_v, window, dilation, border, scale):
    extra = 0 if extra_k is None else extra_k.shape[1]
    sizes = (*q.shape, extra)
    extra_strides = [(0, 0, 0)] * 2 if extra_k is None else [extra_k.stride()[:3], extra_v.stride()[:3]]
    addresses = [0 if x is None else x.data_ptr() for x in (q, k, v, extra_k, extra_v)]
    return addresses, DTYPE_CODES[q.dtype], sizes, extra_strides, (*window, *dilation), BORDERS.index(border), scale


def _native_forward(tensors, out, lse, *options):
    library, launch = where(out)
    addresses, dtype, sizes, extra_strides, *rest = _native_arguments(*tensors, *options)
    library.window_attention(
        addresses,
        (out.data_ptr(), lse.data_ptr()),
        dtype,
        sizes,
        [x.stride()[:4] for x in tensors[:3]],
        extra_strides,
        *rest,
        launch,
    )


def _native_backward(tensors, out, lse, gradients, *options):
    library, launch = where(out)
    d_out, *tensors = tensors
    workspace = lse.new_empty((2, *lse.shape)) if lse.is_cuda else None
    addresses, dtype, sizes, extra_strides, *rest = _native_arguments(*tensors, *options)
    library.window_attention_backward(
        addresses,
        (out.data_ptr(), lse.data_ptr(), d_out.data_ptr(), workspace.data_ptr() if lse.is_cuda else 0),
        [x.data_ptr() for x in gradients],
        dtype,
        sizes,
        [x.stride()[:4] for x in (*tensors[:3], d_out)],
        extra_strides,
        *rest,
        launch,
    )


def _triton_forward(*args):
    from fourdperf.kernels.window_attention import forward

    forward(*args)


def _triton_backward(*args):
    from fourdperf.kernels.window_attention import backward

    backward(*args)


def _head_why_not(q, *rest):
    return f"heads have at most 256 elements here, got {q.shape[-1]}" if q.shape[-1] > 256 else None


def _native_args_why_not(q, *rest):
    return _head_why_not(q) if q.is_cuda else None


def _triton_args_why_not(q, *rest):
    return "tensor cores have no use for float64 here: take native" if q.dtype == torch.float64 else _head_why_not(q)


BACKENDS = (
    Backend("sdpa", _sdpa, _sdpa_device_why_not, _sdpa_args_why_not),
    Backend(
        "native", _define("window_attention", _native_forward, _native_backward), native_why_not, _native_args_why_not
    ),
    Backend(
        "triton",
        _define("window_attention_triton", _triton_forward, _triton_backward),
        triton_why_not,
        _triton_args_why_not,
    ),
    Backend("eager", window_attention_eager, eager_why_not),
)
_ON_CUDA = (BACKENDS[0], BACKENDS[2], BACKENDS[1], BACKENDS[3])  # tensor cores: in Triton
