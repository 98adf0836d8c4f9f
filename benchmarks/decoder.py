"""Queries per second of a D4RT decoder: 8 layers, 6144 + 1 memory tokens, query embedding included.

    fourdperf bench decoder                       the harness' table
    python -m fourdperf.benchmarks.decoder        queries per second, and full-video tracks in the form of the paper's Table 3

A track of a video at f frames a second takes f queries a second, so a decoder of n queries/s keeps up with n / f tracks.
The paper's decoder reaches about 40,000 queries/s on an A100 (its width is not stated). Floor: FLOPs at the matmul rate.
Peers: a decoder in the style of the public ports, which projects keys and values in every call of 256 queries
(nn.MultiheadAttention without weights); and SDPA under torch.compile with projections kept, all queries in one call.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, machine, roofs, run
from torch import Tensor, nn

from fourdperf.models.layers import CrossDecoder

WIDTHS = {512: 8, 768: 12, 1024: 16}
LAYERS, TOKENS, FRAMES, BANDS, PORT_CHUNK = 8, 6145, 48, 10, 256
QUERIES = {"cpu": 2048, "cuda": 65536}
RATES = (60, 24, 10, 1)


class QueryEmbedding(nn.Module):
    """Fourier features of (u, v), embeddings of three times, and an MLP of the 9x9 RGB patch, summed."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * torch.pi * 2.0 ** torch.arange(BANDS))
        self.position = nn.Linear(4 * BANDS, width)
        self.times = nn.ModuleList(nn.Embedding(FRAMES, width) for _ in range(3))
        self.patch = nn.Sequential(nn.Linear(9 * 9 * 3, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, points: Tensor, times: Tensor, patches: Tensor) -> Tensor:
        angles = (points.float().unsqueeze(-1) * self.frequencies.float()).flatten(-2)
        features = torch.cat((angles.sin(), angles.cos()), -1).to(patches.dtype)
        embedded = self.position(features) + self.patch(patches.flatten(-3))
        return embedded + sum(table(index) for table, index in zip(self.times, times.unbind(-1)))


def cases(device: str):
    for width in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(width, dtype, device)


@torch.no_grad()
def _case(width: int, dtype: torch.dtype, device: str) -> Case:
    torch.manual_seed(0)
    torch.compiler.reset()
    embed = QueryEmbedding(width).to(device, dtype).eval()
    decoder = CrossDecoder(width, LAYERS, WIDTHS[width], 4 * width).to(device, dtype).eval()
    head = nn.Linear(width, 13).to(device, dtype)
    n = QUERIES[device]
    features = torch.randn(1, TOKENS, width, device=device, dtype=dtype)
    query = (
        torch.rand(1, n, 2, device=device),
        torch.randint(FRAMES, (1, n, 3), device=device),
        torch.rand(1, n, 9, 9, 3, device=device, dtype=dtype),
    )
    memory = decoder.prepare(features)
    port = _port_style(decoder)

    def ours(*query):
        return head(decoder(embed(*query), memory))

    def sdpa(*query):
        x = embed(*query)
        for block, keys, values in zip(decoder.blocks, memory.keys, memory.values):
            q = block.attention._heads(block.attention.query(block.attention_norm(x)))
            heads = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, keys, values))).transpose(1, 2)
            x = x + block.attention.out(heads.flatten(-2))
            x = x + block.mlp(block.mlp_norm(x))
        return head(decoder.norm(x))

    def ports():
        parts = zip(*(part.split(PORT_CHUNK, 1) for part in query))
        return torch.cat([head(port(embed(*part), features)) for part in parts], 1)

    compiled = torch.compile(sdpa)
    no_grad = lambda function, *args: torch.no_grad()(lambda: function(*args))
    providers = {
        "fourdperf": no_grad(ours, *query),
        "SDPA, compiled, kept projections": no_grad(compiled, *query),
        "port style": no_grad(ports),
    }
    per_layer = 2 * width * (2 * width + 8 * width) + 4 * TOKENS * width
    return Case(
        "decoder",
        f"width {width}, {n} queries",
        str(dtype).removeprefix("torch."),
        providers,
        flops=n * LAYERS * per_layer,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )


def _port_style(decoder: CrossDecoder):
    """The same weights in nn.MultiheadAttention, keys and values projected in every call."""
    decoder = copy.deepcopy(decoder)
    attentions = []
    for block in decoder.blocks:
        a = block.attention
        attention = nn.MultiheadAttention(a.query.out_features, a.num_heads, batch_first=True).to(a.out.weight).eval()
        attention.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
        attention.out_proj.load_state_dict(a.out.state_dict())
        attentions.append(attention)

    def decode(x, features):
        for block, attention in zip(decoder.blocks, attentions):
            x = x + attention(block.attention_norm(x), features, features, need_weights=False)[0]
            x = x + block.mlp(block.mlp_norm(x))
        return decoder.norm(x)

    return decode


def main(device: str) -> None:
    header, roof = machine(device), roofs(device)
    print(" ".join(f"{key}={value}" for key, value in header.items()))
    print(
        f"{'':52} queries/s  "
        + "".join(f"{f'{rate} FPS':>9}" for rate in RATES)
        + "   tracks of a whole video, per second of it"
    )
    for case in cases(device):
        for row in run(case, roof, device, rounds=5, seconds=1):
            name = f"{case.name}, {case.dtype}, {row.provider}"
            if row.p50_ms is None:
                print(f"{name:75} {row.note}")
                continue
            rate = QUERIES[device] / row.p50_ms * 1e3
            print(
                f"{name:75} {rate:9.0f}  "
                + "".join(f"{rate / f:9.0f}" for f in RATES)
                + f"   ours is {row.speed and 1 / row.speed:.2f}x"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main("cuda" if torch.cuda.is_available() else "cpu")
