"""Parts that several models share word for word; parameters of transformers are named as Kauldron names them."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from jax import Array
from safetensors.torch import load_file

from fourdperf.jax.ops import cross_attention
from fourdperf.models.checkpoint import WEIGHTS, CheckpointError, check_keys, read_config, read_shapes
from fourdperf.models.config import BaseConfig


def read_pretrained(
    path: str | os.PathLike, name: str, config_class: type[BaseConfig], build: Callable[[BaseConfig], torch.nn.Module]
) -> tuple[BaseConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of a directory written by the PyTorch model's `save_pretrained`.

    name, config_class, build: the model family's, its config's class, and the PyTorch model of a config.
    Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
    """
    fields, file = read_config(path, name), Path(path) / WEIGHTS
    try:
        config = config_class.from_dict(fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        wanted = {key: tuple(x.shape) for key, x in build(config).state_dict().items()}
    check_keys(str(file), wanted, read_shapes(file))
    return config, load_file(file)


def tap(taps: dict[str, Array] | None, name: str, value: Array) -> None:
    """Keep an intermediate value under `name`, where a dictionary is given."""
    if taps is not None:
        taps[name] = value


def attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(query key^T / sqrt(d)) value on `(B, N, H, d)`, the softmax in fp32."""
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = jnp.einsum("...qhd,...khd->...hqk", query, key)
    weights = jax.nn.softmax(weights.astype(jnp.float32)).astype(weights.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


class SelfAttention(nn.Module):
    """Multi-head self-attention, `(B, N, D)` -> `(B, N, D)`."""

    num_heads: int
    qk_features: int
    v_features: int

    @nn.compact
    def __call__(self, tokens: Array, attend: Callable[[Array, Array, Array], Array] = attention) -> Array:
        """`attend`: query, key, value `(B, N, H, d)` -> heads `(B, N, H, d)`; by default all tokens attend to all."""

        def project(name, features):
            shape = (self.num_heads, features // self.num_heads)
            return nn.DenseGeneral(shape, dtype=tokens.dtype, name=name)(tokens)

        heads = attend(
            project("query", self.qk_features), project("key", self.qk_features), project("value", self.v_features)
        )
        return nn.DenseGeneral(tokens.shape[-1], axis=(-2, -1), dtype=heads.dtype, name="out")(heads)


class MLP(nn.Module):
    """dense_out(gelu(dense_in(x))) over the last axis."""

    hidden_size: int
    approximate: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.xavier_uniform()
        hidden = nn.gelu(
            nn.Dense(self.hidden_size, dtype=x.dtype, kernel_init=init, name="dense_in")(x), self.approximate
        )
        return nn.Dense(x.shape[-1], dtype=x.dtype, kernel_init=init, name="dense_out")(hidden)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `(B, N, D)` -> `(B, N, D)`."""

    num_heads: int
    mlp_size: int
    qk_features: int
    v_features: int
    dtype: jnp.dtype = jnp.float32
    eps: float = 1e-6
    approximate: bool = True

    def setup(self):
        self.attention_norm = nn.LayerNorm(self.eps, dtype=self.dtype)
        self.attention = SelfAttention(self.num_heads, self.qk_features, self.v_features)
        self.mlp_norm = nn.LayerNorm(self.eps, dtype=self.dtype)
        self.mlp = MLP(self.mlp_size, self.approximate)

    def __call__(self, tokens: Array) -> Array:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens `(B, Q, D)` to a memory `(B, K, M)` that `prepare` projects."""

    num_heads: int
    features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        def project():
            return nn.DenseGeneral((self.num_heads, self.features // self.num_heads), dtype=self.dtype)

        self.query, self.key, self.value = project(), project(), project()
        self.out = nn.DenseGeneral(self.features, axis=(-2, -1), dtype=self.dtype)

    def prepare(self, memory: Array) -> tuple[Array, Array]:
        """Keys and values `(B, K, H, d)`."""
        return self.key(memory), self.value(memory)

    def __call__(self, tokens: Array, keys: Array, values: Array, key_padding_mask: Array | None = None) -> Array:
        return self.out(cross_attention(self.query(tokens), keys, values, key_padding_mask=key_padding_mask))


class CrossBlock(nn.Module):
    """x + attention(norm(x), memory), then x + mlp(norm(x)); the memory is normed first where `norm_memory` says so."""

    features: int
    num_heads: int
    mlp_size: int
    norm_memory: bool = False
    eps: float = 1e-6
    approximate: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.attention_norm = nn.LayerNorm(self.eps, dtype=self.dtype)
        if self.norm_memory:
            self.memory_norm = nn.LayerNorm(self.eps, dtype=self.dtype)
        self.attention = CrossAttention(self.num_heads, self.features, self.dtype)
        self.mlp_norm = nn.LayerNorm(self.eps, dtype=self.dtype)
        self.mlp = MLP(self.mlp_size, self.approximate)

    def prepare(self, memory: Array) -> tuple[Array, Array]:
        return self.attention.prepare(self.memory_norm(memory) if self.norm_memory else memory)

    def __call__(self, tokens: Array, keys: Array, values: Array, key_padding_mask: Array | None = None) -> Array:
        tokens = tokens + self.attention(self.attention_norm(tokens), keys, values, key_padding_mask)
        return tokens + self.mlp(self.mlp_norm(tokens))


class CrossDecoder(nn.Module):
    """Independent queries `(B, Q, D)` against one memory `(B, K, M)`: blocks of cross-attention and MLP, then a norm.

    `prepare` gives keys and values of every layer; `decode` runs queries against them; calling the module does both.
    """

    features: int
    num_layers: int
    num_heads: int
    mlp_size: int
    norm_memory: bool = False
    eps: float = 1e-6
    approximate: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.blocks = [
            CrossBlock(
                self.features, self.num_heads, self.mlp_size, self.norm_memory, self.eps, self.approximate, self.dtype
            )
            for _ in range(self.num_layers)
        ]
        self.norm = nn.LayerNorm(self.eps, dtype=self.dtype)

    def prepare(self, memory: Array) -> list[tuple[Array, Array]]:
        return [block.prepare(memory) for block in self.blocks]

    def decode(
        self,
        queries: Array,
        memory: list[tuple[Array, Array]],
        key_padding_mask: Array | None = None,
        taps: dict[str, Array] | None = None,
    ) -> Array:
        tokens = queries
        for layer, (block, (keys, values)) in enumerate(zip(self.blocks, memory)):
            tokens = block(tokens, keys, values, key_padding_mask)
            if taps is not None:
                taps[f"decoder/{layer:02d}"] = tokens
        tokens = self.norm(tokens)
        if taps is not None:
            taps["decoder/norm"] = tokens
        return tokens

    def __call__(
        self, queries: Array, memory: Array, key_padding_mask: Array | None = None, taps: dict[str, Array] | None = None
    ) -> Array:
        return self.decode(queries, self.prepare(memory), key_padding_mask, taps)
