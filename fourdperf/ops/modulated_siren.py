"""modulated_siren: a sine layer whose scales and shifts are read from a map at each point, as in (spatial) functa.

    s, t = samples of the map at xy;  a = (1 + s) pre + t;  modulated_sine = sin(omega a)
    modulated_siren(x, weight, bias, map, xy) = modulated_sine(F.linear(x, weight, bias), map, xy)
    modulate='shift': the map holds t and s = 0;  'scale': it holds s and t = 0;  'both': first all s, then all t

pre (B, N, H), map (B, Hm, Wm, M), xy (B, N, 2) -> (B, N, H), with M = H, or 2 H for 'both'. N points; xy[..., 0] runs
along Wm and xy[..., 1] along Hm, in [0, 1]. A batch axis of length 1 is shared by all signals; pre, x, xy may lack it.
A map of one pixel is plain functa: one set of modulations for all points of a signal.

Modes; coordinates outside of [0, 1] are clamped:
    'nearest'     the pixel (floor(y Hm), floor(x Wm))
    'bilinear'    the four pixels around (y (Hm - 1), x (Wm - 1)), as bilinear_sample does by default
A coordinate that is NaN makes that point's output NaN, and it sends nothing to the gradient of the map.

Derivatives with respect to pre and map (hence x, weight and bias): reverse mode of first and second order. native and
triton keep only their inputs for it, and never write modulations of points to memory. Where xy wants a gradient the
eager backend serves, which has every order too.

Dtypes: float64, float32, bfloat16, float16. One of pre and map may be float32 and the other of 16 bits, which is then
widened. xy has the dtype of pre, or is float32 beside 16 bits. Positions, angles and sums are float32 (float64 for
float64), rounded once; native and Triton take the sine of the exact product of omega and a, see fourier_embed.

Strides: with contiguous channels, pre and map are taken as they lie: a layer's slice of a larger map, or an expanded
batch axis, is not copied. CPU: the same bits in every run, for any number of threads. CUDA: the gradient of the map is
summed by atomics, or, with torch.use_deterministic_algorithms, pixel by pixel over points sorted by cell.

Other conventions:
    spatial functa (samuelepapa)     its scale is 1 + s; '1-NN' is 'nearest', 'linear' is 'bilinear'
    functa (Dupont et al.)           modulate='shift' and a map (B, 1, 1, H)
    SIREN (Sitzmann et al.)          torch.sin(omega * F.linear(x, weight, bias)): no map, no need of this op

Raises ValueError for a dtype that is not floating or does not fit, mixed devices, shapes that do not fit, an empty map
with points to sample, an omega that is no finite number, an unknown option, or a backend that cannot run.

Sources: Sitzmann et al., "Implicit neural representations with periodic activation functions", 2020; Dupont et al.,
"From data to functa", 2022; Bauer et al., "Spatial functa", 2023.
"""

import math

import torch
import torch.nn.functional as F

from fourdperf.ops.backends import (
    DTYPE_CODES,
    Backend,
    choose,
    define,
    eager_why_not,
    native_why_not,
    triton_why_not,
    wants_gradient,
    where,
)
from fourdperf.ops.bilinear_sample import bilinear_sample_eager, sorted_by_cell
from fourdperf.ops.checks import check_choice, check_floating, require

MODULATE = ("shift", "scale", "both")
MODES = ("nearest", "bilinear")
_RULES = {"nearest": ("nearest_floor", "unit", False, "clamp"), "bilinear": ("bilinear", "unit", True, "clamp")}
_HALF = (torch.bfloat16, torch.float16)


def modulated_sine(
    pre: torch.Tensor,
    map: torch.Tensor,
    xy: torch.Tensor,
    *,
    omega: float = 30.0,
    modulate: str = "shift",
    mode: str = "nearest",
    backend: str | None = None,
) -> torch.Tensor:
    """sin(omega ((1 + scale) pre + shift)), scale and shift read from `map` at `xy`. See the module for all else.

    Args:
        pre: (B, N, H), or (1, N, H) or (N, H) for all signals; what a linear layer gives.
        map: (B, Hm, Wm, M) or (1, Hm, Wm, M); M = H, or 2 H for 'both': scales, then shifts.
        xy: (B, N, 2), or (1, N, 2) or (N, 2) for all signals; x along Wm and y along Hm, in [0, 1].
        omega: factor of the angle, finite.
        modulate: 'shift', 'scale' or 'both'.
        mode: 'nearest' or 'bilinear'.
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (B, N, H), contiguous, of the dtype of `pre` (float32 if either of pre and map is).

    Example:  modulated_sine(x @ w + b, modulations[..., 256:512], xy, mode="bilinear")   # (16, 1024, 256)
    """
    for name, x in (("pre", pre), ("map", map), ("xy", xy)):
        check_floating(name, x)
    if pre.ndim not in (2, 3):
        raise ValueError(f"pre must have shape (B, N, H) or (N, H), got {tuple(pre.shape)}")
    if map.ndim != 4:
        raise ValueError(f"map must have shape (B, H, W, M), got {tuple(map.shape)}")
    if xy.ndim not in (2, 3) or xy.shape[-1] != 2:
        raise ValueError(f"xy must have shape (B, N, 2) or (N, 2), got {tuple(xy.shape)}")
    check_choice("modulate", modulate, MODULATE)
    check_choice("mode", mode, MODES)
    if not isinstance(omega, int | float) or not math.isfinite(omega):
        raise ValueError(f"omega must be a finite number, got {omega!r}")
    dtype = pre.dtype
    if map.dtype != dtype:
        if torch.float32 not in (pre.dtype, map.dtype) or not (pre.dtype in _HALF or map.dtype in _HALF):
            raise ValueError(
                f"map must have the dtype of pre ({pre.dtype}), or one be float32 and the other of 16 bits, got {map.dtype}"
            )
        dtype = torch.float32
    if xy.dtype != dtype and not (dtype in _HALF and xy.dtype == torch.float32):
        wanted = f"{dtype}{' or float32' if dtype in _HALF else ''}"
        raise ValueError(f"xy must be {wanted}, as pre and map are, got {xy.dtype}")
    for name, x in (("map", map), ("xy", xy)):
        if x.device != pre.device:
            raise ValueError(f"{name} must be on the device of pre ({pre.device}), got {x.device}")
    if map.shape[-1] != pre.shape[-1] * (1 + (modulate == "both")):
        channels = f"{pre.shape[-1] * (1 + (modulate == 'both'))} channels ({'2 H' if modulate == 'both' else 'H'}"
        raise ValueError(f"map must have {channels} for modulate={modulate!r}), got shape {tuple(map.shape)}")
    pre, xy = (x if x.ndim == 3 else x[None] for x in (pre, xy))
    if pre.shape[1] != xy.shape[1]:
        raise ValueError(f"xy must have the N of pre ({pre.shape[1]}), got {tuple(xy.shape)}")
    batches = {x.shape[0] for x in (pre, map, xy)} - {1}
    if len(batches) > 1:
        sizes = f"{pre.shape[0]}, {map.shape[0]} and {xy.shape[0]}"
        raise ValueError(f"the batch axes of pre, map and xy must be equal or 1, got {sizes}")
    b = batches.pop() if batches else 1
    if map.shape[1] * map.shape[2] == 0 and b * pre.shape[1] > 0:
        shapes = f"{tuple(map.shape)} and {tuple(xy.shape)}"
        raise ValueError(f"map must have pixels where xy has points, got shapes {shapes}")
    args = *(x.expand(b, *x.shape[1:]) for x in (pre.to(dtype), map.to(dtype), xy)), float(omega), modulate, mode
    return choose("modulated_siren", BACKENDS, args, backend)(*args)


def modulated_siren(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    map: torch.Tensor,
    xy: torch.Tensor,
    *,
    omega: float = 30.0,
    modulate: str = "shift",
    mode: str = "nearest",
    backend: str | None = None,
) -> torch.Tensor:
    """A whole layer: modulated_sine(F.linear(x, weight, bias), map, xy, ...).

    Args:
        x: (B, N, K), or (1, N, K) or (N, K) for all signals: then the linear layer runs once for them.
        weight: (H, K), as in nn.Linear.
        bias: (H,) or None.
        map, xy and options: see modulated_sine.

    Returns:
        (B, N, H), contiguous.
    """
    for name, tensor in (("x", x), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        check_floating(name, tensor)
        require(tensor.device == x.device, f"{name} must be on the device of x ({x.device}), got {tensor.device}")
    require(x.ndim in (2, 3), f"x must have shape (B, N, K) or (N, K), got {tuple(x.shape)}")
    require(
        weight.ndim == 2 and weight.shape[1] == x.shape[-1],
        f"weight must have shape (H, K) with K = {x.shape[-1]}, got {tuple(weight.shape)}",
    )
    require(
        bias is None or bias.shape == weight.shape[:1],
        f"bias must have shape ({weight.shape[0]},), got {None if bias is None else tuple(bias.shape)}",
    )
    options = dict(omega=omega, modulate=modulate, mode=mode, backend=backend)
    return modulated_sine(F.linear(x, weight, bias), map, xy, **options)


# ---- eager


def modulated_sine_eager(pre, map, xy, omega=30.0, modulate="shift", mode="nearest"):
    """The reference in plain torch: pre (B, N, H), map (B, Hm, Wm, M), xy (B, N, 2) -> (B, N, H)."""
    dtype = _acc(pre)
    sampled = bilinear_sample_eager(map.to(dtype), xy.to(dtype), *_RULES[mode])
    scale = sampled[..., : pre.shape[-1]] if modulate != "shift" else None
    shift = sampled[..., -pre.shape[-1] :] if modulate != "scale" else None
    angle = pre.to(dtype) if scale is None else (1 + scale) * pre.to(dtype)
    angle = angle if shift is None else angle + shift
    return (omega * angle).sin().to(pre.dtype)


def _acc(x):
    """The dtype that `x` is summed in."""
    return torch.float32 if x.dtype in _HALF else x.dtype


# ---- schema, fake, autograd, vmap

_RULE = "float omega, str modulate, str mode"


def _fake(pre, map, xy, *rule):
    return pre.new_empty(pre.shape)


def _fake_bwd(d_out, pre, map, xy, omega, modulate, mode, need_pre, need_map):
    return pre.new_empty(pre.shape if need_pre else (0,)), map.new_empty(map.shape if need_map else (0,))


def _fake_bwd_bwd(v_pre, v_map, d_out, pre, map, xy, omega, modulate, mode, need_pre, need_map):
    return d_out.new_empty(d_out.shape), *_fake_bwd(d_out, pre, map, xy, omega, modulate, mode, need_pre, need_map)


def _channels(x):
    """`x` with contiguous channels; its other axes may have any strides."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _points(xy, pre):
    """Coordinates as the kernels take them; a batch stride of 0 is kept."""
    xy = xy.to(_acc(pre))
    return xy if xy.shape[0] == 0 or xy[0].is_contiguous() else xy.contiguous()


def _define(name, kernels):
    """The op `name` on the three kernels of `kernels`, and the ops that its first and second derivatives are."""

    def forward(pre, map, xy, *rule):
        out = pre.new_empty(pre.shape)
        if out.numel():
            kernels.fwd(_channels(pre), _channels(map), _points(xy, pre), out, rule)
        return out

    def empty(pre, map, need_pre, need_map):
        """Gradients to be written: that of pre in its dtype, that of the map zeros in the dtype that is summed in."""
        d_pre = pre.new_empty(pre.shape if need_pre else (0,))
        return d_pre, torch.zeros(map.shape if need_map else (0,), dtype=_acc(map), device=map.device)

    def backward(d_out, pre, map, xy, omega, modulate, mode, need_pre, need_map):
        d_pre, d_map = empty(pre, map, need_pre, need_map)
        if d_out.numel():
            wanted = d_pre if need_pre else None, d_map if need_map else None
            tensors = _channels(d_out), _channels(pre), _channels(map), _points(xy, pre), *wanted
            kernels.bwd(*tensors, (omega, modulate, mode))
        return d_pre, d_map.to(map.dtype)

    def backward_backward(v_pre, v_map, d_out, pre, map, xy, omega, modulate, mode, need_pre, need_map):
        d_d_out = d_out.new_empty(d_out.shape)
        d_pre, d_map = empty(pre, map, need_pre, need_map)
        if d_out.numel():
            given = (_channels(x) for x in (v_pre, v_map, d_out, pre, map))
            wanted = d_d_out, d_pre if need_pre else None, d_map if need_map else None
            kernels.bwd_bwd(*given, _points(xy, pre), *wanted, (omega, modulate, mode))
        return d_d_out, d_pre, d_map.to(map.dtype)

    def fwd_context(ctx, inputs, output):
        pre, map, xy, *ctx.rule = inputs
        ctx.save_for_backward(pre, map, xy)

    def fwd_backward(ctx, d_out):
        need_pre, need_map = ctx.needs_input_grad[:2]
        d_pre, d_map = bwd(d_out, *ctx.saved_tensors, *ctx.rule, need_pre, need_map)
        return d_pre if need_pre else None, d_map if need_map else None, None, None, None, None

    def bwd_context(ctx, inputs, output):
        d_out, pre, map, xy, *ctx.rule, ctx.need_pre, ctx.need_map = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_out, pre, map, xy)

    def bwd_backward(ctx, v_pre, v_map):
        v_pre, v_map = v_pre if ctx.need_pre else None, v_map if ctx.need_map else None
        grads = [None] * 3
        if v_pre is not None or v_map is not None:
            need = ctx.needs_input_grad[:3]
            grads = bwd_bwd(v_pre, v_map, *ctx.saved_tensors, *ctx.rule, *need[1:])
            grads = [grad if needed else None for grad, needed in zip(grads, need)]
        return (*grads, *[None] * 6)

    def fwd_vmap(info, in_dims, *args):
        tensors = (_flat(x, dim, info) for x, dim in zip(args[:3], in_dims))
        return fwd(*tensors, *args[3:]).unflatten(0, (info.batch_size, -1)), 0

    def batched(op, tensors):
        """A vmap rule for an op with a batch axis in front of all its tensors."""

        def rule(info, in_dims, *args):
            outs = op()(*(_flat(x, dim, info) for x, dim in zip(args[:tensors], in_dims)), *args[tensors:])
            # an output that was not asked for is empty, with one axis
            return tuple(
                out.unflatten(0, (info.batch_size, -1)) if out.ndim > 1 else out.expand(info.batch_size, 0)
                for out in outs
            ), (0,) * len(outs)

        return rule

    fwd = define(
        f"{name}(Tensor pre, Tensor map, Tensor xy, {_RULE}) -> Tensor",
        fake=_fake,
        setup_context=fwd_context,
        backward=fwd_backward,
        vmap=fwd_vmap,
        CPU=forward,
        CUDA=forward,
    )
    bwd = define(
        f"{name}_bwd(Tensor d_out, Tensor pre, Tensor map, Tensor xy, {_RULE}, bool need_pre, bool need_map) "
        "-> (Tensor, Tensor)",
        fake=_fake_bwd,
        setup_context=bwd_context,
        backward=bwd_backward,
        vmap=batched(lambda: bwd, 4),
        CPU=backward,
        CUDA=backward,
    )
    bwd_bwd = define(
        f"{name}_bwd_bwd(Tensor? v_pre, Tensor? v_map, Tensor d_out, Tensor pre, Tensor map, Tensor xy, {_RULE}, "
        "bool need_pre, bool need_map) -> (Tensor, Tensor, Tensor)",
        fake=_fake_bwd_bwd,
        vmap=batched(lambda: bwd_bwd, 6),
        CPU=backward_backward,
        CUDA=backward_backward,
    )
    return fwd


def _flat(x, dim, info):
    """The axis `dim` that vmap adds, laid beside the batch axis; x without it is repeated (not copied if B = 1)."""
    if x is None:
        return None
    x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


# ---- native and Triton


def sums_by_cell(d_map, xy, map, mode):
    """(order, starts) of `sorted_by_cell` where d_map is wanted on a GPU with deterministic algorithms, else Nones."""
    if d_map is None or not d_map.is_cuda or not torch.are_deterministic_algorithms_enabled():
        return None, None
    return sorted_by_cell(xy, map.shape[1], map.shape[2], *_RULES[mode])


class _Native:
    """Launches csrc/modulated_siren. d_map holds zeros, in the dtype that is summed in; None: not given, not wanted."""

    @staticmethod
    def fwd(pre, map, xy, out, rule):
        library, launch = where(pre)
        library.modulated_sine_fwd(*_tensors(pre, map, xy), out.data_ptr(), *_description(pre, map, rule), launch)

    @staticmethod
    def bwd(d_out, pre, map, xy, d_pre, d_map, rule):
        library, launch = where(pre)
        sums = sums_by_cell(d_map, xy, map, rule[-1])
        library.modulated_sine_bwd(
            *_tensors(pre, map, xy, d_out),
            *(_address(x) for x in (d_pre, d_map, *sums)),
            *_description(pre, map, rule),
            launch,
        )

    @staticmethod
    def bwd_bwd(v_pre, v_map, d_out, pre, map, xy, d_d_out, d_pre, d_map, rule):
        library, launch = where(pre)
        sums = sums_by_cell(d_map, xy, map, rule[-1])
        library.modulated_sine_bwd_bwd(
            *_tensors(pre, map, xy, d_out, v_pre, v_map),
            *(_address(x) for x in (d_d_out, d_pre, d_map, *sums)),
            *_description(pre, map, rule),
            launch,
        )


def _address(x):
    return 0 if x is None else x.data_ptr()


def _tensors(*tensors):
    """Addresses, and the strides of all axes but the channels."""
    return [_address(x) for x in tensors], [[] if x is None else x.stride()[:-1] for x in tensors]


def _description(pre, map, rule):
    omega, modulate, mode = rule
    sizes = *pre.shape, map.shape[1], map.shape[2]  # batch, points, channels, height, width
    return DTYPE_CODES[pre.dtype], sizes, omega, MODULATE.index(modulate), MODES.index(mode)


class _Triton:
    """Launches kernels/modulated_siren.py, with the same arguments."""

    @staticmethod
    def fwd(*args):
        from fourdperf.kernels.modulated_siren import fwd

        fwd(*args)

    @staticmethod
    def bwd(*args):
        from fourdperf.kernels.modulated_siren import bwd

        bwd(*args)

    @staticmethod
    def bwd_bwd(*args):
        from fourdperf.kernels.modulated_siren import bwd_bwd

        bwd_bwd(*args)


def _args_why_not(pre, map, xy, *rule):
    return "it has no derivative with respect to xy" if wants_gradient(xy) else None


BACKENDS = (
    Backend("native", _define("modulated_sine", _Native), native_why_not, _args_why_not),
    Backend("triton", _define("modulated_sine_triton", _Triton), triton_why_not, _args_why_not),
    Backend("eager", modulated_sine_eager, eager_why_not),
)
