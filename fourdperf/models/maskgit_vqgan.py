"""MaskGIT's VQGAN: pictures to a grid of 1024 codes, sixteen pixels wide each, and back; TiTok's pixel decoder.

    images (B, H, W, 3) in [0, 1]
      | residual blocks, halved level by level       MaskGITVQGAN.encode
    latents (B, h, w, C)
      | the nearest of K codes
    indices (B, h, w)
      | residual blocks, doubled level by level      MaskGITVQGAN.decode
    images (B, H, W, 3)

Source: "MaskGIT" (arXiv 2202.04200), in the form that TiTok uses, whose checkpoints `Config.upstream` describes.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, int_tuple, set_field
from fourdperf.models.convolutions import GROUPS, SHORTCUTS, Conv3x3, ResBlock, UpConv3x3, group_norm, swish
from fourdperf.models.layers import like, tap
from fourdperf.models.quantizer import VectorQuantizer
from fourdperf.models.token_blocks import check_latents
from fourdperf.models.tokenizer import Encoded, Output

MODEL = "maskgit_vqgan"


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes and options of the VQGAN.

    channels, channel_multipliers: of the levels, finest first. res_blocks: of each level, and at the coarsest again.
    latent_channels, codebook_size: C and K. beta: of the commitment loss.
    shortcut: "output" where a residual block whose channels change adds a convolution of its own outcome, and loses its
        input, as in the released checkpoints.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 256
    codebook_size: int = 1024
    beta: float = 0.25
    shortcut: str = "input"

    def __post_init__(self):
        for name in ("channels", "res_blocks", "latent_channels", "codebook_size"):
            check_int(name, getattr(self, name))
        levels = self.channel_multipliers
        set_field(self, "channel_multipliers", int_tuple("channel_multipliers", levels, *range(1, 11)))
        if any(self.channels * multiplier % GROUPS for multiplier in self.channel_multipliers):
            raise ValueError(f"channels: expected a multiple of {GROUPS}, got {self.channels}")
        check_choices(self, {"shortcut": SHORTCUTS})

    @classmethod
    def upstream(cls, **overrides) -> "Config":
        """The released checkpoints' quirk, `shortcut`."""
        return cls.from_dict({"shortcut": "output", **overrides})

    @property
    def factor(self) -> int:
        """Pixels along a side of a code."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


class PixelEncoder(nn.Module):
    """Pictures `(B, H, W, 3)` -> latents `(B, h, w, C)`."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.widths
        block = lambda inputs, outputs: ResBlock(inputs, outputs, bias=False, shortcut=config.shortcut)
        self.stem = Conv3x3(3, widths[0], bias=False)
        self.levels = nn.ModuleList(
            nn.ModuleList(block(inputs if index == 0 else width, width) for index in range(config.res_blocks))
            for inputs, width in zip([widths[0], *widths], widths)
        )
        self.mid = nn.ModuleList(block(widths[-1], widths[-1]) for _ in range(config.res_blocks))
        self.norm, self.out = group_norm(widths[-1]), nn.Conv2d(widths[-1], config.latent_channels, 1)

    def forward(self, images: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """taps: "pixel_encoder/00", .. by levels; channels first."""
        x = self.stem(images.permute(0, 3, 1, 2))
        for index, blocks in enumerate(self.levels):
            x = x if index == 0 else F.avg_pool2d(x, 2)
            for block in blocks:
                x = block(x)
            tap(taps, f"pixel_encoder/{index:02d}", x)
        for block in self.mid:
            x = block(x)
        return self.out(swish(self.norm, x)).permute(0, 2, 3, 1)


class PixelDecoder(nn.Module):
    """Latents `(B, h, w, C)` -> pictures `(B, H, W, 3)`; levels and doublings coarsest first."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.widths[::-1]
        block = lambda inputs, outputs: ResBlock(inputs, outputs, bias=False, shortcut=config.shortcut)
        self.stem = Conv3x3(config.latent_channels, widths[0])
        self.mid = nn.ModuleList(block(widths[0], widths[0]) for _ in range(config.res_blocks))
        self.levels = nn.ModuleList(
            nn.ModuleList(block(inputs if index == 0 else width, width) for index in range(config.res_blocks))
            for inputs, width in zip([widths[0], *widths], widths)
        )
        self.upsamples = nn.ModuleList(UpConv3x3(width, width) for width in widths[:-1])
        self.norm, self.out = group_norm(widths[-1]), Conv3x3(widths[-1], 3)

    def forward(self, latents: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """taps: "pixel_decoder/mid" and "pixel_decoder/00", .. by levels; channels first."""
        x = self.stem(latents.permute(0, 3, 1, 2))
        for block in self.mid:
            x = block(x)
        tap(taps, "pixel_decoder/mid", x)
        for index, blocks in enumerate(self.levels):
            for block in blocks:
                x = block(x)
            if index < len(self.upsamples):
                x = self.upsamples[index](x)
            tap(taps, f"pixel_decoder/{index:02d}", x)
        return self.out(swish(self.norm, x)).permute(0, 2, 3, 1)


class MaskGITVQGAN(PretrainedModel):
    """Pictures of any size that is a multiple of `config.factor` to a grid of codes and back."""

    MODEL, CONFIG = MODEL, Config

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = PixelEncoder(config)
        options = {"normalize": False, "beta": config.beta}
        self.quantizer = VectorQuantizer(config.codebook_size, config.latent_channels, **options)
        self.decoder = PixelDecoder(config)

    def encode(self, images: Tensor, taps: dict[str, Tensor] | None = None) -> Encoded:
        """The codes of `images` `(B, H, W, 3)` in [0, 1]: latents `(B, h, w, C)` and indices `(B, h, w)`.

        taps: as in `PixelEncoder`, and "latents", before the quantizer. Raises ValueError as `Tokenizer.encode` does.
        """
        factor = self.config.factor
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images: expected a tensor (B, H, W, 3), got {tuple(getattr(images, 'shape', ()))}")
        if images.shape[1] % factor or images.shape[2] % factor or 0 in images.shape[1:]:
            raise ValueError(f"images: expected sides that are multiples of {factor}, got {tuple(images.shape)}")
        z = self.encoder(like(images, self.quantizer.codebook, "images"), taps)
        tap(taps, "latents", z)
        return Encoded(*self.quantizer(z))

    def decode(self, latents: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures `(B, H, W, 3)`, about in [0, 1], of `latents` `(B, h, w, C)`."""
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            raise ValueError(f"latents: expected a tensor (B, h, w, C), got {tuple(getattr(latents, 'shape', ()))}")
        codebook, shape = self.quantizer.codebook, latents.shape
        latents = check_latents(latents.flatten(1, 2), shape[1] * shape[2], self.config.latent_channels, codebook)
        return self.decoder(latents.view(shape), taps)

    def decode_indices(self, indices: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures of the codes `indices` `(B, h, w)`."""
        return self.decode(self.quantizer.lookup(indices), taps)

    def forward(self, images: Tensor, taps: dict[str, Tensor] | None = None) -> Output:
        encoded = self.encode(images, taps)
        return Output(self.decode(encoded.latents, taps), encoded)
