"""TiTok in Flax; see fourdperf.models.titok."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fourdperf.jax.models.convolutions import conv3x3
from fourdperf.jax.models.layers import tap
from fourdperf.jax.models.maskgit_vqgan import PixelDecoder
from fourdperf.jax.models.pretrained import Pretrained
from fourdperf.jax.models.quantizer import VectorQuantizer, unit
from fourdperf.jax.models.token_blocks import TOKEN, Block, MaskedTokens, TokenEncoder
from fourdperf.jax.models.tokenizer import Encoded, Output
from fourdperf.models import titok
from fourdperf.models.titok import LOG_VARIANCE_RANGE


class Decoder(nn.Module):
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
        self.decoder = Decoder(c)
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
