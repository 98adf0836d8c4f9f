"""gather_patches: every backend against eager and float64, eager against the goldens of both D4RT ports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import gather_patches
from fourdperf.ops.gather_patches import BORDERS, COORDINATES, MODES
from tests.harness import check_op, device_of, dtypes, same_with_threads, strided, transposed

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"

# (B, T, H, W, C), N, size
CASES = {
    "d4rt": ((2, 3, 20, 26, 3), 17, 9),
    "even": ((1, 2, 9, 8, 1), 12, 4),
    "one_pixel": ((2, 1, 5, 6, 4), 9, 1),
    "whole_frame": ((1, 2, 7, 7, 2), 6, 7),
    "wide_channels": ((1, 1, 6, 9, 37), 5, 3),
}
modes = pytest.mark.parametrize("mode", MODES)
borders = pytest.mark.parametrize("border", BORDERS)


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inputs(shape, n, seed=0):
    """A video; frames and points, some of them outside."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(-1, shape[1] + 1, (shape[0], n), generator=generator)
    points = torch.rand(shape[0], n, 2, dtype=torch.float64, generator=generator) * 1.4 - 0.2
    return {"video": sample(shape, seed=seed + 1), "t": t, "points": points}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@borders
@dtypes
def test_bilinear_agrees_with_eager(case, border, dtype, target):
    shape, n, size = case
    function = lambda backend, **x: gather_patches(**x, size=size, mode="bilinear", border=border, backend=backend)
    check_op(function, inputs(shape, n), target, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("mode", ["round", "floor"])
@borders
def test_whole_pixels_agree_with_eager(case, mode, border, target):
    shape, n, size = case
    function = lambda backend, **x: gather_patches(**x, size=size, mode=mode, border=border, backend=backend)
    for dtype in (torch.float32, torch.bfloat16) if str(target) != "triton-cpu" else (torch.float32,):
        check_op(function, inputs(shape, n), target, dtype, grads=("video",))


@modes
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_coordinates_and_uint8(mode, coordinates, target):
    data = inputs((2, 3, 12, 15, 3), 20)
    scale = 12 if coordinates == "pixels" else 1
    video = (data["video"].clamp(-2, 2) * 60 + 128).to(torch.uint8).to(target.device)
    t, points = data["t"].to(target.device), (data["points"] * scale).float().to(target.device)
    run = lambda backend: gather_patches(
        video, t, points, 5, mode=mode, coordinates=coordinates, border="replicate", backend=backend
    )
    ours, plain = run(target.backend), run("eager")
    assert ours.dtype == plain.dtype == (torch.float32 if mode == "bilinear" else torch.uint8)
    assert torch.allclose(ours.float(), plain.float(), rtol=0, atol=2e-4 if mode == "bilinear" else 0)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_goldens(backend):
    """Port A: rounded and shifted inside; its ties; frame 0. Port B: bilinear with corners, and truncated."""
    for name in ("a_patches", "a_patches_7", "a_patches_ties", "a_patches_highres"):
        with np.load(GOLDENS / f"{name}.npz") as golden:
            array = lambda key: torch.from_numpy(golden[key])
            video, t, points, want = (array(key) for key in ("in/images", "in/t_src", "in/coords", "out/patches"))
            video = video.requires_grad_()
            moved, size = video.permute(0, 1, 3, 4, 2), want.shape[-1]
            patches = gather_patches(moved, t, points, size, backend=backend).permute(0, 1, 4, 2, 3)
            assert torch.equal(patches, want)
            first = gather_patches(moved, torch.zeros_like(t), points, size, backend=backend).permute(0, 1, 4, 2, 3)
            assert torch.equal(first, array("out/patches_frame0"))
            out = F.conv2d(patches.flatten(0, 1), array("params/conv.0.weight"), array("params/conv.0.bias"), padding=1)
            out = F.conv2d(out.relu(), array("params/conv.2.weight"), array("params/conv.2.bias")).flatten(1)
            out = out.reshape(*t.shape, -1)
            atol = json.loads(str(golden["config"]))["atol"]
            assert (out - array("out/embedded")).abs().max() <= atol["out/embedded"]
            (d_video,) = torch.autograd.grad(out, video, array("in/cot/embedded"))
            assert (d_video - array("grad/images")).abs().max() <= atol["grad/images"]
    with np.load(GOLDENS / "b_patches.npz") as golden:
        array = lambda key: torch.from_numpy(golden[key])
        atol = json.loads(str(golden["config"]))["atol"]
        video, t, points = (
            array("in/frames").permute(0, 1, 3, 4, 2).requires_grad_(),
            array("in/t_src"),
            array("in/coords"),
        )
        options = {"coordinates": "corners", "border": "replicate", "backend": backend}
        fast = gather_patches(video, t, points, 9, mode="bilinear", **options).flatten(2)
        assert (fast - array("out/fast_patches_flat")).abs().max() <= atol["out/fast_patches_flat"]
        assert torch.equal(gather_patches(video, t, points, 9, mode="floor", **options), array("out/slow_patches"))
        hidden = F.gelu(F.linear(fast, array("params/fast.mlp.0.weight"), array("params/fast.mlp.0.bias")))
        out = F.linear(hidden, array("params/fast.mlp.2.weight"), array("params/fast.mlp.2.bias"))
        assert (out - array("out/fast_embedded")).abs().max() <= atol["out/fast_embedded"]
        (d_video,) = torch.autograd.grad(out, video, array("in/cot/fast_embedded"))
        assert (d_video.permute(0, 1, 4, 2, 3) - array("grad/frames")).abs().max() <= atol["grad/frames"]


def test_grid_sample_is_the_same_interpolation():
    """One frame, patches as a grid of positions: align_corners both ways, replicated border."""
    data = inputs((1, 1, 13, 17, 4), 11)
    video, points = data["video"], data["points"]
    for coordinates, corners in (("corners", True), ("centers", False)):
        ours = gather_patches(video, data["t"], points, 5, mode="bilinear", coordinates=coordinates, border="replicate")
        length = torch.tensor([17.0, 13.0], dtype=torch.float64)
        p = points * (length - 1) if corners else points * length - 0.5
        offsets = torch.stack(torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="xy"), -1)
        grid = p[0, :, None, None] + offsets
        grid = grid / (length - 1) * 2 - 1 if corners else (grid + 0.5) / length * 2 - 1
        frame = video[:, 0].permute(0, 3, 1, 2).expand(11, -1, -1, -1)
        want = F.grid_sample(frame, grid, mode="bilinear", padding_mode="border", align_corners=corners).permute(
            0, 2, 3, 1
        )
        assert torch.allclose(ours[0], want, atol=1e-12)


@modes
@pytest.mark.parametrize(
    "layout",
    [strided, transposed, lambda x: x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)],
    ids=["strided", "transposed", "planar"],
)
def test_non_contiguous(layout, mode, target):
    data = {k: x.to(target.device) for k, x in inputs((2, 3, 11, 12, 3), 9).items()}
    data["video"] = data["video"].float()
    run = lambda video, t, points: gather_patches(
        video, t, points, 3, mode=mode, border="replicate", backend=target.backend
    )
    want = run(**data)
    assert torch.equal(run(layout(data["video"]), strided(data["t"].double()).long(), strided(data["points"])), want)
    still = data["video"][:, :1].expand(-1, 3, -1, -1, -1)  # stride 0: one picture shown three times
    assert torch.equal(run(still, data["t"], data["points"]), run(still.contiguous(), data["t"], data["points"]))


@modes
def test_points_anywhere(mode, target):
    """Infinite, NaN and enormous coordinates, frames far outside: an answer or NaN, and the same as eager."""
    video = sample((1, 2, 6, 8, 2), torch.float32).to(target.device)
    bad = [float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0, 1.0]
    points = torch.tensor([[u, v] for u in bad for v in bad], device=target.device)[None]
    t = torch.full((1, len(bad) ** 2), 2**40, device=target.device)
    for border in BORDERS:
        results = [
            gather_patches(video, t, points, 3, mode=mode, border=border, backend=b) for b in (target.backend, "eager")
        ]
        assert torch.allclose(*results, atol=1e-5, equal_nan=True)
        assert mode == "bilinear" or results[0].isfinite().all()


@pytest.mark.parametrize("mode", ["round", "floor"])
@borders
def test_nan_is_rounded_as_zero(mode, border, target):
    video = sample((1, 1, 6, 8, 2), torch.float32).to(target.device)
    points = torch.tensor([[[torch.nan, torch.nan], [0, 0], [torch.nan, 0.5], [0, 0.5]]], device=target.device)
    t = torch.zeros(1, 4, dtype=torch.long, device=target.device)
    for backend in (target.backend, "eager"):
        patches = gather_patches(video, t, points, 5, mode=mode, border=border, backend=backend)
        assert torch.equal(patches[:, ::2], patches[:, 1::2])


@pytest.mark.parametrize("nan_in", ["video", "d_out"])
@borders
def test_nan_moves_no_point_that_the_border_holds(nan_in, border, target):
    video, d_out = torch.ones(1, 1, 6, 8, 2, device=target.device), torch.ones(1, 2, 3, 3, 2, device=target.device)
    (video if nan_in == "video" else d_out).fill_(torch.nan)
    points = torch.tensor([[[-9, 0.5], [0.4, 9]]], device=target.device, requires_grad=True)
    t = torch.zeros(1, 2, dtype=torch.long, device=target.device)
    for backend in (target.backend, "eager"):
        patches = gather_patches(video, t, points, 3, mode="bilinear", border=border, backend=backend)
        ((of_left, of_below),) = torch.autograd.grad(patches, points, d_out)[0]
        assert of_left[0] == 0 and of_left[1].isnan() and of_below[0].isnan() and of_below[1] == 0


def test_nan_in_the_gradient_stays_in_its_pixel(target):
    video = torch.zeros(1, 1, 9, 9, 1, device=target.device, requires_grad=True)
    points = torch.full((1, 1, 2), 0.5, device=target.device)
    patch = gather_patches(
        video, torch.zeros(1, 1, dtype=torch.long, device=target.device), points, 3, backend=target.backend
    )
    d_out = torch.ones_like(patch)
    d_out[0, 0, 1, 1] = float("nan")
    (d_video,) = torch.autograd.grad(patch, video, d_out)
    assert d_video.isnan().sum() == 1 and d_video.nansum() == 8


@pytest.mark.parametrize(
    "shape, n", [((0, 2, 9, 9, 3), 4), ((1, 2, 9, 9, 3), 0), ((1, 2, 9, 9, 0), 4), ((1, 0, 0, 0, 3), 0)], ids=str
)
@modes
def test_empty(shape, n, mode, target):
    video = torch.zeros(shape, device=target.device, requires_grad=True)
    points = torch.zeros(shape[0], n, 2, device=target.device, requires_grad=True)
    t = torch.zeros(shape[0], n, dtype=torch.long, device=target.device)
    out = gather_patches(video, t, points, 5, mode=mode, backend=target.backend)
    assert out.shape == (shape[0], n, 5, 5, shape[4])
    (d_video,) = torch.autograd.grad(out.sum(), video)
    assert d_video.shape == shape and not d_video.any()


@pytest.mark.parametrize("backend", ["native", "triton"])
@borders
def test_derivatives_and_registration(backend, border):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "" if backend == "native" else "_triton"
    data = {k: x.to(device) for k, x in inputs((1, 2, 4, 3, 1), 2).items()}
    video, points, t = data["video"].requires_grad_(), (data["points"] * 0.7).requires_grad_(), data["t"]
    run = lambda video, points: gather_patches(video, t, points, 3, mode="bilinear", border=border, backend=backend)
    whole = lambda video: gather_patches(video, t, points, 3, border=border, backend=backend) ** 2
    fast = backend == "triton" and device == "cpu"  # random directions: the interpreter is slow
    for function, args in ((run, (video, points)), (whole, (video,))):
        assert torch.autograd.gradcheck(function, args, fast_mode=fast)
        assert torch.autograd.gradgradcheck(function, args, fast_mode=fast)
    video, points = video.detach().float().requires_grad_(), points.detach().float().requires_grad_()
    ops = torch.ops.fourdperf
    forward, backward = getattr(ops, f"gather_patches{suffix}"), getattr(ops, f"gather_patches_backward{suffix}")
    d_out = sample((1, 2, 3, 3, 1), torch.float32).to(device)
    for mode in ("bilinear", "round"):
        torch.library.opcheck(forward, (video, t, points, 3, mode, "scaled", border))
    byte = (video.detach() * 50 + 100).to(torch.uint8)
    torch.library.opcheck(forward, (byte, t, points, 3, "bilinear", "scaled", border))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            backward, (d_out, video.detach(), t, points.detach(), 3, "bilinear", "scaled", border, *wanted)
        )


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap, func.grad, autocast, compile without a graph break."""
    data = {name: x.to(device_of(backend)) for name, x in inputs((2, 3, 9, 10, 2), 4).items()}
    video, t, points = data["video"].float(), data["t"], data["points"].float()
    run = lambda video, t, points: gather_patches(video, t, points, 3, mode="bilinear", backend=backend)
    want = run(video, t, points)
    clips = torch.stack([video, 2 * video, -video])
    mapped = torch.vmap(run, (0, None, None))(clips, t, points)
    assert torch.allclose(mapped[1], 2 * want, atol=1e-6)
    mapped = torch.vmap(run, (None, 0, 1))(video, torch.stack([t, t]), torch.stack([points, points], 1))
    assert torch.equal(mapped[1], want)
    d_points = torch.func.grad(lambda points: run(video, t, points).square().sum())(points)
    assert d_points.shape == points.shape
    each = torch.vmap(torch.func.grad(lambda v, p: run(v, t, p).square().sum(), (0, 1)), (0, None))(clips, points)
    assert torch.allclose(each[1][1], 4 * d_points, rtol=1e-3, atol=1e-3) and each[0].shape == clips.shape
    with torch.autocast(device_of(backend), torch.bfloat16):
        assert torch.equal(run(video, t, points), want)
    video.requires_grad_()
    compiled = torch.compile(lambda v, p: run(v * 2, t, p) + 1, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(video, points), 2 * want + 1, atol=1e-5)
    (d_video,) = torch.autograd.grad(compiled(video, points).sum(), video)
    assert torch.allclose(d_video, torch.autograd.grad(2 * run(video, t, points).sum(), video)[0], atol=1e-5)


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
@modes
@borders
def test_jax(backend, mode, border):
    """Both JAX backends against torch: value and gradients, uint8, vmap, second order."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import gather_patches as jax_gather

    data = inputs((2, 3, 9, 10, 3), 6)
    video, t, points = data["video"].float(), data["t"], data["points"].float()
    arrays = [jnp.asarray(x.numpy()) for x in (video, points)]
    run = lambda video, points, backend=backend: jax_gather(
        video, jnp.asarray(t.numpy()), points, 5, mode=mode, border=border, backend=backend
    )
    video, points = video.requires_grad_(), points.requires_grad_()
    want = gather_patches(video, t, points, 5, mode=mode, border=border, backend="eager")
    cotangent = sample(want.shape, torch.float32, seed=5)
    grads = torch.autograd.grad(want, (video, points), cotangent, allow_unused=True)
    got, pullback = jax.vjp(jax.jit(run), *arrays)
    assert np.allclose(got, want.detach().numpy(), atol=1e-5)
    for ours, theirs in zip(pullback(jnp.asarray(cotangent.numpy())), grads):
        assert np.allclose(ours, 0 if theirs is None else theirs.numpy(), atol=1e-4)
    byte = (video.detach() * 50 + 100).to(torch.uint8)
    ours, plain = (
        run(jnp.asarray(byte.numpy()), arrays[1]),
        gather_patches(byte, t, points, 5, mode=mode, border=border, backend="eager"),
    )
    assert str(ours.dtype) == str(plain.dtype).removeprefix("torch.") and np.allclose(
        ours, plain.detach().numpy(), atol=1e-3
    )
    mapped = jax.jit(jax.vmap(run, (0, None)))(jnp.stack([arrays[0], 2 * arrays[0]]), arrays[1])
    assert np.allclose(mapped[1], 2 * got, atol=1e-5)
    if mode == "bilinear":
        energy = lambda backend: lambda *args: (run(*args, backend=backend) ** 3).sum()
        square = lambda backend: lambda *args: sum((g**2).sum() for g in jax.grad(energy(backend), (0, 1))(*args))
        second = lambda backend: jax.jit(jax.grad(square(backend), (0, 1)))(*arrays)
        for ours, theirs in zip(second(backend), second("jnp")):
            assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
        d_points = jax.grad(lambda points: run(jnp.asarray(byte.numpy()), points).sum())(arrays[1])
        assert np.isfinite(d_points).all() and np.abs(d_points).max() > 0


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
@borders
def test_jax_nan(backend, border):
    jnp, jax = pytest.importorskip("jax.numpy"), pytest.importorskip("jax")
    from fourdperf.jax.ops import gather_patches as jax_gather

    video, t = jnp.asarray(sample((1, 1, 6, 8, 2), torch.float32).numpy()), jnp.zeros((1, 2), int)
    patches = jax_gather(video, t, jnp.asarray([[[jnp.nan, 0.5], [0, 0.5]]]), 5, border=border, backend=backend)
    assert np.array_equal(patches[:, 0], patches[:, 1])
    run = lambda points: jax_gather(video, t, points, 3, mode="bilinear", border=border, backend=backend)
    out, pullback = jax.vjp(run, jnp.asarray([[[-9, 0.5], [0.4, 9]]]))
    (d_points,) = pullback(jnp.full_like(out, jnp.nan))
    assert np.array_equal(d_points, [[[0, np.nan], [np.nan, 0]]], equal_nan=True)


def test_threads_change_nothing():
    data = inputs((2, 3, 90, 260, 3), 500)
    video, points, t = data["video"].float().requires_grad_(), data["points"].float().requires_grad_(), data["t"]

    def everything():
        out = gather_patches(video, t, points, 9, mode="bilinear", border="replicate", backend="native")
        return out, *torch.autograd.grad(out.square().sum(), (video, points))

    same_with_threads(everything)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v, t, p: gather_patches(v[0], t, p), r"video must have shape \(B, T, H, W, C\), got \(3, 12, 13, 2\)"),
        (lambda v, t, p: gather_patches(v.int(), t, p), "video must be uint8 or floating, got torch.int32"),
        (lambda v, t, p: gather_patches(v.numpy(), t, p), "video must be a torch.Tensor, got ndarray"),
        (
            lambda v, t, p: gather_patches(v, t, p[..., :1]),
            r"points must have shape \(B, N, 2\) with B = 2, got \(2, 4, 1\)",
        ),
        (lambda v, t, p: gather_patches(v, t, p.long()), "points must be float64"),
        (lambda v, t, p: gather_patches(v, t.float(), p), "t must be a tensor of integers, got torch.float32"),
        (lambda v, t, p: gather_patches(v, t[:, 1:], p), r"t must have shape \(B, N\) = \(2, 4\), got \(2, 3\)"),
        (lambda v, t, p: gather_patches(v, t, p, 0), "size must be at least 1, got 0"),
        (
            lambda v, t, p: gather_patches(v, t, p, 13),
            "border='shift' needs frames of at least 13 x 13 pixels, got 12 x 13",
        ),
        (lambda v, t, p: gather_patches(v[:, :0], t, p), "video must not be empty"),
        (lambda v, t, p: gather_patches(v, t, p, mode="nearest"), "mode must be one of 'round', 'floor', 'bilinear'"),
        (lambda v, t, p: gather_patches(v, t, p, coordinates="uv"), "coordinates must be one of 'scaled'"),
        (lambda v, t, p: gather_patches(v, t, p, border="zeros"), "border must be one of 'shift', 'replicate'"),
        (lambda v, t, p: gather_patches(v, t.to("meta"), p), "t and points must be on the device of video"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 12, 13, 2), torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, 2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout and option: native computes what eager does, or both raise the same ValueError."""
    draw = data.draw
    batch, n, size = draw(st.integers(0, 2)), draw(st.integers(0, 5)), draw(st.integers(0, 7))
    shape = (batch, *draw(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9), st.integers(0, 4))))
    options = {
        "mode": draw(st.sampled_from(MODES)),
        "coordinates": draw(st.sampled_from(COORDINATES)),
        "border": draw(st.sampled_from(BORDERS)),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]))
    layout = draw(st.sampled_from([torch.clone, transposed] + [strided] * dtype.is_floating_point))
    video = layout((sample(shape) * 20 + 60).to(dtype))
    t = torch.randint(
        -2,
        5,
        (batch, n),
        generator=torch.Generator().manual_seed(0),
        dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )
    points = strided(
        sample((batch, n, 2)).to(draw(st.sampled_from([torch.float32, torch.float64]))) * draw(st.sampled_from([1, 9]))
    )
    results = []
    for backend in ("native", "eager"):
        try:
            results.append(gather_patches(video, t, points, size, **options, backend=backend))
        except ValueError as error:
            results.append(str(error))
    ours, plain = results
    if isinstance(plain, str):
        assert ours == plain
    else:
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        tolerance = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 1.0, torch.float16: 0.1}.get(dtype, 2e-2)
        assert torch.allclose(ours.double(), plain.double(), rtol=0, atol=tolerance)
