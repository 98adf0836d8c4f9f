"""``fourdperf train niso.EXPERIMENT``: the experiments of Neural Isometries, each a backbone or a head on one.

    laplacian                                           functions and eigenvalues of images rolled around a torus
    hmnist_encode  -> hmnist_pred                       digits under homographies, and telling them apart
    shrec_encode   -> shrec_pred                        shapes under Moebius maps of the sphere, and telling them apart
    pose_encode    -> pose_pred                         frames of videos, and the camera's motion between them

A _pred takes the folder of its _encode, which stays as it is. Without --data_path each learns from a stand-in made
here, with sizes for some minutes on two cores; on real data the sizes are the original's where they are known: op_dim
256, 16 x 16 pixels, 266 channels and batches of 16 of the torus; op_dim 128 and 128 channels on 36 x 36 points of
poses.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fourdperf.cli.training import check_at_least_one, check_positive, check_run, fit_run, make_trainer, quiet
from fourdperf.data.files import output_folder, write_text

__all__ = ["EXPERIMENTS", "niso"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The defaults of a command: of the stand-in (`small`) and of real data (`full`) fields of the model's config, and
    options of training by name."""

    small: Mapping[str, Any]
    full: Mapping[str, Any]
    options: Mapping[str, Any]


SMALL = {
    "encoder_channels": (16, 32),
    "encoder_depth": (1, 1),
    "latent_channels": 32,
    "op_dim": 48,
    "stem_channels": 16,
}
LARGE = {"encoder_channels": (64, 128), "encoder_depth": (2, 2), "latent_channels": 128, "op_dim": 128}
POSES = {"encoder_channels": (64, 96, 128), "encoder_depth": (2, 2, 2), "latent_channels": 128, "op_dim": 128}
HEAD = {"head_features": 32, "head_layers": 2, "gram_features": 16}
BASIS_RATES = ("functions_lr", "mass_lr", "eigenvalues_lr")

EXPERIMENTS = {
    "laplacian": Experiment(
        {"op_dim": 21, "clustered": True},
        {"op_dim": 256, "clustered": True},
        {"lr": 2e-2, "max_steps": 4000, "batch_size": 8},
    ),
    "hmnist_encode": Experiment(SMALL, LARGE, {"lr": 3e-3, "max_steps": 1500, "batch_size": 16}),
    "hmnist_pred": Experiment(HEAD, {}, {"lr": 2e-3, "max_steps": 1500, "batch_size": 32}),
    "shrec_encode": Experiment(SMALL, LARGE, {"lr": 1e-3, "max_steps": 1200, "batch_size": 8}),
    "shrec_pred": Experiment(HEAD, {}, {"lr": 2e-3, "max_steps": 1000, "batch_size": 16}),
    "pose_encode": Experiment(
        {**SMALL, "latent_channels": 128, "op_dim": 64}, POSES, {"lr": 3e-3, "max_steps": 2000, "batch_size": 8}
    ),
    "pose_pred": Experiment(
        {"head_features": 128, "head_layers": 4}, {"head_layers": 6}, {"lr": 1e-3, "max_steps": 3000, "batch_size": 8}
    ),
}


def laplacian(
    data_path: Path | None = None,
    size: int = 16,
    slope: float | None = 1.5,
    stack: int | None = None,
    model: dict[str, Any] | None = None,
    beta: float = 0.05,
    eigenvalues: float | None = 2.25,
    eigenvalues_lr: float = 0.5,
    mass_lr: float = 0.005,
    **run,
) -> None:
    """Learns functions that shifts around a torus rotate into each other: approximates the toric Laplacian's.

    Writes to the folder --out: functions.png, operator.png and eigenvalues.png beside the exact ones, isometries.png,
    and what every run of fourdperf train writes.

    Args:
        data_path: Shards of square images (fourdperf niso_data homnist); without it, pieces of photographs that come
            with scikit-learn.
        size: Pixels of the photographs' pieces, along each side.
        slope: Brings the photographs' waves of f per image to the strength (1 + f^2)^(-slope / 2), alike in all
            directions, so that the first functions are the slowest waves; null leaves the photographs as they are.
        stack: Images that are shifted together, as channels; by default three channels for each function, but no more
            than a few over the pixels.
        model: Fields of the model's config: --model.op_dim, --model.clustered.
        beta: Weight of the multiplicity loss.
        eigenvalues: Where clustered eigenvalues start, all close together, or what others rise to; null for the
            original's squares of numbers in 0 .. 1.
        eigenvalues_lr: Their learning rate, as a multiple of --lr: they are to come apart no faster than the functions
            are found.
        mass_lr: The mass's learning rate, as a multiple of --lr.
        **run: Of the run.
    """
    options = {"data_path": data_path, "size": size, "slope": slope, "stack": stack, "model": model, "beta": beta}
    options |= {"eigenvalues": eigenvalues, "eigenvalues_lr": eigenvalues_lr, "mass_lr": mass_lr}
    _train("laplacian", options, **run)


def hmnist_encode(
    data_path: Path | None = None,
    dataset: Literal["digits", "mnist"] = "digits",
    size: int = 24,
    digit: int = 16,
    spread: float = 0.5,
    model: dict[str, Any] | None = None,
    alpha: float = 0.1,
    relative: bool = True,
    beta: float = 0.01,
    gamma: float = 0.1,
    **run,
) -> None:
    """Learns a backbone from digits and the same digits seen through homographies.

    Writes to the folder --out: reconstructions.png, functions.png, operator.png, isometries.png, and what every run of
    fourdperf train writes.

    Args:
        data_path: Shards of fourdperf niso_data homnist; without it, the images of --dataset.
        dataset: digits come with scikit-learn; mnist is read from its usual files below the environment's DATA_PATH.
        size: Without --data_path, pixels of an image, along each side.
        digit: Without --data_path, pixels of the digit in it.
        spread: How far homographies are from the identity.
        model: Fields of the model's config that differ from the usual one, such as --model.op_dim=64.
        alpha: Weight of the equivariance loss; 0.5 in the original, where it is not relative.
        relative: Measure equivariance in terms of the coefficients' size; otherwise a network can make them small.
        beta: Weight of the multiplicity loss; with more, maps become diagonal and views are less related by them.
        gamma: Weight of a term that the paper does not have: a thing's Gram matrix, all that a classifier sees of it,
            is to be the same in both views and differ from those of the other things in the process's batch. With 0, as
            in the original, nothing asks for the second, and all matrices become nearly one.
        **run: Of the run.
    """
    options = {"data_path": data_path, "dataset": dataset, "size": size, "digit": digit, "spread": spread}
    options |= {"model": model, "alpha": alpha, "relative": relative, "beta": beta, "gamma": gamma}
    _train("hmnist_encode", options, **run)


def hmnist_pred(
    encoder: Path = Path("hmnist_encode_run"),
    data_path: Path | None = None,
    warp: bool = False,
    model: dict[str, Any] | None = None,
    **run,
) -> None:
    """Learns to tell digits apart on a frozen backbone, and is tested on digits seen through homographies.

    Writes to the folder --out: results.json with the accuracies, and what every run of fourdperf train writes.

    Args:
        encoder: The folder of a run of niso.hmnist_encode (the original's --weights).
        data_path: Shards of fourdperf niso_data homnist, whose test split can be homNIST's own (the original's --in);
            by default what the backbone was trained on.
        warp: Train on digits seen through homographies; by default on digits as they are, as homNIST wants it.
        model: Fields of the head: --model.head_features, --model.head_layers, --model.gram_features.
        **run: Of the run.
    """
    _train("hmnist_pred", {"encoder": encoder, "data_path": data_path, "warp": warp, "model": model}, **run)


def shrec_encode(
    data_path: Path | None = None,
    shapes: int = 400,
    height: int = 32,
    width: int = 64,
    shift: float = 0.2,
    base_weight: float | None = None,
    model: dict[str, Any] | None = None,
    alpha: float = 0.5,
    relative: bool = False,
    beta: float = 0.01,
    gamma: float = 0.0,
    **run,
) -> None:
    """Learns a backbone from pairs of maps of a shape, seen through Moebius maps of the sphere.

    Writes to the folder --out: reconstructions.png, functions.png, operator.png, isometries.png, and what every run of
    fourdperf train writes.

    Args:
        data_path: Shards of fourdperf niso_data shrec or shapes; without it, shapes made here.
        shapes: Without --data_path, how many of them.
        height: Without --data_path, pixels of a map from pole to pole.
        width: Without --data_path, pixels of a map around.
        shift: The largest boost of the Moebius maps.
        base_weight: The probability that a pair's first is the original shape, where a shape has conformal copies; by
            default all are alike.
        model: Fields of the model's config that differ from the usual one, such as --model.op_dim=64.
        alpha: Weight of the equivariance loss.
        relative: Measure equivariance in terms of the coefficients' size. Otherwise, as in the original, a network can
            make them small; it then learns less equivariance, but classifiers did better on it here.
        beta: Weight of the multiplicity loss.
        gamma: Weight of the term that keeps invariants apart, see niso.hmnist_encode. It tells single shapes apart, of
            which there are few: classifiers did worse with it here.
        **run: Of the run.
    """
    options = {"data_path": data_path, "shapes": shapes, "height": height, "width": width, "shift": shift}
    options |= {"base_weight": base_weight, "model": model}
    options |= {"alpha": alpha, "relative": relative, "beta": beta, "gamma": gamma}
    _train("shrec_encode", options, **run)


def shrec_pred(
    encoder: Path = Path("shrec_encode_run"),
    data_path: Path | None = None,
    warp: bool = True,
    model: dict[str, Any] | None = None,
    **run,
) -> None:
    """Learns to tell shapes apart on a frozen backbone, and is tested on shapes seen through Moebius maps.

    Writes to the folder --out: results.json with the accuracies, and what every run of fourdperf train writes.

    Args:
        encoder: The folder of a run of niso.shrec_encode (the original's --weights).
        data_path: Shards of fourdperf niso_data shrec or shapes (the original's --in); by default what the backbone was
            trained on.
        warp: Train on shapes seen through Moebius maps; otherwise on the maps as they are.
        model: Fields of the head: --model.head_features, --model.head_layers, --model.gram_features.
        **run: Of the run.
    """
    _train("shrec_pred", {"encoder": encoder, "data_path": data_path, "warp": warp, "model": model}, **run)


def pose_encode(
    data_path: Path | None = None,
    videos: int = 480,
    size: int = 48,
    stride: int = 2,
    augment: bool = True,
    model: dict[str, Any] | None = None,
    alpha: float = 0.3,
    relative: bool = True,
    beta: float = 0.0,
    eigenvalues: float | None = 0.2,
    waves: bool = True,
    basis_lr: float = 0.1,
    **run,
) -> None:
    """Learns a backbone from pairs of frames of videos in which only the camera moves.

    Writes to the folder --out: reconstructions.png, functions.png, operator.png, isometries.png, and what every run of
    fourdperf train writes.

    Args:
        data_path: Shards of fourdperf niso_data co3d or sequences; without it, synthetic scenes, which are rendered to
            --out/data at the start.
        videos: Without --data_path, how many of them.
        size: Without --data_path, height and width of their frames.
        stride: The largest distance between the two frames.
        augment: Learn from videos run backwards and seen in a mirror too; the original does not.
        model: Fields of the model's config that differ from the usual one, such as --model.op_dim=64. With fewer
            latent_channels than functions, maps are not determined.
        alpha: Weight of the equivariance loss; 0.5 in the original, where it is not relative.
        relative: Measure equivariance in terms of the coefficients' size; otherwise a network can make them small.
        beta: Weight of the multiplicity loss, which makes maps diagonal, so that they say less of the motion.
        eigenvalues: What they rise to at the start: maps are free between those that differ by less than 1. null for
            the original's sums of squares of numbers in 0 .. 1, which make maps nearly diagonal.
        waves: Begin with the grid's slowest waves as functions; otherwise, as in the original, with random ones, which
            take far longer to become smooth.
        basis_lr: The learning rate of functions, mass and eigenvalues, as a multiple of --lr.
        **run: Of the run.
    """
    options = {"data_path": data_path, "videos": videos, "size": size, "stride": stride, "augment": augment}
    options |= {"model": model, "alpha": alpha, "relative": relative, "beta": beta}
    options |= {"eigenvalues": eigenvalues, "waves": waves, "basis_lr": basis_lr}
    _train("pose_encode", options, **run)


def pose_pred(
    encoder: Path = Path("pose_encode_run"),
    data_path: Path | None = None,
    frames: int = 5,
    stride: int = 2,
    first_frame: bool = False,
    augment: bool = True,
    model: dict[str, Any] | None = None,
    **run,
) -> None:
    """Learns the camera's motion between frames from what a frozen backbone finds to relate them.

    Writes to the folder --out: results.json with the errors, trajectories.png, and what every run of fourdperf train
    writes.

    Args:
        encoder: The folder of a run of niso.pose_encode (the original's --weights).
        data_path: Shards of fourdperf niso_data co3d or sequences (the original's --in); by default what the backbone
            was trained on.
        frames: Frames of a sequence.
        stride: The largest distance between them.
        first_frame: Begin with a video's first frame and take the largest stride always, as the original does.
        augment: Learn from videos run backwards and seen in a mirror too; the original does not.
        model: Fields of the head: --model.head_features, --model.head_layers, --model.head_input: motion, which is how
            far the map between two frames moves things at 36 places, or the map itself, as in the original: tau.
        **run: Of the run.
    """
    options = {"encoder": encoder, "data_path": data_path, "frames": frames, "stride": stride}
    _train("pose_pred", {**options, "first_frame": first_frame, "augment": augment, "model": model}, **run)


niso = {
    "laplacian": laplacian,
    "hmnist_encode": hmnist_encode,
    "hmnist_pred": hmnist_pred,
    "shrec_encode": shrec_encode,
    "shrec_pred": shrec_pred,
    "pose_encode": pose_encode,
    "pose_pred": pose_pred,
}


def _train(
    experiment: str,
    own: dict[str, Any],
    batch_size: int | None = None,
    max_steps: int | None = None,
    minutes: float | None = None,
    lr: float | None = None,
    final_lr: float | None = None,
    warmup_steps: int | None = None,
    weight_decay: float = 1e-4,
    decay_basis: bool = False,
    clip: float | None = 1.0,
    in_memory: bool = True,
    devices: int = 1,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    ckpt: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    workers: int = 0,
    log_every: int = 20,
    val_every: int = 250,
    val_items: int = 64,
    save_every: int = 250,
) -> None:
    """Trains what `experiment` says, with its own options.

    Args:
        experiment: Its name.
        own: Its options.
        batch_size: Pairs, images or sequences per process and batch; each command has its usual number.
        max_steps: Optimiser steps; each command has its usual number.
        minutes: Stop after this time with a checkpoint; the learning rate still follows the steps.
        lr: The peak learning rate, of AdamW; by default 2e-2 for laplacian, 3e-3 for hmnist_encode and
            pose_encode, 2e-3 for classifiers and 1e-3 for the others.
        final_lr: The learning rate at the first and the last step; by default a fiftieth of --lr.
        warmup_steps: Steps to the peak; by default 2500, but at most a tenth of all.
        weight_decay: Of AdamW.
        decay_basis: Let the mass and the eigenvalues decay too, as the original does.
        clip: The gradient's largest L2 norm; null leaves it.
        in_memory: Read all images or shapes at the start, and not from the files when they are needed.
        devices: Processes, one per device.
        accelerator: Where to train.
        strategy: How several devices share the work.
        precision: Number type of the computation; the operator and the nearest rotations stay in fp32.
        accumulate_grad_batches: Batches per optimiser step.
        ckpt: The checkpoint to go on from; the other options must be those of its run.
        out: The folder for the results; by default EXPERIMENT_run.
        seed: Of the initial weights and of all random choices.
        workers: Processes that prepare batches, per device.
        log_every: Steps from one line of train.csv to the next.
        val_every: Steps from one validation to the next.
        val_items: Pairs, images or sequences per validation, at most.
        save_every: Steps from one checkpoint to the next.
    """
    options = {**locals(), **own}
    del options["own"]
    defaults = EXPERIMENTS[experiment].options
    for name in ("batch_size", "max_steps", "lr"):
        options[name] = defaults[name] if options[name] is None else options[name]
    max_steps, lr = options["max_steps"], options["lr"]
    options["final_lr"] = lr / 50 if final_lr is None else final_lr
    options["val_every"] = min(val_every, max_steps)
    out = options["out"] = Path(f"{experiment}_run") if out is None else out
    _check(options)
    quiet()
    from lightning import seed_everything

    from fourdperf.models.niso import MODEL
    from fourdperf.train.evaluate_niso import format_tables, measure
    from fourdperf.train.niso import NisoTraining
    from fourdperf.train.niso_pictures import NisoPictures
    from fourdperf.train.niso_runs import load_run, open_run
    from fourdperf.train.schedule import warmup_within

    seed_everything(seed, verbose=False)
    with output_folder(out):
        run = open_run(options, EXPERIMENTS[experiment].small, EXPERIMENTS[experiment].full)
        options = run.options
        module = NisoTraining(
            run.model,
            run.objective,
            max_steps,
            lr=lr,
            final_lr=options["final_lr"],
            warmup_steps=warmup_within(max_steps) if warmup_steps is None else warmup_steps,
            weight_decay=weight_decay,
            decay_basis=decay_basis,
            **{name: options.get(name, options.get("basis_lr", 1.0)) for name in BASIS_RATES},
            clip=clip,
        )
        trainer = make_trainer(options, max_steps, [NisoPictures(out, run)], MODEL, run.items)
        learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        told = f"niso.{experiment}, {learning / 1e3:.0f} k parameters learn; {run.told}; results in {out}"
        fit_run(trainer, module, run.data, options, told)
    if trainer.is_global_zero:
        tables = measure(*load_run(out))
        write_text(out / "results.json", json.dumps({"steps": trainer.global_step, **tables}, indent=2) + "\n")
        print(f"{trainer.global_step} steps done; wrote {out}; on held-out data:\n{format_tables(tables)}")


def _check(options: dict[str, Any]) -> None:
    counts = ("batch_size", "max_steps", "devices", "accumulate_grad_batches", "log_every", "val_every", "val_items")
    own = ("size", "digit", "stack", "shapes", "height", "width", "videos", "stride")
    check_at_least_one(options, *counts, "save_every", *(name for name in own if name in options))
    positive = ("lr", "final_lr", "clip", "eigenvalues", "basis_lr", *BASIS_RATES)
    check_positive(options, *(name for name in positive if name in options))
    for name in ("alpha", "beta", "gamma", "spread", "weight_decay"):
        if not options.get(name, 0) >= 0:
            raise ValueError(f"--{name}: wanted a number from 0, got {options[name]}")
    if options.get("frames", 2) < 2:
        raise ValueError(f"--frames: wanted at least 2, got {options['frames']}")
    check_run("train", options)
