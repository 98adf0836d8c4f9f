"""Networks that tell pictures from reconstructions, patch by patch: `(B, H, W, 3)` in [0, 1] -> logits `(B, h, w)`,
high for what looks real.

Source: "Image-to-Image Translation with Conditional Adversarial Networks" (arXiv 1611.07004; PatchGAN) in the form of
"Taming Transformers" (arXiv 2012.09841), which the seed trains with; bytedance/1d-tokenizer (TiTok's own; blurred
pooling from arXiv 1904.11486).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST = 8
GROUPS = 32
BLUR = (1, 3, 3, 1)
PLACES = 16


class PatchDiscriminator(nn.Module):
    """4x4 convolutions with BatchNorm, halving `layers` times; an evidence for every patch of 70 pixels at 3 layers.

    In train mode a batch is judged by its own statistics, those of one process. width: of the first layer, doubled by
    each up to eightfold.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**index, WIDEST) for index in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (inputs, outputs) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if index < layers else 1
            parts += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for part in self.layers:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(2 * images.permute(0, 3, 1, 2) - 1).squeeze(1)


class BlurPool(nn.Module):
    """`(B, C, H, W)` -> half the size, rounded up: a 4x4 binomial filter, the border filled up with zeros."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor(BLUR, dtype=torch.float32)
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None] / taps.sum().square(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, -1, -1, -1), stride=2, groups=channels)


class TiTokDiscriminator(nn.Module):
    """TiTok's own: 3x3 convolutions with blurred pooling and GroupNorm, an evidence for each of 16x16 places.

    Nothing depends on the rest of a batch. width: of the first stage, doubled by each after it; a multiple of 32.
    """

    def __init__(self, width: int = 128, stages: int = 3):
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"width: expected a multiple of {GROUPS}, got {width}")
        widths = [width * 2**index for index in range(stages)]
        self.stem = nn.Conv2d(3, width, 5, padding=2)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip([width, *widths], widths))
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for width in widths)
        self.pool = BlurPool()
        self.dense = nn.Conv2d(widths[-1], widths[-1], 1)
        self.out = nn.Conv2d(widths[-1], 1, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(images.permute(0, 3, 1, 2)), 0.1)
        for convolution, norm in zip(self.convolutions, self.norms):
            x = F.leaky_relu(norm(self.pool(convolution(x))), 0.1)
        x = F.leaky_relu(self.dense(F.adaptive_max_pool2d(x, PLACES)), 0.1)
        return self.out(x).squeeze(1)


DISCRIMINATORS = {"patch": PatchDiscriminator, "titok": TiTokDiscriminator}
