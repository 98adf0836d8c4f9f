"""What the commands that train share: the Trainer, checks of options, and one line for what goes wrong."""

import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourdperf.data.files import write_text

if TYPE_CHECKING:
    from lightning import Callback, LightningDataModule, LightningModule, Trainer

__all__ = [
    "check_at_least_one",
    "check_positive",
    "check_run",
    "check_shares",
    "fit_run",
    "make_trainer",
    "plain_error",
    "quiet",
]


def check_at_least_one(options: dict[str, Any], *names: str) -> None:
    """Raises ValueError for the first of these options that is given and less than 1."""
    for name in names:
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name}: wanted at least 1, got {options[name]}")


def check_positive(options: dict[str, Any], *names: str) -> None:
    """Raises ValueError for the first of these options that is given and not positive."""
    for name in names:
        if options[name] is not None and not options[name] > 0:
            raise ValueError(f"--{name}: wanted a positive number, got {options[name]}")


def check_shares(options: dict[str, Any], *names: str) -> None:
    """Raises ValueError for the first of these options that is not in [0, 1)."""
    for name in names:
        if not 0 <= options[name] < 1:
            raise ValueError(f"--{name}: wanted a number in [0, 1), got {options[name]}")


def check_run(command: str, options: dict[str, Any]) -> None:
    """Raises ValueError for an --optimizer that the --strategy does not allow, FileNotFoundError for a --ckpt that is
    none, and ImportError without lightning."""
    if options.get("optimizer") == "muon" and options["strategy"] == "fsdp":
        raise ValueError("--optimizer: wanted adamw with --strategy fsdp: muon needs whole matrices")
    if options["ckpt"] is not None and not options["ckpt"].is_file():
        raise FileNotFoundError(f"--ckpt: no such file: {options['ckpt']}")
    if importlib.util.find_spec("lightning") is None:
        raise ImportError(f"fourdperf {command} needs the package lightning: pip install 'fourdperf[train]'")


def quiet() -> None:
    """Without Lightning's advertisement and what it warns of in vain."""
    import lightning  # noqa: F401, its import sets the level

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # nothing here works in place on it


def make_trainer(
    options: dict[str, Any], max_steps: int, callbacks: Sequence["Callback"], model: str, items: str
) -> "Trainer":
    """A Trainer that validates every --val_every optimiser steps, shows a progress bar, and writes last.ckpt, model,
    train.csv, val.csv and, where it is installed, TensorBoard's logs to --out.

    callbacks: those of the model. model: its family. items: what a batch is made of.
    """
    from lightning import Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.strategies import ModelParallelStrategy

    from fourdperf.train.callbacks import AtomicCheckpoints, Checkpoints, Curves

    out, strategy, devices, nodes = options["out"], options["strategy"], options["devices"], options.get("num_nodes", 1)
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(devices * nodes, 1, save_distributed_checkpoint=False)
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    return Trainer(
        accelerator=options["accelerator"],
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=options["precision"],
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options["accumulate_grad_batches"],
        val_check_interval=options["val_every"] * options["accumulate_grad_batches"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=options["log_every"],
        logger=TensorBoardLogger(out, name="tensorboard", version="") if tensorboard else False,
        callbacks=[
            Curves(out, options["log_every"], items),
            Checkpoints(out, options["save_every"], options["minutes"]),
            TQDMProgressBar(options["log_every"]),
            *callbacks,
        ],
        plugins=[AtomicCheckpoints(model)],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def fit_run(
    trainer: "Trainer", module: "LightningModule", data: "LightningDataModule", options: dict[str, Any], *told: str
) -> None:
    """Says what is about to be done, in lines, and does it, from --ckpt if there is one. A run that begins writes its
    options to options.json.

    Raises:
        FileExistsError: a run that begins would write over another's checkpoint.
        OSError, ValueError: the run failed.
    """
    last = options["out"] / "last.ckpt"
    if trainer.is_global_zero:
        if options["ckpt"] is None and last.exists():
            raise FileExistsError(
                f"--out: {options['out']} holds a run; go on with --ckpt {last}, or give another folder"
            )
        print(*told, sep="\n")
        if options["ckpt"] is None or not (options["out"] / "options.json").exists():
            plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
            write_text(options["out"] / "options.json", json.dumps(plain, indent=2) + "\n")
    try:
        trainer.fit(module, data, ckpt_path=options["ckpt"], weights_only=True)
    except (ValueError, OSError) as error:
        raise plain_error(error) from error
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        there = last if last.exists() else options["ckpt"]
        then = f"go on with --ckpt {there}" if there else f"the first checkpoint comes at step {options['save_every']}"
        print(f"stopped after step {trainer.global_step}; {then}", file=sys.stderr)
        raise KeyboardInterrupt from stop


def plain_error(error: Exception) -> Exception:
    """The error of a worker without the traceback that torch puts into its message."""
    text = str(error)
    if "Original Traceback" not in text:
        return error
    kind = next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))
    return kind(text.strip().splitlines()[-1].partition(": ")[2])
