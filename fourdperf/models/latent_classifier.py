"""Classifiers of fitted fields: they see nothing of an image but its latent map.

    latent (B, s, s, c), divided by `normalizing_factor`
      | "mlp"          flattened; linear layers with SiLU                                      MLP
      | "transformer"  s s tokens and a class token, positions; pre-norm blocks; a norm        Transformer
      | "resnet"       3 x 3 convolutions in pre-activation blocks at one resolution; mean     ResNet
    features (B, D)
      | a linear layer                                                                         LatentClassifier
    logits (B, classes)

Source: the unofficial JAX implementation of "Spatial Functa" (arXiv 2302.03130), whose MLP and transformer these are.
Its configuration only names a ResNet; ours is the plain one of "Identity Mappings in Deep Residual Networks" (arXiv
1603.05027), with GroupNorm, so that an answer depends on no other latent of the batch.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, set_field
from fourdperf.models.layers import LAYER_NORM_EPS, PreNormBlock, like, linear_gelu, tap

MODEL = "latent_classifier"
KINDS = ("mlp", "transformer", "resnet")


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes of a classifier.

    kind: "mlp", "transformer" or "resnet".
    latent_size, latent_channels: side s and channels c of the latent maps; of a plain functa, s is 1.
    num_classes: length of the logits.
    hidden_size, num_layers: width, and the number of hidden layers or blocks.
    num_heads, mlp_size: of the transformer; the MLP has four times the width by default.
    dropout: probability, while training, after every activation and, in a transformer, every branch and the positions.
    normalizing_factor: what latents are divided by; the standard deviation of those of a functaset is a good one.
    """

    kind: str = "transformer"
    latent_size: int = 8
    latent_channels: int = 64
    num_classes: int = 10
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    mlp_size: int | None = None
    dropout: float = 0.0
    normalizing_factor: float = 1.0

    def __post_init__(self):
        check_choices(self, {"kind": KINDS})
        check_int("hidden_size", self.hidden_size)
        set_field(self, "mlp_size", 4 * self.hidden_size if self.mlp_size is None else self.mlp_size)
        for field in dataclasses.fields(self):
            if field.type in (int, int | None):
                check_int(field.name, getattr(self, field.name))
        if self.kind == "transformer" and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads {self.num_heads}, got {self.hidden_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout!r}")
        if not 0 < self.normalizing_factor < math.inf:
            raise ValueError(f"normalizing_factor: expected a positive number, got {self.normalizing_factor!r}")


class MLP(nn.Module):
    """Latent `(B, ..., c)` of s s c numbers -> features `(B, D)`."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        sizes = [config.latent_size**2 * config.latent_channels, *[width] * config.num_layers]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, latent: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        x = latent.flatten(1)
        for index, layer in enumerate(self.layers):
            x = self.dropout(F.silu(layer(x)))
            tap(taps, f"layers/{index:02d}", x)
        return x


class TransformerBlock(PreNormBlock):
    """PreNormBlock with dropout of both branches and of the MLP's hidden layer."""

    def __init__(self, config: Config):
        super().__init__(config.hidden_size, config.num_heads, config.mlp_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens)))
        hidden = linear_gelu(self.mlp_norm(tokens), self.mlp.dense_in, self.mlp.approximate)
        return tokens + self.dropout(self.mlp.dense_out(self.dropout(hidden)))


class Transformer(nn.Module):
    """Latent `(B, ..., c)` -> features `(B, D)`: those of the class token, which comes first."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Linear(config.latent_channels, width)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + config.latent_size**2, width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, latent: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        tokens = self.embedding(latent.flatten(1, -2))
        tokens = torch.cat([self.class_token.to(tokens).expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = self.dropout(tokens + self.positions[: tokens.shape[1]])
        tap(taps, "tokens", tokens)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            tap(taps, f"blocks/{index:02d}", tokens)
        features = self.norm(tokens[:, 0])
        tap(taps, "norm", features)
        return features


class Norm(nn.GroupNorm):
    """GroupNorm of 8 groups, or as many as divide the channels."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(8, channels), channels, eps=LAYER_NORM_EPS)


class ResNetBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))) on `(B, D, h, w)`."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        self.norm_in, self.norm_out = Norm(width), Norm(width)
        self.conv_in, self.conv_out = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.norm_in(x)))
        hidden = self.dropout(F.relu(self.norm_out(self.conv_in(hidden))))
        return x + self.conv_out(hidden)


class ResNet(nn.Module):
    """Latent `(B, h, w, c)` -> features `(B, D)`: the mean over the map."""

    def __init__(self, config: Config):
        super().__init__()
        self.stem = nn.Conv2d(config.latent_channels, config.hidden_size, 3, padding=1)
        self.blocks = nn.ModuleList(ResNetBlock(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size)

    def forward(self, latent: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        x = self.stem(latent.movedim(-1, 1))
        tap(taps, "stem", x.movedim(1, -1))
        for index, block in enumerate(self.blocks):
            x = block(x)
            tap(taps, f"blocks/{index:02d}", x.movedim(1, -1))
        features = F.relu(self.norm(x)).mean((2, 3))
        tap(taps, "norm", features)
        return features


BODIES = {"mlp": MLP, "transformer": Transformer, "resnet": ResNet}


class LatentClassifier(PretrainedModel):
    """Latents `(B, s, s, c)` -> logits `(B, classes)`.

    A transformer takes fewer tokens too, which have the first positions, and a ResNet a map of any size.
    """

    MODEL, CONFIG, DTYPE = MODEL, Config, torch.float32

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.body = BODIES[config.kind](config)
        self.head = nn.Linear(config.hidden_size, config.num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters: He's for a ResNet, else Xavier's; class token and positions normal of 0.02; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, Transformer):
                nn.init.normal_(module.class_token, std=0.02)
                nn.init.normal_(module.positions, std=0.02)

    def forward(self, latent: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Raises ValueError for latents of another shape; `taps` receives what every layer gives."""
        self._check(latent)
        latent = like(latent, self.head.weight, "latent") / self.config.normalizing_factor
        logits = self.head(self.body(latent, taps))
        tap(taps, "logits", logits)
        return logits

    def _check(self, latent: Tensor) -> None:
        c, shape = self.config, tuple(latent.shape)
        size, channels, tokens = c.latent_size, c.latent_channels, math.prod(shape[1:-1])
        fits = {
            "mlp": tokens * shape[-1] == size**2 * channels,
            "transformer": shape[-1] == channels and 1 <= tokens <= size**2,
            "resnet": shape[-1] == channels and latent.ndim == 4 and tokens > 0,
        }
        if latent.ndim < 2 or not fits[c.kind]:
            raise ValueError(f"latent: expected (B, {size}, {size}, {channels}), got {shape}")
