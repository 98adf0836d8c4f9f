"""bilinear_sample: latents of a spatial functa, and a feature map at many points.

Floor: the points' features once, and the map once (forward: map read, out written; second order: d_out read, d_d_out written).
Peers: F.grid_sample on a map kept channels last or channels first, whichever is faster, with the permutes around it that
points-major results ask for; torch.compile of the eager code; the jnp version under jit.
"""

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops.bilinear_sample import bilinear_sample, bilinear_sample_eager

# name: map, points per map
SHAPES = {
    "feature map (1, 64x64, 256) x 65536": ((1, 64, 64, 256), 65536),
    "functa latents (16, 8x8, 64) x 1024": ((16, 8, 8, 64), 1024),
    "functa modulations (16, 8x8, 2304) x 1024": ((16, 8, 8, 2304), 1024),
}


def cases(device: str):
    for name, (shape, n) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for direction in ("forward", "forward+backward", "second order")[: 3 if dtype == torch.float32 else 1]:
                torch.compiler.reset()
                yield _case(name, shape, n, dtype, direction, device)


def _case(name, shape, n, dtype, direction, device):
    map = torch.randn(shape, device=device).to(dtype)
    xy = torch.rand(shape[0], n, 2, device=device)
    channels_first = map.permute(0, 3, 1, 2).contiguous()
    d_out, h, u = torch.randn(shape[0], n, shape[3], device=device), torch.randn_like(map), torch.randn_like(xy)

    def grid_sample(map, xy):
        # (it wants map and grid in one dtype, and a grid in 16 bits misses the pixels)
        out = F.grid_sample(
            map.permute(0, 3, 1, 2).float(), (xy * 2 - 1)[:, None], padding_mode="border", align_corners=True
        )
        return out[:, :, 0].transpose(1, 2).to(map.dtype).contiguous()

    compiled = torch.compile(bilinear_sample_eager)
    functions = {
        "fourdperf": (bilinear_sample, map),
        "F.grid_sample, map channels last": (grid_sample, map),
        "F.grid_sample, map channels first": (grid_sample, channels_first.permute(0, 2, 3, 1)),
        "eager, compiled": (compiled, map),
    }
    if device == "cuda":
        functions["fourdperf triton"] = (lambda map, xy: bilinear_sample(map, xy, backend="triton"), map)
    if direction == "second order":
        del functions["eager, compiled"]  # torch.compile takes no second derivatives
    providers = {key: _provider(function, m, xy, d_out, h, u, direction) for key, (function, m) in functions.items()}
    providers["JAX jit"] = _jax(map, xy, d_out, h, u, direction)
    features = d_out.numel() * map.element_size()
    moved = {
        "forward": features + map.nbytes,
        "forward+backward": 2 * features + 3 * map.nbytes,
        "second order": 4 * features + 7 * map.nbytes,
    }[direction]
    return Case(
        "bilinear_sample",
        name,
        str(dtype).removeprefix("torch."),
        providers,
        bytes=moved + 2 * xy.nbytes,
        tolerance=2e-4 if dtype == torch.float32 else 2e-2,
        direction=direction,
    )


def _provider(function, map, xy, d_out, h, u, direction):
    if direction == "forward":
        return lambda: function(map, xy)
    leaves = map.detach().requires_grad_(), xy.detach().requires_grad_()
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(function(*leaves), leaves, d_out)
    d_out = d_out.clone().requires_grad_()

    def second_order():
        grads = torch.autograd.grad(function(*leaves), leaves, d_out, create_graph=True)
        return torch.autograd.grad(grads, (d_out, *leaves), (h, u))

    return second_order


def _jax(map, xy, d_out, h, u, direction):
    if why_not := jax_why_not(map.device.type):
        return why_not
    import jax
    import jax.numpy as jnp

    from fourdperf.jax.ops import bilinear_sample as jax_sample

    arrays = [jnp.asarray(x.float().cpu().numpy()) for x in (map, xy, d_out, h, u)]
    arrays[0] = arrays[0].astype(str(map.dtype).removeprefix("torch."))
    sample = lambda map, xy: jax_sample(map, xy, backend="jnp")
    first = lambda d_out, map, xy: jax.vjp(sample, map, xy)[1](d_out)
    if direction == "forward":
        function = jax.jit(sample)
        return lambda: function(*arrays[:2])
    map, xy, d_out, h, u = arrays
    if direction == "forward+backward":
        function = jax.jit(first)
        return lambda: function(d_out, map, xy)
    second = jax.jit(lambda d_out, map, xy, h, u: jax.vjp(first, d_out, map, xy)[1]((h, u)))
    return lambda: second(d_out, map, xy, h, u)
