"""The classes of fourdperf.models.convolutions in Flax, channels last."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fourdperf.jax.models.layers import attention
from fourdperf.models.convolutions import GROUP_NORM_EPS, GROUPS


def conv3x3(features: int, bias: bool = True) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, use_bias=bias)


def group_norm() -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, epsilon=GROUP_NORM_EPS)


class ResBlock(nn.Module):
    """See the PyTorch class; `changed` where the number of channels does."""

    width: int
    changed: bool = False
    bias: bool = True
    shortcut: str = "input"

    def setup(self):
        self.norm_in, self.norm_out = group_norm(), group_norm()
        self.conv_in, self.conv_out = conv3x3(self.width, self.bias), conv3x3(self.width, self.bias)
        if self.changed:
            self.skip = nn.Conv(self.width, (1, 1), use_bias=self.bias)

    def __call__(self, x: Array) -> Array:
        out = self.conv_in(nn.silu(self.norm_in(x)))
        out = self.conv_out(nn.silu(self.norm_out(out)))
        if not self.changed:
            return x + out
        return out + self.skip(x if self.shortcut == "input" else out)


class PixelAttention(nn.Module):
    """x + attention of all places to all, one head: `(B, H, W, C)` -> `(B, H, W, C)`."""

    channels: int

    def setup(self):
        self.norm, self.qkv, self.out = group_norm(), nn.Dense(3 * self.channels), nn.Dense(self.channels)

    def __call__(self, x: Array) -> Array:
        tokens = self.norm(x).reshape(len(x), -1, 1, self.channels)
        return x + self.out(attention(*jnp.split(self.qkv(tokens), 3, axis=-1))).reshape(x.shape)


def upsample(x: Array) -> Array:
    """Every pixel four times: `(B, H, W, C)` -> `(B, 2 H, 2 W, C)`."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def channels_first(x: Array) -> Array:
    """`(B, H, W, C)` -> `(B, C, H, W)`, as the PyTorch models have it between convolutions."""
    return x.transpose(0, 3, 1, 2)
