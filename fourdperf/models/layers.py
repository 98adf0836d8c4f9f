"""Parts that several transformer models share word for word.

Tokens are `(B, N, D)`; attention inputs are `(B, N, H, d)`: heads after tokens, as a linear layer leaves them.
LayerNorm's epsilon is 1e-6 and GELU is the tanh form: the Flax defaults that the reference models were trained with.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from fourdperf.ops import cross_attention
from fourdperf.ops.backends import native_why_not

LAYER_NORM_EPS = 1e-6


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(d)) value by the fastest exact path of the device.

    query `(B, Q, H, d)`, key `(B, K, H, d)`, value `(B, K, H, e)` -> `(B, Q, H, e)`. The softmax is computed in fp32.
    On a CPU that is the native kernel (against SDPA: 0.98 to 1.2 times as fast in fp32, 1.5 to 2.4 times in bf16); on a
    GPU, where ours has not been measured, and without the compiled library, SDPA.
    """
    if query.device.type == "cpu" and native_why_not(query) is None:
        return cross_attention(query, key, value)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def linear_gelu(x: Tensor, layer: nn.Linear, approximate: str = "none") -> Tensor:
    """F.gelu(layer(x), approximate=approximate); one pass of oneDNN (PyTorch's) on a CPU, where no gradient is needed."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], approximate)
    return F.gelu(layer(x), approximate=approximate)


def _fuses(x: Tensor, layer: nn.Linear) -> bool:
    """Only a plain layer of plain CPU tensors, that no derivative, transformation, autocast, mode or compiler follows."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() or type(layer) is not nn.Linear or not untouched(layer):
        return False
    if type(x) is not Tensor or type(layer.weight) is not nn.Parameter or layer.weight.device != x.device:
        return False
    if x.device.type != "cpu" or x.dtype != layer.weight.dtype or not x.numel() or x.shape[-1] != layer.in_features:
        return False
    bf16 = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and (bf16 or x.dtype == torch.float32)


def untouched(module: nn.Module) -> bool:
    """Whether nobody looks on: no hooks, and no `forward` put in the place of the class's."""
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules())


class PatchEmbedding(nn.Module):
    """One linear map of each patch: video `(B, T, H, W, C)` -> tokens `(B, t h w, D)`.

    What does not fill a patch is dropped. With `ids_keep` `(B, K)` only those patches are embedded, in that order.
    """

    def __init__(self, patch_size: Sequence[int], channels: int, features: int):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.projection = nn.Linear(math.prod(self.patch_size) * channels, features)

    def forward(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        for dim, patch in enumerate(self.patch_size, start=1):
            video = video.narrow(dim, 0, video.shape[dim] // patch * patch)
        for dim, patch in zip((1, 3, 5), self.patch_size):
            video = video.unflatten(dim, (-1, patch))
        patches = video.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)
        return self.projection(patches if ids_keep is None else take(patches, ids_keep))


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

    def forward(self, tokens: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """`attend`: query, key, value `(B, N, H, d)` -> heads `(B, N, H, d)`; by default all tokens attend to all."""
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in self.qkv(tokens).split(self.sizes, dim=-1))
        return self.out((attend or attention)(*heads).flatten(-2))


class MLP(nn.Module):
    """dense_out(gelu(dense_in(x))) over the last axis; `approximate` as in F.gelu."""

    def __init__(self, features: int, hidden_size: int, approximate: str = "tanh"):
        super().__init__()
        self.approximate = approximate
        self.dense_in = nn.Linear(features, hidden_size)
        self.dense_out = nn.Linear(hidden_size, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_out(linear_gelu(x, self.dense_in, self.approximate))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `(B, N, D)` -> `(B, N, D)`."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_size: int,
        qk_features: int | None = None,
        v_features: int | None = None,
        *,
        eps: float = LAYER_NORM_EPS,
        approximate: str = "tanh",
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(features, eps=eps)
        self.attention = SelfAttention(features, num_heads, qk_features, v_features)
        self.mlp_norm = nn.LayerNorm(features, eps=eps)
        self.mlp = MLP(features, mlp_size, approximate)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


class Memory(NamedTuple):
    """What queries attend to, projected once: keys and values `(B, K, H, d)` per layer, the padding mask `(B, K)`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_padding_mask: Tensor | None


class CrossAttention(nn.Module):
    """Multi-head attention of tokens `(B, Q, D)` to a memory `(B, K, M)` that `prepare` projects."""

    def __init__(self, features: int, num_heads: int, memory_features: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(memory_features, features)
        self.value = nn.Linear(memory_features, features)
        self.out = nn.Linear(features, features)

    def prepare(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, K, H, d)`."""
        return self._heads(self.key(memory)), self._heads(self.value(memory))

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        heads = cross_attention(self._heads(self.query(tokens)), keys, values, key_padding_mask=key_padding_mask)
        return self.out(heads.flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class CrossBlock(nn.Module):
    """x + attention(norm(x), memory), then x + mlp(norm(x)); the memory is normed first where `norm_memory` says so."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_size: int,
        memory_features: int,
        norm_memory: bool,
        eps: float,
        approximate: str,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(features, eps=eps)
        self.memory_norm = nn.LayerNorm(memory_features, eps=eps) if norm_memory else nn.Identity()
        self.attention = CrossAttention(features, num_heads, memory_features)
        self.mlp_norm = nn.LayerNorm(features, eps=eps)
        self.mlp = MLP(features, mlp_size, approximate)

    def prepare(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.prepare(self.memory_norm(memory))

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens), keys, values, key_padding_mask)
        return tokens + self.mlp(self.mlp_norm(tokens))


class CrossDecoder(nn.Module):
    """Independent queries `(B, Q, D)` against one memory `(B, K, M)`: blocks of cross-attention and MLP, then a norm.

        memory = decoder.prepare(features)     once per clip: keys and values of every layer
        tokens = decoder(queries, memory)      as often as there are queries

    Queries never see each other, so they run in chunks whose activations fit `memory_budget` bytes; a query's result
    does not depend on its chunk beyond the rounding of the linear layers. Training and inference are the same code.
    Where `norm_memory`, every block has its own LayerNorm for the memory. `eps` and `approximate` (of GELU) are for
    checkpoints.
    """

    def __init__(
        self,
        features: int,
        num_layers: int,
        num_heads: int,
        mlp_size: int,
        memory_features: int | None = None,
        *,
        norm_memory: bool = False,
        eps: float = LAYER_NORM_EPS,
        approximate: str = "tanh",
        memory_budget: int = 2**28,
    ):
        super().__init__()
        self.memory_budget = memory_budget
        self.floats_per_query = 2 * features + 2 * mlp_size  # residual and normed; hidden before and after the GELU
        self.blocks = nn.ModuleList(
            CrossBlock(features, num_heads, mlp_size, memory_features or features, norm_memory, eps, approximate)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(features, eps=eps)

    def prepare(self, memory: Tensor, key_padding_mask: Tensor | None = None) -> Memory:
        """Projects the memory for every layer; `key_padding_mask` `(B, K)` is True where a token is padding."""
        keys, values = zip(*(block.prepare(memory) for block in self.blocks))
        return Memory(keys, values, key_padding_mask)

    def forward(self, queries: Tensor, memory: Memory, taps: dict[str, Tensor] | None = None) -> Tensor:
        chunk = self.chunk_size(queries.shape[0], queries.element_size())
        return in_chunks(lambda part, taps: self._chunk(part, memory, taps), [queries], chunk, taps)

    def chunk_size(self, batch: int, element_size: int) -> int:
        """How many queries of each clip fit the budget: a multiple of 64, at least 64."""
        per_query = batch * self.floats_per_query * element_size
        return max(64, self.memory_budget // max(1, per_query) // 64 * 64)

    def _chunk(self, tokens: Tensor, memory: Memory, taps: dict[str, Tensor] | None) -> Tensor:
        for layer, (block, keys, values) in enumerate(zip(self.blocks, memory.keys, memory.values)):
            tokens = block(tokens, keys, values, memory.key_padding_mask)
            tap(taps, f"decoder/{layer:02d}", tokens)
        tokens = self.norm(tokens)
        tap(taps, "decoder/norm", tokens)
        return tokens


def in_chunks(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], size: int, taps: dict[str, Tensor] | None
) -> Tensor:
    """function(*inputs, taps), of `size` rows of axis 1 at a time; outputs and taps are joined along axis 1."""
    found: list[dict[str, Tensor] | None] = []
    outputs = []
    for parts in zip(*(x.split(size, dim=1) for x in inputs)):
        found.append(None if taps is None else {})
        outputs.append(function(*parts, found[-1]))
    for name in found[0] or ():
        taps[name] = torch.cat([part[name] for part in found], dim=1)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def take(x: Tensor, ids: Tensor) -> Tensor:
    """x `(B, N, D)`, ids `(B, K)` -> `(B, K, D)`."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def may_look(x: Tensor) -> bool:
    """Whether values may be checked: on a GPU that would wait for the device, and a compiler sees none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def tap(taps: dict[str, Tensor] | None, name: str, value: Tensor) -> None:
    if taps is not None:
        taps[name] = value


def like(x: Tensor, parameter: Tensor, name: str) -> Tensor:
    """A floating tensor in the dtype of `parameter`; raises ValueError where it is not one, or elsewhere."""
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating point dtype, got {x.dtype}; 8-bit frames: pass x.float() / 255")
    if x.device != parameter.device:
        raise ValueError(f"{name}: expected it on {parameter.device} like the parameters, got {x.device}")
    return x.to(parameter.dtype)
