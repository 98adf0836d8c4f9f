"""The seed's tokenizer in Flax: the reference that the PyTorch files are compared with.

The classes of fourdperf.models.tokenizer in that order, for inference, with `taps` under the same names; so are the
parameters, in Flax's layouts (`fourdperf.jax.models.pretrained.flax_params`). Plain jnp, channels last; titok,
maskgit_vqgan and token_generator are beside it. `Tokenizer.from_pretrained` reads the same directories.
"""

from typing import NamedTuple

from flax import linen as nn
from jax import Array

from fourdperf.jax.models.convolutions import PixelAttention, ResBlock, channels_first, conv3x3, group_norm, upsample
from fourdperf.jax.models.layers import tap
from fourdperf.jax.models.pretrained import Pretrained
from fourdperf.jax.models.quantizer import VectorQuantizer, unit
from fourdperf.jax.models.token_blocks import MaskedTokens, TokenEncoder
from fourdperf.models import tokenizer


class Encoded(NamedTuple):
    """Latents `(B, N, C)`; indices `(B, N)` or None; mean and logarithm of the variance of a VAE or None."""

    latents: Array
    indices: Array | None
    moments: tuple[Array, Array] | None = None


class Output(NamedTuple):
    """The reconstruction, and the code."""

    recon: Array
    encoded: Encoded


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
        tap(taps, "decoder/stem", channels_first(x))
        for part in self.mid:
            x = part(x)
        tap(taps, "decoder/mid", channels_first(x))
        x = x[:, 1 : 1 + self.grid[0] * self.grid[1]].reshape(len(x), *self.grid, -1)
        for index, level in enumerate(self.levels):
            x = level(x)
            tap(taps, f"decoder/{index:02d}", channels_first(x))
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
            *(c.activation, c.norm_eps, c.norm_pre, c.patch_bias, c.layer_scale, c.class_position, c.latent_layout),
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
