"""Pictures of runs of tokenizers and of generators on their codes: reconstructions, how codes are used, samples,
curves."""

from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.chart import line_chart
from fourdperf.data.pictures import enlarge, label, side_by_side, stack, to_pixels
from fourdperf.models.token_generator import TokenGenerator
from fourdperf.models.tokenizers import decode
from fourdperf.train.callbacks import RunPictures, write_curves
from fourdperf.train.functa_pictures import reconstructions_picture

__all__ = ["GeneratorPictures", "TokenizerPictures", "samples_picture", "usage_picture"]

IMAGES, PANEL = 8, 128
ROWS, COLUMNS = 4, 8


class TokenizerPictures(RunPictures):
    """Of the first of `images`: reconstructions; of all codes of a validation: how often each was chosen. At the end,
    curves."""

    def __init__(self, out: Path, images: Dataset) -> None:
        super().__init__(out)
        self.images = torch.stack([images[i][0] for i in range(min(IMAGES, len(images)))])

    @torch.no_grad()
    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        training = module.training
        recon = module.eval().reconstruct(self.images.to(module.device))
        module.train(training)
        found = {"reconstructions": reconstructions_picture(self.images, recon)}
        if module.counts is not None and module.counts.sum():
            found["codes"] = usage_picture(module.counts)
        return found

    def finish(self, module: LightningModule) -> None:
        titles = {"loss": ("loss", ""), "psnr": ("PSNR", "dB"), "perplexity": ("perplexity of the codes", "codes")}
        write_curves(self.out, **titles, accuracy=("codes of the VQGAN that are right", "share"))


class GeneratorPictures(RunPictures):
    """New pictures by the generator, of its classes in turn; at the end, curves."""

    def __init__(self, out: Path, tokenizer, classes: tuple[str, ...]) -> None:
        super().__init__(out)
        self.tokenizer, self.classes = tokenizer, classes

    @torch.no_grad()
    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        generator = torch.Generator(module.device).manual_seed(0)
        return {"samples": samples_picture(module.model, self.tokenizer, self.classes, generator)}

    def finish(self, module: LightningModule) -> None:
        write_curves(self.out, loss=("loss", ""), accuracy=("masked codes that are right", "share"))


def usage_picture(counts: Tensor) -> np.ndarray:
    """How often codes were chosen `(K,)`, the most frequent first."""
    share = counts.double().sort(descending=True).values / counts.sum()
    curves = {"share": (range(1, 1 + len(share)), share.tolist())}
    used = int((counts > 0).sum())
    title = f"{used} of {len(counts)} codes are in use"
    return line_chart(curves, title=title, x_label="code, by frequency", y_label="share")


def samples_picture(model: TokenGenerator, tokenizer, names: tuple[str, ...], generator: torch.Generator) -> np.ndarray:
    """New pictures, a column for each of the first classes."""
    columns = min(COLUMNS, model.config.num_classes) if len(names) > 1 else COLUMNS
    classes = torch.arange(columns, device=generator.device).repeat(ROWS) % model.config.num_classes
    training = model.training
    codes = model.eval().generate(classes, generator=generator)
    model.train(training)
    pixels = to_pixels(decode(tokenizer, codes).unflatten(0, (ROWS, columns)))
    panels = [stack([_panel(image) for image in pixels[:, column]]) for column in range(columns)]
    if len(names) > 1:
        panels = [label(panel, name) for panel, name in zip(panels, names)]
    return side_by_side(panels)


def _panel(image: np.ndarray) -> np.ndarray:
    return enlarge(image, PANEL, max(1, round(PANEL * image.shape[1] / image.shape[0])))
