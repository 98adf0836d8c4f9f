"""Parts that several transformer models share word for word; parameters are named as Kauldron names them."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


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
    def __call__(self, tokens: Array) -> Array:
        def project(name, features):
            shape = (self.num_heads, features // self.num_heads)
            return nn.DenseGeneral(shape, dtype=tokens.dtype, name=name)(tokens)

        heads = attention(
            project("query", self.qk_features), project("key", self.qk_features), project("value", self.v_features)
        )
        return nn.DenseGeneral(tokens.shape[-1], axis=(-2, -1), dtype=heads.dtype, name="out")(heads)


class MLP(nn.Module):
    """dense_out(gelu(dense_in(x))) over the last axis."""

    hidden_size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.xavier_uniform()
        hidden = nn.gelu(nn.Dense(self.hidden_size, dtype=x.dtype, kernel_init=init, name="dense_in")(x))
        return nn.Dense(x.shape[-1], dtype=x.dtype, kernel_init=init, name="dense_out")(hidden)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `(B, N, D)` -> `(B, N, D)`."""

    num_heads: int
    mlp_size: int
    qk_features: int
    v_features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.attention_norm = nn.LayerNorm(dtype=self.dtype)
        self.attention = SelfAttention(self.num_heads, self.qk_features, self.v_features)
        self.mlp_norm = nn.LayerNorm(dtype=self.dtype)
        self.mlp = MLP(self.mlp_size)

    def __call__(self, tokens: Array) -> Array:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))
