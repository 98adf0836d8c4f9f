"""What the Frechet distance of pictures is measured on: Inception's features, or named substitutes where its weights
are absent. Only Inception's give an FID; distances on other features compare with each other alone."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.convert.state import hub_folder
from fourdperf.metrics.inception import FEATURES, FILE, load_inception
from fourdperf.models.checkpoint import CONFIG, CheckpointError
from fourdperf.models.scaling4d import MODEL, Scaling4D

__all__ = ["Features", "RandomConvNet", "open_features"]

SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
RANDOM = "random convolutional net, seed 0"
WIDTHS = (32, 64, 128, 256)
LAYER = 0.95  # of 4DS' depth, as its readouts take it


class Features(NamedTuple):
    """measure: what the Frechet distance on them is called. size: D. of: pictures `(B, H, W, 3)` in [0, 1] ->
    `(B, D)`."""

    measure: str
    size: int
    of: Callable[[Tensor], Tensor]


def open_features(path: Path | None = None, device: torch.device | str = "cpu") -> Features:
    """The features of `path`: pytorch-fid's Inception weights (then the measure is "rFID"), or the folder of a 4DS.

    By default Inception's weights in torch.hub's cache; where they are not, those of a convolutional net with random
    weights, with a warning.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is neither.
    """
    cached = hub_folder() / FILE
    if path is None and not cached.is_file():
        warnings.warn(
            f"rFID: no Inception weights at {cached}; get them from {SOURCE}, or name the file. Instead, the "
            f"Frechet distance on features of a {RANDOM}, which is no FID",
            stacklevel=2,
        )
        net = RandomConvNet().to(device)
        return Features(f"Frechet distance on features of a {RANDOM}", net.size, net)
    path = path or cached
    if path.is_dir():
        model = _load_4ds(path).to(device)
        of = lambda images: still_features(model, images)
        return Features(f"Frechet distance on features of 4DS {path}", model.config.hidden_size, of)
    return Features("rFID", FEATURES, load_inception(path).to(device))


class RandomConvNet(nn.Module):
    """Pictures -> means and deviations over places of four levels of 3 x 3 convolutions and ReLUs, halved between them;
    weights drawn with seed 0, the same everywhere."""

    size = 2 * sum(WIDTHS)

    def __init__(self):
        super().__init__()
        generator, self.kernels, inputs = torch.Generator().manual_seed(0), nn.ParameterList(), 3
        for width in WIDTHS:
            kernel = torch.randn(width, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            self.kernels.append(nn.Parameter(kernel, requires_grad=False))
            inputs = width

    def forward(self, images: Tensor) -> Tensor:
        x, found = 2 * images.float().permute(0, 3, 1, 2) - 1, []
        for kernel in self.kernels:
            x = F.relu(F.conv2d(x, kernel, padding=1))
            deviation, mean = torch.std_mean(x, (2, 3), correction=0)
            found += [mean, deviation]
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(found, 1)


def still_features(model: Scaling4D, images: Tensor) -> Tensor:
    """4DS' features `(B, D)` of pictures as videos in which nothing moves, averaged over tokens."""
    frames, *size = model.config.video_size
    images = F.interpolate(images.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    video = images[:, None].expand(-1, frames, -1, -1, -1)
    layer = round(LAYER * model.config.num_layers)
    return model.encode(video, layers=[layer])[0].mean(1)


def _load_4ds(path: Path) -> Scaling4D:
    try:
        name = json.loads((path / CONFIG).read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name != MODEL:
        raise CheckpointError(f"{path}: expected {FILE}, or the folder of a {MODEL}")
    return Scaling4D.from_pretrained(path).requires_grad_(False)
