"""``fourdperf train``: train a model, from the command line or a YAML file, and go on after any interruption."""

import json
from pathlib import Path
from typing import Any, Literal

from fourdperf.data.files import output_folder, write_text

__all__ = ["d4rt", "train"]

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Strategy = Literal["auto", "ddp", "fsdp"]


def d4rt(
    train_data_path: str | None = None,
    val_data_path: str | None = None,
    num_queries: int = 2048,
    num_frames: int = 8,
    img_size: int = 256,
    batch_size: int = 1,
    variant: str = "tiny",
    model: dict[str, Any] | None = None,
    init: Path | None = None,
    lr: float = 1e-4,
    final_lr: float = 1e-6,
    warmup_steps: int | None = None,
    weight_decay: float = 0.03,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    minutes: float | None = None,
    devices: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("d4rt_run"),
    seed: int = 0,
    scenes: int | None = None,
    cache: Path | None = None,
    workers: int = 1,
    photometric: bool = True,
    crop: float = 1.0,
    zoom: float = 0.0,
    stride: int = 1,
    log_every: int = 20,
    val_every: int = 1000,
    val_clips: int = 32,
    save_every: int = 500,
) -> None:
    """Trains D4RT on point queries.

    Writes to the folder --out: last.ckpt (everything, to go on from with --ckpt), model (config and weights for
    from_pretrained), train.csv and val.csv, TensorBoard logs if that is installed, and options.json.

    Args:
        train_data_path: The clips to train on; without it, synthetic scenes without end.
        val_data_path: The clips to validate on; without it, held-out synthetic scenes.
        num_queries: Queries per clip.
        num_frames: Frames per clip.
        img_size: Height and width that frames are squeezed to.
        batch_size: Clips per process and batch.
        variant: The size of the model: tiny, S, B, L, H or g.
        model: Fields of the model's config that differ from the variant's.
        init: A folder with a model to start from, in place of random weights.
        lr: The peak learning rate.
        final_lr: The learning rate at --max_steps.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of AdamW.
        max_epochs: Passes over the training clips; of endless scenes, over 1000 batches.
        max_steps: Optimiser steps, in place of --max_epochs; by default 100 epochs.
        minutes: Stop after this time with a checkpoint; the learning rate still follows --max_steps.
        devices: Processes, one per device.
        accelerator: Where to train.
        strategy: How several devices share the work.
        precision: Number type of the matrix products.
        accumulate_grad_batches: Batches per optimiser step.
        ckpt: The checkpoint to go on from; the other options must be those of its run.
        out: The folder for the results.
        seed: Of the initial weights and of all random choices.
        scenes: How many different synthetic scenes to train on; by default a new one for every clip.
        cache: A folder that keeps rendered scenes; only useful with --scenes.
        workers: Processes that prepare clips, per device.
        photometric: Change colours and blur at random.
        crop: Crop frames at random, to this share of their area at least; the paper has 0.3.
        zoom: The probability that the crop changes over the clip; the paper has 0.05.
        stride: The largest step between the frames of a clip.
        log_every: Steps from one line of train.csv to the next.
        val_every: Steps from one validation to the next.
        val_clips: Synthetic clips per validation.
        save_every: Steps from one checkpoint to the next.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    from lightning import Trainer, seed_everything
    from lightning.pytorch.callbacks import TQDMProgressBar

    from fourdperf.models.d4rt import D4RT, Config
    from fourdperf.train.callbacks import AtomicCheckpoints, Checkpoints, Curves
    from fourdperf.train.d4rt import ClipData, D4RTTraining
    from fourdperf.train.schedule import warmup_within

    for name in ("batch_size", "accumulate_grad_batches", "log_every", "val_every", "save_every", "devices"):
        if options[name] < 1:
            raise ValueError(f"--{name}: wanted at least 1, got {options[name]}")
    if ckpt is not None and not ckpt.is_file():
        raise FileNotFoundError(f"--ckpt: no such file: {ckpt}")
    seed_everything(seed, verbose=False)
    if init is not None:
        network = D4RT.from_pretrained(init)
    else:
        sizes = {"num_frames": num_frames, "image_size": img_size}
        network = D4RT(Config.from_variant(variant, **{**sizes, **(model or {})}))
    clips = _clips(train_data_path, "train", options)
    per_epoch = scenes or 1000 * batch_size * devices
    if max_steps is None:
        max_steps = max(1, (max_epochs or 100) * per_epoch // (batch_size * devices * accumulate_grad_batches))
    warmup = warmup_within(max_steps) if warmup_steps is None else warmup_steps
    module = D4RTTraining(
        network,
        max_steps,
        lr=lr,
        final_lr=final_lr,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        seed=seed,
    )
    data = ClipData(clips, _clips(val_data_path, "val", options), batch_size, workers)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"D4RT, {parameters / 1e6:.1f} M parameters; {max_steps} steps, warm-up {warmup}; results in {out}")
    with output_folder(out):
        if ckpt is None:
            plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
            write_text(out / "options.json", json.dumps(plain, indent=2) + "\n")
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            precision=precision,
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate_grad_batches,
            val_check_interval=val_every * accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=log_every,
            logger=_loggers(out),
            callbacks=[Curves(out, log_every), Checkpoints(out, save_every, minutes), TQDMProgressBar(log_every)],
            plugins=[AtomicCheckpoints()],
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, data, ckpt_path=ckpt)
    print(f"{trainer.global_step} steps done; wrote {out / 'last.ckpt'} and {out / 'model'}")


train = {"d4rt": d4rt}


def _clips(path: str | None, split: str, options: dict[str, Any]):
    from fourdperf.data.augment import PhotometricConfig, ViewConfig
    from fourdperf.data.synthetic import SyntheticClips

    training = split == "train"
    size = (options["img_size"], options["img_size"])
    clips = SyntheticClips(
        split,
        options["num_queries"],
        options["num_frames"],
        size,
        seed=options["seed"],
        scenes=options.get("scenes") if training else options["val_clips"],
        cache=options.get("cache"),
        colours=PhotometricConfig() if training and options["photometric"] else None,
        view=ViewConfig(crop=options["crop"], zoom=options["zoom"], stride=options["stride"]) if training else None,
    )
    return clips


def _loggers(out: Path) -> list:
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return [TensorBoardLogger(out, name="tensorboard", version="")]
    except ModuleNotFoundError:
        return []
