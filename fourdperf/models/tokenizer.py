"""A picture as a short sequence of codes: ViT encoder with latent tokens, quantizer, convolutional decoder.

    images (B, H, W, 3) in [0, 1]; inside, the networks have [-1, 1]
      | class token, patches and latent tokens through a ViT; a linear map; length 1     Tokenizer.encode
    latents (B, N, C)
      | the nearest of K codes of length 1
    indices (B, N)
      | class token, mask tokens and latents as a picture one pixel wide: 3x3 convolutions along it, one attention
      | mask tokens as the coarsest grid, residual blocks, doubled level by level        Tokenizer.decode
    images (B, H, W, 3)

Source: the seed's 1d-tokenizer on taming-transformers, whose checkpoints `Config.upstream` describes; "Taming
Transformers" (arXiv 2012.09841; the decoder), "An Image is Worth 32 Tokens" (arXiv 2406.07550).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, int_tuple, set_field
from fourdperf.models.convolutions import (
    GROUPS,
    Conv3x3,
    PixelAttention,
    ResBlock,
    UpConv3x3,
    channels_last,
    group_norm,
    swish,
)
from fourdperf.models.layers import tap
from fourdperf.models.quantizer import BETA_ON, VectorQuantizer
from fourdperf.models.token_blocks import (
    ACTIVATIONS,
    LATENT_LAYOUTS,
    MaskedTokens,
    TokenEncoder,
    check_images,
    check_indices,
    check_latents,
    grid_size,
)

MODEL = "tokenizer"
CHOICES = {"activation": tuple(ACTIVATIONS), "latent_layout": LATENT_LAYOUTS, "beta_on": BETA_ON}
VARIANTS = {
    "small": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "mlp_size": 1536},
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_size": 3072},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_size": 4096},
}


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes and options of a tokenizer.

    image_size: height and width; one number stands for a square. patch_size: of the encoder.
    num_latents, latent_channels: N and C, of the picture's code.
    hidden_size, num_layers, num_heads, mlp_size: of the encoder.
    head_dim: of the encoder's heads; None for hidden_size / num_heads.
    activation, qkv_bias, norm_eps: of the encoder; the defaults are those of timm's ViTs. norm_pre: one more norm before
        its blocks, as CLIP has it. patch_bias: of its embedding of patches, which CLIP does without. layer_scale: its
        blocks' branches are multiplied by learned numbers, as DINOv2's are.
    codebook_size: K.
    beta, entropy_gamma: of the quantizer's losses. ema, restart: of its codes; see `VectorQuantizer`.
    decoder_size: D of the decoder's tokens.
    decoder_channels, channel_multipliers: of the decoder's levels, finest first; each but the first is doubled.
    res_blocks: of each level, plus one. attention_sizes: heights of grids whose blocks have attention.

    Of the seed's code (`Config.upstream`):
    class_position: False where the encoder's class token has no position.
    latent_layout: "upstream" reads latents (N, D) as (D, N) without a transpose, which mixes tokens and channels.
    beta_on: "codebook" puts `beta` on the codebook's loss instead of the commitment's.
    in_place: the stored codebook is overwritten by its normalised version at every forward pass.
    grid: side of the decoder's coarsest grid, which is what the seed's `patch_size` means there; None for image_size /
        2^(levels - 1). Pictures come out at grid 2^(levels - 1).
    """

    image_size: int | tuple[int, int] = 256
    patch_size: int = 16
    num_latents: int = 64
    latent_channels: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    head_dim: int | None = None
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    norm_pre: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    codebook_size: int = 4096
    beta: float = 0.25
    entropy_gamma: float | None = 1.0
    ema: float | None = None
    restart: int | None = None
    decoder_size: int = 768
    decoder_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention_sizes: tuple[int, ...] = (16,)
    class_position: bool = True
    latent_layout: str = "token"
    beta_on: str = "commitment"
    in_place: bool = False
    grid: int | None = None

    def __post_init__(self):
        for name in ("patch_size", "num_latents", "latent_channels", "hidden_size", "num_layers", "num_heads"):
            check_int(name, getattr(self, name))
        for name in ("mlp_size", "codebook_size", "decoder_size", "decoder_channels", "res_blocks"):
            check_int(name, getattr(self, name))
        for name in ("head_dim", "grid"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        set_field(self, "image_size", int_tuple("image_size", size, 2))
        levels = self.channel_multipliers
        set_field(self, "channel_multipliers", int_tuple("channel_multipliers", levels, *range(1, 11)))
        set_field(self, "attention_sizes", int_tuple("attention_sizes", self.attention_sizes, *range(11)))
        check_choices(self, CHOICES)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {self.hidden_size}, got {self.num_heads}")
        if any(self.decoder_channels * multiplier % GROUPS for multiplier in self.channel_multipliers):
            raise ValueError(f"decoder_channels: expected multiples of {GROUPS}, got {self.decoder_channels}")
        grid_size(self.image_size, self.patch_size)
        if self.grid is None:
            grid_size(self.image_size, 2 ** (len(self.channel_multipliers) - 1))

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "Config":
        """One of VARIANTS, sizes of the encoder."""
        if name not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
        return cls.from_dict({**VARIANTS[name], **overrides})

    @classmethod
    def upstream(cls, pretrained: bool = True, **overrides) -> "Config":
        """What the seed's code computes, with the encoder from timm, or else its own `EncoderVIT`."""
        fields = {"beta_on": "codebook", "in_place": True, "grid": overrides.get("patch_size", 16)}
        if not pretrained:
            fields |= {"activation": "tanh", "qkv_bias": False, "norm_eps": 1e-5, "head_dim": 64}
            fields |= {"class_position": False, "latent_layout": "upstream"}
        return cls.from_dict({**fields, **overrides})

    @property
    def decoder_grid(self) -> tuple[int, int]:
        """The decoder's coarsest grid."""
        if self.grid is not None:
            return self.grid, self.grid
        return grid_size(self.image_size, 2 ** (len(self.channel_multipliers) - 1))


class Encoded(NamedTuple):
    """A picture's code.

    latents: `(B, N, C)`, what `decode` takes; with the straight-through gradient where there are indices.
    indices: `(B, N)`, int64; None for a VAE.
    losses: "commitment", "codebook", and "entropy" in train mode; of a VAE "kl" `(B, N)`.
    moments: of a VAE, mean and logarithm of the variance, each `(B, N, C)`; else None.
    """

    latents: Tensor
    indices: Tensor | None
    losses: dict[str, Tensor]
    moments: tuple[Tensor, Tensor] | None = None


class Output(NamedTuple):
    """What calling a tokenizer gives: the reconstruction `(B, H, W, 3)`, and the code with its losses."""

    recon: Tensor
    encoded: Encoded


class Decoder(nn.Module):
    """Latents `(B, N, C)` -> pictures `(B, H, W, 3)` in [-1, 1].

    stem, mid: convolutions along the sequence of class token, mask tokens and latents, as a picture one pixel wide (of
        their kernels the middle column alone sees anything). levels: coarsest first.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.grid = c.decoder_grid
        self.tokens = MaskedTokens(self.grid[0] * self.grid[1], c.num_latents, c.latent_channels, c.decoder_size)
        widths = [c.decoder_channels * multiplier for multiplier in reversed(c.channel_multipliers)]
        self.stem = Conv3x3(c.decoder_size, widths[0])
        self.mid = nn.ModuleList(
            [ResBlock(widths[0], widths[0]), PixelAttention(widths[0]), ResBlock(widths[0], widths[0])]
        )
        # what the grid would be with the right side: that is what the seed compares with
        height = c.image_size[0] // 2 ** (len(widths) - 1)
        self.levels = nn.ModuleList()
        for index, (inputs, width) in enumerate(zip([widths[0], *widths], widths)):
            attend = height * 2**index in c.attention_sizes
            self.levels.append(Level(inputs, width, c.res_blocks + 1, attend, index < len(widths) - 1))
        self.norm, self.out = group_norm(widths[-1]), Conv3x3(widths[-1], 3)

    def forward(self, latents: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """taps: "decoder/embed", "decoder/stem", "decoder/mid" and "decoder/00", .. by levels; channels first."""
        tokens = self.tokens(latents)
        tap(taps, "decoder/embed", tokens)
        x = self.stem(tokens.transpose(1, 2).unsqueeze(-1))
        tap(taps, "decoder/stem", x)
        for part in self.mid:
            x = part(x)
        tap(taps, "decoder/mid", x)
        x = channels_last(x[:, :, 1 : 1 + self.tokens.patches].unflatten(2, self.grid).squeeze(-1))
        for index, level in enumerate(self.levels):
            x = level(x)
            tap(taps, f"decoder/{index:02d}", x)
        return self.out(swish(self.norm, x)).permute(0, 2, 3, 1)


class Level(nn.Module):
    """Residual blocks, each with attention after it or not, and the doubling with a convolution, or not."""

    def __init__(self, inputs: int, width: int, blocks: int, attend: bool, upsampled: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(inputs if index == 0 else width, width) for index in range(blocks))
        self.attention = nn.ModuleList(PixelAttention(width) for _ in range(blocks)) if attend else None
        self.upsample = UpConv3x3(width, width) if upsampled else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attention is not None:
                x = self.attention[index](x)
        return x if self.upsample is None else self.upsample(x)


class Tokenizer(PretrainedModel):
    """Pictures to codes and back: `model.encode(images)`, `model.decode(latents)`, `model.decode_indices(indices)`.

    On a CPU `model.to(memory_format=torch.channels_last)` spares a copy of the convolutions' weights in every pass.
    """

    MODEL, CONFIG = MODEL, Config

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.encoder = TokenEncoder(
            *(c.image_size, c.patch_size, c.num_latents, c.latent_channels),
            *(c.hidden_size, c.num_layers, c.num_heads, c.mlp_size),
            head_dim=c.head_dim,
            qkv_bias=c.qkv_bias,
            activation=c.activation,
            eps=c.norm_eps,
            norm_pre=c.norm_pre,
            patch_bias=c.patch_bias,
            layer_scale=c.layer_scale,
            class_position=c.class_position,
            latent_layout=c.latent_layout,
        )
        names = ("beta", "entropy_gamma", "ema", "restart", "beta_on", "in_place")
        options = {name: getattr(c, name) for name in names}
        self.quantizer = VectorQuantizer(c.codebook_size, c.latent_channels, **options)
        self.decoder = Decoder(c)

    def encode(self, images: Tensor, taps: dict[str, Tensor] | None = None) -> Encoded:
        """The codes of `images` `(B, H, W, 3)` in [0, 1].

        taps: filled with "encoder/embed", "encoder/00", .., "encoder/norm", "encoder/latents" and "latents" (before the
        quantizer, of length 1). Raises ValueError for shapes, dtypes or devices that do not fit.
        """
        images = check_images(images, self.config.image_size, self.quantizer.codebook)
        z = F.normalize(self.encoder(2 * images - 1, taps), dim=-1)
        tap(taps, "latents", z)
        return Encoded(*self.quantizer(z))

    def decode(self, latents: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures `(B, H, W, 3)`, about in [0, 1], of `latents` `(B, N, C)`; taps as in `Decoder`."""
        c = self.config
        latents = check_latents(latents, c.num_latents, c.latent_channels, self.quantizer.codebook)
        return (self.decoder(latents, taps) + 1) / 2

    def decode_indices(self, indices: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Pictures of the codes `indices` `(B, N)`."""
        return self.decode(self.quantizer.lookup(check_indices(indices, self.config.num_latents)), taps)

    def forward(self, images: Tensor, taps: dict[str, Tensor] | None = None) -> Output:
        encoded = self.encode(images, taps)
        return Output(self.decode(encoded.latents, taps), encoded)

    @property
    def last_layer(self) -> nn.Parameter:
        """The last weights before the picture, on which the adaptive weight of a discriminator is measured."""
        return self.decoder.out.weight
