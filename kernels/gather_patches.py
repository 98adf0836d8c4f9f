"""gather_patches in Triton.

maths     bilinear (or whole-pixel) samples of a video on a small grid around each point
          (see csrc/gather_patches/gather_patches.h)
shapes    video (B, T, H, W, C) with any strides, t (B, N) int64, points (B, N, 2), out (B, N, size, size, C) contiguous
work      forward and the video's gradient: one program = BLOCK elements of the patches; d_points: one program = one point
numerics  positions in the type of the points; sums in float32 (float64 for a float64 video), one rounding at the store. The
          video's gradient adds with atomics, in an order that changes: the backend steps back where determinism is asked for.
limits    64-bit addressing; frames shorter than 2^22 pixels a side (2^51 with float64 points)
"""

import torch
import triton
import triton.language as tl

MODES = ("round", "floor", "bilinear")
COORDINATES = ("scaled", "corners", "centers", "pixels")
_SIZES = ["height", "width", "size"]  # may be 1, which Triton would otherwise turn into a constant


@triton.jit
def _axis(u, length, size, MODE: tl.constexpr, COORDINATES: tl.constexpr, SHIFT: tl.constexpr):
    """First pixel before clamping, fraction, and d p / d u."""
    dtype: tl.constexpr = u.dtype
    scale = length.to(dtype)
    if COORDINATES == 1:
        scale = (length - 1).to(dtype)
    elif COORDINATES == 3:
        scale = tl.full([], 1.0, dtype)
    raw = u * scale
    if COORDINATES == 2:
        raw -= 0.5
    if MODE != 2:
        raw = tl.where(raw == raw, raw, 0.0)
    if SHIFT:
        low, high = (size // 2).to(dtype), (length - size + size // 2).to(dtype)
    else:
        low, high = (-size - 1).to(dtype), (length + size).to(dtype)
    p = tl.where(raw < low, low, tl.where(raw > high, high, raw))
    if MODE == 0:  # adding 1.5 2^23 (2^52) rounds half to even
        magic: tl.constexpr = 6755399441055744.0 if dtype == tl.float64 else 12582912.0
        whole = (p + magic) - magic
    else:
        whole = tl.floor(p)
    first = tl.where(whole == whole, whole, 0.0).to(tl.int64) - size // 2
    return first, p - whole, tl.where((raw >= low) & (raw <= high), scale, 0.0)


@triton.jit
def _clamp(i, length):
    return tl.minimum(tl.maximum(i, 0), length - 1)


@triton.jit
def _elements(
    o,
    p_t,
    p_points,
    m,
    points,
    frames,
    height,
    width,
    channels,
    size,
    MODE: tl.constexpr,
    COORDINATES: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Of elements o of the patches: batch, frame, channel, and row and column with their fractions and slopes."""
    c, j = o % channels, o // channels % size
    i, n = o // channels // size % size, o // channels // size // size
    t = _clamp(tl.load(p_t + n, mask=m, other=0), frames)
    x, f_x, s_x = _axis(tl.load(p_points + 2 * n, mask=m, other=0.0), width, size, MODE, COORDINATES, SHIFT)
    y, f_y, s_y = _axis(tl.load(p_points + 2 * n + 1, mask=m, other=0.0), height, size, MODE, COORDINATES, SHIFT)
    return n // points, t, c, y + i, x + j, f_y, f_x, s_y, s_x


@triton.jit(do_not_specialize=_SIZES)
def gather_kernel(
    p_video,
    p_t,
    p_points,
    p_out,
    elements,
    points,
    frames,
    height,
    width,
    channels,
    size,
    s_b,
    s_t,
    s_h,
    s_w,
    s_c,
    MODE: tl.constexpr,
    COORDINATES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b, t, c, y, x, f_y, f_x, _, _ = _elements(
        o, p_t, p_points, m, points, frames, height, width, channels, size, MODE, COORDINATES, SHIFT
    )
    p_frame = p_video + b * s_b + t * s_t + c * s_c
    x_0, y_0 = _clamp(x, width) * s_w, _clamp(y, height) * s_h
    v_00 = tl.load(p_frame + y_0 + x_0, mask=m, other=0)
    if MODE == 2:
        x_1, y_1 = _clamp(x + 1, width) * s_w, _clamp(y + 1, height) * s_h
        v_01 = tl.load(p_frame + y_0 + x_1, mask=m, other=0).to(ACC)
        v_10 = tl.load(p_frame + y_1 + x_0, mask=m, other=0).to(ACC)
        v_11 = tl.load(p_frame + y_1 + x_1, mask=m, other=0).to(ACC)
        v_00 = v_00.to(ACC)
        f_x = f_x.to(ACC)
        above, below = v_00 + f_x * (v_01 - v_00), v_10 + f_x * (v_11 - v_10)
        out = above + f_y.to(ACC) * (below - above)
        tl.store(p_out + o, out.to(p_out.dtype.element_ty), mask=m)
    else:
        tl.store(p_out + o, v_00, mask=m)


@triton.jit(do_not_specialize=_SIZES)
def video_backward_kernel(
    p_d_out,
    p_t,
    p_points,
    p_d_video,
    elements,
    points,
    frames,
    height,
    width,
    channels,
    size,
    MODE: tl.constexpr,
    COORDINATES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b, t, c, y, x, f_y, f_x, _, _ = _elements(
        o, p_t, p_points, m, points, frames, height, width, channels, size, MODE, COORDINATES, SHIFT
    )
    d = tl.load(p_d_out + o, mask=m, other=0.0).to(ACC)
    p_frame = p_d_video + (b * frames + t) * height * width * channels + c
    x_0, y_0 = _clamp(x, width), _clamp(y, height)
    if MODE == 2:
        f_x, f_y = f_x.to(ACC), f_y.to(ACC)
        x_1, y_1 = _clamp(x + 1, width), _clamp(y + 1, height)
        tl.atomic_add(p_frame + (y_0 * width + x_0) * channels, d * (1 - f_y) * (1 - f_x), mask=m)
        tl.atomic_add(p_frame + (y_0 * width + x_1) * channels, d * (1 - f_y) * f_x, mask=m)
        tl.atomic_add(p_frame + (y_1 * width + x_0) * channels, d * f_y * (1 - f_x), mask=m)
        tl.atomic_add(p_frame + (y_1 * width + x_1) * channels, d * f_y * f_x, mask=m)
    else:
        tl.atomic_add(p_frame + (y_0 * width + x_0) * channels, d, mask=m)


@triton.jit(do_not_specialize=_SIZES)
def points_backward_kernel(
    p_d_out,
    p_video,
    p_t,
    p_points,
    p_d_points,
    points,
    frames,
    height,
    width,
    channels,
    size,
    s_b,
    s_t,
    s_h,
    s_w,
    s_c,
    COORDINATES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    per_point = size * size * channels
    u, v = tl.load(p_points + 2 * n), tl.load(p_points + 2 * n + 1)
    x_first, f_x, s_x = _axis(u, width, size, 2, COORDINATES, SHIFT)
    y_first, f_y, s_y = _axis(v, height, size, 2, COORDINATES, SHIFT)
    p_frame = p_video + n // points * s_b + _clamp(tl.load(p_t + n), frames) * s_t
    b_x = tl.zeros([BLOCK], dtype=ACC)
    b_y = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, per_point, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < per_point
        c, x, y = o % channels, x_first + o // channels % size, y_first + o // channels // size
        x_0, x_1 = _clamp(x, width) * s_w + c * s_c, _clamp(x + 1, width) * s_w + c * s_c
        y_0, y_1 = _clamp(y, height) * s_h, _clamp(y + 1, height) * s_h
        v_00 = tl.load(p_frame + y_0 + x_0, mask=m, other=0).to(ACC)
        v_01 = tl.load(p_frame + y_0 + x_1, mask=m, other=0).to(ACC)
        v_10 = tl.load(p_frame + y_1 + x_0, mask=m, other=0).to(ACC)
        v_11 = tl.load(p_frame + y_1 + x_1, mask=m, other=0).to(ACC)
        d = tl.load(p_d_out + n * per_point + o, mask=m, other=0.0).to(ACC)
        above, below = v_01 - v_00, v_11 - v_10
        b_x += d * (above + f_y.to(ACC) * (below - above))
        b_y += d * ((v_10 + f_x.to(ACC) * below) - (v_00 + f_x.to(ACC) * above))
    dtype = p_d_points.dtype.element_ty
    # where the border holds the point there is no gradient, be the sum NaN or infinite
    tl.store(p_d_points + 2 * n, tl.where(s_x == 0, 0.0, s_x * tl.sum(b_x).to(dtype)))
    tl.store(p_d_points + 2 * n + 1, tl.where(s_y == 0, 0.0, s_y * tl.sum(b_y).to(dtype)))


def _acc(video):
    return tl.float64 if video.dtype == torch.float64 else tl.float32


def _options(mode, coordinates, border):
    return {"MODE": MODES.index(mode), "COORDINATES": COORDINATES.index(coordinates), "SHIFT": border == "shift"}


def gather(video, t, points, out, size, mode, coordinates, border):
    """Launches over non-empty tensors, contiguous but for the video."""
    grid = (triton.cdiv(out.numel(), 256),)
    gather_kernel[grid](
        video,
        t,
        points,
        out,
        out.numel(),
        t.shape[1],
        *video.shape[1:],
        size,
        *video.stride(),
        BLOCK=256,
        ACC=_acc(video),
        **_options(mode, coordinates, border),
    )


def gather_backward(d_out, video, t, points, d_video, d_points, size, mode, coordinates, border):
    """Launches for the gradients that are not empty. Allocates a float32 sum for a 16-bit video."""
    options, shape = _options(mode, coordinates, border), video.shape[1:]
    if d_video.numel():
        wide = torch.float64 if video.dtype == torch.float64 else torch.float32
        total = torch.zeros(d_video.shape, dtype=wide, device=video.device)
        video_backward_kernel[(triton.cdiv(d_out.numel(), 256),)](
            d_out, t, points, total, d_out.numel(), t.shape[1], *shape, size, BLOCK=256, ACC=_acc(video), **options
        )
        d_video.copy_(total)
    if d_points.numel():
        del options["MODE"]
        points_backward_kernel[(t.numel(),)](
            d_out,
            video,
            t,
            points,
            d_points,
            t.shape[1],
            *shape,
            size,
            *video.stride(),
            BLOCK=256,
            ACC=_acc(video),
            **options,
        )


def aot():
    """(kernel, signature, constexprs, options) of what runs hot, for compilation without a GPU."""
    sizes = {name: "i32" for name in ("points", "frames", "height", "width", "channels", "size")}
    strides = {name: "i64" for name in ("s_b", "s_t", "s_h", "s_w", "s_c")}
    for dtype, mode, shift in (("u8", 0, True), ("fp32", 0, True), ("fp32", 2, False), ("bf16", 2, True)):
        constexprs = {"MODE": mode, "COORDINATES": 0, "SHIFT": shift, "BLOCK": 256, "ACC": tl.float32}
        names = dict.fromkeys(constexprs, "constexpr")
        where = {"p_t": "*i64", "p_points": "*fp32"}
        yield (
            gather_kernel,
            {"p_video": f"*{dtype}", **where, "p_out": f"*{dtype}", "elements": "i64", **sizes, **strides, **names},
            constexprs,
            {},
        )
        if dtype != "u8":
            yield (
                video_backward_kernel,
                {"p_d_out": f"*{dtype}", **where, "p_d_video": "*fp32", "elements": "i64", **sizes, **names},
                constexprs,
                {},
            )
        if mode == 2:
            points = {k: v for k, v in constexprs.items() if k != "MODE"}
            yield (
                points_backward_kernel,
                {
                    "p_d_out": f"*{dtype}",
                    "p_video": f"*{dtype}",
                    **where,
                    "p_d_points": "*fp32",
                    **sizes,
                    **strides,
                    **dict.fromkeys(points, "constexpr"),
                },
                points,
                {},
            )
