"""Classifiers of functasets under Lightning: AdamW, label smoothing, averaged weights, standardised latents."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from fourdperf.data.files import write_text
from fourdperf.data.synthetic import clip_generator
from fourdperf.models.latent_classifier import LatentClassifier
from fourdperf.train.data import BatchNumbers
from fourdperf.train.module import ModelTraining, average_into
from fourdperf.train.schedule import adamw

__all__ = ["ClassifierTraining", "Passes", "SignalData", "Standardised", "load_classifier", "score", "write_statistics"]

STATISTICS = "normalisation.json"


class Standardised(nn.Module):
    """A classifier of latents `(B, s, s, c)` that sees (latent - mean) / std, by channel: `(c,)` each."""

    def __init__(self, model: LatentClassifier, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, latents: Tensor) -> Tensor:
        return self.model((latents - self.mean) / self.std)


class ClassifierTraining(ModelTraining):
    """One classifier, its loss and its optimiser; batches are latents `(B, s, s, c)` and labels `(B,)`.

    network: what is trained. `model` is the exponential moving average of its parameters, which validation uses and a
    run leaves behind.
    max_steps: where the learning rate falls from lr to `final_lr`, after `warmup_steps`.
    mean, std: `(c,)`, of the latents' channels; None leaves latents as they are.
    smoothing: the share of a label that goes to all classes alike.
    ema: how much of the average stays in a step. ema_warmup: but at most (1 + n) / (10 + n) in step n, so that the
    initial weights are soon forgotten.
    clip: the gradient's largest L2 norm.
    divide_gradient: divide the gradient of the mean loss by the batch's length once more, as the JAX port does. AdamW
    does not mind, but for its epsilon.
    seed: of dropout; step n of process r starts from a seed of its own.
    """

    def __init__(
        self,
        network: LatentClassifier,
        max_steps: int,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        lr: float = 1e-3,
        final_lr: float = 1e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.1,
        smoothing: float = 0.1,
        ema: float = 0.999,
        ema_warmup: bool = True,
        clip: float = math.inf,
        divide_gradient: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.model = network, LatentClassifier(network.config)
        self.model.load_state_dict(network.state_dict())
        self.model.requires_grad_(False)
        channels = network.config.latent_channels
        self.register_buffer("mean", torch.zeros(channels) if mean is None else mean.clone())
        self.register_buffer("std", torch.ones(channels) if std is None else std.clone())
        self.max_steps, self.lr, self.final_lr, self.warmup_steps = max_steps, lr, final_lr, warmup_steps
        self.weight_decay, self.smoothing, self.ema, self.ema_warmup = weight_decay, smoothing, ema, ema_warmup
        self.clip, self.divide_gradient, self.seed = clip, divide_gradient, seed

    def forward(self, latents: Tensor) -> Tensor:
        """Logits of the averaged parameters."""
        return self.model((latents - self.mean) / self.std)

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.length = len(batch[0])
        self.seed_batch(batch_idx)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        latents, labels = batch
        logits = self.network((latents - self.mean) / self.std)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        right = (logits.argmax(-1) == labels).float().mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": right}, batch_size=len(labels))
        return loss

    def optimizer_step(self, *arguments, **options) -> None:
        step = self.global_step  # from 0
        super().optimizer_step(*arguments, **options)
        ema = min(self.ema, (1 + step) / (10 + step)) if self.ema_warmup else self.ema
        average_into(self.model, self.network, ema)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        latents, labels = batch
        logits = self(latents).float()
        values = {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(-1) == labels).float().mean()}
        self.log_validation(values, len(labels))

    def configure_optimizers(self) -> dict:
        optimizer = adamw(self.network.parameters(), self.lr, self.weight_decay)
        return self.scheduled(optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.divide_gradient:
            torch._foreach_div_([p.grad for p in self.network.parameters() if p.grad is not None], self.length)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.log_norm(norm)


class Passes(Dataset):
    """A finite data set as an endless one, in batches: number i is item i mod n of pass i // n, each pass in an order
    of its own, and `passes[numbers]` is a batch. Its length is that of a pass."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed, self.last = dataset, seed, (-1, None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbers: Sequence[int]):
        return self.dataset[[self._place(number) for number in numbers]]

    def _place(self, number: int) -> int:
        visit, position = divmod(number, len(self.dataset))
        if self.last[0] != visit:
            generator = clip_generator(self.seed, 2**32 - 1 - visit)
            self.last = visit, torch.randperm(len(self.dataset), generator=generator)
        return int(self.last[1][position])


class SignalData(LightningDataModule):
    """Latents (or maps of pixels) to train on, in an order that the seed and the step alone decide, and to validate on.

    train, val: `fourdperf.data.functaset.Functaset` or `PixelMaps`, which give batches for lists of numbers.
    """

    def __init__(self, train: Dataset, val: Dataset, batch_size: int, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.train, self.val, self.batch_size, self.workers = Passes(train, seed), val, batch_size, workers

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        had = lambda: trainer.global_step * trainer.accumulate_grad_batches
        numbers = BatchNumbers(self.batch_size, trainer.global_rank, trainer.world_size, had)
        many = self.workers > 0
        return DataLoader(
            self.train,
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            persistent_workers=many,
            prefetch_factor=4 if many else None,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        mine = range(self.trainer.global_rank, len(self.val), self.trainer.world_size)
        return DataLoader(self.val, batch_size=None, sampler=BatchSampler(mine, self.batch_size, drop_last=False))


@torch.inference_mode()
def score(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> float:
    """The share of right answers of a classifier on a `Functaset` or `PixelMaps`."""
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(dataset), batch_size):
        latents, labels = dataset[start : start + batch_size]
        right += int((model(latents.to(device)).argmax(-1).cpu() == labels).sum())
    return right / len(dataset)


def write_statistics(out: Path, mean: Tensor, std: Tensor) -> None:
    """What `load_classifier` needs beside a run's model."""
    write_text(out / STATISTICS, json.dumps({"mean": mean.tolist(), "std": std.tolist()}) + "\n")


def load_classifier(run: Path) -> Standardised:
    """The averaged classifier of a run's folder, in eval mode, with the statistics of what it was trained on.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: its model or its statistics are damaged.
    """
    file = run / STATISTICS
    if not file.is_file():
        raise FileNotFoundError(f"no {STATISTICS} in {run}; fourdperf train functa_classifier writes one")
    try:
        found = json.loads(file.read_bytes())
        mean, std = (torch.tensor(found[name], dtype=torch.float32) for name in ("mean", "std"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: wanted mean and std, lists of numbers: {error}") from error
    model = LatentClassifier.from_pretrained(run / "model")
    if not mean.shape == std.shape == (model.config.latent_channels,):
        raise ValueError(f"{file}: wanted {model.config.latent_channels} numbers each, got {len(mean)} and {len(std)}")
    return Standardised(model, mean, std).eval()
