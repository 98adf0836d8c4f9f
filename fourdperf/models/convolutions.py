"""Convolutional parts of picture decoders and encoders, channels first: residual blocks, attention, doubling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.layers import attention, untouched

GROUPS = 32
GROUP_NORM_EPS = 1e-6
SHORTCUTS = ("input", "output")


def group_norm(channels: int) -> nn.GroupNorm:
    """Over 32 groups of channels."""
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_NORM_EPS)


class Conv3x3(nn.Conv2d):
    """3 x 3, with a border of zeros; of pictures one pixel wide the kernel's middle column alone, which is all that
    sees anything."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] == 1:
            return F.conv2d(x, self.weight[..., 1:2], self.bias, padding=(1, 0))
        return super().forward(x)


class UpConv3x3(Conv3x3):
    """Every pixel four times, then 3 x 3: `(B, C, H, W)` -> `(B, C', 2 H, 2 W)`.

    A new pixel sees 2 x 2 old ones: for each of the four that come of one, the kernel's rows and columns that fall on
    the same old pixel are added up first, which leaves four ninths of the work. Small pictures are not worth it.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height * width <= self.out_channels:
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernels = [kernel for rows in _halves(self.weight, 2) for kernel in _halves(rows, 3)]
        found = [F.conv2d(x, kernel, self.bias, padding=1) for kernel in kernels]
        out = found[0].new_empty(len(x), 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)
        for number, part in enumerate(found):
            row, column = divmod(number, 2)
            out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
        return out


def _halves(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps on doubled pixels as two on the old ones: of the first and of the second of a pair."""
    a, b, c = kernel.split(1, dim)
    return torch.cat([a, b + c], dim), torch.cat([a + b, c], dim)


def channels_last(x: Tensor) -> Tensor:
    """The picture with channels together in memory, on a CPU, where convolutions then copy nothing, and in bf16 are
    several times as fast; elsewhere as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def swish(norm: nn.Module, x: Tensor) -> Tensor:
    """y sigmoid(y) of y = norm(x), in y's place where nobody else needs it: no gradients, no hooks."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled() and untouched(norm))


def add(x: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
    """x + layer(y), in the place of the layer's output where nobody else needs that."""
    out = layer(y)
    alone = not torch.is_grad_enabled() and untouched(layer) and out.dtype == torch.promote_types(x.dtype, out.dtype)
    return out.add_(x) if alone else x + out


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution for the sum where the channels change.

    shortcut: "output" applies that convolution to the block's outcome, and adds it to that; x is lost. For checkpoints
        that were trained so.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, shortcut: str = "input"):
        super().__init__()
        self.shortcut = shortcut
        self.norm_in, self.conv_in = group_norm(inputs), Conv3x3(inputs, outputs, bias)
        self.norm_out, self.conv_out = group_norm(outputs), Conv3x3(outputs, outputs, bias)
        channels = inputs if shortcut == "input" else outputs
        self.skip = nn.Conv2d(channels, outputs, 1, bias=bias) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = swish(self.norm_out, self.conv_in(swish(self.norm_in, x)))
        if self.skip is None:
            return add(x, self.conv_out, out)
        out = self.conv_out(out)
        return add(out, self.skip, x if self.shortcut == "input" else out)


class PixelAttention(nn.Module):
    """x + attention of all places to all, one head: `(B, C, H, W)` -> `(B, C, H, W)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        heads = (part[:, :, None] for part in self.qkv(tokens).chunk(3, dim=-1))
        return x + self.out(attention(*heads).flatten(-2)).transpose(1, 2).unflatten(2, x.shape[2:])
