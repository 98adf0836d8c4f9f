"""fourier_embed and fourier_linear: the query coordinates of D4RT.

Floor: the embedding (or the layer's output) written once; coordinates are small beside it. Peers: the formula in eager
torch, torch.compile of it, JAX jit.
"""

import torch
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops.fourier_embed import (
    fourier_embed,
    fourier_embed_eager,
    fourier_linear,
    fourier_linear_eager,
    linear_range,
    octaves,
)

# name: coordinates (N, D), frequencies, features of the linear layer
SHAPES = {
    "D4RT dense query (200000, 2) x 10": ((200_000, 2), linear_range(0.5, 10, 10), 512),
    "D4RT training query (2048, 2) x 10": ((2048, 2), linear_range(0.5, 10, 10), 512),
    "kathirgounder D4RT (2048, 2) x 64 octaves": ((2048, 2), octaves(64, scale=1.0), 512),
}


def cases(device: str):
    for name, (shape, frequencies, features) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            if len(frequencies) == 64 and dtype != torch.float32:
                continue
            for linear in (False, True):
                for backward in (False, True):
                    torch.compiler.reset()  # each shape compiled afresh, as in a user's model
                    yield _case(name, shape, frequencies.to(device), features, dtype, device, linear, backward)


def _case(name, shape, frequencies, features, dtype, device, linear, backward):
    """Alone the gradients are those of x and the frequencies; of the layer, those of weight and bias (what training needs)."""
    generator = torch.Generator().manual_seed(0)
    # multiples of 2^-10: with 64 octaves of scale 1 the products are exact, so that all have the same angles to compare
    x = (torch.randint(0, 1024, shape, generator=generator) / 1024).to(device)
    weight = (torch.randn(features, 2 * shape[1] * len(frequencies), generator=generator) / 8).to(device, dtype)
    bias = torch.randn(features, generator=generator).to(device, dtype)
    x = x if linear else x.to(dtype)
    tensors = (x, frequencies, weight, bias) if linear else (x, frequencies)
    wanted = (weight, bias) if linear else (x, frequencies)
    width = features if linear else weight.shape[1]
    d_out = torch.randn(shape[0], width, generator=generator).to(device, dtype)
    if backward:
        for tensor in wanted:
            tensor.requires_grad_()

    def provider(function):
        if not backward:
            return lambda: function(*tensors)
        return lambda: (out := function(*tensors), *torch.autograd.grad(out, wanted, d_out))

    ours, eager = (fourier_linear, fourier_linear_eager) if linear else (fourier_embed, fourier_embed_eager)
    providers = {"fourdperf": provider(ours)}
    if device == "cuda":
        providers["fourdperf triton"] = provider(lambda *args: ours(*args, backend="triton"))
        providers["fourdperf native"] = provider(lambda *args: ours(*args, backend="native"))
    providers["eager"] = provider(eager)
    providers["eager, compiled"] = provider(torch.compile(eager))
    providers["JAX jit"] = _jax(tensors, d_out, linear, backward)
    out_bytes = shape[0] * width * d_out.element_size()
    flops = 2 * shape[0] * weight.numel() if linear else 0
    return Case(
        "fourier_embed",
        name + (f" -> {features}" if linear else ""),
        str(dtype).removeprefix("torch."),
        providers,
        bytes=out_bytes * (2 if backward else 1),
        flops=flops * (2 if backward else 1),
        tolerance=2e-4 if dtype == torch.float32 else 3e-2,
        direction="forward+backward" if backward else "forward",
    )


def _jax(tensors, d_out, linear, backward):
    if why_not := jax_why_not(d_out.device.type):
        return why_not
    import jax
    import jax.numpy as jnp

    from fourdperf.jax.ops import fourier_embed as embed
    from fourdperf.jax.ops import fourier_linear as layer

    arrays = [
        jnp.asarray(t.detach().float().cpu().numpy()).astype(str(t.dtype).removeprefix("torch."))
        for t in (*tensors, d_out)
    ]
    function = (lambda *args: layer(*args, backend="jnp")) if linear else (lambda *args: embed(*args, backend="jnp"))
    if not backward:
        forward = jax.jit(function)
        return lambda: forward(*arrays[:-1])

    def both(*args):
        out, pullback = jax.vjp(function, *args[:-1])
        gradients = pullback(args[-1])
        return out, *(gradients[2:] if linear else gradients)

    both = jax.jit(both)
    return lambda: both(*arrays)
