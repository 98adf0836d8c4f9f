"""``fourdperf train``: train a model, from the command line or a YAML file, and go on after any interruption."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fourdperf.cli.train_functa import functa_classifier
from fourdperf.cli.train_image_mae import image_mae
from fourdperf.cli.train_niso import niso
from fourdperf.cli.train_token_generator import token_generator
from fourdperf.cli.train_tokenizer import tokenizer
from fourdperf.cli.training import check_at_least_one, check_positive, check_run, fit_run, make_trainer, quiet
from fourdperf.data.files import output_folder

if TYPE_CHECKING:
    from lightning import Trainer
    from torch.utils.data import Dataset

__all__ = ["d4rt", "train"]

BATCHES_PER_EPOCH = 1000  # where clips have no end


def d4rt(
    train_data_path: str | None = None,
    val_data_path: str | None = None,
    num_queries: int = 2048,
    num_frames: int = 8,
    img_size: int = 256,
    patch_img_size: int | None = None,
    batch_size: int = 1,
    variant: str = "tiny",
    model: dict[str, Any] | None = None,
    init: Path | None = None,
    lr: float = 1e-4,
    final_lr: float = 1e-6,
    warmup_steps: int | None = None,
    weight_decay: float = 0.03,
    optimizer: Literal["adamw", "muon"] = "adamw",
    max_epochs: int = 100,
    max_steps: int | None = None,
    minutes: float | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path = Path("d4rt_run"),
    seed: int = 0,
    scenes: int | None = None,
    cache: Path | None = None,
    intrinsics: Literal["normalised", "pixels", "pixels_integer_centres"] = "pixels",
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
    from_pretrained), train.csv, val.csv, pictures, TensorBoard logs where that is installed, and options.json.

    Args:
        train_data_path: A folder of videos in a known layout, or module:name of a data set of your own; without it,
            synthetic scenes without end.
        val_data_path: The same to validate on; without it, held-out synthetic scenes.
        num_queries: Queries per clip.
        num_frames: Frames per clip.
        img_size: Height and width that frames are squeezed to.
        patch_img_size: Height and width of the frames that the queries' colour patches are cut from, for fourdperf
            reconstruct --patch_resolution video; by default the frames themselves.
        batch_size: Clips per process and batch.
        variant: The size of the model, tiny, S, B, L, H or g.
        model: Fields of the model's config that differ from the variant's.
        init: A folder with a model to start from, or of a run, in place of random weights and --variant; or a 4DS
            folder or VideoMAE weights (a folder of transformers, .safetensors, .pth) for the encoder of --variant.
        lr: The peak learning rate.
        final_lr: The learning rate at the last step.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of either optimiser.
        optimizer: adamw as in the paper, or muon for the blocks' matrices and adamw for the rest: a small model learns
            in fewer steps, with --lr of about 2e-3.
        max_epochs: Passes over the training clips; a pass over clips without end has 1000 batches.
        max_steps: Optimiser steps, in place of --max_epochs.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        devices: Processes per node, one per device.
        num_nodes: Nodes, under torchrun or SLURM.
        accelerator: Where to train.
        strategy: How several devices share the work; fsdp also shares out the weights.
        precision: Number type of the computation.
        accumulate_grad_batches: Batches per optimiser step.
        ckpt: The checkpoint to go on from; the other options must be those of its run.
        out: The folder for the results.
        seed: Of the initial weights and of all random choices.
        scenes: How many different synthetic scenes to train on; by default a new one for every clip.
        cache: A folder that keeps rendered scenes; only useful with --scenes.
        intrinsics: The unit of intrinsics in the dictionaries of a data set of your own.
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
    options = dict(locals())
    _check(options)
    quiet()
    from lightning import seed_everything

    from fourdperf.convert.d4rt_encoder import init_encoder
    from fourdperf.models.d4rt import D4RT, Config
    from fourdperf.train.d4rt import ClipData, D4RTTraining
    from fourdperf.train.schedule import warmup_within

    seed_everything(seed, verbose=False)
    report = None
    if init is not None and (init / "model").is_dir():  # a run
        init = init / "model"
    if init is not None and _is_d4rt(init):
        network = D4RT.from_pretrained(init)
        if Config.from_dict({**network.config.to_dict(), **(model or {})}) != network.config:
            raise ValueError(f"--model: wanted the fields of the D4RT in {init}, or none, got {model}")
    else:
        sizes = {"num_frames": num_frames, "image_size": img_size}
        network = D4RT(Config.from_variant(variant, **{**sizes, **(model or {})}))
        if init is not None:
            report = init_encoder(network, init)
    clips, val = _clips(train_data_path, "train", options), _clips(val_data_path, "val", options)
    if max_steps is None:
        batches = _batches(clips, batch_size * devices * num_nodes)
        max_steps = max(1, max_epochs * batches // accumulate_grad_batches)
    warmup = warmup_within(max_steps) if warmup_steps is None else warmup_steps
    rates = {"lr": lr, "final_lr": final_lr, "warmup_steps": warmup, "weight_decay": weight_decay}
    module = D4RTTraining(network, max_steps, **rates, optimizer=optimizer, seed=seed)
    parameters = sum(p.numel() for p in network.parameters())
    with output_folder(out):
        trainer = _trainer(options, max_steps, val)
        told = [f"D4RT, {parameters / 1e6:.1f} M parameters; {max_steps} steps, warm-up {warmup}; results in {out}"]
        told += [] if report is None else [report]
        fit_run(trainer, module, ClipData(clips, val, batch_size, workers), options, *told)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps done; wrote {out / 'last.ckpt'} and {out / 'model'}")


train = {
    "d4rt": d4rt,
    "functa_classifier": functa_classifier,
    "image_mae": image_mae,
    "niso": niso,
    "tokenizer": tokenizer,
    "token_generator": token_generator,
}


def _check(options: dict[str, Any]) -> None:
    sizes = (
        "num_queries",
        "num_frames",
        "img_size",
        "patch_img_size",
        "batch_size",
        "max_epochs",
        "devices",
        "num_nodes",
    )
    check_at_least_one(options, *sizes, "accumulate_grad_batches", "log_every", "val_every", "val_clips", "save_every")
    check_at_least_one(options, "max_steps", "stride")
    check_positive(options, "lr")
    if not 0 < options["crop"] <= 1:
        raise ValueError(f"--crop: wanted a share in (0, 1], got {options['crop']}")
    check_run("train", options)


def _is_d4rt(init: Path) -> bool:
    from fourdperf.models.checkpoint import CONFIG
    from fourdperf.models.d4rt import MODEL

    try:
        return json.loads((init / CONFIG).read_bytes()).get("model") == MODEL
    except (OSError, ValueError, AttributeError):
        return False


def _clips(path: str | None, split: Literal["train", "val"], options: dict[str, Any]) -> "Dataset":
    from fourdperf.data.augment import PhotometricConfig, ViewConfig
    from fourdperf.data.synthetic import SyntheticClips
    from fourdperf.data.video_dataset import ClipConfig
    from fourdperf.train.data import open_clips

    training, size = split == "train", options["img_size"]
    view = ViewConfig(**{name: options[name] for name in ("crop", "zoom", "stride")}) if training else ViewConfig()
    colours = PhotometricConfig() if training and options["photometric"] else None
    patch = None if options["patch_img_size"] is None else (options["patch_img_size"],) * 2
    queries, frames, seed = options["num_queries"], options["num_frames"], options["seed"]
    if path is not None:
        config = ClipConfig(queries, frames, size, view, colours, patch)
        return open_clips(path, config, seed=seed, endless=training, intrinsics=options["intrinsics"])
    scenes = options["scenes"] if training else options["val_clips"]
    common = {"patch_size": patch, "seed": seed, "scenes": scenes, "cache": options["cache"]}
    return SyntheticClips(split, queries, frames, (size, size), **common, colours=colours, view=view)


def _batches(clips: "Dataset", together: int) -> int:
    """The batches of a pass, `together` clips each over all processes."""
    try:
        return max(1, len(clips) // together)
    except TypeError:
        return BATCHES_PER_EPOCH


def _trainer(options: dict[str, Any], max_steps: int, val: "Dataset") -> "Trainer":
    from torch.utils.data import IterableDataset

    from fourdperf.models.d4rt import MODEL
    from fourdperf.train.pictures import Pictures

    pictures = [] if isinstance(val, IterableDataset) else [Pictures(options["out"], val)]
    return make_trainer(options, max_steps, pictures, MODEL, "clips")
