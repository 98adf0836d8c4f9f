"""``fourdperf train functa_classifier``: learn to tell images apart from nothing but the latents of their fields."""

import json
import time
from pathlib import Path
from typing import Any, Literal

from fourdperf.cli.training import (
    check_at_least_one,
    check_positive,
    check_run,
    check_shares,
    fit_run,
    make_trainer,
    quiet,
)
from fourdperf.data.files import output_folder, write_text

__all__ = ["functa_classifier"]

SMALL = {"hidden_size": 128, "num_layers": 3, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {"digits": SMALL, "mnist": SMALL}


def functa_classifier(
    functaset: Path = Path("functaset"),
    on: Literal["latents", "pixels"] = "latents",
    data_path: Path | None = None,
    model: dict[str, Any] | None = None,
    normalisation: Literal["dataset", "factor"] = "dataset",
    batch_size: int = 128,
    max_epochs: int = 20,
    max_steps: int | None = None,
    minutes: float | None = None,
    lr: float = 1e-3,
    final_lr: float = 1e-5,
    warmup_steps: int | None = None,
    weight_decay: float = 0.1,
    label_smoothing: float = 0.1,
    ema: float = 0.999,
    ema_warmup: bool = True,
    clip: float = 1.0,
    divide_gradient: bool = False,
    in_memory: bool = True,
    devices: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("functa_classifier_run"),
    seed: int = 0,
    workers: int = 0,
    log_every: int = 20,
    val_every: int = 200,
    save_every: int = 200,
) -> None:
    """Trains a classifier on a functaset, or for comparison on the pixels that it was fitted to.

    Writes to the folder --out: results.json (accuracy on val and test), last.ckpt (everything, to go on from with
    --ckpt), model (config and averaged weights), normalisation.json, train.csv, val.csv, TensorBoard logs where that is
    installed, and options.json.

    Args:
        functaset: A folder of fourdperf functaset create.
        on: latents; or pixels, the very images (and changed copies) of the functaset, each cell of the latent map
            replaced by its patch of pixels, with everything else the same.
        data_path: Where the images are, for pixels, if they have moved.
        model: Fields of the classifier's config: --model.kind mlp, transformer or resnet, --model.hidden_size,
            --model.num_layers, --model.num_heads, --model.mlp_size, --model.dropout, --model.normalizing_factor.
        normalisation: dataset makes each channel's mean 0 and deviation 1 over the training signals; factor divides all
            by model.normalizing_factor, by default their deviation, as the JAX port does.
        batch_size: Signals per process and batch.
        max_epochs: Passes over the training signals.
        max_steps: Optimiser steps, in place of --max_epochs.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        lr: The peak learning rate, of AdamW.
        final_lr: The learning rate at the last step.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of AdamW.
        label_smoothing: The share of a label that goes to all classes alike.
        ema: How much of the parameters' moving average stays in a step; 0 for no averaging.
        ema_warmup: Average over fewer steps at the beginning.
        clip: The gradient's largest L2 norm.
        divide_gradient: Divide the gradient by the batch size once more, as the JAX port does.
        in_memory: Read all latents at the start, and not from the file when they are needed.
        devices: Processes, one per device.
        accelerator: Where to train.
        strategy: How several devices share the work.
        precision: Number type of the computation.
        accumulate_grad_batches: Batches per optimiser step.
        ckpt: The checkpoint to go on from; the other options must be those of its run.
        out: The folder for the results.
        seed: Of the initial weights, of the signals' order and of dropout.
        workers: Processes that read signals, per device.
        log_every: Steps from one line of train.csv to the next.
        val_every: Steps from one validation to the next.
        save_every: Steps from one checkpoint to the next.
    """
    options = dict(locals())
    counts = ("batch_size", "max_epochs", "max_steps", "devices", "accumulate_grad_batches")
    check_at_least_one(options, *counts, "log_every", "val_every", "save_every")
    check_positive(options, "lr", "final_lr", "clip")
    check_shares(options, "label_smoothing", "ema")
    check_run("train", options)
    quiet()
    from lightning import seed_everything

    from fourdperf.models.latent_classifier import MODEL, Config, LatentClassifier
    from fourdperf.train.latent_classifier import (
        ClassifierTraining,
        SignalData,
        load_classifier,
        score,
        write_statistics,
    )
    from fourdperf.train.schedule import warmup_within

    seed_everything(seed, verbose=False)
    train, val, test = (_signals(functaset, split, on, data_path, in_memory) for split in ("train", "val", "test"))
    fields = {**MODELS.get(train.recipe.dataset, {}), **(model or {})}
    mean, std, factor = _statistics(train, normalisation)
    if factor is not None:
        fields = {"normalizing_factor": factor, **fields}
    sizes = {"latent_size": train.shape[0], "latent_channels": train.shape[-1], "num_classes": _classes(train)}
    for name, value in sizes.items():
        if fields.get(name, value) != value:
            raise ValueError(f"--model.{name}: wanted {value}, as the {on} have it, got {fields[name]}")
    network = LatentClassifier(Config.from_dict({**fields, **sizes}))
    if max_steps is None:
        max_steps = max(1, max_epochs * len(train) // (batch_size * devices * accumulate_grad_batches))
    warmup = warmup_within(max_steps) if warmup_steps is None else warmup_steps
    module = ClassifierTraining(
        network,
        max_steps,
        mean=mean,
        std=std,
        lr=lr,
        final_lr=final_lr,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        smoothing=label_smoothing,
        ema=ema,
        ema_warmup=ema_warmup,
        clip=clip,
        divide_gradient=divide_gradient,
        seed=seed,
    )
    parameters = sum(p.numel() for p in network.parameters())
    start = time.monotonic()
    with output_folder(out):
        trainer = make_trainer(options, max_steps, [], MODEL, "signals")
        if trainer.is_global_zero:
            write_statistics(out, mean, std)
        told = (
            f"{network.config.kind}, {parameters / 1e3:.0f} k parameters, on {on} of {train.recipe.dataset}: "
            f"{len(train):,} signals {' x '.join(map(str, train.shape))}; {max_steps} steps; results in {out}"
        )
        fit_run(trainer, module, SignalData(train, val, batch_size, workers, seed), options, told)
    if trainer.is_global_zero:
        found = load_classifier(out)
        results = {f"{name}_accuracy": score(found, signals) for name, signals in (("val", val), ("test", test))}
        results |= {"on": on, "kind": network.config.kind, "parameters": parameters, "steps": trainer.global_step}
        results |= {"train_signals": len(train), "seconds": round(time.monotonic() - start, 1)}
        write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
        print(
            f"{trainer.global_step} steps done; right on {100 * results['val_accuracy']:.2f}% of {len(val):,} val and "
            f"{100 * results['test_accuracy']:.2f}% of {len(test):,} test {on}; wrote {out}"
        )


def _signals(folder: Path, split: str, on: str, data_path: Path | None, in_memory: bool):
    """A split of the functaset, or of the images that it was fitted to."""
    from fourdperf.cli.functaset import load_functa, open_recipe_images
    from fourdperf.data.functaset import PixelMaps, open_functaset, read_recipe

    signals = open_functaset(folder, split, in_memory and on == "latents")
    if on == "latents":
        return signals
    root = read_recipe(folder)["root"] if data_path is None else data_path
    return PixelMaps(signals, open_recipe_images(signals.recipe, split, root, load_functa(folder)), split)


def _statistics(train, normalisation: str):
    """The mean and deviation to standardise with, (c,) each, and the factor to divide by, if any."""
    import torch

    # channels that hardly change, such as pixels of a border, are not blown up
    std = train.std.clamp(min=max(1e-12, 0.05 * float(train.std.square().mean().sqrt())))
    if normalisation == "dataset":
        return train.mean, std, None
    overall = (train.std.square() + train.mean.square()).mean() - train.mean.mean().square()
    return torch.zeros_like(std), torch.ones_like(std), float(overall.clamp(min=1e-12).sqrt())


def _classes(train) -> int:
    classes = int(train.labels.max()) + 1
    if classes < 2:
        raise ValueError(f"{train.recipe.dataset}: wanted labels of at least two classes, got one")
    return classes
