"""Convolutional parts of picture decoders and encoders, channels first: residual blocks, attention, up-sampling."""

import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.layers import attention

GROUPS = 32
GROUP_NORM_EPS = 1e-6
SHORTCUTS = ("input", "output")


def group_norm(channels: int) -> nn.GroupNorm:
    """Over 32 groups of channels."""
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_NORM_EPS)


def conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution for the sum where the channels change.

    shortcut: "output" applies that convolution to the block's outcome, and adds it to that; x is lost. For checkpoints
        that were trained so.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, shortcut: str = "input"):
        super().__init__()
        self.shortcut = shortcut
        self.norm_in, self.conv_in = group_norm(inputs), conv3x3(inputs, outputs, bias)
        self.norm_out, self.conv_out = group_norm(outputs), conv3x3(outputs, outputs, bias)
        channels = inputs if shortcut == "input" else outputs
        self.skip = nn.Conv2d(channels, outputs, 1, bias=bias) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_in(F.silu(self.norm_in(x)))
        out = self.conv_out(F.silu(self.norm_out(out)))
        if self.skip is None:
            return x + out
        return out + self.skip(x if self.shortcut == "input" else out)


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


def upsample(x: Tensor) -> Tensor:
    """Every pixel four times: `(B, C, H, W)` -> `(B, C, 2 H, 2 W)`."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
