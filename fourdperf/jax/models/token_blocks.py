"""The classes of fourdperf.models.token_blocks in Flax."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fourdperf.jax.models.layers import attention, tap

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
}
TOKEN = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention `(B, N, D)` -> `(B, N, D)`."""

    num_heads: int
    head_dim: int
    qkv_bias: bool

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        inner = self.num_heads * self.head_dim
        qkv = nn.Dense(3 * inner, use_bias=self.qkv_bias, name="qkv")(tokens)
        heads = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim) for x in jnp.split(qkv, 3, axis=-1))
        return nn.Dense(tokens.shape[-1], name="out")(attention(*heads).reshape(*tokens.shape[:2], inner))


class MLP(nn.Module):
    """dense_out(activation(dense_in(x)))."""

    hidden_size: int
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = ACTIVATIONS[self.activation](nn.Dense(self.hidden_size, name="dense_in")(x))
        return nn.Dense(x.shape[-1], name="dense_out")(hidden)


class Block(nn.Module):
    """Attention and an MLP around residuals; see the PyTorch class."""

    features: int
    num_heads: int
    mlp_size: int
    head_dim: int | None = None
    qkv_bias: bool = True
    activation: str = "gelu"
    eps: float = 1e-5
    post_norm: bool = False
    joined: bool = False
    layer_scale: bool = False

    def setup(self):
        self.attention_norm, self.mlp_norm = nn.LayerNorm(self.eps), nn.LayerNorm(self.eps)
        self.attention = Attention(self.num_heads, self.head_dim or self.features // self.num_heads, self.qkv_bias)
        self.mlp = MLP(self.mlp_size, self.activation)
        if self.joined:
            self.skip = nn.Dense(self.features)
        if self.layer_scale:
            names = ("attention_scale", "mlp_scale")
            self.attention_scale, self.mlp_scale = (
                self.param(x, nn.initializers.ones, (self.features,)) for x in names
            )

    def __call__(self, tokens: Array, skip: Array | None = None) -> Array:
        if self.joined:
            tokens = self.skip(jnp.concatenate([tokens, skip], axis=-1))
        if self.post_norm:
            tokens = self.attention_norm(tokens + self.attention(tokens))
            return self.mlp_norm(tokens + self.mlp(tokens))
        attention_scale, mlp_scale = (self.attention_scale, self.mlp_scale) if self.layer_scale else (1, 1)
        tokens = tokens + attention_scale * self.attention(self.attention_norm(tokens))
        return tokens + mlp_scale * self.mlp(self.mlp_norm(tokens))


class TokenEncoder(nn.Module):
    """Pictures `(B, H, W, 3)` -> latents `(B, N, C)`; see the PyTorch class."""

    grid: tuple[int, int]
    patch_size: int
    num_latents: int
    channels: int
    features: int
    num_layers: int
    num_heads: int
    mlp_size: int
    head_dim: int | None = None
    qkv_bias: bool = True
    activation: str = "gelu"
    eps: float = 1e-5
    pre: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    class_position: bool = True
    latent_layout: str = "token"

    def setup(self):
        patch, places = (self.patch_size,) * 2, self.class_position + self.grid[0] * self.grid[1] + self.num_latents
        self.patch_embed = nn.Conv(self.features, patch, patch, padding="VALID", use_bias=self.patch_bias)
        self.class_token = self.param("class_token", TOKEN, (self.features,))
        self.latent_tokens = self.param("latent_tokens", TOKEN, (self.num_latents, self.features))
        self.positions = self.param("positions", TOKEN, (places, self.features))
        if self.pre:
            self.norm_pre = nn.LayerNorm(self.eps)
        sizes = (self.features, self.num_heads, self.mlp_size, self.head_dim, self.qkv_bias, self.activation, self.eps)
        self.blocks = [Block(*sizes, layer_scale=self.layer_scale) for _ in range(self.num_layers)]
        self.norm, self.out = nn.LayerNorm(self.eps), nn.Dense(self.channels)

    def __call__(self, images: Array, taps: dict[str, Array] | None = None) -> Array:
        batch = len(images)
        patches = self.patch_embed(images).reshape(batch, -1, self.features)
        class_token = jnp.broadcast_to(self.class_token, (batch, 1, self.features))
        latents = jnp.broadcast_to(self.latent_tokens, (batch, *self.latent_tokens.shape))
        tokens = jnp.concatenate([class_token, patches, latents], axis=1)
        tokens = tokens.at[:, 1 - self.class_position :].add(self.positions)
        if self.pre:
            tokens = self.norm_pre(tokens)
        tap(taps, "encoder/embed", tokens)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            tap(taps, f"encoder/{index:02d}", tokens)
        latents = self.norm(tokens[:, -self.num_latents :])
        tap(taps, "encoder/norm", latents)
        if self.latent_layout == "upstream":
            latents = latents.reshape(batch, -1, self.num_latents).swapaxes(1, 2)
        latents = self.out(latents)
        tap(taps, "encoder/latents", latents)
        return latents


class MaskedTokens(nn.Module):
    """Class and mask tokens, then latents, with positions: `(B, N, C)` -> `(B, 1 + patches + N, D)`."""

    patches: int
    features: int

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        batch, features = len(latents), self.features
        class_token, mask_token = (self.param(x, TOKEN, (features,)) for x in ("class_token", "mask_token"))
        positions = self.param("positions", TOKEN, (1 + self.patches + latents.shape[1], features))
        class_token = jnp.broadcast_to(class_token, (batch, 1, features))
        masks = jnp.broadcast_to(mask_token, (batch, self.patches, features))
        latents = nn.Dense(features, name="embed")(latents)
        return jnp.concatenate([class_token, masks, latents], axis=1) + positions
