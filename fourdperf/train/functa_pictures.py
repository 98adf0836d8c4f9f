"""Pictures of a functa: reconstructions, the map of latents and how the field reads it, the coordinates that the
network sees, the PSNR of a run."""

from pathlib import Path

import cv2
import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor

from fourdperf.data.images import Images
from fourdperf.data.pictures import PcaColours, enlarge, label, side_by_side, stack
from fourdperf.data.video import write_png
from fourdperf.models.functa import Functa, fit, psnr
from fourdperf.ops import bilinear_sample
from fourdperf.train.callbacks import RunPictures, curve_picture
from fourdperf.train.functa import signals

__all__ = ["FunctaPictures", "coordinates_picture", "latents_picture", "reconstructions_picture"]

IMAGES, PANEL = 8, 128
LATENT_ROWS, CHANNELS = 3, 6
LINE = (255, 255, 255)


class FunctaPictures(RunPictures):
    """Of the first images of `images`: reconstructions and latents, and at the end the coordinates and the curve."""

    def __init__(self, out: Path, images: Images) -> None:
        super().__init__(out)
        self.images = torch.stack([images[i][0] for i in range(min(IMAGES, len(images)))])

    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        found = fit(module.model, signals(self.images.to(module.device)), chunk=module.chunk)
        return {
            "reconstructions": reconstructions_picture(self.images, found.recon.reshape(self.images.shape)),
            "latents": latents_picture(module.model, found.latent, self.images),
        }

    def finish(self, module: LightningModule) -> None:
        write_png(self.out / "coordinates.png", coordinates_picture(module.model))
        if (self.out / "val.csv").exists():
            write_png(self.out / "psnr.png", curve_picture(self.out, "psnr", "PSNR", "dB"))


def reconstructions_picture(images: Tensor, recon: Tensor) -> np.ndarray:
    """Images `(B, H, W, C)`, what their fields give `(B, H, W, C)` with its PSNR, and how far apart they are."""
    images, recon = images.cpu(), recon.detach().float().cpu()
    error = (recon - images).abs().mean(-1, keepdim=True)
    largest = max(float(error.max()), 1e-6)
    columns = []
    for image, found, wrong, decibel in zip(images, recon, error, psnr(signals(recon), signals(images)).tolist()):
        panels = (
            label(_panel(_colours(image)), "original"),
            label(_panel(_colours(found)), f"{decibel:.1f} dB"),
            label(_panel(_colours(wrong / largest)), f"error / {largest:.2g}"),
        )
        columns.append(stack(panels))
    return side_by_side(columns)


def latents_picture(model: Functa, latent: Tensor, images: Tensor) -> np.ndarray:
    """Of the first images `(B, H, W, C)`, a row each: the latent map `(B, s, s, c)` by its principal components, the
    same as the field reads it at the pixels, and the channels that vary most, each from its least value to its largest.
    """
    grid, size = model.grid(), images.shape[1:3]
    rule = {"mode": "nearest_floor", "align_corners": False} if model.config.interpolation == "nearest" else {}
    read = bilinear_sample(latent.float(), grid.float(), **rule).reshape(len(latent), *size, -1).detach().cpu().numpy()
    latent = latent.detach().float().cpu().numpy()
    flat = latent.reshape(-1, latent.shape[-1])
    colours, varied = PcaColours.fit(flat), np.argsort(-flat.var(0), kind="stable")[:CHANNELS]
    ranges = [(flat[:, channel].min(), flat[:, channel].max()) for channel in varied]
    rows = []
    for cells, pixels, image in zip(latent[:LATENT_ROWS], read, images.cpu()):
        panels = [
            label(_panel(_colours(image)), "image"),
            label(_panel(colours(cells), cells.shape[:2]), "latents, PCA"),
            label(_panel(colours(pixels), size), "at the pixels"),
        ]
        for channel, (low, high) in zip(varied, ranges):
            value = (pixels[..., channel] - low) / max(high - low, 1e-12)
            panels.append(label(_panel(_scale(value), size), f"channel {channel}"))
        rows.append(side_by_side(panels))
    return stack(rows)


def coordinates_picture(model: Functa) -> np.ndarray:
    """What the network sees of every pixel's coordinate, an input at a time, from 0 (blue) to 1 (yellow)."""
    config = model.config
    inputs = model.features(model.grid()).float().cpu().numpy()
    inputs = inputs.reshape(*config.image_size, -1)
    if not config.spatial:
        names = ("x", "y")
    elif config.interpolation == "nearest":
        names = ("x in its cell", "y in its cell")
    else:
        names = tuple(f"{axis}, bit {bit}" for axis in "xy" for bit in range(config.bits))
    panels = [label(_panel(_scale(inputs[..., i]), config.image_size), name) for i, name in enumerate(names)]
    per_row = config.bits if len(panels) > 2 else 2
    return stack([side_by_side(panels[i : i + per_row]) for i in range(0, len(panels), per_row)])


def _colours(image: Tensor) -> np.ndarray:
    """uint8 (H, W, 3) of an image (H, W, C): RGB, or grey from its first channel."""
    pixels = np.rint(image.numpy().clip(0, 1) * 255).astype(np.uint8)
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def _scale(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of values (H, W) from 0 to 1."""
    levels = np.rint(255 * values.clip(0, 1)).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _panel(image: np.ndarray, cells: tuple[int, int] | None = None) -> np.ndarray:
    """The image (h, w, 3) enlarged to a height of PANEL, with dotted lines between `cells` that are large enough."""
    height, width = PANEL, max(1, round(PANEL * image.shape[1] / image.shape[0]))
    image = enlarge(image, height, width)
    if cells is not None and min(height // cells[0], width // cells[1]) >= 8:
        for axis, (length, count) in enumerate(zip((height, width), cells)):
            lines = np.rint(np.arange(1, count) * length / count).astype(int)
            image.swapaxes(0, axis)[lines, ::3] = LINE
    return image
