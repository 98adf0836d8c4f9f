"""Functa under Lightning: the outer loop of meta-learning, and the data module that feeds it."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from fourdperf.data.images import Images
from fourdperf.models.functa import Functa, fit, psnr
from fourdperf.train.data import Shuffled, loader
from fourdperf.train.schedule import learning_rate

__all__ = ["FunctaTraining", "ImageData", "signals"]


def signals(images: Tensor) -> Tensor:
    """Images `(B, H, W, C)` as what `fit` takes: `(B, H W, C)`."""
    return images.flatten(1, -2)


class FunctaTraining(LightningModule):
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
        values = {"val/loss": found.loss.mean(), "val/psnr": psnr(found.recon, target).mean()}
        self.log_dict(values, batch_size=len(target), on_epoch=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["model_config"] = self.model.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        ours, theirs = self.model.config.to_dict(), checkpoint.get("model_config")
        if theirs is not None and theirs != ours:
            different = [f"{name} {theirs.get(name)}" for name in ours if theirs.get(name) != ours[name]]
            raise ValueError(f"--ckpt: its model has {', '.join(different)}; give the options its run was started with")

    def configure_optimizers(self) -> dict:
        rates = [] if self.model.rates is None else [self.model.rates]
        others = [p for p in self.parameters() if all(p is not rate for rate in rates)]
        groups = [{"params": others}]
        groups += [{"params": rates, "lr": self.lr * self.rates_lr}] * bool(rates)
        optimizer = torch.optim.Adam(groups, lr=self.lr, fused=True)
        share = lambda step: learning_rate(step, self.max_steps, self.warmup_steps, self.lr, self.final_lr) / self.lr
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        if not norm.isfinite():
            # Gradients are averaged over the processes before this, so that all of them stop here.
            raise ValueError(
                f"step {self.global_step}: the gradient's norm is {norm.item()}; nothing was changed. The last "
                f"checkpoint is good; go on from it with a lower --lr or --precision 32-true, or look at the data"
            )
        self.log("train/grad_norm", norm)


class ImageData(LightningDataModule):
    """Images for training, in an order that the seed and the step alone decide, and for validation: `val_images` of
    them at most."""

    def __init__(
        self, train: Images, val: Images, batch_size: int, workers: int = 0, seed: int = 0, val_images: int = 256
    ) -> None:
        super().__init__()
        self.train, self.batch_size, self.workers = Shuffled(train, seed), batch_size, workers
        self.val = Subset(val, range(min(len(val), val_images)))

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        had = lambda: trainer.global_step * trainer.accumulate_grad_batches
        rank, ranks = trainer.global_rank, trainer.world_size
        return loader(self.train, self.batch_size, self.workers, rank, ranks, had, default_collate)

    def val_dataloader(self) -> DataLoader:
        mine = range(self.trainer.global_rank, len(self.val), self.trainer.world_size)
        return DataLoader(Subset(self.val, mine), self.batch_size, num_workers=self.workers)
