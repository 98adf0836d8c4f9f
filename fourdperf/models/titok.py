"""TiTok: a picture as 16 to 256 tokens, codes or Gaussians, with a ViT on either side.

    images (B, H, W, 3) in [0, 1]
      | class token, patches and latent tokens through a ViT; a linear map            TiTok.encode
    latents (B, N, C), the nearest of K codes; or means and variances
      | class token, mask tokens and latents through a ViT                            TiTok.decode
    of each mask token, a patch's pixels            (B, H, W, 3)
    or the logits of a code of MaskGIT's VQGAN      (B, h, w, 1024)
      | the expected code through its pixel decoder, once `pixels` is there
    images (B, H, W, 3)

Source: "An Image is Worth 32 Tokens for Reconstruction and Generation" (arXiv 2406.07550) and bytedance/1d-tokenizer
(released checkpoints, whose names VARIANTS has).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models import maskgit_vqgan
from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, int_tuple, set_field
from fourdperf.models.convolutions import Conv3x3
from fourdperf.models.layers import tap
from fourdperf.models.maskgit_vqgan import PixelDecoder
from fourdperf.models.quantizer import VectorQuantizer
from fourdperf.models.token_blocks import (
    LATENT_LAYOUTS,
    Block,
    MaskedTokens,
    TokenEncoder,
    check_images,
    check_indices,
    check_latents,
    grid_size,
)
from fourdperf.models.tokenizer import Encoded, Output

MODEL = "titok"
CHOICES = {"mode": ("vq", "vae"), "target": ("pixels", "codes"), "latent_layout": LATENT_LAYOUTS}
LOG_VARIANCE_RANGE = (-30.0, 20.0)
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, layers, heads


def _sizes(encoder: str, decoder: str) -> dict:
    names = ("hidden_size", "num_layers", "num_heads", "decoder_size", "decoder_layers", "decoder_heads")
    return dict(zip(names, SIZES[encoder] + SIZES[decoder]))


def _first(size: str, num_latents: int) -> dict:
    """Of the first release: finetuned on MaskGIT's codes, latents reshaped."""
    fields = {"num_latents": num_latents, "target": "codes", "latent_layout": "upstream"}
    return {**_sizes(size, size), **fields, "pixels": maskgit_vqgan.Config.upstream()}


def _second(encoder: str, num_latents: int, **fields) -> dict:
    return {**_sizes(encoder, "large"), "num_latents": num_latents, **fields}


CODES_8K = {"latent_channels": 64, "codebook_size": 8192, "normalize": False}
GAUSSIAN = {"latent_channels": 16, "mode": "vae"}
VARIANTS = {
    "s128": _first("small", 128),
    "b64": _first("base", 64),
    "l32": _first("large", 32),
    "bl64_vq8k": _second("base", 64, **CODES_8K),
    "bl128_vq8k": _second("base", 128, **CODES_8K),
    "sl256_vq8k": _second("small", 256, **CODES_8K),
    "bl64_vae_c16": _second("base", 64, **GAUSSIAN),
    "bl128_vae_c16": _second("base", 128, **GAUSSIAN),
    "ll32_vae_c16": _second("large", 32, **GAUSSIAN),
}


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes and options of a TiTok.

    image_size: height and width; one number stands for a square. patch_size: of encoder and decoder.
    num_latents, latent_channels: N and C, of the picture's code.
    hidden_size, num_layers, num_heads: of the encoder, whose MLPs are four times as wide.
    decoder_size, decoder_layers, decoder_heads: of the decoder.
    mode: "vq" for one of `codebook_size` codes per latent; "vae" for a Gaussian.
    normalize: latents and codes have length 1. beta: of the commitment loss. ema, restart: of the codes; see
        `VectorQuantizer`.
    target: "pixels", or "codes" of MaskGIT's VQGAN, of which the decoder gives logits.
    target_codes: how many of those there are.
    pixels: config of the pixel decoder for the last stage of training, or None. With it encoder and codes are frozen.
        Pictures come out at `pixels.factor` pixels a patch, which is patch_size in all releases.
    latent_layout: "upstream" reads latents (N, D) as (D, N) without a transpose, as the first release does (there
        `is_legacy`); right is "token".
    """

    image_size: int | tuple[int, int] = 256
    patch_size: int = 16
    num_latents: int = 64
    latent_channels: int = 12
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    decoder_size: int = 768
    decoder_layers: int = 12
    decoder_heads: int = 12
    mode: str = "vq"
    codebook_size: int = 4096
    normalize: bool = True
    beta: float = 0.25
    ema: float | None = None
    restart: int | None = None
    target: str = "pixels"
    target_codes: int = 1024
    pixels: maskgit_vqgan.Config | None = None
    latent_layout: str = "token"

    def __post_init__(self):
        for name in ("patch_size", "num_latents", "latent_channels", "hidden_size", "num_layers", "num_heads"):
            check_int(name, getattr(self, name))
        for name in ("decoder_size", "decoder_layers", "decoder_heads", "codebook_size", "target_codes"):
            check_int(name, getattr(self, name))
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        set_field(self, "image_size", int_tuple("image_size", size, 2))
        check_choices(self, CHOICES)
        for heads, width in (("num_heads", "hidden_size"), ("decoder_heads", "decoder_size")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{heads}: expected a divisor of {width} {getattr(self, width)}")
        grid_size(self.image_size, self.patch_size)
        if self.pixels is not None:
            if isinstance(self.pixels, dict):
                set_field(self, "pixels", maskgit_vqgan.Config.from_dict(self.pixels))
            if self.target != "codes" or self.mode != "vq":
                raise ValueError("pixels: expected None unless target is codes and mode is vq")
            if self.pixels.codebook_size != self.target_codes:
                raise ValueError(f"pixels: expected {self.target_codes} codes, got {self.pixels.codebook_size}")

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "Config":
        """One of VARIANTS, the released models."""
        if name not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
        return cls.from_dict({**VARIANTS[name], **overrides})

    @property
    def grid(self) -> tuple[int, int]:
        return grid_size(self.image_size, self.patch_size)


class Decoder(nn.Module):
    """Latents `(B, N, C)` -> pictures `(B, H, W, 3)`, or logits `(B, h, w, K')` of codes of pixels."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.grid, self.patch_size = c.grid, c.patch_size
        width = c.decoder_size
        self.tokens = MaskedTokens(self.grid[0] * self.grid[1], c.num_latents, c.latent_channels, width)
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, c.decoder_heads, 4 * width) for _ in range(c.decoder_layers))
        self.norm = nn.LayerNorm(width)
        if c.target == "codes":
            self.dense, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, c.target_codes)
        else:
            self.dense, self.out = nn.Linear(width, 3 * c.patch_size**2), Conv3x3(3, 3)

    def forward(self, latents: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """taps: "decoder/embed", "decoder/00", .., "decoder/norm", "decoder/out"."""
        tokens = self.norm_pre(self.tokens(latents))
        tap(taps, "decoder/embed", tokens)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            tap(taps, f"decoder/{index:02d}", tokens)
        tokens = self.norm(tokens[:, 1 : 1 + self.tokens.patches])
        tap(taps, "decoder/norm", tokens)
        tokens = self.dense(tokens)
        if isinstance(self.out, nn.Linear):
            out = self.out(tokens.tanh()).unflatten(1, self.grid)
        else:
            patches = tokens.unflatten(2, (self.patch_size, self.patch_size, 3)).unflatten(1, self.grid)
            picture = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
            out = self.out(picture).permute(0, 2, 3, 1)
        tap(taps, "decoder/out", out)
        return out


class TiTok(PretrainedModel):
    """Pictures to codes and back: `model.encode(images)`, `model.decode(latents)`, `model.decode_indices(indices)`."""

    MODEL, CONFIG = MODEL, Config

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        channels = c.latent_channels if c.mode == "vq" else 2 * c.latent_channels
        self.encoder = TokenEncoder(
            *(c.image_size, c.patch_size, c.num_latents, channels),
            *(c.hidden_size, c.num_layers, c.num_heads, 4 * c.hidden_size),
            norm_pre=True,
            latent_layout=c.latent_layout,
        )
        options = {"normalize": c.normalize, "beta": c.beta, "ema": c.ema, "restart": c.restart}
        vq = c.mode == "vq"
        self.quantizer = VectorQuantizer(c.codebook_size, c.latent_channels, **options) if vq else None
        self.decoder = Decoder(c)
        self.pixel_codes = self.pixel_decoder = None
        if c.pixels is not None:
            self.pixel_codes = nn.Parameter(torch.empty(c.target_codes, c.pixels.latent_channels))
            nn.init.uniform_(self.pixel_codes, -1 / c.target_codes, 1 / c.target_codes)
            self.pixel_decoder = PixelDecoder(c.pixels)
            self.encoder.requires_grad_(False)
            self.quantizer.requires_grad_(False)

    def train(self, mode: bool = True) -> "TiTok":
        """As every module's; codes that are frozen stay in eval mode, where nothing moves them."""
        super().train(mode)
        if self.config.pixels is not None:
            self.quantizer.eval()
        return self

    def encode(self, images: Tensor, taps: dict[str, Tensor] | None = None, *, noise: Tensor | None = None) -> Encoded:
        """The codes of `images` `(B, H, W, 3)` in [0, 1].

        noise: `(B, N, C)`, standard normal, of a VAE's sample; by default drawn in train mode, and zero (the mean is
        the code) in eval mode. taps: filled with "encoder/embed", "encoder/00", .., "encoder/norm" and
        "encoder/latents". Raises ValueError for shapes, dtypes or devices that do not fit.
        """
        images = check_images(images, self.config.image_size, self.encoder.positions)
        z = self.encoder(images, taps)
        if self.quantizer is not None:
            quantized, indices, losses = self.quantizer(F.normalize(z, dim=-1) if self.config.normalize else z)
            # the last stage trains the decoder alone
            return Encoded(quantized, indices, losses if self.pixel_decoder is None else {})
        mean, log_variance = z.chunk(2, dim=-1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        if noise is None and self.training:
            noise = torch.randn_like(mean)
        latents = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return Encoded(latents, None, {"kl": kl}, (mean, log_variance))

    def decode(self, latents: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures `(B, H, W, 3)`, about in [0, 1], of `latents` `(B, N, C)`; taps as in `Decoder`.

        Before the last stage of training for codes, the logits `(B, h, w, K')` of MaskGIT's codes instead.
        """
        c = self.config
        out = self.decoder(check_latents(latents, c.num_latents, c.latent_channels, self.encoder.positions), taps)
        if self.pixel_decoder is None:
            return out
        expected = out.softmax(-1) @ self.pixel_codes.to(out.dtype)
        return self.pixel_decoder(expected, taps)

    def decode_indices(self, indices: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """What `decode` gives for the codes `indices` `(B, N)`; raises ValueError for a VAE, which has none."""
        if self.quantizer is None:
            raise ValueError("indices: a TiTok of mode vae has no codes; expected latents for decode")
        return self.decode(self.quantizer.lookup(check_indices(indices, self.config.num_latents)), taps)

    def forward(self, images: Tensor, taps: dict[str, Tensor] | None = None, *, noise: Tensor | None = None) -> Output:
        encoded = self.encode(images, taps, noise=noise)
        return Output(self.decode(encoded.latents, taps), encoded)

    @property
    def last_layer(self) -> nn.Parameter:
        """The last weights before the picture (or logits), on which a discriminator's adaptive weight is measured."""
        return (self.decoder if self.pixel_decoder is None else self.pixel_decoder).out.weight
