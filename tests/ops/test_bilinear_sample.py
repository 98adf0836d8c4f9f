"""bilinear_sample: every backend against eager and float64, eager against F.grid_sample and the functa goldens."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import bilinear_sample
from fourdperf.ops.bilinear_sample import BORDERS, COORDINATES, MODES
from tests.harness import check_op, device_of, dtypes, jax_device, opcheck, same, same_in_jax, strided, transposed

GOLDENS = Path(__file__).parents[1] / "goldens" / "functa"
RULES = [
    dict(mode=m, coordinates=c, align_corners=a, border=b)
    for m, c, a, b in itertools.product(MODES, COORDINATES, (True, False), BORDERS)
]
# Each value of every option, and the rules that differ in kind
SOME_RULES = [RULES[i] for i in (0, 4, 7, 11, 13, 17, 21, 24, 34)]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
some_rules = pytest.mark.parametrize("rule", SOME_RULES, ids=lambda rule: "-".join(map(str, rule.values())))
# map, xy
SHAPES = {
    "vectors": ((2, 5, 6, 32), (2, 9, 2)),
    "odd": ((1, 7, 3, 19), (1, 33, 2)),
    "rgb": ((2, 4, 9, 3), (2, 17, 2)),
    "one_pixel": ((1, 1, 1, 5), (1, 6, 2)),
    "one_row": ((1, 1, 8, 4), (1, 6, 2)),
    "one_map_many_sets": ((4, 5, 8), (3, 2, 7, 2)),
    "many_maps_one_set": ((3, 2, 4, 5, 8), (7, 2)),
}
NAN, INF = float("nan"), float("inf")


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def points(shape, coordinates="unit", dtype=torch.float64, seed=1, beyond=0.4):
    """Coordinates inside the range and up to `beyond` of it outside."""
    xy = (
        torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * (1 + 2 * beyond)
        - beyond
    )
    return (xy * 2 - 1 if coordinates == "signed" else xy).to(dtype)


def second_order(function, map, xy, seed=5):
    """d_out, map, xy derivatives of <h, d_map> + <u, d_xy>."""
    map, xy = map.detach().requires_grad_(), xy.detach().requires_grad_()
    out = function(map, xy)
    d_out = sample(out.shape, seed=seed).to(out).requires_grad_()
    d_map, d_xy = torch.autograd.grad(out, (map, xy), d_out, create_graph=True)
    h, u = sample(map.shape, seed=seed + 1).to(map), sample(xy.shape, seed=seed + 2).to(xy)
    total = (d_map * h).sum() + (d_xy * u).sum()
    return torch.autograd.grad(total, (d_out, map, xy), materialize_grads=True)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@dtypes
def test_agrees_with_eager(shapes, dtype, target):
    inputs = {"map": sample(shapes[0]), "xy": points(shapes[1])}
    check_op(lambda map, xy, backend: bilinear_sample(map, xy, backend=backend), inputs, target, dtype)


@rules
def test_rules_agree_with_eager(rule, target):
    n = 40 if target.device == "cuda" or target.backend == "native" else 8  # the interpreter is slow
    inputs = {"map": sample((2, 5, 6, 4)), "xy": points((2, n, 2), rule["coordinates"], beyond=1.3)}
    check_op(lambda map, xy, backend: bilinear_sample(map, xy, **rule, backend=backend), inputs, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_points_of_a_16_bit_map(dtype, target):
    xy = points((2, 30, 2), dtype=torch.float32).to(target.device)
    check_op(
        lambda map, backend: bilinear_sample(
            map, xy.to(map.device, torch.float64 if map.dtype == torch.float64 else torch.float32), backend=backend
        ),
        {"map": sample((2, 40, 60, 5))},
        target,
        dtype,
    )
    map, xy = sample((2, 4, 5, 3), dtype).to(target.device), xy.requires_grad_()
    (d_xy,) = torch.autograd.grad(bilinear_sample(map, xy, backend=target.backend).sum(), xy)
    assert d_xy.dtype == torch.float32


@pytest.mark.parametrize(
    "shapes", [SHAPES["vectors"], SHAPES["odd"], SHAPES["one_map_many_sets"]], ids=["vectors", "odd", "sets"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_second_order_agrees_with_eager(shapes, dtype, target):
    map, xy = sample(shapes[0]).to(target.device), points(shapes[1]).to(target.device)
    exact = second_order(lambda *args: bilinear_sample(*args, backend="eager"), map, xy)
    ours = second_order(lambda *args: bilinear_sample(*args, backend=target.backend), map.to(dtype), xy.to(dtype))
    plain = second_order(lambda *args: bilinear_sample(*args, backend="eager"), map.to(dtype), xy.to(dtype))
    for name, a, b, c in zip(("d_d_out", "d_map", "d_xy"), ours, plain, exact):
        allowed = 3 * (b - c).abs().max() + torch.finfo(dtype).eps * c.abs().max()
        if dtype == torch.float64:
            allowed = 1e-13 * c.abs().max()
        assert (a - c).abs().max() <= allowed, name


@some_rules
def test_second_order_of_the_rules(rule, target):
    map, xy = (
        sample((2, 5, 6, 3)).to(target.device),
        points((2, 20, 2), rule["coordinates"], beyond=1.3).to(target.device),
    )
    want = second_order(lambda *args: bilinear_sample(*args, **rule, backend="eager"), map, xy)
    got = second_order(lambda *args: bilinear_sample(*args, **rule, backend=target.backend), map, xy)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


# Native and Triton with few: their second order is compared with eager's, rule by rule
GRADCHECKS = [
    *itertools.product(["eager"], SOME_RULES),
    ("native", RULES[11]),
    ("native", RULES[17]),
    ("triton", RULES[7]),
]


@pytest.mark.parametrize(
    "backend, rule", GRADCHECKS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_gradcheck(backend, rule):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = backend == "triton" and device == "cpu"  # the interpreter is slow
    map = sample((1, 2, 2, 1) if small else (1, 3, 4, 2)).to(device).requires_grad_()
    xy = points((1, 2 if small else 3, 2), rule["coordinates"], seed=3).to(device).requires_grad_()
    function = lambda map, xy: bilinear_sample(map, xy, **rule, backend=backend)
    assert torch.autograd.gradcheck(function, (map, xy), fast_mode=small)
    assert torch.autograd.gradgradcheck(function, (map, xy), fast_mode=small)
    only_map = lambda map: bilinear_sample(map, xy.detach(), **rule, backend=backend) ** 2
    assert torch.autograd.gradgradcheck(only_map, map, fast_mode=small)
    only_xy = lambda xy: bilinear_sample(map.detach(), xy, **rule, backend=backend) ** 2
    assert torch.autograd.gradgradcheck(only_xy, xy, fast_mode=small)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("border", BORDERS)
def test_is_grid_sample(backend, mode, align_corners, border):
    map, grid = sample((2, 5, 7, 3)), points((2, 60, 2), "signed", beyond=2.0)
    grid[:, 40:] = (grid[:, 40:] * 8).round() / 8  # ties between pixels, border pixels, corners of the range
    padding = {"clamp": "border", "zeros": "zeros", "reflect": "reflection"}[border]
    want = F.grid_sample(
        map.permute(0, 3, 1, 2), grid[:, :, None], mode=mode, padding_mode=padding, align_corners=align_corners
    )[..., 0].transpose(1, 2)
    got = bilinear_sample(
        map,
        grid,
        mode="nearest_round" if mode == "nearest" else mode,
        coordinates="signed",
        align_corners=align_corners,
        border=border,
        backend=backend,
    )
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("file", sorted(GOLDENS.glob("interp_*.npz")), ids=lambda file: file.stem)
def test_goldens(file, backend):
    """Values and gradients of upstream's own code. Its negative coordinates wrap round, and its gradient leaves out
    coordinates of one and more: only points in [0, 1] are compared, and gradients only of files within [0, 1)."""
    with np.load(file) as golden:
        config = json.loads(str(golden["config"]))
        tensors = {key: torch.from_numpy(golden[key]) for key in golden if key != "config"}
    rule = dict(mode="nearest_floor", align_corners=False) if config["mode"] == "1-NN" else {}
    allowed = lambda key: (
        30 * config["float32_noise"][key]["max_abs"] + 3e-6 * config["float32_noise"][key]["ref_max"]
        if key in config["float32_noise"]
        else 0
    )
    map, xy = tensors["in/feature_map"].requires_grad_(), tensors["in/coords"].requires_grad_()
    out = bilinear_sample(map, xy, **rule, backend=backend)
    inside = ((xy >= 0) & (xy <= 1)).all(-1)
    assert inside.sum() >= 5
    assert (out - tensors["out/value"])[inside].abs().max() <= allowed("out/value")
    d_map, d_xy = torch.autograd.grad(out, (map, xy), tensors["in/weight"])
    if not config["edge"]:
        assert (d_map - tensors["grad/feature_map"]).abs().max() <= allowed("grad/feature_map")
    want = tensors.get("grad/coords", torch.zeros_like(d_xy))
    assert (d_xy - want)[inside].abs().max() <= (allowed("grad/coords") if "grad/coords" in tensors else 0)


@some_rules
def test_special_coordinates(rule, target):
    """NaN, infinities, huge numbers and the ends of the range: defined, the same everywhere, and never out of bounds."""
    numbers = [0.0, 1.0, -1.0, 0.5, -0.0, INF, -INF, NAN, 3e38, -3e38, 1e10, 1e19, 1e-45, 2.0]
    xy = torch.tensor(list(itertools.product(numbers, numbers)))[None].to(target.device)
    map = sample((1, 4, 4, 3), torch.float32).to(target.device)
    results = []
    for backend in (target.backend, "eager"):
        leaves = map.clone().requires_grad_(), xy.clone().requires_grad_()
        out = bilinear_sample(*leaves, **rule, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    for name, a, b in zip(("out", "d_map", "d_xy"), *results):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4, equal_nan=True), name
    out, d_map, d_xy = results[0]
    undefined = (
        xy.isnan() if rule["border"] != "reflect" else ~(xy * 4).isfinite()
    )  # products that overflow are infinite
    if rule["mode"] == "bilinear":
        assert torch.equal(d_xy.isnan() & undefined, undefined)
    else:
        assert (d_xy == 0).all()
    undefined = undefined.any(-1)
    assert torch.equal(out.isnan().all(-1), undefined) and torch.equal(out.isnan().any(-1), undefined)
    assert d_map.isfinite().all() and not (d_xy.isnan().any(-1) & ~undefined).any()


def test_a_nan_in_the_map_stays_near_its_pixel(target):
    map = torch.zeros(1, 6, 6, 2, device=target.device)
    map[:, 2, 3] = NAN
    xy = torch.stack(torch.meshgrid(*[torch.linspace(0.01, 0.99, 30)] * 2, indexing="xy"), -1).reshape(1, -1, 2).to(map)
    hit = bilinear_sample(map, xy, backend=target.backend).isnan()[..., 0]
    assert torch.equal(hit, ((xy * 5 - torch.tensor([3.0, 2.0]).to(xy)).abs() < 1).all(-1))


def test_leading_dimensions_broadcast(target):
    """Every way in which leading axes may belong to the map, to the points, or to both."""
    map, xy = sample((2, 3, 2, 4, 3, 5)), points((2, 3, 2, 6, 2))
    for keep_map, keep_xy in itertools.product(itertools.product((0, 1), repeat=3), repeat=2):
        m = map[tuple(slice(None) if keep else slice(1) for keep in keep_map)]
        p = xy[tuple(slice(None) if keep else slice(1) for keep in keep_xy)]
        lead = torch.broadcast_shapes(m.shape[:3], p.shape[:3])
        want = bilinear_sample(
            m.expand(*lead, 4, 3, 5).flatten(0, 2), p.expand(*lead, 6, 2).flatten(0, 2), backend="eager"
        )
        got = bilinear_sample(m.to(target.device), p.to(target.device), backend=target.backend)
        assert got.shape == (*lead, 6, 5) and torch.allclose(got.cpu(), want.reshape(got.shape), rtol=0, atol=1e-13)
        if (*keep_map, *keep_xy) in ((0, 1, 1, 1, 0, 1), (1, 1, 0, 0, 1, 1)):
            leaves = m.to(target.device).requires_grad_(), p.to(target.device).requires_grad_()
            cotangent = sample(want.shape).reshape(got.shape).to(target.device)
            ours, plain = (
                torch.autograd.grad(bilinear_sample(*leaves, backend=backend), leaves, cotangent)
                for backend in (target.backend, "eager")
            )
            assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours, plain))


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_non_contiguous(layout, target):
    map, xy = (
        sample((2, 5, 6, 7), torch.float32).to(target.device),
        points((2, 9, 2), dtype=torch.float32).to(target.device),
    )
    want = bilinear_sample(map, xy, backend=target.backend)
    assert torch.equal(bilinear_sample(layout(map), layout(xy), backend=target.backend), want)
    leaves = layout(map).requires_grad_(), layout(xy).requires_grad_()
    cotangent = sample(want.shape, torch.float32).to(target.device)
    grads = torch.autograd.grad(bilinear_sample(*leaves, backend=target.backend), leaves, layout(cotangent))
    leaves = map.requires_grad_(), xy.requires_grad_()
    wanted = torch.autograd.grad(bilinear_sample(*leaves, backend=target.backend), leaves, cotangent)
    assert all(same(a, b, target) for a, b in zip(grads, wanted))


def test_a_shared_map_is_not_copied(monkeypatch):
    map, xy = sample((4, 5, 3)), points((6, 7, 2))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *args, **kwargs: pytest.fail("copied"))
    bilinear_sample(map, xy, backend="native")
    bilinear_sample(map.expand(6, 4, 5, 3), xy, backend="native")
    bilinear_sample(sample((6, 4, 5, 3))[::2], xy[0], backend="native")


@pytest.mark.parametrize(
    "map_shape, xy_shape",
    [
        ((0, 3, 4, 2), (0, 5, 2)),
        ((2, 3, 4, 2), (2, 0, 2)),
        ((2, 3, 4, 0), (2, 5, 2)),
        ((2, 0, 4, 2), (2, 0, 2)),
        ((0, 3, 4, 2), (5, 2)),
    ],
)
def test_empty(map_shape, xy_shape, target):
    map, xy = (
        torch.zeros(map_shape, device=target.device).requires_grad_(),
        torch.zeros(xy_shape, device=target.device).requires_grad_(),
    )
    out = bilinear_sample(map, xy, backend=target.backend)
    assert out.shape == (*torch.broadcast_shapes(map_shape[:-3], xy_shape[:-2]), xy_shape[-2], map_shape[-1])
    d_map, d_xy = torch.autograd.grad(out.sum(), (map, xy))
    assert d_map.shape == map.shape and d_xy.shape == xy.shape and (d_map == 0).all() and (d_xy == 0).all()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_registration(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "" if backend == "native" else "_triton"
    op, bwd, bwd_bwd = (
        getattr(torch.ops.fourdperf, f"bilinear_sample{suffix}{order}") for order in ("", "_bwd", "_bwd_bwd")
    )
    for dtype, mode in ((torch.float32, "bilinear"), (torch.bfloat16, "bilinear"), (torch.float32, "nearest_floor")):
        rule = (mode, "unit", True, "clamp")
        map, xy = (
            sample((2, 3, 4, 5)).to(device, dtype).requires_grad_(),
            points((2, 6, 2)).to(device, torch.float32).requires_grad_(),
        )
        d_out = sample((2, 6, 5)).to(device, dtype).requires_grad_()
        opcheck(op, (map, xy, *rule), dtype)
        opcheck(bwd, (d_out, map, xy, *rule, True, True), dtype)
        if mode == "bilinear":
            detached = [x.detach() for x in (sample((2, 3, 4, 5)).to(map), sample((2, 6, 2)).to(xy), d_out, map, xy)]
            opcheck(bwd_bwd, (*detached, *rule, True), dtype)


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap over either input or both, func.grad twice, jvp (eager alone has it, and is chosen), autocast, compile."""
    device = device_of(backend)
    map, xy = sample((3, 2, 4, 5, 6), torch.float32).to(device), points((3, 2, 7, 2), dtype=torch.float32).to(device)
    function = lambda map, xy: bilinear_sample(map, xy, backend=backend)
    want = function(map, xy)
    assert torch.equal(torch.vmap(function)(map, xy), want)
    assert torch.equal(
        torch.vmap(function, in_dims=(3, 2), out_dims=1)(map.movedim(0, 3), xy.movedim(0, 2)), want.movedim(0, 1)
    )
    assert torch.equal(torch.vmap(function, in_dims=(0, None))(map, xy[0]), function(map, xy[:1]))
    assert torch.equal(torch.vmap(function, in_dims=(None, 0))(map[0], xy), function(map[:1], xy))
    assert torch.equal(torch.vmap(function, in_dims=(None, 0))(map[0, 0], xy), function(map[0, 0], xy))

    def inner(map, xy):  # a step of gradient descent on the map, and the loss after it, as in functa's inner loop
        loss = lambda map, xy: function(map, xy).square().sum()
        d_map, d_xy = torch.func.grad(loss, argnums=(0, 1))(map, xy)
        return loss(map - 0.1 * d_map, xy - 0.01 * d_xy)

    for in_dims in ((0, 0), (0, None), (None, 0)):
        arguments = [x if dim == 0 else x[0] for x, dim in zip((map, xy), in_dims)]
        outer = torch.vmap(torch.func.grad(inner, argnums=(0, 1)), in_dims=in_dims)(*arguments)
        plain = torch.vmap(torch.func.grad(lambda m, p: _inner_eager(m, p), argnums=(0, 1)), in_dims=in_dims)(
            *arguments
        )
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(outer, plain))
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(function(map, xy), want)
    compiled = torch.compile(lambda map, xy: function(map * 2, xy) + 1, fullgraph=True, backend="aot_eager")
    leaves = map.clone().requires_grad_(), xy.clone().requires_grad_()
    out = compiled(*leaves)
    assert torch.allclose(out, want * 2 + 1, atol=1e-5)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves))
    assert torch.func.jvp(bilinear_sample, (map, xy), (map, xy))[1].shape == want.shape
    if backend != "eager":
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            torch.func.jvp(function, (map, xy), (map, xy))


def _inner_eager(map, xy):
    loss = lambda map, xy: bilinear_sample(map, xy, backend="eager").square().sum()
    d_map, d_xy = torch.func.grad(loss, argnums=(0, 1))(map, xy)
    return loss(map - 0.1 * d_map, xy - 0.01 * d_xy)


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
@some_rules
def test_jax(rule, backend):
    """Value, first and second derivatives of both JAX backends against torch."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import bilinear_sample as jax_sample

    map, xy = sample((2, 5, 6, 3), torch.float32), points((2, 20, 2), rule["coordinates"], torch.float32, beyond=1.3)
    d_out, h, u = (sample(shape, seed=seed).float() for shape, seed in (((2, 20, 3), 5), (map.shape, 6), (xy.shape, 7)))
    want = (bilinear_sample(map, xy, **rule), *second_order(lambda *args: bilinear_sample(*args, **rule), map, xy))
    function = lambda map, xy: jax_sample(map, xy, **rule, backend=backend)

    def second(d_out, map, xy):
        d_map, d_xy = jax.vjp(function, map, xy)[1](d_out)
        return (d_map * h.numpy()).sum() + (d_xy * u.numpy()).sum()

    arrays = [jnp.asarray(x.numpy()) for x in (d_out, map, xy)]
    got = (jax.jit(function)(*arrays[1:]), *jax.jit(jax.grad(second, (0, 1, 2)))(*arrays))
    for name, a, b in zip(("out", "d_d_out", "d_map", "d_xy"), got, want):
        assert np.abs(np.asarray(a) - b.detach().numpy()).max() <= 1e-5 * max(1, b.abs().max().item()), name


def test_jax_batches_and_dtypes():
    """Leading axes, nested vmap with shared tensors, 16-bit maps; special coordinates; errors."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import bilinear_sample as jax_sample

    map, xy = sample((3, 2, 4, 5, 6), torch.float32), points((2, 7, 2), dtype=torch.float32)
    xy[0, :4, 0] = torch.tensor([NAN, INF, -INF, 1.0])
    for m, p in ((map, xy), (map[0, 0], xy), (map, xy[0]), (map[:, :1], xy)):
        want = bilinear_sample(m, p).numpy()
        for backend in ("jnp", "ffi"):
            got = jax_sample(jnp.asarray(m.numpy()), jnp.asarray(p.numpy()), backend=backend)
            assert np.allclose(got, want, atol=1e-5, equal_nan=True)
    xy = points((2, 7, 2), dtype=torch.float32)
    m, p = jnp.asarray(map.numpy()), jnp.asarray(xy.numpy())
    for in_dims in ((0, None), (None, 0), (0, 0)):
        both = []
        for backend in ("jnp", "ffi"):
            loss = lambda m, p: (jax_sample(m, p, backend=backend) ** 2).sum()
            second = jax.grad(lambda m, p: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(m, p)), (0, 1))
            inner = jax.vmap(second, in_axes=(0, None))  # over the maps of m[:, i], one set
            arguments = m.swapaxes(0, 1) if in_dims[0] == 0 else m[:, 0], p if in_dims[1] == 0 else p[0]
            both.append(jax.jit(jax.vmap(inner, in_axes=in_dims))(*arguments))
        for a, b in zip(*both):
            assert a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-2)
    for dtype in ("bfloat16", "float16"):
        half = map[0].to(jax_device(), getattr(torch, dtype))
        got = jax_sample(m[0].astype(dtype), p, backend="ffi")
        assert got.dtype == dtype and same_in_jax(got, bilinear_sample(half, xy.to(half.device)))
    assert jax_sample(m[0], p[:, :0]).shape == (2, 0, 6)
    with pytest.raises(ValueError, match="xy must have the dtype of map"):
        jax_sample(m[0], p.astype("bfloat16"))
    with pytest.raises(ValueError, match="must broadcast"):
        jax_sample(m[0], jnp.zeros((3, 7, 2)))


def test_threads_change_nothing():
    """Crowded points, few rows, more threads than rows; large maps that are sorted into stretches of columns."""
    before, results = torch.get_num_threads(), []
    cases = [
        ((2, 3, 5, 8), points((2, 500, 2))),
        ((1, 40, 700, 80), points((1, 3000, 2)) ** 4),
        ((300, 90, 1, 3), points((300, 4, 2))),
    ]
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            run = lambda map, xy: bilinear_sample(map, xy, backend="native")
            results.append(
                [
                    torch.cat(
                        [
                            x.flatten()
                            for x in (
                                run(sample(m, torch.float32), p.float()),
                                *second_order(run, sample(m, torch.float32), p.float()),
                            )
                        ]
                    )
                    for m, p in cases
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_deterministic_algorithms(backend):
    """d_map summed cell by cell agrees with the sum by atomics (a GPU; Triton also in its interpreter)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rule in SOME_RULES[::2]:
        map, xy = sample((2, 2, 3, 3)).to(device), points((2, 7, 2), rule["coordinates"]).to(device)
        xy[0, 0] = NAN
        leaves = map.requires_grad_(), xy.requires_grad_()
        function = lambda *args: bilinear_sample(*args, **rule, backend=backend)
        both = []
        for wanted in (False, True):
            torch.use_deterministic_algorithms(wanted)
            try:
                both.append(
                    (
                        torch.autograd.grad(function(*leaves).square().sum(), map)[0],
                        second_order(function, map, xy[:, 1:])[1],
                    )
                )
            finally:
                torch.use_deterministic_algorithms(False)
        for a, b in zip(*both):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, p: bilinear_sample(m.int(), p),
            "map must be float64, float32, bfloat16 or float16, got torch.int32",
        ),
        (
            lambda m, p: bilinear_sample(m, p.long()),
            "xy must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (
            lambda m, p: bilinear_sample(m, p.double()),
            r"xy must have the dtype of map \(torch.float32\), got torch.float64",
        ),
        (
            lambda m, p: bilinear_sample(m.half(), p.bfloat16()),
            r"xy must have the dtype of map \(torch.float16\) or float32",
        ),
        (lambda m, p: bilinear_sample(m[0, 0], p), r"map must have shape \(..., H, W, C\), got \(5, 3\)"),
        (lambda m, p: bilinear_sample(m, p[..., :1]), r"xy must have shape \(..., N, 2\), got \(2, 6, 1\)"),
        (
            lambda m, p: bilinear_sample(m, torch.zeros(3, 6, 2)),
            r"leading dimensions of map \(2,\) and of xy \(3,\) must broadcast",
        ),
        (lambda m, p: bilinear_sample(m[:, :0], p), "map must have pixels where xy has points"),
        (lambda m, p: bilinear_sample(m, p, mode="nearest"), "mode must be one of 'bilinear', 'nearest_floor'"),
        (lambda m, p: bilinear_sample(m, p, coordinates="pixels"), "coordinates must be one of 'unit', 'signed'"),
        (lambda m, p: bilinear_sample(m, p, border="border"), "border must be one of 'clamp', 'zeros', 'reflect'"),
        (lambda m, p: bilinear_sample(m, p.to("meta")), "xy must be on the device of map"),
        (lambda m, p: bilinear_sample(m, p, backend="cuda"), "backend must be one of"),
        (lambda m, p: bilinear_sample(m.numpy(), p), "map must be a torch.Tensor, got ndarray"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4, 5, 3), torch.zeros(2, 6, 2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout, rule and coordinate: native computes what eager does, derivatives too, or both raise ValueError."""
    sizes = st.integers(0, 6)
    map_shape = data.draw(st.lists(sizes, min_size=2, max_size=5), label="map")
    xy_shape = [*data.draw(st.lists(sizes, max_size=2), label="xy"), data.draw(st.integers(0, 80)), 2]
    if data.draw(st.booleans(), label="same lead"):
        xy_shape = [*map_shape[:-3], *xy_shape[-2:]]
    rule = data.draw(st.sampled_from(RULES))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    layout = data.draw(st.sampled_from([torch.clone, strided, transposed]))
    xy = points(xy_shape, beyond=data.draw(st.sampled_from([0.0, 0.5, 100.0]))).to(dtype)
    odd = data.draw(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -1.0, 1e30, -1e30]), max_size=4))
    xy.flatten()[: len(odd)] = torch.tensor(odd, dtype=torch.float64).to(dtype)[: xy.numel()]
    map, xy = layout(sample(map_shape).to(dtype)), layout(xy)
    results = []
    for backend in ("native", "eager"):
        leaves = map.detach().requires_grad_(), xy.detach().requires_grad_()
        try:
            out = bilinear_sample(*leaves, **rule, backend=backend)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))))
        except ValueError as error:
            results.append(str(error))
    ours, plain = results
    if isinstance(plain, str):
        assert ours == plain
        return
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    for a, b in zip(ours, plain):
        assert a.shape == b.shape and a.dtype == b.dtype
        size = b.double().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * max(1, size), equal_nan=True)


@pytest.mark.heavy
def test_more_than_2_to_the_31_elements():
    map = torch.zeros(1, 2, 2**15 + 1, 2**16, dtype=torch.bfloat16)
    map[0, 1, -1] = 1
    xy = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [1.0, 0.5]]])
    assert bilinear_sample(map, xy, backend="native")[0, :, 0].tolist() == [1, 0, 0.5]
    shared = torch.ones(1, 1, 1, 2).expand(1, 1, 1, 2)
    assert (bilinear_sample(shared, torch.rand(1, 2**30 + 5, 2), backend="native")[0, -5:] == 1).all()
