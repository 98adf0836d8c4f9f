"""window_attention: neighbourhood attention over ViT grids, against full attention, masks and FlexAttention.

Floor: 4 D FLOPs for each pair of a query and a key of its window (14 D forward and backward), and q, k, v, out once. Peers:
scaled_dot_product_attention with a mask, FlexAttention compiled with its block mask (no backward on the CPU), keys gathered by
unfold, and torch.compile of the eager code. Full attention computes something else; it has cases of its own, with no comparison
of answers, since it is what people use in place of a window.
"""

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case

from fourdperf.ops.window_attention import _axis_keys, window_attention, window_attention_eager

# name: frames, side, heads, size of a head, window
SHAPES = {
    "ViT-B/16 clip: 24 frames x 12 heads x 16x16 x d64, window 7": (24, 16, 12, 64, 7),
    "dense map: 8 heads x 64x64 x d64, window 7": (1, 64, 8, 64, 7),
}


def cases(device: str):
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()
            yield _case(name, shape, dtype, device, backward=False)
            yield _case(name, shape, dtype, device, backward=True)
            for backward in (False, True):
                yield _against_full_attention(name, shape, dtype, device, backward)
    frames, side, heads, dim = 24, 16, 12, 64
    yield _covering(frames, side, heads, dim, device)


def _case(name, shape, dtype, device, backward):
    frames, side, heads, dim, window = shape
    leaves, call = _leaves(frames, side, heads, dim, dtype, device, backward)
    seen = _axis_keys(side, window, 1, "mask", device)[1].sum(1)
    pairs = int(seen.sum()) ** 2 * frames * heads
    functions = {"fourdperf": lambda q, k, v: window_attention(q, k, v, window)}
    if device == "cuda":
        functions["fourdperf native"] = lambda q, k, v: window_attention(q, k, v, window, backend="native")
    mask = _mask(side, window, device)
    functions["SDPA, mask"] = lambda q, k, v: _sdpa(q, k, v, attn_mask=mask)
    functions["FlexAttention, compiled"] = (
        _flex(side, window, device) if not backward or device == "cuda" else "FlexAttention has no backward on the CPU"
    )
    functions["unfold"] = lambda q, k, v: _unfold(q, k, v, window)
    eager = torch.compile(window_attention_eager)
    functions["eager, compiled"] = lambda q, k, v: eager(
        q, k, v, None, None, (window, window), (1, 1), "mask", dim**-0.5
    )
    providers = {name: f if isinstance(f, str) else call(f) for name, f in functions.items()}
    moved = 4 * leaves[0].numel() * leaves[0].element_size()
    return Case(
        "window_attention",
        name,
        str(dtype).removeprefix("torch."),
        providers,
        bytes=moved * (3 if backward else 1),
        flops=pairs * dim * (14 if backward else 4),
        tolerance=2e-5 if dtype == torch.float32 else 4e-2,
        direction="forward+backward" if backward else "forward",
    )


def _leaves(frames, side, heads, dim, dtype, device, backward):
    """q, k, v as views of one projection, and what turns a function of them into a provider."""
    qkv = torch.randn(frames, side, side, 3, heads, dim, device=device).to(dtype)
    leaves = [x.detach().requires_grad_(backward) for x in qkv.unbind(3)]
    d_out = torch.randn(frames, side, side, heads, dim, device=device).to(dtype)
    if not backward:
        return leaves, lambda f: lambda: f(*leaves)
    return leaves, lambda f: lambda: (out := f(*leaves), *torch.autograd.grad(out, leaves, d_out))


def _against_full_attention(name, shape, dtype, device, backward):
    frames, side, heads, dim, window = shape
    _, call = _leaves(frames, side, heads, dim, dtype, device, backward)
    providers = {"fourdperf": call(lambda q, k, v: window_attention(q, k, v, window)), "SDPA, full frame": call(_sdpa)}
    return Case(
        "window_attention",
        f"{name}, against full attention",
        str(dtype).removeprefix("torch."),
        providers,
        tolerance=float("inf"),
        direction="forward+backward" if backward else "forward",
    )


def _covering(frames, side, heads, dim, device):
    """A window that covers the frame, and what full attention takes on this machine."""
    q, k, v = torch.randn(frames, side, side, 3, heads, dim, device=device).unbind(3)
    providers = {
        "fourdperf, window 31": lambda: window_attention(q, k, v, 2 * side - 1),
        "SDPA": lambda: _sdpa(q, k, v),
    }
    return Case(
        "window_attention",
        "24 frames x 12 heads x 16x16 x d64, window 31 (covers)",
        "float32",
        providers,
        flops=4 * dim * side**4 * frames * heads,
        tolerance=1e-6,
    )


def _sdpa(q, k, v, **options):
    out = F.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)), **options)
    return out.transpose(1, 2).reshape(q.shape)


def _mask(side, window, device):
    y, x = (i.flatten() for i in torch.meshgrid(*[torch.arange(side, device=device)] * 2, indexing="ij"))
    near = lambda i: ((i[None] - i[:, None]) >= -(window // 2)) & ((i[None] - i[:, None]) < window - window // 2)
    return near(y) & near(x)


def _flex(side, window, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b, h, q, k):
        y, x = k // side - q // side, k % side - q % side
        return (y >= -(window // 2)) & (y < window - window // 2) & (x >= -(window // 2)) & (x < window - window // 2)

    block = create_block_mask(near, None, None, side * side, side * side, device=device)
    flex = torch.compile(flex_attention)

    def run(q, k, v):
        out = flex(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)), block_mask=block)
        return out.transpose(1, 2).reshape(q.shape)

    return run


def _unfold(q, k, v, window):
    """The neighbours of every token by unfolding the padded grid, as ports do it; keys outside are masked."""
    frames, height, width, heads, dim = q.shape
    reach = (window // 2, window - 1 - window // 2)

    def neighbours(x):
        x = F.pad(x.permute(0, 3, 4, 1, 2).flatten(0, 1), (*reach, *reach))
        return x.unfold(2, window, 1).unfold(3, window, 1)  # (frames heads, D, H, W, window, window)

    q = q.permute(0, 3, 4, 1, 2).flatten(0, 1)
    inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=q.device), (*reach, *reach))
    inside = inside.unfold(0, window, 1).unfold(1, window, 1)
    scores = torch.einsum("bdyx,bdyxij->byxij", q, neighbours(k)).float() * dim**-0.5
    weights = (
        scores.masked_fill(~inside, float("-inf")).flatten(-2).softmax(-1).to(q.dtype).unflatten(-1, (window, window))
    )
    out = torch.einsum("byxij,bdyxij->byxd", weights, neighbours(v))
    return out.unflatten(0, (frames, heads)).permute(0, 2, 3, 1, 4).contiguous()
