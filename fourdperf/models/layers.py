"""Parts that several transformer models share word for word.

Tokens are `(B, N, D)`; attention inputs are `(B, N, H, d)`: heads after tokens, as a linear layer leaves them.
LayerNorm's epsilon is 1e-6 and GELU is the tanh form: the Flax defaults that the reference models were trained with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


# Scores that a block of queries has at once: 16 MB in bf16, which stays in the last cache.
BLOCK_SCORES = 2**23


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(d)) value by the fastest exact path of the device.

    query `(B, Q, H, d)`, key `(B, K, H, d)`, value `(B, K, H, e)` -> `(B, Q, H, e)`. The softmax is computed in fp32.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    path = _attention_in_blocks if _blocks_pay(query, key, value) else F.scaled_dot_product_attention
    return path(query, key, value).transpose(1, 2)


def _blocks_pay(*inputs: Tensor) -> bool:
    """Whether inference in bf16 on this CPU goes through blocks.

    Without AMX, SDPA multiplies bf16 at the rate of fp32 (80 GFLOP/s a core on Zen 4), while oneDNN's matmul reaches
    twice that: blocks take 0.6 of the time at every head size from 64 to 128. fp32 and fp16 are better off in SDPA.
    """
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in inputs)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def _attention_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention on `(B, H, N, d)` as matmul, softmax, matmul, some rows of queries at a time."""
    shape = (*query.shape[:3], value.shape[3])
    query, key, value = (x.flatten(0, 1).contiguous() for x in (query * query.shape[-1] ** -0.5, key, value))
    output = query.new_empty(shape).flatten(0, 1)
    rows = max(1, BLOCK_SCORES // max(1, key.shape[0] * key.shape[1]))
    with torch.autocast("cpu", enabled=False):
        for block, out in zip(query.split(rows, dim=1), output.split(rows, dim=1)):
            torch.bmm(torch.bmm(block, key.transpose(1, 2)).softmax(dim=-1), value, out=out)
    return output.view(shape)


class SelfAttention(nn.Module):
    """Multi-head self-attention, `(B, N, D)` -> `(B, N, D)`, with one fused projection to queries, keys and values."""

    def __init__(self, features: int, num_heads: int, qk_features: int | None = None, v_features: int | None = None):
        super().__init__()
        qk_features = qk_features or features
        v_features = v_features or qk_features
        self.num_heads = num_heads
        self.sizes = (qk_features, qk_features, v_features)
        self.qkv = nn.Linear(features, sum(self.sizes))
        self.out = nn.Linear(v_features, features)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in self.qkv(tokens).split(self.sizes, dim=-1))
        return self.out(attention(*heads).flatten(-2))


class MLP(nn.Module):
    """dense_out(gelu(dense_in(x))) over the last axis."""

    def __init__(self, features: int, hidden_size: int):
        super().__init__()
        self.dense_in = nn.Linear(features, hidden_size)
        self.dense_out = nn.Linear(hidden_size, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_out(F.gelu(self.dense_in(x), approximate="tanh"))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `(B, N, D)` -> `(B, N, D)`."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_size: int,
        qk_features: int | None = None,
        v_features: int | None = None,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(features, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(features, num_heads, qk_features, v_features)
        self.mlp_norm = nn.LayerNorm(features, eps=LAYER_NORM_EPS)
        self.mlp = MLP(features, mlp_size)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))
