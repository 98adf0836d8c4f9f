"""Nets of Neural Isometries: convolutional ones from observations to fields and back, heads equivariant to rotations of
coefficients, and plain ones.

Source: "Neural Isometries" (arXiv 2405.19296), "Vector Neurons" (arXiv 2104.12229).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.layers import tap

NORM_EPS = 1e-6
NEURON_EPS = 1e-8
DAMPING_START = 1e-3


# ---- convolutional nets


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-6) over the grid, of each sample and channel, scaled, shifted; `(B, H, W, C)`.

    By torch's group norm on channels first: accurate, and twice as fast even with the two copies.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(-1, 1).contiguous()
        return torch.group_norm(x, x.shape[1], self.weight, self.bias, NORM_EPS).movedim(1, -1).contiguous()


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))), `(B, H, W, C)` -> `(B, H, W, D)`; zeros outside the image."""

    def __init__(self, channels: int, features: int, kernel_size: int = 3, *, bias: bool = False):
        super().__init__()
        self.norm_in, self.norm_out = InstanceNorm(channels), InstanceNorm(features)
        self.conv_in = nn.Conv2d(channels, features, kernel_size, padding="same", bias=bias)
        self.conv_out = nn.Conv2d(features, features, kernel_size, padding="same", bias=bias)
        self.skip = nn.Linear(channels, features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norm_in(x))
        hidden = F.silu(self.norm_out(_conv(self.conv_in, hidden)))
        return self.skip(x) + _conv(self.conv_out, hidden)


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(x.movedim(-1, 1)).movedim(1, -1)


class ConvEncoder(nn.Module):
    """Observations `(B, H, W, C)` -> fields `(B, h, w, D)`: levels of residual blocks, 2 x 2 means between them.

    What does not fill a mean is dropped.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        depth: Sequence[int],
        out_channels: int,
        kernel_size: int = 3,
        *,
        stem_channels: int = 48,
        bias: bool = False,
    ):
        super().__init__()
        self.stem = nn.Linear(in_channels, stem_channels)
        self.levels = _levels(stem_channels, channels, depth, kernel_size, bias)
        self.norm = InstanceNorm(channels[-1])
        self.out = nn.Linear(channels[-1], out_channels)
        reset_parameters(self)

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        x = F.silu(self.stem(x))
        tap(taps, "encoder/stem", x)
        for index, level in enumerate(self.levels):
            if index:
                x = F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)
            x = level(x)
            tap(taps, f"encoder/{index:02d}", x)
        x = self.out(F.silu(self.norm(x)))
        tap(taps, "encoder/out", x)
        return x


class ConvDecoder(nn.Module):
    """Fields `(B, h, w, D)` -> observations `(B, H, W, C)`: levels of residual blocks, points doubled between them."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        depth: Sequence[int],
        out_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = False,
    ):
        super().__init__()
        self.levels = _levels(in_channels, channels, depth, kernel_size, bias)
        self.norm = InstanceNorm(channels[-1])
        self.out = nn.Linear(channels[-1], out_channels)
        reset_parameters(self)

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        for index, level in enumerate(self.levels):
            if index:
                x = F.interpolate(x.movedim(-1, 1), scale_factor=2.0, mode="nearest").movedim(1, -1)
            x = level(x)
            tap(taps, f"decoder/{index:02d}", x)
        x = self.out(F.silu(self.norm(x)))
        tap(taps, "decoder/out", x)
        return x


def _levels(inputs: int, channels: Sequence[int], depth: Sequence[int], kernel_size: int, bias: bool) -> nn.ModuleList:
    levels = nn.ModuleList()
    for width, blocks in zip(channels, depth, strict=True):
        sizes = [inputs, *[width] * blocks]
        levels.append(nn.Sequential(*(ResBlock(*pair, kernel_size, bias=bias) for pair in zip(sizes, sizes[1:]))))
        inputs = width
    return levels


# ---- equivariant nets: vectors of K numbers in C channels, (B, K, C); a rotation of K rotates what they give


class OrthogonalNeuron(nn.Module):
    """A vector's SiLU: of q the part along k, p = <q, k> / |k|^2 k, becomes sigmoid(<q, k>) p; q, k are linear in x."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.query = nn.Linear(channels, features, bias=False)
        self.key = nn.Linear(channels, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x), self.key(x)
        along = (query * key).sum(-2, keepdim=True)
        return query - torch.sigmoid(-along) * along / (key.square().sum(-2, keepdim=True) + NEURON_EPS) * key


class OrthogonalNorm(nn.Module):
    """Each channel's vector over its root mean square: scale x / sqrt(mean_K x^2 + |damping| + 1e-6)."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.damping = nn.Parameter(torch.full((channels,), DAMPING_START))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x / (x.square().mean(-2, keepdim=True) + self.damping.abs() + NORM_EPS).sqrt())


class OrthogonalMLP(nn.Module):
    """`num_layers` pairs of (OrthogonalNorm, OrthogonalNeuron), `(B, K, C)` -> `(B, K, D)`.

    upstream_modules: only the first `num_layers` modules of that list: one norm for one layer, a pair for two.
    """

    def __init__(self, channels: int, features: int, num_layers: int, *, upstream_modules: bool = False):
        super().__init__()
        self.layers = nn.Sequential()
        for index in range(num_layers if upstream_modules else 2 * num_layers):
            self.layers.append(OrthogonalNeuron(channels, features) if index % 2 else OrthogonalNorm(channels))
            channels = features if index % 2 else channels
        self.features = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OrthogonalOut(nn.Module):
    """Vectors `(B, K, C)` -> invariant numbers `(B, out)`: two linear layers on a Gram matrix."""

    def __init__(self, channels: int, out_features: int, gram_features: int = 64):
        super().__init__()
        entries = gram_features * (gram_features + 1) // 2
        self.norm = OrthogonalNorm(channels)
        self.neuron = OrthogonalNeuron(channels, gram_features)
        self.dense_in = nn.Linear(entries, 4 * entries)
        self.dense_out = nn.Linear(4 * entries, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neuron(self.norm(x))
        rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        gram = (x.mT @ x)[..., rows, columns]
        return self.dense_out(F.silu(self.dense_in(gram)))


class OrthogonalNet(nn.Module):
    """Vectors `(B, K, C)` -> invariant numbers `(B, out)`: two OrthogonalMLPs, one beside a linear map; OrthogonalOut.

    num_layers: of both together, the first has one more where it is odd.
    upstream_modules: each has num_layers // 2 + 1 modules.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        num_layers: int,
        out_features: int,
        gram_features: int = 64,
        *,
        upstream_modules: bool = False,
    ):
        super().__init__()
        first, second = num_layers - num_layers // 2, num_layers // 2
        if upstream_modules:
            first = second = num_layers // 2 + 1
        self.skip = nn.Linear(channels, features, bias=False)
        self.mlp_in = OrthogonalMLP(channels, features, first, upstream_modules=upstream_modules)
        self.mlp_out = OrthogonalMLP(features, features, second, upstream_modules=upstream_modules)
        self.out = OrthogonalOut(features, out_features, gram_features)
        reset_parameters(self)

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        x = self.mlp_in(x) + self.skip(x)
        tap(taps, "head/in", x)
        x = self.mlp_out(x)
        tap(taps, "head/out", x)
        return self.out(x)


# ---- plain nets


class MLP(nn.Module):
    """`num_layers` linear layers with a SiLU before each, before the first only with `first_activation`."""

    def __init__(
        self, channels: int, features: int, num_layers: int, out_features: int, *, first_activation: bool = True
    ):
        super().__init__()
        sizes = [channels, *[features] * (num_layers - 1), out_features]
        self.first_activation = first_activation
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
        reset_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(F.silu(x) if index or self.first_activation else x)
        return x


class SkipMLP(nn.Module):
    """An MLP of `num_layers` in two halves, the first beside a linear map; where odd, the first has one layer more."""

    def __init__(
        self, channels: int, features: int, num_layers: int, out_features: int, *, first_activation: bool = True
    ):
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"num_layers: expected at least 2, one for each half, got {num_layers}")
        half = num_layers // 2
        self.skip = nn.Linear(channels, features)
        self.mlp_in = MLP(channels, features, num_layers - half, features, first_activation=first_activation)
        self.mlp_out = MLP(features, features, half, out_features)
        reset_parameters(self)

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        x = self.mlp_in(x) + self.skip(x)
        tap(taps, "head/in", x)
        return self.mlp_out(x)


@torch.no_grad()
def reset_parameters(module: nn.Module) -> None:
    """Linear layers and convolutions below `module`: normal of variance 1 / inputs, biases zero (Flax's default)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
