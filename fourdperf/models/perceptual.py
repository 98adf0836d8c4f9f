"""How different two pictures look: LPIPS, and what stands in for it where its weights are absent.

    pictures a, b (B, H, W, 3) in [0, 1]
      | VGG16's five last ReLUs before each pooling, each place's features divided by their length
    sum over the five of the mean over places of sum_c w_c (f_a - f_b)_c^2        (B,)

Source: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), version 0.1 of its
weights; "Optimizing the Latent Space of Generative Networks" (arXiv 1707.05776; the Laplacian pyramid's L1).
"""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.convert.state import hub_folder, load_checked, read_state

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
LENGTH_FLOOR = 1e-10
SMALLEST = 2 ** (len(STAGES) - 1)
PYRAMID_LEVELS, PYRAMID_COARSEST = 5, 4

VGG_FILE, LINEAR_FILE = "vgg16-397923af.pth", "vgg.pth"
VGG_SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"
LINEAR_SOURCE = "the packages lpips or torchmetrics, which have it, or richzhang/PerceptualSimilarity"


class LPIPS(nn.Module):
    """LPIPS on VGG16, frozen; random unless loaded.

    convolutions: by torchvision's numbers. weights: of the five stages' channels.
    dropout: of the weighed channels, in train mode. The seed's training has 0.5 there, since its train() reaches a
        network that was meant to stay in eval mode; the measure has none.
    """

    name = "LPIPS (VGG16)"

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.convolutions = nn.ModuleDict()
        number, inputs = 0, 3
        for widths in STAGES:
            for width in widths:
                self.convolutions[str(number)] = nn.Conv2d(inputs, width, 3, padding=1)
                number, inputs = number + 2, width  # a ReLU follows
            number += 1  # a pooling
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(widths[-1])) for widths in STAGES)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, vgg: Path | None = None, linear: Path | None = None, dropout: float = 0.0) -> "LPIPS":
        """With weights, in eval mode.

        vgg: torchvision's vgg16-397923af.pth; by default in torch's cache (TORCH_HOME). linear: richzhang's vgg.pth for
        version 0.1; by default there, or in the packages lpips or torchmetrics.

        Raises:
            FileNotFoundError: one of the two is nowhere; the message says where it was looked for.
            ValueError: a file holds something else, or is cut off.
        """
        vgg = _find("vgg", vgg, VGG_FILE, VGG_SOURCE, hub_folder() / VGG_FILE)
        linear = _find("linear", linear, LINEAR_FILE, LINEAR_SOURCE, hub_folder() / LINEAR_FILE, *_packaged())
        model = cls(dropout)
        model.load_vgg(read_state(vgg), str(vgg))
        model.load_linear(read_state(linear), str(linear))
        return model.eval()

    def load_vgg(self, state: Mapping[str, Tensor], where: str = "vgg") -> None:
        """torchvision's `features.0.weight`, ..; what is not of the features is left."""
        state = {name.removeprefix("features."): x for name, x in state.items() if name.startswith("features.")}
        load_checked(self.convolutions, state, where)

    def load_linear(self, state: Mapping[str, Tensor], where: str = "linear") -> None:
        """richzhang's `lin0.model.1.weight`, .. `(1, C, 1, 1)`."""
        found = {name: x.flatten() for name, x in state.items()}
        named = {f"lin{index}.model.1.weight": str(index) for index in range(len(STAGES))}
        load_checked(self.weights, {named.get(name, name): x for name, x in found.items()}, where)

    def features(self, images: Tensor) -> list[Tensor]:
        """The five stages `(B, C, h, w)` of pictures `(B, H, W, 3)` in [0, 1]."""
        x = (2 * images.permute(0, 3, 1, 2) - 1 - self.shift) / self.scale
        convolutions, found = iter(self.convolutions.values()), []
        for index, widths in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if index else x
            for _ in widths:
                x = F.relu(next(convolutions)(x))
            found.append(x)
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """How different pictures `(B, H, W, 3)` in [0, 1] look, `(B,)`; raises ValueError where shapes do not fit."""
        check_pictures(a, b, SMALLEST)
        total = a.new_zeros(len(a), dtype=torch.float32)
        for weight, of_a, of_b in zip(self.weights, self.features(a), self.features(b)):
            difference = self.dropout((_unit(of_a) - _unit(of_b)).square())
            total = total + torch.einsum("bchw,c->b", difference, weight.float()) / difference[0, 0].numel()
        return total


class PyramidL1(nn.Module):
    """The mean absolute difference of two pictures' Laplacian pyramids, summed over levels: detail of every size."""

    name = "L1 of Laplacian pyramids (not LPIPS)"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures `(B, H, W, 3)` -> `(B,)`; raises ValueError where shapes do not fit."""
        check_pictures(a, b, 1)
        x = (a - b).permute(0, 3, 1, 2).float()
        total = x.new_zeros(len(x))
        for _ in range(PYRAMID_LEVELS):
            if min(x.shape[2:]) < 2 * PYRAMID_COARSEST:
                break
            coarse = F.avg_pool2d(x, 2, ceil_mode=True)
            detail = x - F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=False)
            total, x = total + detail.abs().mean((1, 2, 3)), coarse
        return total + x.abs().mean((1, 2, 3))


def perceptual_or_substitute(
    vgg: Path | None = None, linear: Path | None = None, dropout: float = 0.0
) -> LPIPS | PyramidL1:
    """LPIPS, or where its weights are nowhere `PyramidL1`, with a warning that says what is missing; `name` tells which
    it is.

    Raises:
        FileNotFoundError, ValueError: a file that was named is not there, or not what it should be.
    """
    try:
        return LPIPS.from_files(vgg, linear, dropout)
    except FileNotFoundError as error:
        if vgg is not None or linear is not None:
            raise
        warnings.warn(f"{error}. Instead of {LPIPS.name}: {PyramidL1.name}", stacklevel=2)
        return PyramidL1()


def check_pictures(a: Tensor, b: Tensor, smallest: int) -> None:
    """Raises ValueError unless both are `(B, H, W, 3)` of one shape, H and W at least `smallest`."""
    if a.shape != b.shape or a.ndim != 4 or a.shape[3] != 3 or min(a.shape[1:3]) < smallest:
        wanted = f"pictures (B, H, W, 3) of one shape, with sides of at least {smallest}"
        raise ValueError(f"a, b: expected {wanted}, got {tuple(a.shape)} and {tuple(b.shape)}")


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    # vector_norm, and not a root of a sum: where nothing is active its gradient is 0, and not NaN
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + LENGTH_FLOOR)


def _packaged() -> list[Path]:
    places = {"lpips": "weights/v0.1", "torchmetrics": "functional/image/lpips_models"}
    found = {name: importlib.util.find_spec(name) for name in places}
    return [Path(spec.origin).parent / places[name] / LINEAR_FILE for name, spec in found.items() if spec is not None]


def _find(name: str, given: Path | None, file: str, source: str, *places: Path) -> Path:
    for path in places if given is None else (given,):
        if path.is_file():
            return path
    if given is not None:
        raise FileNotFoundError(f"{name}: no such file: {given}")
    looked = ", ".join(map(str, places))
    raise FileNotFoundError(f"{LPIPS.name}: {file} is in none of {looked}; get it from {source}, or name its path")
