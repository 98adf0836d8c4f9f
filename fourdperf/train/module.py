"""What runs of all models share under Lightning: checks of checkpoints and gradients, the learning rate, averaged
weights, the data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from fourdperf.train.data import loader
from fourdperf.train.schedule import learning_rate

__all__ = ["ADVICE", "ModelTraining", "RunData", "average_into", "val_batches"]

SAME_OPTIONS = "give the options that its run was started with"
ADVICE = "The last checkpoint is good; go on from it with a lower --lr or --precision 32-true, or look at the data"


class ModelTraining(LightningModule):
    """A module that trains `model`, which has a config, to step `max_steps`; subclasses set these and lr, final_lr and
    warmup_steps (`fourdperf.train.schedule.learning_rate`).

    PARTS: what decides, in words, on parts of the state that a run may have or not; by the beginnings of their names.
    """

    PARTS: Mapping[str, str] = {}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["model_config"] = self.model.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raises ValueError for the checkpoint of another model, or of a run with other parts or another optimiser."""
        config, theirs = self.model.config, checkpoint.get("model_config") or {}
        ours = config.to_dict()
        if theirs:  # a field that is younger than the run had its usual value; where that is None it is not compared
            known = (bool, int, float, str)
            theirs = {f.name: f.default for f in fields(config) if isinstance(f.default, known)} | theirs
        different = [f"{name} {theirs[name]}" for name in ours if name in theirs and theirs[name] != ours[name]]
        if different:
            raise ValueError(f"--ckpt: its model has {', '.join(different)}; {SAME_OPTIONS}")
        different = self._other_parts(checkpoint)
        if different:
            raise ValueError(f"--ckpt: it differs in {', '.join(different)}; {SAME_OPTIONS}")

    def _other_parts(self, checkpoint: dict) -> list[str]:
        found = []
        if "state_dict" in checkpoint:  # under FSDP it has been loaded before
            states = self.state_dict(), checkpoint["state_dict"]
            ours, theirs = ({name: x.shape for name, x in state.items()} for state in states)
            for name in {**ours, **theirs}:
                if ours.get(name) != theirs.get(name):
                    found.append(next((what for part, what in self.PARTS.items() if name.startswith(part)), name))
        muon = getattr(self, "optimizer", None) == "muon"
        if any(("parts" in state) != muon for state in checkpoint.get("optimizer_states", ())[:1]):
            found.append("--optimizer")
        return list(dict.fromkeys(found))

    def seed_batch(self, number: int) -> None:
        """Torch's generators for batch `number` of this process, from the run's seed, so that a resumed run repeats an
        uninterrupted one."""
        torch.manual_seed(((self.seed * 1_000_003 + number) * 65_537 + self.global_rank) % 2**64)

    def scheduled(self, optimizer: torch.optim.Optimizer) -> dict:
        """What `configure_optimizers` gives: every group's rate follows the schedule from its own peak."""
        share = lambda step: learning_rate(step, self.max_steps, self.warmup_steps, self.lr, self.final_lr) / self.lr
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def log_validation(self, values: Mapping[str, Tensor], count: float) -> None:
        """Log means over a batch of a validation of `count` items, to be averaged over the items of all batches and
        processes."""
        values = {f"val/{name}": value for name, value in values.items()}
        # a float: Lightning averages the count over processes too, and truncates the mean of integers
        self.log_dict(values, batch_size=float(count), on_epoch=True, sync_dist=True)

    def log_norm(self, norm: Tensor, name: str = "grad_norm") -> None:
        """Log a gradient's norm; raises ValueError where it is not finite, before anything has moved.

        Gradients are averaged over the processes before this, so that all of them stop here.
        """
        if not norm.isfinite():
            raise ValueError(f"step {self.global_step}: {self.not_finite(norm)}; nothing was changed. {ADVICE}")
        self.log(f"train/{name}", norm)

    def not_finite(self, norm: Tensor) -> str:
        """What is wrong, in words."""
        return f"the gradient's norm is {norm.item()}"


def average_into(average: nn.Module, model: nn.Module, share: float) -> None:
    """Moving averages of a model's parameters: `share` of each stays. Buffers are copied."""
    get_ema_multi_avg_fn(share)(list(average.parameters()), [p.detach() for p in model.parameters()], None)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


class RunData(LightningDataModule):
    """Items for training by number, without end, in an order of their own; and the first `val_items` of `val`."""

    def __init__(
        self,
        train: Dataset,
        val: Dataset,
        batch_size: int,
        workers: int = 0,
        val_items: int = 256,
        collate: Callable = default_collate,
    ) -> None:
        super().__init__()
        self.train, self.batch_size, self.workers, self.collate = train, batch_size, workers, collate
        self.val = Subset(val, range(min(len(val), val_items)))

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        had = lambda: trainer.global_step * trainer.accumulate_grad_batches
        rank, ranks = trainer.global_rank, trainer.world_size
        return loader(self.train, self.batch_size, self.workers, rank, ranks, had, self.collate)

    def val_dataloader(self) -> DataLoader:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        batches = val_batches(len(self.val), self.batch_size, rank, ranks)
        return DataLoader(self.val, batch_sampler=batches, num_workers=self.workers, collate_fn=self.collate)


def val_batches(items: int, batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """Every `ranks`-th item, in batches. All processes get equally many batches, since sharded parameters (FSDP) need
    every process in each pass; so a batch may have two items where batch_size is one."""
    if items < ranks:
        raise ValueError(f"val: wanted at least one item for each of {ranks} processes, got {items}")
    count = min(math.ceil(math.ceil(items / ranks) / batch_size), items // ranks)
    return [part.tolist() for part in np.array_split(np.arange(rank, items, ranks), count)]
