"""MaskGIT's VQGAN in Flax; see fourdperf.models.maskgit_vqgan."""

from flax import linen as nn
from jax import Array

from fourdperf.jax.models.convolutions import ResBlock, channels_first, conv3x3, group_norm, upsample
from fourdperf.jax.models.layers import tap
from fourdperf.jax.models.pretrained import Pretrained
from fourdperf.jax.models.quantizer import VectorQuantizer
from fourdperf.jax.models.tokenizer import Encoded, Output
from fourdperf.models import maskgit_vqgan


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
            tap(taps, f"pixel_encoder/{index:02d}", channels_first(x))
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
        tap(taps, "pixel_decoder/mid", channels_first(x))
        for index, blocks in enumerate(self.levels):
            for block in blocks:
                x = block(x)
            if index < len(self.upsamples):
                x = self.upsamples[index](upsample(x))
            tap(taps, f"pixel_decoder/{index:02d}", channels_first(x))
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
