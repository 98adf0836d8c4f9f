"""Pictures of what a model saw: features coloured by their principal components, depth maps, panels with labels.

Images are uint8 (H, W, 3), RGB, everywhere in this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DepthColours", "PcaColours", "enlarge", "label", "side_by_side", "stack", "to_pixels"]

BACKGROUND = 255
INK = (30, 30, 30)
STRIP = 22


def to_pixels(images: "Tensor") -> np.ndarray:
    """uint8 of floating pictures `(.., H, W, C)` in [0, 1]; what is beyond is cut."""
    return (images * 255).round().clamp(0, 255).byte().cpu().numpy()


@dataclass(frozen=True)
class PcaColours:
    """Colours features by their first three principal components, which become red, green and blue.

    Fitted once and then applied to every frame and clip of a video, so that a colour means the same throughout.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> "PcaColours":
        """Fits to a sample of features (N, C), C >= 1. Features without any variance give grey pictures.

        Each component's sign is the one that makes its largest entry positive, so the colours do not depend on the
        linear algebra library. The range shown is the 1st to the 99th percentile of each component.
        """
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"wanted features (N, C) with N, C >= 1, got {features.shape}")
        x = features.astype(np.float64)
        mean = x.mean(0)
        values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        components = vectors[:, ::-1][:, :3] * (values[::-1][:3] > 1e-12 * max(values[-1], 1e-300))
        largest = np.take_along_axis(components, np.abs(components).argmax(0)[None], 0)
        components = components * np.where(largest < 0, -1, 1)
        components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
        low, high = np.percentile((x - mean) @ components, (1, 99), axis=0)
        return cls(mean, components, low, high)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Colours features (..., C): uint8 (..., 3)."""
        projected = (features.astype(np.float64) - self.mean) @ self.components
        flat = self.high <= self.low
        scaled = (projected - self.low) / np.where(flat, 1, self.high - self.low)
        return np.rint(255 * np.clip(np.where(flat, 0.5, scaled), 0, 1)).astype(np.uint8)


@dataclass(frozen=True)
class DepthColours:
    """Colours depth maps with OpenCV's Turbo map: blue for ``low`` and less, red for ``high`` and more. Values that
    are not finite are grey."""

    low: float
    high: float

    @classmethod
    def fit(cls, depth: np.ndarray) -> "DepthColours":
        """Takes the 2nd and the 98th percentile of the finite values of ``depth`` (any shape) as the range."""
        finite = depth[np.isfinite(depth)]
        low, high = np.percentile(finite, (2, 98)) if finite.size else (0.0, 1.0)
        return cls(float(low), float(high))

    def __call__(self, depth: np.ndarray) -> np.ndarray:
        """Colours depth (H, W)."""
        finite = np.isfinite(depth)
        span = self.high - self.low if self.high > self.low else 1.0
        scaled = np.clip((np.where(finite, depth, self.low) - self.low) / span, 0, 1)
        colours = cv2.applyColorMap(np.rint(255 * scaled).astype(np.uint8), cv2.COLORMAP_TURBO)
        return np.where(finite[..., None], cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), np.uint8(128))

    def legend(self, width: int) -> np.ndarray:
        """A colour bar (2 * STRIP, width, 3) with the range written under it."""
        bar = self(np.linspace(self.low, self.high, width)[None].repeat(STRIP, 0))
        strip = _strip(width)
        _write(strip, f"{self.low:.3g}", 4)
        text = f"{self.high:.3g}"
        _write(strip, text, width - 4 - _text_width(text, _font_scale(text, width)))
        return np.concatenate([bar, strip])


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarges (or shrinks) to (height, width, 3) with sharp cells: one feature stays one block of colour."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)


def label(image: np.ndarray, text: str) -> np.ndarray:
    """Puts ``text`` on a white strip above the image; long texts get smaller letters."""
    strip = _strip(image.shape[1])
    _write(strip, text, 4)
    return np.concatenate([strip, image])


def side_by_side(images: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Joins images from left to right with white gaps; lower ones are filled up with white below."""
    height = max(image.shape[0] for image in images)
    parts = [
        np.pad(image, ((0, height - image.shape[0]), (gap * (i > 0), 0), (0, 0)), constant_values=BACKGROUND)
        for i, image in enumerate(images)
    ]
    return np.concatenate(parts, axis=1)


def stack(images: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Joins images from top to bottom with white gaps; narrower ones are filled up with white on the right."""
    return side_by_side([image.swapaxes(0, 1) for image in images], gap).swapaxes(0, 1)


def _strip(width: int) -> np.ndarray:
    return np.full((STRIP, width, 3), BACKGROUND, np.uint8)


def _write(strip: np.ndarray, text: str, x: int) -> None:
    scale = _font_scale(text, strip.shape[1])
    cv2.putText(strip, text, (x, STRIP - 7), cv2.FONT_HERSHEY_SIMPLEX, scale, INK, 1, cv2.LINE_AA)


def _font_scale(text: str, width: int) -> float:
    return 0.45 * min(1.0, (width - 8) / max(1, _text_width(text, 0.45)))


def _text_width(text: str, scale: float) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0]
