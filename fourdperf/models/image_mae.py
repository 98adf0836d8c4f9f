"""A masked autoencoder of pictures, to initialise the encoders of tokenizers with.

    images (B, H, W, 3) in [0, 1]; inside, the networks have [-1, 1]
      | patches with positions, a quarter of them; class token, blocks, norm        Encoder
    features (B, 1 + kept, D)
      | mask tokens at the places left out, positions, a few narrower blocks
    of each patch, its pixels less their mean over their deviation

Source: "Masked Autoencoders Are Scalable Vision Learners" (He et al. 2021, arXiv 2111.06377). The encoder's parameters
have the names and the meaning of those of `token_blocks.TokenEncoder`, less the latent tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_int, int_tuple, set_field
from fourdperf.models.token_blocks import Block, check_images, grid_size, reset_transformer, sincos_positions

MODEL = "image_mae"
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes of a masked autoencoder.

    image_size: height and width; one number stands for a square. patch_size: pixels.
    hidden_size, num_layers, num_heads, mlp_size: of the encoder; mlp_size None means four times hidden_size.
    decoder_size, decoder_layers, decoder_heads: of the decoder, whose MLPs are four times as wide.
    mask_ratio: share of the patches that the encoder does not see; at least one is left, and one left out.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int | None = None
    decoder_size: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75

    def __post_init__(self):
        set_field(self, "mlp_size", 4 * self.hidden_size if self.mlp_size is None else self.mlp_size)
        for name in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_size", "decoder_size"):
            check_int(name, getattr(self, name))
        for name in ("decoder_layers", "decoder_heads"):
            check_int(name, getattr(self, name))
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        set_field(self, "image_size", int_tuple("image_size", size, 2))
        for heads, width in (("num_heads", "hidden_size"), ("decoder_heads", "decoder_size")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{heads}: expected a divisor of {width} {getattr(self, width)}")
            if getattr(self, width) % 4:
                raise ValueError(f"{width}: expected a multiple of 4, got {getattr(self, width)}")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio: expected a number in (0, 1), got {self.mask_ratio!r}")
        if grid_size(self.image_size, self.patch_size) == (1, 1):
            raise ValueError(f"image_size: expected more than one patch of {self.patch_size}, got {self.image_size}")

    @property
    def grid(self) -> tuple[int, int]:
        return grid_size(self.image_size, self.patch_size)

    @property
    def kept(self) -> int:
        """Patches that the encoder sees."""
        patches = self.grid[0] * self.grid[1]
        return min(patches - 1, max(1, round(patches * (1 - self.mask_ratio))))


class Encoder(nn.Module):
    """Pictures `(B, H, W, 3)` in [-1, 1], and the numbers of some patches `(B, K)` -> features `(B, 1 + K, D)`."""

    def __init__(self, config: Config):
        super().__init__()
        c, width = config, config.hidden_size
        self.patch_embed = nn.Conv2d(3, width, c.patch_size, c.patch_size)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + c.grid[0] * c.grid[1], width))
        self.blocks = nn.ModuleList(Block(width, c.num_heads, c.mlp_size, eps=NORM_EPS) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        reset_transformer(self)
        nn.init.normal_(self.class_token, std=0.02)
        with torch.no_grad():
            self.positions.copy_(F.pad(sincos_positions(width, *c.grid), (0, 0, 1, 0)))

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        patches = self.patch_embed(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        positions = self.positions.to(patches.dtype)
        tokens = _take(patches + positions[1:], kept)
        class_token = (self.class_token.to(patches.dtype) + positions[0]).expand(len(tokens), 1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Output(NamedTuple):
    """loss: a number. recon: `(B, H, W, 3)` in [0, 1], with the patches' own means and deviations. mask: `(B, P)`, true
    where a patch was left out."""

    loss: Tensor
    recon: Tensor
    mask: Tensor


class ImageMAE(PretrainedModel):
    """Guesses the patches that it is not shown."""

    MODEL, CONFIG = MODEL, Config

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        width = c.decoder_size
        self.decoder_embed = nn.Linear(c.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder_positions = nn.Parameter(torch.empty(1 + c.grid[0] * c.grid[1], width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, c.decoder_heads, 4 * width, eps=NORM_EPS) for _ in range(c.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.out = nn.Linear(width, 3 * c.patch_size**2)
        for part in (self.decoder_embed, self.decoder_blocks, self.out):
            reset_transformer(part)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            self.decoder_positions.copy_(F.pad(sincos_positions(width, *c.grid), (0, 0, 1, 0)))

    def forward(self, images: Tensor, noise: Tensor) -> Output:
        """images `(B, H, W, 3)` in [0, 1]. noise `(B, P)`: the patches with the lowest are shown.

        The loss is the mean squared error over patches left out, whose pixels have mean 0 and deviation 1.
        Raises ValueError for shapes, dtypes or devices that do not fit.
        """
        c = self.config
        images = check_images(images, c.image_size, self.encoder.positions)
        if noise.shape != (len(images), c.grid[0] * c.grid[1]):
            wanted = (len(images), c.grid[0] * c.grid[1])
            raise ValueError(f"noise: expected a tensor {wanted}, got {tuple(noise.shape)}")
        order = noise.argsort(dim=1)
        tokens = self.decoder_embed(self.encoder(2 * images - 1, order[:, : c.kept]))
        mask_token = self.mask_token.to(tokens.dtype).expand(len(images), order.shape[1] - c.kept, -1)
        places = order.argsort(dim=1)
        patches = _take(torch.cat([tokens[:, 1:], mask_token], dim=1), places)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_positions.to(tokens.dtype)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        guess = self.out(self.decoder_norm(tokens[:, 1:])).float()
        mask, pixels = places >= c.kept, self._patches(images).float()
        mean, std = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (guess - (pixels - mean) / std).square().mean(-1)
        shown = torch.where(mask[..., None], guess * std + mean, pixels)
        return Output((error * mask).sum() / mask.sum(), self._picture(shown), mask)

    def _patches(self, images: Tensor) -> Tensor:
        """`(B, H, W, 3)` -> `(B, P, p p 3)`."""
        (rows, columns), p = self.config.grid, self.config.patch_size
        cells = images.unflatten(2, (columns, p)).unflatten(1, (rows, p))
        return cells.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)

    def _picture(self, patches: Tensor) -> Tensor:
        (rows, columns), p = self.config.grid, self.config.patch_size
        cells = patches.unflatten(2, (p, p, 3)).unflatten(1, (rows, columns))
        return cells.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def _take(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Tokens `(B, N, D)` by numbers `(B, K)`."""
    return tokens.gather(1, numbers[..., None].expand(-1, -1, tokens.shape[-1]))
