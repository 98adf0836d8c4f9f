"""Tokenizers and generators of pictures in Flax: the reference that the PyTorch files are compared with.

The classes of fourdperf.models.token_blocks, convolutions, tokenizer, maskgit_vqgan, titok and token_generator, in that
order, for inference, with `taps` under the same names; so are the parameters, in Flax's layouts (`flax_params`). Plain
jnp, channels last. `Tokenizer.from_pretrained` and the like read the same directories.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from jax import Array

from fourdperf.convert.flax_tree import nested
from fourdperf.jax.models.layers import attention, read_pretrained, tap
from fourdperf.jax.ops import vector_quantize
from fourdperf.models import maskgit_vqgan, titok, token_generator, tokenizer
from fourdperf.models.convolutions import GROUP_NORM_EPS, GROUPS
from fourdperf.models.titok import LOG_VARIANCE_RANGE
from fourdperf.models.token_generator import BERT_EPS

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
}
TOKEN = nn.initializers.normal(0.02)


# ---- token_blocks


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

    def setup(self):
        self.attention_norm, self.mlp_norm = nn.LayerNorm(self.eps), nn.LayerNorm(self.eps)
        self.attention = Attention(self.num_heads, self.head_dim or self.features // self.num_heads, self.qkv_bias)
        self.mlp = MLP(self.mlp_size, self.activation)
        if self.joined:
            self.skip = nn.Dense(self.features)

    def __call__(self, tokens: Array, skip: Array | None = None) -> Array:
        if self.joined:
            tokens = self.skip(jnp.concatenate([tokens, skip], axis=-1))
        if self.post_norm:
            tokens = self.attention_norm(tokens + self.attention(tokens))
            return self.mlp_norm(tokens + self.mlp(tokens))
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


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
    class_position: bool = True
    latent_layout: str = "token"

    def setup(self):
        patch, places = (self.patch_size,) * 2, self.class_position + self.grid[0] * self.grid[1] + self.num_latents
        self.patch_embed = nn.Conv(self.features, patch, patch, padding="VALID")
        self.class_token = self.param("class_token", TOKEN, (self.features,))
        self.latent_tokens = self.param("latent_tokens", TOKEN, (self.num_latents, self.features))
        self.positions = self.param("positions", TOKEN, (places, self.features))
        if self.pre:
            self.norm_pre = nn.LayerNorm(self.eps)
        options = (self.head_dim, self.qkv_bias, self.activation, self.eps)
        self.blocks = [Block(self.features, self.num_heads, self.mlp_size, *options) for _ in range(self.num_layers)]
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


class VectorQuantizer(nn.Module):
    """The nearest of K codes; see the PyTorch class."""

    number: int
    channels: int
    normalize: bool = True

    def setup(self):
        self.codebook = self.param("codebook", TOKEN, (self.number, self.channels))

    def codes(self) -> Array:
        return unit(self.codebook) if self.normalize else self.codebook

    def __call__(self, z: Array) -> tuple[Array, Array]:
        """Codes `(.., C)` and indices `(..)` of z `(.., C)`."""
        wide = jnp.promote_types(z.dtype, jnp.float32)
        found = vector_quantize(z.astype(wide), self.codes().astype(wide))
        return found.quantized, found.indices

    def lookup(self, indices: Array) -> Array:
        return self.codes()[indices]


def unit(x: Array) -> Array:
    """Vectors along the last axis, to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# ---- convolutions


def conv3x3(features: int, bias: bool = True) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, use_bias=bias)


def group_norm() -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, epsilon=GROUP_NORM_EPS)


class ResBlock(nn.Module):
    """See the PyTorch class; `changed` where the number of channels does."""

    width: int
    changed: bool = False
    bias: bool = True
    shortcut: str = "input"

    def setup(self):
        self.norm_in, self.norm_out = group_norm(), group_norm()
        self.conv_in, self.conv_out = conv3x3(self.width, self.bias), conv3x3(self.width, self.bias)
        if self.changed:
            self.skip = nn.Conv(self.width, (1, 1), use_bias=self.bias)

    def __call__(self, x: Array) -> Array:
        out = self.conv_in(nn.silu(self.norm_in(x)))
        out = self.conv_out(nn.silu(self.norm_out(out)))
        if not self.changed:
            return x + out
        return out + self.skip(x if self.shortcut == "input" else out)


class PixelAttention(nn.Module):
    """x + attention of all places to all, one head: `(B, H, W, C)` -> `(B, H, W, C)`."""

    channels: int

    def setup(self):
        self.norm, self.qkv, self.out = group_norm(), nn.Dense(3 * self.channels), nn.Dense(self.channels)

    def __call__(self, x: Array) -> Array:
        tokens = self.norm(x).reshape(len(x), -1, 1, self.channels)
        return x + self.out(attention(*jnp.split(self.qkv(tokens), 3, axis=-1))).reshape(x.shape)


def upsample(x: Array) -> Array:
    """Every pixel four times: `(B, H, W, C)` -> `(B, 2 H, 2 W, C)`."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


# ---- models


class Encoded(NamedTuple):
    """Latents `(B, N, C)`; indices `(B, N)` or None; mean and logarithm of the variance of a VAE or None."""

    latents: Array
    indices: Array | None
    moments: tuple[Array, Array] | None = None


class Output(NamedTuple):
    """The reconstruction, and the code."""

    recon: Array
    encoded: Encoded


class Pretrained:
    """Reads the directories that the PyTorch class TORCH writes."""

    TORCH: type

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> tuple[nn.Module, dict]:
        """The model of a directory, and its variables in fp32.

        Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
        """
        config, state = read_pretrained(path, cls.TORCH.MODEL, cls.TORCH.CONFIG, cls.TORCH)
        return cls(config), {"params": flax_params(state)}


class Level(nn.Module):
    """Residual blocks, each with attention after it or not, and the doubling with a convolution, or not."""

    inputs: int
    width: int
    number: int
    attend: bool
    upsampled: bool

    def setup(self):
        widths = [self.inputs, *[self.width] * self.number]
        self.blocks = [ResBlock(self.width, widths[index] != self.width) for index in range(self.number)]
        if self.attend:
            self.attention = [PixelAttention(self.width) for _ in range(self.number)]
        if self.upsampled:
            self.upsample = conv3x3(self.width)

    def __call__(self, x: Array) -> Array:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attend:
                x = self.attention[index](x)
        return self.upsample(upsample(x)) if self.upsampled else x


class Decoder(nn.Module):
    """Latents `(B, N, C)` -> pictures `(B, H, W, 3)` in [-1, 1]; see the PyTorch class."""

    config: tokenizer.Config

    def setup(self):
        c = self.config
        self.grid = c.decoder_grid
        self.tokens = MaskedTokens(self.grid[0] * self.grid[1], c.decoder_size)
        widths = [c.decoder_channels * multiplier for multiplier in reversed(c.channel_multipliers)]
        self.stem = conv3x3(widths[0])
        self.mid = [ResBlock(widths[0]), PixelAttention(widths[0]), ResBlock(widths[0])]
        height, last = c.image_size[0] // 2 ** (len(widths) - 1), len(widths) - 1
        self.levels = [
            Level(inputs, width, c.res_blocks + 1, height * 2**index in c.attention_sizes, index < last)
            for index, (inputs, width) in enumerate(zip([widths[0], *widths], widths))
        ]
        self.norm, self.out = group_norm(), conv3x3(3)

    def __call__(self, latents: Array, taps: dict[str, Array] | None = None) -> Array:
        tokens = self.tokens(latents)
        tap(taps, "decoder/embed", tokens)
        x = self.stem(tokens[:, :, None])
        tap(taps, "decoder/stem", _channels_first(x))
        for part in self.mid:
            x = part(x)
        tap(taps, "decoder/mid", _channels_first(x))
        x = x[:, 1 : 1 + self.grid[0] * self.grid[1]].reshape(len(x), *self.grid, -1)
        for index, level in enumerate(self.levels):
            x = level(x)
            tap(taps, f"decoder/{index:02d}", _channels_first(x))
        return self.out(nn.silu(self.norm(x)))


class Tokenizer(nn.Module, Pretrained):
    """`model.apply(variables, images)`, and with `method="encode"`, `"decode"` and `"decode_indices"`."""

    config: tokenizer.Config
    TORCH = tokenizer.Tokenizer

    def setup(self):
        c = self.config
        self.encoder = TokenEncoder(
            *((c.image_size[0] // c.patch_size, c.image_size[1] // c.patch_size), c.patch_size, c.num_latents),
            *(c.latent_channels, c.hidden_size, c.num_layers, c.num_heads, c.mlp_size, c.head_dim, c.qkv_bias),
            *(c.activation, c.norm_eps, c.norm_pre, c.class_position, c.latent_layout),
        )
        self.quantizer = VectorQuantizer(c.codebook_size, c.latent_channels)
        self.decoder = Decoder(c)

    def encode(self, images: Array, taps: dict[str, Array] | None = None) -> Encoded:
        z = unit(self.encoder(2 * images - 1, taps))
        tap(taps, "latents", z)
        return Encoded(*self.quantizer(z))

    def decode(self, latents: Array, taps: dict[str, Array] | None = None) -> Array:
        return (self.decoder(latents, taps) + 1) / 2

    def decode_indices(self, indices: Array, taps: dict[str, Array] | None = None) -> Array:
        return self.decode(self.quantizer.lookup(indices), taps)

    def __call__(self, images: Array, taps: dict[str, Array] | None = None) -> Output:
        encoded = self.encode(images, taps)
        return Output(self.decode(encoded.latents, taps), encoded)


def _blocks(config: maskgit_vqgan.Config, inputs: int, width: int) -> list[ResBlock]:
    """The residual blocks of a level."""
    widths = [inputs, *[width] * config.res_blocks]
    return [ResBlock(width, widths[index] != width, False, config.shortcut) for index in range(config.res_blocks)]


class PixelEncoder(nn.Module):
    """Pictures `(B, H, W, 3)` -> latents `(B, h, w, C)`."""

    config: maskgit_vqgan.Config

    def setup(self):
        c, widths = self.config, self.config.widths
        self.stem = conv3x3(widths[0], False)
        self.levels = [_blocks(c, inputs, width) for inputs, width in zip([widths[0], *widths], widths)]
        self.mid = _blocks(c, widths[-1], widths[-1])
        self.norm, self.out = group_norm(), nn.Conv(c.latent_channels, (1, 1))

    def __call__(self, images: Array, taps: dict[str, Array] | None = None) -> Array:
        x = self.stem(images)
        for index, blocks in enumerate(self.levels):
            x = x if index == 0 else nn.avg_pool(x, (2, 2), (2, 2))
            for block in blocks:
                x = block(x)
            tap(taps, f"pixel_encoder/{index:02d}", _channels_first(x))
        for block in self.mid:
            x = block(x)
        return self.out(nn.silu(self.norm(x)))


class PixelDecoder(nn.Module):
    """Latents `(B, h, w, C)` -> pictures `(B, H, W, 3)`; levels coarsest first."""

    config: maskgit_vqgan.Config

    def setup(self):
        c, widths = self.config, self.config.widths[::-1]
        self.stem, self.mid = conv3x3(widths[0]), _blocks(c, widths[0], widths[0])
        self.levels = [_blocks(c, inputs, width) for inputs, width in zip([widths[0], *widths], widths)]
        self.upsamples = [conv3x3(width) for width in widths[:-1]]
        self.norm, self.out = group_norm(), conv3x3(3)

    def __call__(self, latents: Array, taps: dict[str, Array] | None = None) -> Array:
        x = self.stem(latents)
        for block in self.mid:
            x = block(x)
        tap(taps, "pixel_decoder/mid", _channels_first(x))
        for index, blocks in enumerate(self.levels):
            for block in blocks:
                x = block(x)
            if index < len(self.upsamples):
                x = self.upsamples[index](upsample(x))
            tap(taps, f"pixel_decoder/{index:02d}", _channels_first(x))
        return self.out(nn.silu(self.norm(x)))


class MaskGITVQGAN(nn.Module, Pretrained):
    """As `Tokenizer`, with latents `(B, h, w, C)` and indices `(B, h, w)`."""

    config: maskgit_vqgan.Config
    TORCH = maskgit_vqgan.MaskGITVQGAN

    def setup(self):
        c = self.config
        self.encoder, self.decoder = PixelEncoder(c), PixelDecoder(c)
        self.quantizer = VectorQuantizer(c.codebook_size, c.latent_channels, False)

    def encode(self, images: Array, taps: dict[str, Array] | None = None) -> Encoded:
        z = self.encoder(images, taps)
        tap(taps, "latents", z)
        return Encoded(*self.quantizer(z))

    def decode(self, latents: Array, taps: dict[str, Array] | None = None) -> Array:
        return self.decoder(latents, taps)

    def decode_indices(self, indices: Array, taps: dict[str, Array] | None = None) -> Array:
        return self.decode(self.quantizer.lookup(indices), taps)

    def __call__(self, images: Array, taps: dict[str, Array] | None = None) -> Output:
        encoded = self.encode(images, taps)
        return Output(self.decode(encoded.latents, taps), encoded)


class TiTokDecoder(nn.Module):
    """Latents `(B, N, C)` -> pictures `(B, H, W, 3)`, or logits `(B, h, w, K')` of codes of pixels."""

    config: titok.Config

    def setup(self):
        c, width = self.config, self.config.decoder_size
        self.tokens = MaskedTokens(c.grid[0] * c.grid[1], width)
        self.norm_pre, self.norm = nn.LayerNorm(1e-5), nn.LayerNorm(1e-5)
        self.blocks = [Block(width, c.decoder_heads, 4 * width) for _ in range(c.decoder_layers)]
        if c.target == "codes":
            self.dense, self.out = nn.Dense(2 * width), nn.Dense(c.target_codes)
        else:
            self.dense, self.out = nn.Dense(3 * c.patch_size**2), conv3x3(3)

    def __call__(self, latents: Array, taps: dict[str, Array] | None = None) -> Array:
        c = self.config
        tokens = self.norm_pre(self.tokens(latents))
        tap(taps, "decoder/embed", tokens)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            tap(taps, f"decoder/{index:02d}", tokens)
        tokens = self.norm(tokens[:, 1 : 1 + c.grid[0] * c.grid[1]])
        tap(taps, "decoder/norm", tokens)
        tokens = self.dense(tokens).reshape(len(latents), *c.grid, -1)
        if c.target == "codes":
            out = self.out(jnp.tanh(tokens))
        else:
            patches = tokens.reshape(len(latents), *c.grid, c.patch_size, c.patch_size, 3)
            out = self.out(patches.transpose(0, 1, 3, 2, 4, 5).reshape(len(latents), *c.image_size, 3))
        tap(taps, "decoder/out", out)
        return out


class TiTok(nn.Module, Pretrained):
    """As `Tokenizer`; a VAE's code is its mean."""

    config: titok.Config
    TORCH = titok.TiTok

    def setup(self):
        c = self.config
        self.encoder = TokenEncoder(
            *(c.grid, c.patch_size, c.num_latents, c.latent_channels * (2 if c.mode == "vae" else 1)),
            *(c.hidden_size, c.num_layers, c.num_heads, 4 * c.hidden_size),
            pre=True,
            latent_layout=c.latent_layout,
        )
        if c.mode == "vq":
            self.quantizer = VectorQuantizer(c.codebook_size, c.latent_channels, c.normalize)
        self.decoder = TiTokDecoder(c)
        if c.pixels is not None:
            self.pixel_codes = self.param("pixel_codes", TOKEN, (c.target_codes, c.pixels.latent_channels))
            self.pixel_decoder = PixelDecoder(c.pixels)

    def encode(self, images: Array, taps: dict[str, Array] | None = None) -> Encoded:
        z = self.encoder(images, taps)
        if self.config.mode == "vq":
            return Encoded(*self.quantizer(unit(z) if self.config.normalize else z))
        mean, log_variance = jnp.split(z, 2, axis=-1)
        return Encoded(mean, None, (mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)))

    def decode(self, latents: Array, taps: dict[str, Array] | None = None) -> Array:
        out = self.decoder(latents, taps)
        if self.config.pixels is None:
            return out
        return self.pixel_decoder(nn.softmax(out) @ self.pixel_codes, taps)

    def decode_indices(self, indices: Array, taps: dict[str, Array] | None = None) -> Array:
        return self.decode(self.quantizer.lookup(indices), taps)

    def __call__(self, images: Array, taps: dict[str, Array] | None = None) -> Output:
        encoded = self.encode(images, taps)
        return Output(self.decode(encoded.latents, taps), encoded)


class TokenGenerator(nn.Module, Pretrained):
    """Logits `(B, N, K)` of `indices` `(B, N)` and `classes` `(B,)` or None; see the PyTorch class."""

    config: token_generator.Config
    TORCH = token_generator.TokenGenerator

    def setup(self):
        c = self.config
        bert, half = c.kind == "bert", c.num_layers // 2
        self.tokens = self.param("tokens", TOKEN, (c.vocabulary, c.hidden_size))
        self.positions = self.param("positions", TOKEN, (1 + c.num_tokens, c.hidden_size))
        if bert:
            self.segments = self.param("segments", TOKEN, (2, c.hidden_size))
        eps = BERT_EPS if bert else 1e-5
        self.norm = nn.LayerNorm(eps)
        block = lambda joined: Block(
            *(c.hidden_size, c.num_heads, c.mlp_size), qkv_bias=bert, eps=eps, post_norm=bert, joined=joined
        )
        self.blocks = [block(False) for _ in range(c.num_layers if bert else half + 1)]
        self.skip_blocks = [block(True) for _ in range(0 if bert else half)]
        self.head = nn.Dense(c.codebook_size)

    def __call__(self, indices: Array, classes: Array | None = None, taps: dict[str, Array] | None = None) -> Array:
        c = self.config
        if classes is None:
            condition = jnp.full(len(indices), c.no_class_id)
        else:
            condition = classes + c.codebook_size + 1
        x = self.tokens[jnp.concatenate([condition[:, None], indices], axis=1)] + self.positions
        if c.kind == "bert":
            x = self.norm(x + self.segments[0])
        tap(taps, "embed", x)
        early = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            early.append(x)
            tap(taps, f"block/{index:02d}", x)
        for index, (block, skip) in enumerate(zip(self.skip_blocks, early[-2::-1]), start=len(self.blocks)):
            x = block(x, skip)
            tap(taps, f"block/{index:02d}", x)
        if c.kind == "uvit":
            x = self.norm(x)
            tap(taps, "norm", x)
        return self.head(x[:, 1:])


def flax_params(state: Mapping[str, torch.Tensor]) -> dict:
    """A PyTorch model's tensors, by name, as the tree of parameters of the class of its name here, fp32."""
    return nested({flax_name(key, x.ndim): flax_array(key, x) for key, x in state.items()})


def flax_name(key: str, axes: int) -> str:
    """blocks.0.attention.qkv.weight -> blocks_0/attention/qkv/kernel."""
    *path, name = key.split(".")
    if name == "weight":
        name = "scale" if axes == 1 else "kernel"
    found = []
    for part in path:
        if part.isdigit():
            found[-1] += f"_{part}"
        else:
            found.append(part)
    return "/".join([*found, name])


def flax_array(key: str, x: torch.Tensor) -> Array:
    """Kernels (out, in) to (in, out), and (out, in, h, w) to (h, w, in, out); the rest stays."""
    array = x.detach().float().cpu().numpy()
    if key.endswith(".weight") and array.ndim > 1:
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return jnp.asarray(np.ascontiguousarray(array))


def _channels_first(x: Array) -> Array:
    """`(B, H, W, C)` -> `(B, C, H, W)`, as the PyTorch models have it between convolutions."""
    return x.transpose(0, 3, 1, 2)
