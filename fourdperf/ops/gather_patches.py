"""gather_patches: square patches of a video around (t, u, v) points, from frames of any resolution, without copying frames.

    p_x = position of u along W, p_y = position of v along H          (see `coordinates`)
    out[b, n, i, j, c] = video[b, t, clamp(k(p_y) + i - size // 2), clamp(k(p_x) + j - size // 2), c]
with k rounding half to even (mode 'round') or down ('floor'); in mode 'bilinear' the patch is sampled at the positions
p_y + i - size // 2 and p_x + j - size // 2 themselves, between the four pixels around each.

video (B, T, H, W, C), uint8 or floating, any strides (a permuted (B, T, C, H, W) is as good); t (B, N) integers, clamped to
[0, T - 1]; points (B, N, 2) floating, (u, v) = (x, y); out (B, N, size, size, C), contiguous, dtype of the video (float32
for uint8 in mode 'bilinear'). Even sizes reach one pixel further to the left and top.

coordinates   'scaled'   p = u W         u in [0, 1]; what rounding to a pixel index usually starts from
              'corners'  p = u (W - 1)   0 and 1 are the centres of the outermost pixels (align_corners=True)
              'centers'  p = u W - 1/2   0 and 1 are the outer edges (align_corners=False)
              'pixels'   p = u
border        'shift'      a patch that would reach outside is moved inside (frames must be at least as large as it)
              'replicate'  the outermost pixel stands for those outside

Positions are computed in float32 (float64 for float64 points), sums in float32 (float64 for a float64 video), with one
rounding at the end. A NaN position counts as 0 where it is rounded and gives NaN in mode 'bilinear'; infinities are clamped.

Derivatives: with respect to a floating video, and to the points in mode 'bilinear' (zero where the border holds them), first
and second. Native code sums the video's gradient without atomics: it is deterministic on the CPU and on CUDA.

Other conventions:
    WangXueyang D4RT                gather_patches(video, t, uv, 9), then permute to (B, N, C, 9, 9). Its unused extract_patch
                                    always reads frame 0: pass torch.zeros_like(t)
    kathirgounder D4RT, "fast"      mode='bilinear', coordinates='corners', border='replicate', then flatten(2)
    kathirgounder D4RT, "slow"      mode='floor', coordinates='corners', border='replicate'
    opend4rt                        as kathirgounder "fast"
    F.grid_sample on a patch grid   mode='bilinear', coordinates='corners' or 'centers', border='replicate'

Raises ValueError for shapes that do not fit, wrong dtypes, unknown options, a patch larger than the frame with
border='shift', an empty frame with points to read, or a backend that cannot run.

Source: the D4RT paper's 9 x 9 RGB patch; the two public ports named above.
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
    wants_gradient,
    where,
)
from fourdperf.ops.checks import FLOATS, check_choice, check_floating, require

MODES = ("round", "floor", "bilinear")
COORDINATES = ("scaled", "corners", "centers", "pixels")
BORDERS = ("shift", "replicate")
_UINT8 = 4  # after the codes of floating types


def gather_patches(
    video: torch.Tensor,
    t: torch.Tensor,
    points: torch.Tensor,
    size: int = 9,
    *,
    mode: str = "round",
    coordinates: str = "scaled",
    border: str = "shift",
    backend: str | None = None,
) -> torch.Tensor:
    """Square patches around points of a video. See the module for maths, conventions, dtypes and errors.

    Args:
        video: (B, T, H, W, C), uint8 or floating.
        t: (B, N) frame of each point, integers.
        points: (B, N, 2) floating, (u, v).
        size: side of a patch in pixels.
        mode: 'round', 'floor' or 'bilinear'.
        coordinates: 'scaled', 'corners', 'centers' or 'pixels'.
        border: 'shift' or 'replicate'.
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (B, N, size, size, C), contiguous.
    """
    require(isinstance(video, torch.Tensor), f"video must be a torch.Tensor, got {type(video).__name__}")
    require(video.dtype in (torch.uint8, *FLOATS), f"video must be uint8 or floating, got {video.dtype}")
    require(video.layout == torch.strided, f"video must be a dense tensor, got layout {video.layout}")
    require(video.ndim == 5, f"video must have shape (B, T, H, W, C), got {tuple(video.shape)}")
    check_floating("points", points)
    batch = video.shape[0]
    require(
        points.ndim == 3 and points.shape[0] == batch and points.shape[2] == 2,
        f"points must have shape (B, N, 2) with B = {batch}, got {tuple(points.shape)}",
    )
    require(
        isinstance(t, torch.Tensor) and not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool,
        f"t must be a tensor of integers, got {getattr(t, 'dtype', type(t).__name__)}",
    )
    require(t.shape == points.shape[:2], f"t must have shape (B, N) = {tuple(points.shape[:2])}, got {tuple(t.shape)}")
    require(
        t.device == video.device and points.device == video.device,
        f"t and points must be on the device of video ({video.device}), got {t.device} and {points.device}",
    )
    require(size >= 1, f"size must be at least 1, got {size}")
    check_choice("mode", mode, MODES)
    check_choice("coordinates", coordinates, COORDINATES)
    check_choice("border", border, BORDERS)
    frames, height, width = video.shape[1:4]
    if points.shape[1] > 0 and batch > 0:
        require(frames > 0 and height > 0 and width > 0, f"video must not be empty, got shape {tuple(video.shape)}")
        require(
            border != "shift" or min(height, width) >= size,
            f"border='shift' needs frames of at least {size} x {size} pixels, got {height} x {width}",
        )
    points = points if points.dtype == torch.float64 else points.float()
    args = video, t.to(torch.int64), points, size, mode, coordinates, border
    return choose("gather_patches", BACKENDS, args, backend)(*args)


# ---- eager


def _locate(u, length, size, mode, coordinates, border):
    """Index of a patch's first pixel (before clamping), and the fraction by which it lies beyond that."""
    scale = {"corners": length - 1, "pixels": 1}.get(coordinates, length)
    p = u * scale - 0.5 if coordinates == "centers" else u * scale
    p = p if mode == "bilinear" else p.nan_to_num(0)
    low, high = (size // 2, length - size + size // 2) if border == "shift" else (-size - 1, length + size)
    p = p.clamp(low, high)
    whole = (p.round() if mode == "round" else p.floor()).detach()
    return whole.nan_to_num(0).long() - size // 2, p - whole


def gather_patches_eager(video, t, points, size=9, mode="round", coordinates="scaled", border="shift"):
    """The reference in plain torch: advanced indexing, then two linear interpolations."""
    _, frames, height, width, channels = video.shape
    dtype = _out_dtype(video, mode)
    if 0 in (*t.shape, channels):
        return (video.to(dtype).sum() + points.sum() * 0).to(dtype).expand(*t.shape, size, size, channels).clone()
    x, f_x = _locate(points[..., 0], width, size, mode, coordinates, border)
    y, f_y = _locate(points[..., 1], height, size, mode, coordinates, border)
    reach = torch.arange(size + (mode == "bilinear"), device=video.device)
    b = torch.arange(video.shape[0], device=video.device)[:, None, None, None]
    rows = (y[..., None] + reach).clamp(0, height - 1)[..., :, None]
    columns = (x[..., None] + reach).clamp(0, width - 1)[..., None, :]
    patch = video[b, t.clamp(0, frames - 1)[..., None, None], rows, columns]
    if mode != "bilinear":
        return patch
    acc = _sum_dtype(video)
    patch, f_x, f_y = patch.to(acc), f_x.to(acc)[..., None, None, None], f_y.to(acc)[..., None, None, None]
    patch = patch[..., :-1, :] + f_x * (patch[..., 1:, :] - patch[..., :-1, :])
    return (patch[..., :-1, :, :] + f_y * (patch[..., 1:, :, :] - patch[..., :-1, :, :])).to(dtype)


def _out_dtype(video, mode):
    return torch.float32 if video.dtype == torch.uint8 and mode == "bilinear" else video.dtype


def _sum_dtype(video):
    return torch.float64 if video.dtype == torch.float64 else torch.float32


# ---- schema, fake, autograd, vmap


_SCHEMA = "Tensor video, Tensor t, Tensor points, int size, str mode, str coordinates, str border"


def _fake(video, t, points, size, mode, coordinates, border):
    return video.new_empty((*t.shape, size, size, video.shape[-1]), dtype=_out_dtype(video, mode))


def _backward_fake(d_out, video, t, points, size, mode, coordinates, border, for_video, for_points):
    return (
        video.new_empty(video.shape if for_video else (0,), dtype=d_out.dtype),
        points.new_empty(points.shape if for_points else (0,)),
    )


def _backward_eager(d_out, video, points, t, options, for_video, for_points):
    """Both gradients in torch operations that can be differentiated again; an empty tensor for one not wanted."""
    wanted = (video,) * for_video + (points,) * for_points
    rest = lambda *args: gather_patches_eager(*_placed(args, video, points, for_video, for_points, t), *options)
    grads = list(torch.func.vjp(rest, *wanted)[1](d_out))
    d_video = grads.pop(0) if for_video else d_out.new_zeros(0)
    return d_video, grads.pop(0) if for_points else points.new_zeros(0)


def _placed(args, video, points, for_video, for_points, t):
    args = list(args)
    video = args.pop(0) if for_video else video
    return video, t, args.pop(0) if for_points else points


def _define(suffix, launch, launch_backward):
    def forward(video, t, points, *options):
        out = _fake(video, t, points, *options)
        if out.numel():
            launch(video, t.contiguous(), points.contiguous(), out, *options)
        return out

    def run_backward(d_out, video, t, points, size, mode, coordinates, border, for_video, for_points):
        d_video, d_points = _backward_fake(
            d_out, video, t, points, size, mode, coordinates, border, for_video, for_points
        )
        if d_out.numel() == 0:
            return d_video.zero_(), d_points.zero_()
        launch_backward(
            d_out.contiguous(),
            video,
            t.contiguous(),
            points.contiguous(),
            d_video,
            d_points,
            size,
            mode,
            coordinates,
            border,
        )
        return d_video, d_points

    def save(ctx, inputs, output):
        video, t, points, *ctx.options = inputs
        ctx.save_for_backward(video, t, points)

    def first_backward(ctx, d_out):
        video, t, points = ctx.saved_tensors
        for_video, for_points = ctx.needs_input_grad[0], ctx.needs_input_grad[2] and ctx.options[1] == "bilinear"
        d_video, d_points = backward(d_out, video, t, points, *ctx.options, for_video, for_points)
        return d_video if for_video else None, None, d_points if for_points else None, None, None, None, None

    def save_backward(ctx, inputs, output):
        d_out, video, t, points, *ctx.options = inputs
        ctx.save_for_backward(d_out, video, t, points)

    def second_backward(ctx, g_video, g_points):
        d_out, video, t, points = ctx.saved_tensors
        *options, for_video, for_points = ctx.options
        if video.is_floating_point():
            first = lambda d_out, video, points: _backward_eager(
                d_out, video, points, t, options, for_video, for_points
            )
            g_out, d_video, d_points = torch.func.vjp(first, d_out, video, points)[1]((g_video, g_points))
        else:
            first = lambda d_out, points: _backward_eager(d_out, video, points, t, options, for_video, for_points)
            (g_out, d_points), d_video = torch.func.vjp(first, d_out, points)[1]((g_video, g_points)), None
        return g_out, d_video, None, d_points, None, None, None, None, None, None

    def vmap(info, in_dims, video, t, points, *options):
        """The mapped axis joins the batch."""
        size = info.batch_size
        video, t, points = (
            x.movedim(d, 0) if d is not None else x.expand(size, *x.shape) for x, d in zip((video, t, points), in_dims)
        )
        batch = video.shape[1]
        out = op(_flat(video), _flat(t), _flat(points), *options)
        return out.unflatten(0, (size, batch)), 0

    def backward_vmap(info, in_dims, d_out, video, t, points, *options):
        size = info.batch_size
        d_out, video, t, points = (
            x.movedim(d, 0) if d is not None else x.expand(size, *x.shape)
            for x, d in zip((d_out, video, t, points), in_dims)
        )
        grads = backward(_flat(d_out), _flat(video), _flat(t), _flat(points), *options)
        wanted = options[-2:]
        return tuple(
            g.reshape(size, *x.shape[1:]) if want else g.new_zeros(size, 0)
            for g, x, want in zip(grads, (video, points), wanted)
        ), (0, 0)

    op = define(
        f"gather_patches{suffix}({_SCHEMA}) -> Tensor",
        fake=_fake,
        setup_context=save,
        backward=first_backward,
        vmap=vmap,
        CPU=forward,
        CUDA=forward,
    )
    backward = define(
        f"gather_patches_backward{suffix}(Tensor d_out, {_SCHEMA}, bool for_video, bool for_points)"
        " -> (Tensor, Tensor)",
        fake=_backward_fake,
        setup_context=save_backward,
        backward=second_backward,
        vmap=backward_vmap,
        CPU=run_backward,
        CUDA=run_backward,
    )
    return op


def _flat(x):
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


# ---- native and Triton


def _codes(video, points, size, mode, coordinates, border):
    return (
        _UINT8 if video.dtype == torch.uint8 else DTYPE_CODES[video.dtype],
        DTYPE_CODES[points.dtype],
        *video.shape,
        *video.stride(),
        points.shape[1],
        size,
        MODES.index(mode),
        COORDINATES.index(coordinates),
        BORDERS.index(border),
    )


def _native(video, t, points, out, *options):
    library, launch = where(video)
    library.gather_patches(
        video.data_ptr(), t.data_ptr(), points.data_ptr(), out.data_ptr(), *_codes(video, points, *options), launch
    )


def _native_backward(d_out, video, t, points, d_video, d_points, *options):
    library, launch = where(video)
    library.gather_patches_backward(
        d_out.data_ptr(),
        video.data_ptr(),
        t.data_ptr(),
        points.data_ptr(),
        d_video.data_ptr() if d_video.numel() else 0,
        d_points.data_ptr() if d_points.numel() else 0,
        *_codes(video, points, *options),
        launch,
    )


def _triton(*args):
    from fourdperf.kernels.gather_patches import gather

    gather(*args)


def _triton_backward(*args):
    from fourdperf.kernels.gather_patches import gather_backward

    gather_backward(*args)


def _triton_why_not(video, *rest):
    if video.is_cuda and wants_gradient(video) and torch.are_deterministic_algorithms_enabled():
        return "its gradient of the video adds with atomics, and deterministic algorithms are asked for"
    return None


BACKENDS = (
    Backend("native", _define("", _native, _native_backward), native_why_not),
    Backend("triton", _define("_triton", _triton, _triton_backward), triton_why_not, _triton_why_not),
    Backend("eager", gather_patches_eager, eager_why_not),
)
