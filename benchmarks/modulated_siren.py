"""modulated_siren: the sine layers of a spatial functa, 16 pictures of 32x32, alone and with their linear layer.

Floor: tensors like pre that move: 2 (forward), 3 more (backward), 5 more (second order); the map is small. With the
linear layer 1, 3 and 9 products of matrices come to it, each of which moves 2.
Peers: the eager version; torch.compile of it, and of what one writes by hand for points that all pictures share
(indices and weights made once, pixels read by index); our bilinear_sample before plain torch; jnp under jit.
"""

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops import bilinear_sample, modulated_sine
from fourdperf.ops.modulated_siren import modulated_sine_eager

BATCH, SIDE, H = 16, 32, 256
_SAMPLE = {"nearest": dict(mode="nearest_floor", align_corners=False), "bilinear": {}}
# modulate, mode, side of the map, whole layer, dtypes, directions
FP32, HALF, ALL = ("float32",), ("float32", "bfloat16"), ("forward", "forward+backward", "second order")
RUNS = (
    ("shift", "nearest", 8, False, HALF, ALL),
    ("shift", "bilinear", 8, False, FP32, ALL),
    ("both", "nearest", 8, False, FP32, ALL),
    ("both", "bilinear", 8, False, FP32, ALL),
    ("shift", "nearest", 1, False, FP32, ALL[:2]),
    ("shift", "nearest", 8, True, FP32, ALL),
    ("both", "bilinear", 8, True, FP32, ALL),
)


def cases(device: str):
    for modulate, mode, side, layer, dtypes, directions in RUNS:
        for dtype in dtypes:
            for direction in directions if dtype == "float32" else directions[:1]:
                torch.compiler.reset()
                yield _case(modulate, mode, side, layer, getattr(torch, dtype), direction, device)


def _case(modulate, mode, side, layer, dtype, direction, device):
    rule = dict(modulate=modulate, mode=mode)
    xy = (torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 2, indexing="xy"), -1).reshape(-1, 2) + 0.5) / SIDE
    xy = xy.to(device)
    map = 0.1 * torch.randn(BATCH, side, side, H * (1 + (modulate == "both")), device=device, dtype=dtype)
    x = 0.1 * torch.randn(BATCH, SIDE * SIDE, H, device=device, dtype=dtype)
    weight = torch.randn(H, H, device=device, dtype=dtype) / H**0.5
    expand = lambda xy: xy.expand(BATCH, -1, -1)
    by_hand = _by_hand(xy, side, **rule)

    def sampled(pre, map):
        s = bilinear_sample(map, expand(xy), **_SAMPLE[mode])
        return _modulate(pre, s, modulate)

    functions = {
        "fourdperf": lambda pre, map: modulated_sine(pre, map, xy, **rule),
        "bilinear_sample + torch": sampled,
        "eager": lambda pre, map: modulated_sine_eager(pre, map, expand(xy), 30.0, modulate, mode),
    }
    if direction != "second order":  # torch.compile takes no second derivatives
        functions["eager, compiled"] = torch.compile(functions["eager"])
        functions["by hand, compiled"] = torch.compile(by_hand)
    else:
        functions["by hand"] = by_hand
    if device == "cuda":
        functions["fourdperf triton"] = lambda pre, map: modulated_sine(pre, map, xy, **rule, backend="triton")
    leaves = (x, map, weight) if layer else (x, map)
    v = [torch.randn_like(leaf) for leaf in (x, *leaves)]
    providers = {key: _provider(function, leaves, v, direction) for key, function in functions.items()}
    providers["JAX jit"] = _jax(leaves, xy, v, rule, direction)
    sine, products = {"forward": (2, 1), "forward+backward": (5, 3), "second order": (10, 9)}[direction]
    maps = {"forward": 1, "forward+backward": 3, "second order": 7}[direction] * map.nbytes
    name = f"functa {'layer' if layer else 'sine'} ({BATCH}, {SIDE}x{SIDE}, {H}), map {side}x{side}, {mode}, {modulate}"
    return Case(
        "modulated_siren",
        name,
        str(dtype).removeprefix("torch."),
        providers,
        bytes=(sine + 2 * products * layer) * x.nbytes + maps,
        flops=2 * products * x.numel() * H * layer,
        tolerance=1e-3 if dtype == torch.float32 else 2e-1,  # an angle of 30 in bfloat16
        direction=direction,
    )


def _modulate(pre, sampled, modulate):
    scale, shift = sampled[..., :H], sampled[..., -H:]
    pre = pre if modulate == "shift" else (1 + scale) * pre
    return torch.sin(30.0 * (pre if modulate == "scale" else pre + shift))


def _by_hand(xy, side, modulate, mode):
    """Indices and weights for all pictures, made once."""
    if mode == "nearest":
        cell = (xy * side).long().clamp(0, side - 1)
        taps = [(cell[:, 1] * side + cell[:, 0], None)]
    else:
        place = xy * (side - 1)
        low = place.long().clamp(0, max(side - 2, 0))
        (fx, fy), step = (place - low).T, min(side - 1, 1)
        taps = [
            ((low[:, 1] + dy * step) * side + low[:, 0] + dx * step, ((wx * wy)[:, None]))
            for dy, wy in ((0, 1 - fy), (1, fy))
            for dx, wx in ((0, 1 - fx), (1, fx))
        ]

    def function(pre, map):
        pixels = map.flatten(1, 2)
        sampled = sum(pixels[:, i] if w is None else pixels[:, i] * w for i, w in taps)
        return _modulate(pre, sampled, modulate)

    return function


def _provider(function, leaves, v, direction):
    def run(x, map, weight=None):
        return function(x if weight is None else F.linear(x, weight), map)

    if direction == "forward":
        return lambda: run(*leaves)
    leaves, d_out = [leaf.detach().requires_grad_() for leaf in leaves], v[0].clone().requires_grad_()
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(run(*leaves), leaves, d_out)

    def second_order():
        grads = torch.autograd.grad(run(*leaves), leaves, d_out, create_graph=True)
        return torch.autograd.grad(grads, (d_out, *leaves), v[1:])

    return second_order


def _jax(leaves, xy, v, rule, direction):
    if why_not := jax_why_not(xy.device.type):
        return why_not
    import jax
    import jax.numpy as jnp

    from fourdperf.jax.ops import modulated_sine as jax_sine

    array = lambda x: jnp.asarray(x.float().cpu().numpy()).astype(str(x.dtype).removeprefix("torch."))
    leaves, (d_out, *cotangents), xy = [array(x) for x in leaves], [array(x) for x in v], array(xy)
    run = lambda x, map, weight=None: jax_sine(x if weight is None else x @ weight.T, map, xy, **rule, backend="jnp")
    first = lambda d_out, *leaves: jax.vjp(run, *leaves)[1](d_out)
    if direction == "forward":
        function = jax.jit(run)
        return lambda: function(*leaves)
    if direction == "forward+backward":
        function = jax.jit(first)
        return lambda: function(d_out, *leaves)
    function = jax.jit(lambda d_out, leaves, cotangents: jax.vjp(first, d_out, *leaves)[1](tuple(cotangents)))
    return lambda: function(d_out, leaves, cotangents)
