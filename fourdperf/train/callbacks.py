"""What a training run leaves behind: checkpoints that are whole, curves that survive an interruption."""

import csv
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fourdperf.data.chart import line_chart
from fourdperf.data.files import atomic_path, write_text
from fourdperf.data.video import write_png
from fourdperf.models.checkpoint import Entry, write_checkpoint
from fourdperf.models.d4rt import MODEL
from fourdperf.train.checkpoint import read_run

__all__ = ["AtomicCheckpoints", "Checkpoints", "Curves", "RunPictures", "curve_picture", "write_curves"]


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all, and read without unpickling code; the network alone, of the
    family `model`, is written beside each, to the folder `model`, for `from_pretrained`."""

    def __init__(self, model: str = MODEL) -> None:
        super().__init__()
        self.model = model

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options=None) -> None:
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
        weights = {
            name.removeprefix("model."): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
        write_checkpoint(Path(path).parent / "model", self.model, checkpoint["model_config"], entries, weights.values())

    def load_checkpoint(self, path: str | os.PathLike, map_location=None, weights_only=None) -> dict[str, Any]:
        return read_run(Path(path), map_location or "cpu")


class Checkpoints(Callback):
    """Writes `out`/last.ckpt (everything, to go on from) every so many optimiser steps and at the end, which is at
    max_steps or after so many minutes."""

    def __init__(self, out: Path, every: int, minutes: float | None = None):
        self.out, self.every = out, every
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.saved = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.saved:  # in the middle of an accumulation, or this step is on disk
            return
        late = self.deadline is not None and time.monotonic() > self.deadline
        if trainer.world_size > 1 and self.deadline is not None:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)
        if late:
            trainer.should_stop = True
        if late or step % self.every == 0 or step >= trainer.max_steps:
            trainer.save_checkpoint(self.out / "last.ckpt", weights_only=False)
            self.saved = step


class Curves(Callback):
    """Appends every `every`-th step's metrics to `out`/train.csv and every validation's to `out`/val.csv. A resumed run
    first drops what a killed one wrote after its last checkpoint. `items` are what a batch is made of."""

    def __init__(self, out: Path, every: int, items: str = "clips"):
        self.out, self.every, self.items = out, every, items
        self.since = (0, 0.0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            for name in ("train.csv", "val.csv"):
                _drop_after(self.out / name, trainer.global_step)
        self.since = (trainer.global_step, time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step <= self.since[0] or step % self.every:
            return
        now = time.monotonic()
        seen = (step - self.since[0]) * trainer.accumulate_grad_batches * trainer.world_size * len(batch[0])
        row = _scalars(trainer.callback_metrics, "train/")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row |= {"lr": rate, f"{self.items}_per_second": seen / (now - self.since[1])}
        self.since = (step, now)
        if trainer.is_global_zero:
            _append(self.out / "train.csv", step, row)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            _append(self.out / "val.csv", trainer.global_step, _scalars(trainer.callback_metrics, "val/"))
        self.since = (trainer.global_step, time.monotonic())


def curve_picture(out: Path, column: str, title: str, y_label: str = "") -> np.ndarray:
    """A column of a run's train.csv and val.csv over its steps, of one of them where the other lacks it."""
    curves = {}
    for name in ("train", "val"):
        path = out / f"{name}.csv"
        if path.exists():
            with open(path, newline="") as file:
                rows = [(float(row["step"]), float(row[column])) for row in csv.DictReader(file) if column in row]
            if rows:
                curves[name] = tuple(zip(*rows))
    return line_chart(curves, title=title, x_label="step", y_label=y_label)


def write_curves(out: Path, **columns: tuple[str, str]) -> None:
    """`out`/NAME.png for each of these columns that the run's train.csv or val.csv has rows of: name=(title, unit)."""
    files = [path.read_text() for path in (out / "train.csv", out / "val.csv") if path.exists()]
    heads = [head for head, _, rows in (file.partition("\n") for file in files) if rows]
    known = {name for head in heads for name in head.split(",")}
    for name, (title, unit) in columns.items():
        if name in known:
            write_png(out / f"{name}.png", curve_picture(out, name, title, unit))


class RunPictures(Callback):
    """At every validation what `pictures` gives, to `out`/pictures and TensorBoard; the last ones also to `out`, where
    `finish` adds to them. Subclasses define the two."""

    def __init__(self, out: Path) -> None:
        self.out, self.drawn = out, -1

    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        """By name."""
        return {}

    def finish(self, module: LightningModule) -> None:
        """After the last step."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.drawn != trainer.global_step:
            self._draw(trainer, module)
        if not trainer.is_global_zero:
            return
        for path in (self.out / "pictures").glob(f"*_{self.drawn:06d}.png"):
            (self.out / f"{path.stem.rpartition('_')[0]}.png").write_bytes(path.read_bytes())
        self.finish(module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        self.drawn = trainer.global_step
        found = self.pictures(module)  # by every process: of a model that is sharded each has a part
        if not trainer.is_global_zero:
            return
        for name, picture in found.items():
            write_png(self.out / "pictures" / f"{name}_{self.drawn:06d}.png", picture)
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_image"):
                    logger.experiment.add_image(f"val/{name}", picture, self.drawn, dataformats="HWC")


def _scalars(metrics: dict[str, torch.Tensor], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def _append(path: Path, step: int, row: dict[str, float]) -> None:
    row = {"step": step, **row}
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow([f"{value:.9g}" for value in row.values()])


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    head, *lines = path.read_text().splitlines(keepends=True) or [""]
    if not head.endswith("\n"):  # cut off before a first line was whole
        path.unlink()
        return
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
    write_text(path, "".join([head, *kept]))
