"""Masked autoencoders of pictures under Lightning, and pictures of what they guess."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.pictures import enlarge, label, side_by_side, stack, to_pixels
from fourdperf.models.image_mae import ImageMAE, Output
from fourdperf.train.callbacks import RunPictures, write_curves
from fourdperf.train.module import ModelTraining

__all__ = ["ImageMAEPictures", "ImageMAETraining", "guesses_picture"]

IMAGES, PANEL = 8, 128
BETAS = (0.9, 0.95)  # the paper's


class ImageMAETraining(ModelTraining):
    """A masked autoencoder, by AdamW; batches are images `(B, H, W, 3)` in [0, 1], with labels that nobody looks at.

    Which patches are left out depends on the seed, the batch and the process in training, on the batch alone in
    validation. clip: the gradient's largest L2 norm. Matrices alone are decayed.
    """

    def __init__(
        self,
        model: ImageMAE,
        max_steps: int,
        *,
        lr: float = 1e-3,
        final_lr: float = 1e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.05,
        clip: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.max_steps, self.lr, self.final_lr, self.warmup_steps = max_steps, lr, final_lr, warmup_steps
        self.weight_decay, self.clip, self.seed = weight_decay, clip, seed

    def guess(self, images: Tensor, generator: torch.Generator | None = None) -> Output:
        """With patches left out at random."""
        grid = self.model.config.grid
        noise = torch.rand(len(images), grid[0] * grid[1], device=images.device, generator=generator)
        return self.model(images, noise)

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.seed_batch(batch_idx)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self.guess(batch[0]).loss
        self.log("train/loss", loss.detach(), batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        found = self.guess(batch[0], torch.Generator(self.device).manual_seed(batch_idx))
        self.log_validation({"loss": found.loss}, len(batch[0]))

    def configure_optimizers(self) -> dict:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        decay = self.weight_decay
        return self.scheduled(torch.optim.AdamW(groups, lr=self.lr, betas=BETAS, weight_decay=decay, fused=True))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        self.log_norm(torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip))


class ImageMAEPictures(RunPictures):
    """Of the first of `images`: what is shown and what is guessed; at the end, the curve."""

    def __init__(self, out: Path, images: Dataset) -> None:
        super().__init__(out)
        self.images = torch.stack([images[i][0] for i in range(min(IMAGES, len(images)))])

    @torch.no_grad()
    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        found = module.guess(self.images.to(module.device), torch.Generator(module.device).manual_seed(0))
        return {"guesses": guesses_picture(self.images, found, module.model.config.grid)}

    def finish(self, module: LightningModule) -> None:
        write_curves(self.out, loss=("loss", ""))


def guesses_picture(images: Tensor, found: Output, grid: tuple[int, int]) -> np.ndarray:
    """Images `(B, H, W, 3)`, what is shown of them, and what is guessed of the rest."""
    mask = found.mask.cpu().unflatten(1, grid)
    for axis in (1, 2):
        mask = mask.repeat_interleave(images.shape[axis] // grid[axis - 1], axis)
    shown = torch.where(mask[..., None], torch.full_like(images, 0.5), images)
    columns = []
    for rows in zip(images, shown, found.recon.float().cpu()):
        height, width = images.shape[1:3]
        large = (enlarge(to_pixels(row), PANEL, PANEL * width // height) for row in rows)
        columns.append(stack([label(panel, text) for panel, text in zip(large, ("original", "shown", "guessed"))]))
    return side_by_side(columns)
