"""modulated_siren: every backend against eager and float64, eager against bilinear_sample and plain torch."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import bilinear_sample, modulated_sine, modulated_siren
from fourdperf.ops.modulated_siren import MODES, MODULATE
from tests.harness import check_op, device_of, dtypes, opcheck, same, strided, transposed

NAN, INF = float("nan"), float("inf")
RULES = [dict(modulate=modulate, mode=mode) for modulate, mode in itertools.product(MODULATE, MODES)]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
# pre (B, N, H), map (B, Hm, Wm), xy (B, N, 2)
SHAPES = {
    "vectors": ((2, 9, 32), (2, 5, 6), (2, 9, 2)),
    "odd": ((1, 33, 19), (1, 7, 3), (1, 33, 2)),
    "one_channel": ((2, 5, 1), (2, 2, 3), (2, 5, 2)),
    "plain_functa": ((3, 7, 20), (3, 1, 1), (7, 2)),
    "one_row": ((2, 9, 5), (2, 1, 8), (9, 2)),
    "one_column": ((2, 9, 5), (2, 8, 1), (9, 2)),
    "shared_pre": ((9, 17), (4, 3, 5), (9, 2)),
    "shared_map": ((4, 9, 17), (1, 3, 5), (4, 9, 2)),
}


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shapes, modulate, dtype=torch.float64):
    """pre, map and points, some outside of [0, 1] or on its border; small angles, so that dtypes can be compared."""
    pre, map, xy = shapes
    points = torch.rand(xy, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2
    points[..., -1, :] = torch.tensor([1.0, 0.5])
    channels = pre[-1] * (1 + (modulate == "both"))
    return 0.3 * sample(pre, dtype), 0.3 * sample((*map, channels), dtype, seed=2), points.to(dtype)


def second_order(function, pre, map, which=("pre", "map")):
    """d_out, pre, map derivatives of <v_pre, d_pre> + <v_map, d_map>, or of one of the two."""
    pre, map = pre.detach().requires_grad_(), map.detach().requires_grad_()
    out = function(pre, map)
    d_out = sample(out.shape, seed=5).to(out).requires_grad_()
    grads = torch.autograd.grad(out, (pre, map), d_out, create_graph=True)
    terms = [(g * sample(g.shape, seed=6 + i).to(g)).sum() for i, g in enumerate(grads) if ("pre", "map")[i] in which]
    return torch.autograd.grad(sum(terms), (d_out, pre, map), materialize_grads=True)


@rules
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_eager(shapes, rule, target):
    pre, map, xy = inputs(shapes, rule["modulate"])
    function = lambda pre, map, backend: modulated_sine(
        pre, map, xy.to(pre.device, pre.dtype), omega=3.0, **rule, backend=backend
    )
    check_op(function, {"pre": pre, "map": map}, target, torch.float32)


@dtypes
@rules
def test_dtypes_agree_with_eager(rule, dtype, target):
    pre, map, xy = inputs(SHAPES["odd"], rule["modulate"])
    points_dtype = lambda dtype: torch.float64 if dtype == torch.float64 else torch.float32
    function = lambda pre, map, backend: modulated_sine(
        pre, map, xy.float().to(pre.device, points_dtype(pre.dtype)), omega=3.0, **rule, backend=backend
    )
    check_op(function, {"pre": pre, "map": map}, target, dtype)


@rules
@pytest.mark.parametrize("which", [("pre", "map"), ("pre",), ("map",)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_second_order_agrees_with_eager(rule, which, dtype, target):
    for shapes in (SHAPES["odd"], SHAPES["shared_pre"]) if which == ("pre", "map") else (SHAPES["one_row"],):
        pre, map, xy = (x.to(target.device) for x in inputs(shapes, rule["modulate"]))
        run = lambda backend, dtype: second_order(
            lambda pre, map: modulated_sine(pre, map, xy.to(dtype), omega=3.0, **rule, backend=backend),
            pre.to(dtype),
            map.to(dtype),
            which,
        )
        exact, ours, plain = run("eager", torch.float64), run(target.backend, dtype), run("eager", dtype)
        for name, a, b, c in zip(("d_d_out", "d_pre", "d_map"), ours, plain, exact):
            allowed = 3 * (b - c).abs().max() + torch.finfo(dtype).eps * c.abs().max()
            if dtype == torch.float64:
                allowed = 1e-13 * c.abs().max()
            assert (a - c).abs().max() <= allowed, (name, shapes)


# Native and Triton with few: their second order is compared with eager's, rule by rule
@pytest.mark.parametrize(
    "backend, rule",
    [*itertools.product(["eager"], RULES), ("native", RULES[0]), ("native", RULES[5]), ("triton", RULES[5])],
    ids=lambda v: v if isinstance(v, str) else "-".join(v.values()),
)
def test_gradcheck(backend, rule):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = backend == "triton" and device == "cpu"  # the interpreter is slow
    shapes = ((1, 2, 1), (1, 2, 2), (2, 2)) if small else ((2, 4, 3), (2, 2, 3), (4, 2))
    pre, map, xy = (x.to(device) for x in inputs(shapes, rule["modulate"]))
    function = lambda pre, map: modulated_sine(pre, map, xy, omega=2.0, **rule, backend=backend)
    leaves = pre.requires_grad_(), map.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves, fast_mode=small)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=small)
    assert torch.autograd.gradgradcheck(lambda pre: function(pre, map.detach()), pre, fast_mode=small)
    assert torch.autograd.gradgradcheck(lambda map: function(pre.detach(), map), map, fast_mode=small)


@rules
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_is_bilinear_sample_and_plain_torch(rule, backend):
    x, weight, bias = sample((2, 50, 4)), sample((6, 4), seed=3), sample((6,), seed=4)
    _, map, xy = inputs(((2, 50, 6), (2, 5, 3), (2, 50, 2)), rule["modulate"])
    nearest = dict(mode="nearest_floor", align_corners=False)
    sampled = bilinear_sample(map, xy, **(nearest if rule["mode"] == "nearest" else {}), backend="eager")
    scale = 1 + sampled[..., :6] if rule["modulate"] != "shift" else 1
    shift = sampled[..., -6:] if rule["modulate"] != "scale" else 0
    want = torch.sin(30 * (scale * F.linear(x, weight, bias) + shift))
    got = modulated_siren(x, weight, bias, map, xy, **rule, backend=backend)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    got = modulated_siren(x, weight, None, map, xy, **rule, omega=-2.5, backend=backend)
    assert torch.allclose(got, torch.sin(-2.5 * (scale * (x @ weight.T) + shift)), rtol=0, atol=1e-12)


def test_large_angles(target):
    """Hundreds of turns in float32, where rounding omega a as plain torch does costs 2^-24 of the angle; and beyond."""
    pre = (torch.linspace(-100, 100, 999)[None, :, None] * torch.tensor([1.0, 7.0, 1e3, 1e9])).to(target.device)
    map, xy = torch.zeros(1, 1, 1, 4, device=target.device), torch.rand(999, 2, device=target.device)
    got = modulated_sine(pre, map, xy, omega=30.0, backend=target.backend)
    want = torch.tensor(np.sin(30.0 * pre.double().cpu().numpy()))
    assert (got.cpu() - want)[..., :3].abs().max() < 2e-7
    assert (got.cpu() - want)[..., 3].abs().max() < 2e-6  # the double product rounds as well


@pytest.mark.parametrize("wanted", [("pre",), ("map",), ("pre", "map")], ids="-".join)
def test_results_of_which_not_all_are_wanted(wanted, target):
    """A gradient that nobody asked for has no memory to write to."""
    values = {"pre": sample((1, 300, 64), torch.float32), "map": sample((1, 2, 2, 64), torch.float32, seed=1)}
    xy = torch.rand(300, 2, generator=torch.Generator().manual_seed(2)).to(target.device)
    found = []
    for backend in (target.backend, "eager"):
        x = {name: v.to(target.device).requires_grad_(name in wanted) for name, v in values.items()}
        out = modulated_sine(x["pre"], x["map"], xy, omega=1.0, backend=backend)
        leaves = [x[name] for name in wanted]
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append((out, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@rules
def test_special_coordinates(rule, target):
    """NaN, infinities, huge numbers and the ends of the range: as in eager, and never out of bounds."""
    numbers = [0.0, 1.0, -1.0, 0.5, -0.0, INF, -INF, NAN, 3e38, -3e38, 1e19, 1e-45, 1 - 2**-24, 2.0]
    xy = torch.tensor(list(itertools.product(numbers, numbers))).to(target.device)
    pre, map, _ = (
        x.to(target.device) for x in inputs(((1, len(xy), 3), (1, 3, 4), (2, 2)), rule["modulate"], torch.float32)
    )
    results = []
    for backend in (target.backend, "eager"):
        function = lambda pre, map: modulated_sine(pre, map, xy, omega=2.0, **rule, backend=backend)
        leaves = pre.clone().requires_grad_(), map.clone().requires_grad_()
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves), *second_order(function, pre, map)))
    for name, a, b in zip(("out", "d_pre", "d_map", "d_d_out", "d_pre 2", "d_map 2"), *results):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True), name
    assert torch.equal(results[0][0].isnan().any(-1)[0], xy.isnan().any(-1))
    assert results[0][2].isfinite().all() and results[0][5].isfinite().all()


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
@rules
def test_non_contiguous(layout, rule, target):
    tensors = [x.to(target.device) for x in inputs(((2, 9, 7), (2, 3, 4), (2, 9, 2)), rule["modulate"], torch.float32)]
    cotangent = sample((2, 9, 7), torch.float32).to(target.device)
    results = []
    for change in (lambda x: x.clone(), layout):
        pre, map, xy = (change(x) for x in tensors)
        leaves = pre.requires_grad_(), map.requires_grad_()
        out = modulated_sine(pre, map, xy, **rule, backend=target.backend)
        grads = torch.autograd.grad(out, leaves, change(cotangent), create_graph=True)
        again = torch.autograd.grad([(g * change(g.detach())).sum() for g in grads][0], leaves)
        results.append((out, *grads, *again))
    assert all(same(a, b, target) for a, b in zip(*results))


def test_nothing_is_copied(monkeypatch):
    """A layer's slice of a larger map, one pre or one set of points for all signals."""
    map, pre, xy = sample((3, 4, 5, 60)), sample((1, 9, 10)), torch.rand(9, 2, dtype=torch.float64)
    want = modulated_sine(pre.repeat(3, 1, 1), map[..., 20:40].contiguous(), xy, modulate="both", backend="eager")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *args, **kwargs: pytest.fail("copied"))
    args = pre.requires_grad_(), map[..., 20:40].requires_grad_(), xy
    for pre in (args[0], args[0][0], args[0].expand(3, 9, 10)):
        got = modulated_sine(pre, *args[1:], modulate="both", backend="native")
        assert torch.allclose(got, want, rtol=0, atol=1e-12)
    torch.autograd.grad(got, args[:2], torch.ones(3, 9, 20, dtype=torch.float64)[..., 5:15])


@pytest.mark.parametrize(
    "pre, map, xy",
    [
        ((0, 5, 4), (0, 2, 3, 4), (0, 5, 2)),
        ((2, 0, 4), (2, 2, 3, 4), (0, 2)),
        ((2, 5, 0), (2, 2, 3, 0), (5, 2)),
        ((2, 0, 4), (2, 0, 3, 4), (0, 2)),
        ((5, 4), (0, 2, 3, 4), (5, 2)),
    ],
)
def test_empty(pre, map, xy, target):
    leaves = [torch.zeros(shape, device=target.device).requires_grad_() for shape in (pre, map)]
    out = modulated_sine(*leaves, torch.zeros(xy, device=target.device), backend=target.backend)
    assert out.shape == (map[0], *pre[-2:])
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    assert all(g.shape == x.shape and (g == 0).all() for g, x in zip(grads, leaves))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_shapes(data):
    """Native against eager at shapes of hypothesis' choice: value, first and second derivatives."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    rule, batch, n, h = data.draw(st.sampled_from(RULES)), draw(1, 3), draw(1, 70), draw(1, 70)
    lead = lambda: data.draw(st.sampled_from([batch, 1]))
    shapes = (lead(), n, h), (lead(), draw(1, 5), draw(1, 5)), (lead(), n, 2)
    pre, map, xy = inputs(shapes, rule["modulate"])
    native, eager = (
        lambda pre, map, backend=backend: modulated_sine(pre, map, xy, omega=3.0, **rule, backend=backend)
        for backend in ("native", "eager")
    )
    assert torch.allclose(native(pre, map), eager(pre, map), rtol=0, atol=1e-12)
    for a, b in zip(second_order(native, pre, map), second_order(eager, pre, map)):
        assert torch.allclose(a, b, rtol=0, atol=1e-11 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_registration(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "" if backend == "native" else "_triton"
    op, bwd, bwd_bwd = (
        getattr(torch.ops.fourdperf, f"modulated_sine{suffix}{order}") for order in ("", "_bwd", "_bwd_bwd")
    )
    for dtype, rule in ((torch.float32, RULES[0]), (torch.bfloat16, RULES[3]), (torch.float32, RULES[5])):
        shapes = (2, 6, 5), (2, 3, 4), (2, 6, 2)
        pre, map, xy = (x.to(device) for x in inputs(shapes, rule["modulate"], dtype))
        rule = 2.0, *rule.values()
        leaves = pre.requires_grad_(), map.requires_grad_(), xy.float()
        d_out = sample((2, 6, 5)).to(device, dtype).requires_grad_()
        opcheck(op, (*leaves, *rule), dtype)
        opcheck(bwd, (d_out, *leaves, *rule, True, True), dtype)
        plain = [x.detach() for x in (d_out, *leaves)]
        opcheck(bwd_bwd, (torch.ones_like(pre).detach(), None, *plain, *rule, True, True), dtype)
        opcheck(bwd_bwd, (None, torch.ones_like(map).detach(), *plain, *rule, False, True), dtype)


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap over any input, func.grad twice (functa's inner loop), jvp (eager alone has it), autocast, compile."""
    function = lambda pre, map, xy: modulated_sine(
        pre, map, xy, omega=2.0, modulate="both", mode="bilinear", backend=backend
    )
    drawn = sample((3, 2, 7, 6), torch.float32), sample((3, 2, 4, 5, 12), torch.float32, 2), torch.rand(3, 7, 2)
    pre, map, xy = (x.to(device_of(backend)) for x in drawn)
    want = torch.stack([function(pre[i], map[i], xy[i]) for i in range(3)])
    assert torch.equal(torch.vmap(function)(pre, map, xy), want)
    got = torch.vmap(function, in_dims=(3, 2, 0), out_dims=1)(pre.movedim(0, 3), map.movedim(0, 2), xy)
    assert torch.equal(got, want.movedim(0, 1))
    assert torch.equal(
        torch.vmap(function, in_dims=(None, 0, None))(pre[0], map, xy[0])[1], function(pre[0], map[1], xy[0])
    )
    assert torch.equal(
        torch.vmap(function, in_dims=(0, None, None))(pre, map[0], xy[0])[1], function(pre[1], map[0], xy[0])
    )

    def outer(backend):
        def inner(pre, map, xy):  # a step on the map, and the loss after it
            loss = lambda map: (
                modulated_sine(pre, map, xy, omega=2.0, modulate="both", mode="bilinear", backend=backend)
                .square()
                .sum()
            )
            return loss(map - 0.01 * torch.func.grad(loss)(map))

        return torch.vmap(torch.func.grad(inner, argnums=(0, 1)))(pre, map, xy)

    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(outer(backend), outer("eager")))
    compiled = torch.compile(lambda *args: function(*args) + 1, fullgraph=True, backend="aot_eager")
    leaves = pre[0].clone().requires_grad_(), map[0].clone().requires_grad_()
    out = compiled(*leaves, xy[0])
    assert torch.allclose(out, want[0] + 1, atol=1e-5)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves))
    jvp = torch.func.jvp(lambda p, m: modulated_sine(p, m, xy[0], modulate="both"), (pre[0], map[0]), (pre[0], map[0]))
    assert jvp[1].shape == want[0].shape
    if backend != "eager":
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            torch.func.jvp(lambda p: function(p, map[0], xy[0]), (pre[0],), (pre[0],))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_autocast(backend):
    """The linear layer runs in bfloat16; a float32 map widens what comes of it, a bfloat16 map does not."""
    x, weight, bias = sample((2, 9, 4), torch.float32), sample((6, 4), torch.float32), sample((6,), torch.float32)
    map, xy = sample((2, 3, 3, 6), torch.float32), torch.rand(9, 2)
    with torch.autocast("cpu", torch.bfloat16):
        wide = modulated_siren(x, weight, bias, map, xy, omega=1.0, backend=backend)
        half = modulated_siren(x, weight, bias, map.bfloat16(), xy, omega=1.0, backend=backend)
        pre = F.linear(x, weight, bias)
    assert wide.dtype == torch.float32 and half.dtype == torch.bfloat16
    want = modulated_sine(pre.float(), map, xy, omega=1.0, backend="eager")
    assert torch.allclose(wide, want, atol=1e-6) and torch.allclose(half.float(), want, atol=0.03)


@pytest.mark.parametrize("rule", RULES[1::2], ids=str)
def test_points_that_want_a_gradient_go_to_eager(rule):
    pre, map, xy = inputs(SHAPES["vectors"], rule["modulate"])
    xy.requires_grad_()
    out = modulated_sine(pre, map, xy, **rule)
    assert torch.autograd.grad(out.sum(), xy)[0].abs().max() > 0
    with pytest.raises(ValueError, match="native.* no derivative with respect to xy"):
        modulated_sine(pre, map, xy, **rule, backend="native")
    with torch.no_grad():
        assert torch.allclose(modulated_sine(pre, map, xy, **rule, backend="native"), out, atol=1e-12)


def test_points_that_want_a_gradient_through_vmap_go_to_eager():
    pre, map, xy = sample((3, 2, 7, 6)), sample((3, 2, 4, 5, 6), seed=2), torch.rand(3, 7, 2, dtype=torch.float64)

    def d_xy(backend):
        sine = functools.partial(modulated_sine, omega=2.0, mode="bilinear", backend=backend)
        return torch.func.grad(lambda xy: torch.vmap(sine)(pre, map, xy).sum())(xy)

    assert torch.equal(d_xy(None), d_xy("eager")) and d_xy(None).abs().max() > 0
    with pytest.raises(ValueError, match="native.* no derivative with respect to xy"):
        d_xy("native")


def test_threads_change_nothing():
    before, results = torch.get_num_threads(), []
    cases = [((1, 300, 50), (1, 3, 4)), ((3, 40, 130), (3, 1, 1)), ((5, 100, 16), (5, 4, 4))]
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for (pre, map), rule in itertools.product(cases, RULES):
                pre, map, xy = inputs((pre, map, (pre[1], 2)), rule["modulate"], torch.float32)
                run = lambda pre, map: modulated_sine(pre, map, xy, **rule, backend="native")
                results.append(torch.cat([x.flatten() for x in (run(pre, map), *second_order(run, pre, map))]))
    finally:
        torch.set_num_threads(before)
    kinds = len(cases) * len(RULES)
    assert all(torch.equal(results[i], results[i % kinds]) for i in range(len(results)))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_deterministic_algorithms(backend):
    """d_map summed cell by cell agrees with the sum by atomics (a GPU; Triton also in its interpreter)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rule in RULES[1:5:3] + RULES[5:]:
        pre, map, xy = (x.to(device) for x in inputs(((2, 7, 3), (2, 2, 3), (2, 7, 2)), rule["modulate"]))
        xy[0, 0] = NAN
        pre, map, both = pre.requires_grad_(), map.requires_grad_(), []
        function = lambda pre, map: modulated_sine(pre, map, xy, omega=2.0, **rule, backend=backend)
        for wanted in (False, True):
            torch.use_deterministic_algorithms(wanted)
            try:
                d_map = torch.autograd.grad(function(pre, map)[:, 1:].square().sum(), map)[0]
                both.append((d_map, second_order(function, pre, map)[2]))
            finally:
                torch.use_deterministic_algorithms(False)
        for a, b in zip(*both):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
@rules
def test_jax(rule, backend):
    """Value, first and second derivatives of both JAX backends against torch; shared axes; the whole layer."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax import ops as jax_ops

    numpy = lambda x: jnp.asarray(x.detach().numpy())
    shared = [((9, 4), (3, 1, 2), (3, 9, 2))] if rule in (RULES[0], RULES[5]) else []
    for shapes in (SHAPES["odd"], *shared):
        pre, map, xy = inputs(shapes, rule["modulate"], torch.float32)
        run = lambda pre, map: modulated_sine(pre, map, xy, omega=3.0, **rule, backend="eager")
        want = run(pre, map), *second_order(run, pre, map)
        d_out, v_pre, v_map = sample(want[0].shape, seed=5), sample(pre.shape, seed=6), sample(map.shape, seed=7)
        function = lambda pre, map: jax_ops.modulated_sine(pre, map, numpy(xy), omega=3.0, **rule, backend=backend)

        def second(d_out, pre, map):
            d_pre, d_map = jax.vjp(function, pre, map)[1](d_out)
            return (d_pre * numpy(v_pre.float())).sum() + (d_map * numpy(v_map.float())).sum()

        arrays = [numpy(x.float()) for x in (d_out, pre, map)]
        got = jax.jit(function)(*arrays[1:]), *jax.jit(jax.grad(second, (0, 1, 2)))(*arrays)
        for name, a, b in zip(("out", "d_d_out", "d_pre", "d_map"), got, want):
            assert np.abs(np.asarray(a) - b.detach().numpy()).max() <= 1e-5 * max(1, b.abs().max().item()), name
    x, weight, bias = sample((9, 4), torch.float32), sample((20, 4), torch.float32), sample((20,), torch.float32)
    layer = inputs(((9, 20), (3, 2, 2), (9, 2)), rule["modulate"], torch.float32)[1:]
    got = jax_ops.modulated_siren(*[numpy(x) for x in (x, weight, bias, *layer)], omega=2.0, **rule, backend=backend)
    assert np.allclose(got, modulated_siren(x, weight, bias, *layer, omega=2.0, **rule), atol=1e-5)


def test_jax_vmap_xy_and_dtypes():
    """Nested vmap with shared tensors, derivatives with respect to one tensor or to xy, 16 bits, errors."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import modulated_sine as jax_sine

    options = dict(omega=2.0, modulate="both", mode="bilinear")
    pre, map, xy = (
        jnp.asarray(x.numpy()) for x in inputs(((3, 2, 7, 6), (3, 2, 4, 5), (3, 7, 2)), "both", torch.float32)
    )
    # (one map or all, with the same points or others); derivatives with respect to pre and map, or to xy as well
    for argnums, in_axes in (
        ((0, 1), (0, 0, 0)),
        ((1,), (None, 0, None)),
        ((0, 1, 2), (0, 0, 0)),
        ((2,), (None, 0, 0)),
    ):
        both = []
        for backend in ("jnp", "ffi"):
            loss = lambda *args, backend=backend: (jax_sine(*args, **options, backend=backend) ** 2).sum()
            square = lambda *args, loss=loss: sum((g**2).sum() for g in jax.grad(loss, argnums)(*args))  # noqa: B023
            arguments = [x if axis == 0 else x[0] for x, axis in zip((pre, map, xy), in_axes)]
            both.append(jax.tree.leaves(jax.jit(jax.vmap(jax.value_and_grad(square, argnums), in_axes))(*arguments)))
        for a, b in zip(*both):
            assert a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(b).max()))
    nested = [
        jax.jit(jax.vmap(lambda p, m: jax.vmap(lambda m: sine(p, m[None], xy[0]))(m)))(pre, map)
        for sine in (functools.partial(jax_sine, **options, backend=backend) for backend in ("jnp", "ffi"))
    ]
    assert nested[0].shape == (3, 2, 2, 7, 6) and np.allclose(*nested, atol=1e-5)
    for dtype in ("bfloat16", "float16"):
        half = [x[0].astype(dtype) for x in (pre, map)]
        got, want = (jax_sine(*half, xy[0], **options, backend=backend) for backend in ("ffi", "jnp"))
        assert got.dtype == dtype and np.allclose(*(np.asarray(x.astype("float32")) for x in (got, want)), atol=0.01)
        assert jax_sine(half[0], map[0], xy[0], **options).dtype == jnp.float32
    assert jax_sine(pre[0, :, :0], map[0], xy[0, :0], **options).shape == (2, 0, 6)
    with pytest.raises(ValueError, match="map must have 12 channels"):
        jax_sine(pre[0], map[0, ..., :6], xy[0], modulate="both")
    with pytest.raises(ValueError, match="batch axes"):
        jax_sine(pre[0], map[:, 0], xy[0], **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, m, x: modulated_sine(p.int(), m, x), "pre must be float64, .* got torch.int32"),
        (lambda p, m, x: modulated_sine(p, m.double(), x), r"map must have the dtype of pre \(torch.float32\)"),
        (
            lambda p, m, x: modulated_sine(p.half(), m.bfloat16(), x),
            r"map must have the dtype of pre \(torch.float16\)",
        ),
        (
            lambda p, m, x: modulated_sine(p, m, x.half()),
            "xy must be torch.float32, as pre and map are, got torch.float16",
        ),
        (lambda p, m, x: modulated_sine(p[0, 0], m, x), r"pre must have shape \(B, N, H\) or \(N, H\), got \(4,\)"),
        (lambda p, m, x: modulated_sine(p, m[0], x), r"map must have shape \(B, H, W, M\), got \(3, 5, 4\)"),
        (lambda p, m, x: modulated_sine(p, m, x[..., :1]), r"xy must have shape .* got \(6, 1\)"),
        (
            lambda p, m, x: modulated_sine(p, m, x, modulate="both"),
            r"map must have 8 channels \(2 H for modulate='both'\)",
        ),
        (lambda p, m, x: modulated_sine(p, m[..., :3], x), "map must have 4 channels"),
        (lambda p, m, x: modulated_sine(p, m, x[:5]), r"xy must have the N of pre \(6\), got \(1, 5, 2\)"),
        (lambda p, m, x: modulated_sine(p, m.repeat(2, 1, 1, 1), x), "batch axes .* got 2, 4 and 1"),
        (lambda p, m, x: modulated_sine(p, m[:, :0], x), "map must have pixels where xy has points"),
        (
            lambda p, m, x: modulated_sine(p, m, x, mode="linear"),
            "mode must be one of 'nearest', 'bilinear', got 'linear'",
        ),
        (lambda p, m, x: modulated_sine(p, m, x, modulate="all"), "modulate must be one of 'shift', 'scale', 'both'"),
        (lambda p, m, x: modulated_sine(p, m, x, omega=INF), "omega must be a finite number, got inf"),
        (lambda p, m, x: modulated_sine(p, m, x, backend="cuda"), "backend must be one of"),
        (
            lambda p, m, x: modulated_siren(p, m[0, 0, :2, :3], None, m, x),
            r"weight must have shape \(H, K\) with K = 4",
        ),
        (lambda p, m, x: modulated_siren(p, torch.ones(4, 4), torch.ones(3), m, x), r"bias must have shape \(4,\)"),
        (lambda p, m, x: modulated_siren(p[None], torch.ones(4, 4), None, m, x), r"x must have shape \(B, N, K\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 6, 4), torch.zeros(2, 3, 5, 4), torch.zeros(6, 2))
