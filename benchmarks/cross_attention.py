"""cross_attention: the memories of a D4RT decoder and of the 4DS depth readout.

Floor: 2 Q K (D + E) FLOPs a head at the matmul rate; bytes are negligible. On AVX-512 machines without AMX the bf16 units
(vdpbf16ps) do twice the fp32 rate; with AMX the products take about as long as the exponentials, which no unit does beside
them. Peers: scaled_dot_product_attention on transposed views (what a user who keeps heads
after tokens writes), the same under torch.compile, jax.nn.dot_product_attention under jit.
"""

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops import cross_attention

# name: B, Q, K, H, D
SHAPES = {
    "D4RT decoder, 2048 queries x 6144 tokens, 16 heads x 64": (1, 2048, 6144, 16, 64),
    "4DS depth readout, 6272 x 3136, 16 heads x 64": (1, 6272, 3136, 16, 64),
    "few queries, 48 x 6144, 16 heads x 64": (1, 48, 6144, 16, 64),
    "ViT-g heads, 1024 x 3136, 16 heads x 88": (1, 1024, 3136, 16, 88),
}


def cases(device: str):
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(name, shape, dtype, device)
    for dtype in (torch.float32, torch.bfloat16):
        yield _backward_case("ViT-g heads, 1024 x 3136, 16 heads x 88", dtype, device)


def _inputs(shape, dtype, device):
    batch, queries, keys, heads, size = shape
    draw = lambda tokens: torch.randn(batch, tokens, heads, size, device=device).to(dtype)
    return draw(queries), draw(keys), draw(keys)


def _case(name, shape, dtype, device):
    q, k, v = _inputs(shape, dtype, device)
    torch.compiler.reset()
    compiled = torch.compile(_sdpa)
    providers = {
        "fourdperf": lambda: cross_attention(q, k, v),
        "SDPA": lambda: _sdpa(q, k, v),
        "SDPA, compiled": lambda: compiled(q, k, v),
        "JAX jit": _jax(q, k, v),
    }
    batch, queries, keys, heads, size = shape
    return Case(
        "cross_attention",
        name,
        str(dtype).removeprefix("torch."),
        providers,
        flops=4 * batch * heads * queries * keys * size,
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
    )


def _backward_case(name, dtype, device):
    shape = SHAPES[name]
    leaves = [x.requires_grad_() for x in _inputs(shape, dtype, device)]
    d_out = torch.randn_like(leaves[0])
    both = lambda function: lambda: (out := function(*leaves), *torch.autograd.grad(out, leaves, d_out))
    batch, queries, keys, heads, size = shape
    return Case(
        "cross_attention",
        name,
        str(dtype).removeprefix("torch."),
        {"fourdperf": both(cross_attention), "SDPA": both(_sdpa)},
        flops=14 * batch * heads * queries * keys * size,
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        direction="forward+backward",
    )


def _sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _jax(q, k, v):
    if why_not := jax_why_not(q.device.type):
        return why_not
    import jax
    import jax.numpy as jnp

    arrays = [jnp.asarray(x.float().cpu().numpy()).astype(str(x.dtype).removeprefix("torch.")) for x in (q, k, v)]
    function = jax.jit(jax.nn.dot_product_attention)
    return lambda: function(*arrays)
