"""Functa under Lightning: the outer loop of meta-learning, and the data module that feeds it."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fourdperf.data.images import Images
from fourdperf.models.functa import Functa, fit, psnr
from fourdperf.train.data import Shuffled
from fourdperf.train.module import ModelTraining, RunData

__all__ = ["FunctaTraining", "ImageData", "signals"]


def signals(images: Tensor) -> Tensor:
    """Images `(B, H, W, C)` as what `fit` takes: `(B, H W, C)`."""
    return images.flatten(1, -2)


class FunctaTraining(ModelTraining):
    """One functa, and its optimiser; batches are images `(B, H, W, C)` in [0, 1], with labels that nobody looks at.

    A step fits every image by the config's `inner_steps` of gradient descent on its latent, from zero, and moves what
    the images share against the derivative of the mean of the errors that are left.

    model: the network. max_steps: where the learning rate reaches `final_lr`. order, chunk: of
    `fourdperf.models.functa.fit`. clip: the gradient's largest L2 norm.
    rates_lr: of the learned step sizes, as a multiple of lr.
    """

    def __init__(
        self,
        model: Functa,
        max_steps: int,
        *,
        lr: float = 3e-4,
        final_lr: float = 3e-6,
        warmup_steps: int = 0,
        rates_lr: float = 10.0,
        clip: float = 1.0,
        order: Literal[1, 2] = 2,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.max_steps, self.lr, self.final_lr, self.warmup_steps = max_steps, lr, final_lr, warmup_steps
        self.rates_lr, self.clip = rates_lr, clip
        self.order, self.chunk = order, chunk

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        target = signals(batch[0])
        found = fit(self.model, target, order=self.order, chunk=self.chunk)
        loss = found.loss.mean()
        values = {"loss": loss.detach(), "psnr": psnr(found.recon.detach(), target).mean()}
        if self.model.rates is not None:
            rates = self.model.rates_now().detach()
            values |= {"rate_min": rates.min(), "rate_max": rates.max()}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(target))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        target = signals(batch[0])
        found = fit(self.model, target, chunk=self.chunk)
        self.log_validation({"loss": found.loss.mean(), "psnr": psnr(found.recon, target).mean()}, len(target))

    def configure_optimizers(self) -> dict:
        rates = [] if self.model.rates is None else [self.model.rates]
        others = [p for p in self.parameters() if all(p is not rate for rate in rates)]
        groups = [{"params": others}]
        groups += [{"params": rates, "lr": self.lr * self.rates_lr}] * bool(rates)
        optimizer = torch.optim.Adam(groups, lr=self.lr, fused=True)
        return self.scheduled(optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.log_norm(norm)


class ImageData(RunData):
    """Images for training, in an order that the seed and the step alone decide, and for validation: `val_images` of
    them at most."""

    def __init__(
        self, train: Images, val: Images, batch_size: int, workers: int = 0, seed: int = 0, val_images: int = 256
    ) -> None:
        super().__init__(Shuffled(train, seed), val, batch_size, workers, val_images)
