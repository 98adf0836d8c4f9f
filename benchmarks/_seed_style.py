"""How the seed's repository computes D4RT's hot spots, written anew for comparison: Python loops over windows and queries,
attention weights kept, keys and values projected in every call. Same weights, same numbers as ours; not a fast baseline,
and labelled "seed style" wherever it is shown."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def window_attention_loop(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Zero-padded sliding-window attention of `(B, T, H, W, heads, d)`, one query position at a time."""
    batch, frames, height, width, heads, size = q.shape
    radius = window // 2
    out = []
    for t in range(frames):
        keys, values = (
            F.pad(x[:, t].permute(0, 3, 4, 1, 2), (radius, radius, radius, radius)).permute(0, 1, 3, 4, 2)
            for x in (k, v)
        )  # (B, heads, H + 2r, W + 2r, d)
        for y in range(height):
            for x in range(width):
                near = (slice(None), slice(None), slice(y, y + window), slice(x, x + window))
                around = keys[near].flatten(2, 3)  # (B, heads, window^2, d)
                logits = q[:, t, y, x].unsqueeze(2) @ around.transpose(-1, -2) * size**-0.5
                out.append((logits.softmax(-1) @ values[near].flatten(2, 3)).squeeze(2))
    return torch.stack(out, dim=1).unflatten(1, (frames, height, width))


def patches_loop(video: Tensor, uv: Tensor, t_src: Tensor, size: int) -> Tensor:
    """RGB patches `(B, N, 3, size, size)` of video `(B, T, 3, H, W)`: rounded, shifted inside, one query at a time."""
    batch, frames, _, height, width = video.shape
    radius = size // 2
    patches = []
    for b in range(batch):
        for n in range(uv.shape[1]):
            t = min(max(int(t_src[b, n].item()), 0), frames - 1)
            x = int(torch.round(uv[b, n, 0].clamp(0, 1) * width).item())
            y = int(torch.round(uv[b, n, 1].clamp(0, 1) * height).item())
            x, y = min(max(x, radius), width - radius - 1), min(max(y, radius), height - radius - 1)
            patches.append(video[b, t, :, y - radius : y + radius + 1, x - radius : x + radius + 1])
    return torch.stack(patches).unflatten(0, uv.shape[:2])


class SeedDecoder(nn.Module):
    """The layers of a CrossDecoder in nn.MultiheadAttention that returns its weights; projects the memory every time."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.attentions = nn.ModuleList(self._attention(block.attention) for block in decoder.blocks)

    @staticmethod
    @torch.no_grad()
    def _attention(ours: nn.Module) -> nn.MultiheadAttention:
        theirs = nn.MultiheadAttention(
            ours.query.out_features,
            ours.num_heads,
            batch_first=True,
            device=ours.out.weight.device,
            dtype=ours.out.weight.dtype,
        )
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        return theirs.eval()

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        for block, attention in zip(self.decoder.blocks, self.attentions):
            memory = block.memory_norm(features)
            queries = queries + attention(block.attention_norm(queries), memory, memory)[0]
            queries = queries + block.mlp(block.mlp_norm(queries))
        return self.decoder.norm(queries)
