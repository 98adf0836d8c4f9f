"""What a run of Neural Isometries is made of, by its options: model, objective, data; and the run that left a
folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.homnist import PlacedImages
from fourdperf.data.images import open_images
from fourdperf.data.niso import (
    HomographyPairs,
    InMemory,
    SequenceWindows,
    ShapePairs,
    ShiftedImages,
    WarpedImages,
    WarpedShapes,
)
from fourdperf.data.niso_shards import Items, Sequences, read_description, write_shards
from fourdperf.data.niso_standins import PhotographPatches, SceneSequences, StarShapes
from fourdperf.data.warps import SHIFT, SPREAD
from fourdperf.models.checkpoint import CONFIG
from fourdperf.models.niso import MODELS, Autoencoder, Classifier, Config, Model, PosePredictor
from fourdperf.train.module import RunData
from fourdperf.train.niso import (
    Objective,
    classification_objective,
    collate_frames,
    collate_items,
    encode_objective,
    laplacian_objective,
    pose_objective,
)
from fourdperf.train.processes import started

__all__ = ["Run", "backbone_options", "load_run", "observations", "open_run", "source", "split_pairs", "evened"]

KINDS = {"laplacian": "homnist", "hmnist": "homnist", "shrec": "shapes", "pose": "sequences"}
STAND_INS = ("digits", "shapes", "sequences")  # data sets of `fourdperf niso_data`
DATA_OPTIONS = ("data_path", "dataset", "size", "digit", "spread", "shapes", "height", "width", "shift", "videos")
PHOTOGRAPHS = {"train": 2048, "val": 512, "test": 512}
TEST_SHAPES, TEST_VIDEOS = 200, 48
VIDEO_FRAMES = 24
EIGENVALUES_APART = 0.05  # of their square roots, at the start
HEAD_FIELDS = {  # of the config, that are not the encoder's or the data's
    Classifier: ("head_features", "head_layers", "gram_features", "upstream_modules", "train_basis"),
    PosePredictor: ("head_features", "head_layers", "head_input", "negative_scale"),
}


@dataclass(frozen=True)
class Run:
    """model, objective and data as `fourdperf.train.niso` has them; options: all of the run's, those of its data taken
    from the backbone's where they are; items: what a batch is made of; told: what it is, in words."""

    options: dict[str, Any]
    model: Model
    objective: Objective
    data: RunData
    items: str
    told: str


def family(options: Mapping[str, Any]) -> str:
    """laplacian, hmnist, shrec or pose."""
    return options["experiment"].partition("_")[0]


def open_run(options: dict[str, Any], small: Mapping[str, Any], full: Mapping[str, Any]) -> Run:
    """The run of `options`, all that its command has and `experiment`, its name. Renders videos that are missing.

    small, full: fields of the model's config, on stand-ins and on real data; options["model"] goes before.

    Raises:
        FileNotFoundError: --encoder or --data_path is nothing.
        ValueError: --encoder is another experiment's, --data_path another kind of data, or a field does not fit.
    """
    encoder = None
    if "encoder" in options:
        encoder, known = _open_encoder(options)
        kept = {name: known[name] for name in DATA_OPTIONS if name in known and options.get(name) is None}
        options = {**options, **kept}
    prepare(options)
    fields = {**(small if _stands_in(options) else full), **(options["model"] or {})}
    train, val = (source(options, split) for split in ("train", "val"))
    if options["experiment"] == "laplacian":
        options, fields = _stacked(options, fields, train)
    model = _model(options, encoder, fields, train)
    objective, items = _objective(options)
    data = RunData(
        split_pairs(options, train, "train"),
        split_pairs(options, val, "val"),
        options["batch_size"],
        options["workers"],
        options["val_items"],
        collate_frames if options["experiment"] == "pose_encode" else collate_items,
    )
    told = f"{len(train):,} {_noun(options)}, {options['max_steps']} steps of {options['batch_size']}"
    return Run(options, model, objective, data, items, told)


def load_run(folder: Path) -> tuple[dict[str, Any], Model]:
    """The options and the model, in eval mode, of what a run left in `folder`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run's of niso, or the run did not come to a checkpoint.
    """
    options = _read_options(folder, "--run")
    if not (folder / "model").is_dir():
        raise ValueError(f"{folder}: wanted a run with a checkpoint, got none")
    fields = json.loads((folder / "model" / CONFIG).read_bytes())
    return options, MODELS[fields["kind"]].from_pretrained(folder / "model")


def backbone_options(folder: Path, experiment: str) -> dict[str, Any]:
    """The options of the run of `experiment` that left `folder`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run's of that experiment.
    """
    options = _read_options(folder, "--encoder")
    if options["experiment"] != experiment:
        raise ValueError(
            f"--encoder: wanted a run of niso.{experiment}, got one of niso.{options['experiment']}: {folder}"
        )
    return options


def _read_options(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such folder: {folder}")
    try:
        options = json.loads((folder / "options.json").read_bytes())
        options["experiment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: wanted a folder that fourdperf train niso.. wrote, got {folder}") from error
    paths = ("data_path", "encoder", "out")
    return options | {name: Path(options[name]) for name in paths if options.get(name) is not None}


def _open_encoder(options: Mapping[str, Any]) -> tuple[Autoencoder, dict[str, Any]]:
    """The backbone, and the options of its data."""
    folder = options["encoder"]
    if (folder / CONFIG).is_file():  # weights alone, such as converted ones
        if options["data_path"] is None:
            raise ValueError(f"--data_path: wanted one, since {folder} does not say what its weights were trained on")
        return Autoencoder.from_pretrained(folder), {"spread": SPREAD, "shift": SHIFT}
    known = backbone_options(folder, f"{family(options)}_encode")
    if family(options) == "pose" and known["data_path"] is None:
        known["data_path"] = folder / "data"
    if not (folder / "model").is_dir():
        raise ValueError(f"--encoder: wanted a run with a checkpoint, got none in {folder}")
    return Autoencoder.from_pretrained(folder / "model"), known


def _stacked(options: dict[str, Any], fields: dict[str, Any], train) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and fields with a number of images to stack and of functions that fit."""
    height, width, channels = observations(options, train)[0].shape
    if "op_dim" not in (options["model"] or {}):  # no more functions than pixels
        fields = {**fields, "op_dim": min(fields["op_dim"], height * width)}
    enough = min(3 * fields["op_dim"], height * width + 10)
    return {**options, "stack": options["stack"] or math.ceil(enough / channels)}, fields


def _model(options: Mapping[str, Any], encoder: Autoencoder | None, fields: dict[str, Any], train) -> Model:
    shape = observations(options, train)[0].shape[-3:]
    if encoder is None:
        image = {"image_size": tuple(shape[:2]), "channels": shape[2]}
        if options["experiment"] == "laplacian":
            image["channels"] *= options["stack"]
        for name, value in image.items():
            if fields.get(name, value) != value:
                raise ValueError(f"--model.{name}: wanted {value}, as the data have it, got {fields[name]}")
        model = Autoencoder(Config.from_dict({**fields, **image}))
        _start(model, options)
        return model
    head = PosePredictor if family(options) == "pose" else Classifier
    for name, value in fields.items():
        if name not in HEAD_FIELDS[head]:
            raise ValueError(f"--model.{name}: wanted a head's own {', '.join(HEAD_FIELDS[head])}, got {name} {value}")
    config = encoder.config
    if (*config.image_size, config.channels) != tuple(shape):
        wanted = " x ".join(map(str, (*config.image_size, config.channels)))
        raise ValueError(f"--data_path: wanted {wanted} as the encoder has it, got {' x '.join(map(str, shape))}")
    known = {} if head is PosePredictor else {"num_classes": len(train.classes)}
    return head.on(encoder, **known, **fields)


@torch.no_grad()
def _start(model: Autoencoder, options: Mapping[str, Any]) -> None:
    """The functions and eigenvalues to begin with, where `options` have an opinion."""
    operator, largest = model.operator, options.get("eigenvalues")
    if options.get("waves"):
        operator.Phi.copy_(slowest_waves(model.config.grid, model.config.op_dim))
    if largest is not None and model.config.clustered:
        root = largest**0.5
        torch.nn.init.uniform_(operator.Lambda, root - EIGENVALUES_APART, root + EIGENVALUES_APART)
    elif largest is not None:  # the sum of as many squares of 0 .. limit
        torch.nn.init.uniform_(operator.Lambda, 0, (3 * largest / model.config.op_dim) ** 0.5)


def slowest_waves(grid: tuple[int, int], count: int) -> Tensor:
    """The `count` slowest of the grid's products of cosines, the Laplacian's functions on a rectangle: orthonormal
    columns (N, count), ascending."""
    cosines = [torch.cos((torch.arange(n) + 0.5)[:, None] * torch.arange(n) * (math.pi / n)) for n in grid]
    down, across = (torch.arange(n) / n for n in grid)
    order = (down[:, None] ** 2 + across**2).flatten().argsort(stable=True)[:count]
    return torch.nn.functional.normalize(torch.kron(*cosines)[:, order], dim=0)


def _objective(options: Mapping[str, Any]) -> tuple[Objective, str]:
    match options["experiment"]:
        case "laplacian":
            return laplacian_objective(options["beta"]), "pairs"
        case "pose_pred":
            return pose_objective, "sequences"
        case "hmnist_pred" | "shrec_pred":
            return classification_objective, "images"
    gamma = options.get("gamma", 0.0)
    return encode_objective(options["alpha"], options["beta"], options["relative"], gamma), "pairs"


# Data


def prepare(options: Mapping[str, Any]) -> None:
    """Renders the videos that stand in for recorded ones, where they are missing, each of torchrun's processes a share;
    checks what --data_path is."""
    folder = options["data_path"]
    if folder is not None:
        wanted, found = KINDS[family(options)], read_description(folder)["kind"]
        if found != wanted:
            raise ValueError(f"--data_path: wanted shards of {wanted}, got {found}: {folder}")
    elif family(options) == "pose":
        count, size = options["videos"], options["size"]
        counts = {"train": count, "val": max(1, count // 8), "test": min(count, TEST_VIDEOS)}
        sources = {split: SceneSequences(split, n, VIDEO_FRAMES, (size, size)) for split, n in counts.items()}
        made = {"dataset": "sequences", "frames": VIDEO_FRAMES, "size": size}
        rank, ranks = started()
        share = {"rank": rank, "ranks": ranks, "wait": True, "progress": rank == 0}
        write_shards(options["out"] / "data", "sequences", sources, made, per_shard=8, **share)


def source(options: Mapping[str, Any], split: str):
    """The images, shapes or videos of a split: of --data_path, or of what stands in for it."""
    folder = options["data_path"]
    if family(options) == "pose":
        return Sequences(options["out"] / "data" if folder is None else folder, split)
    if folder is not None:
        if split == "val" and "val" not in read_description(folder)["items"]:
            split = "test"  # SHREC'11 has two
        items = Items(folder, split)
        return InMemory(items) if options["in_memory"] else items
    match family(options):
        case "laplacian":
            return _photographs(split, options["size"], options["slope"])
        case "hmnist":
            images = open_images(options["dataset"], split, None)
            return InMemory(PlacedImages(images, options["size"], options["digit"]))
    count = {"train": options["shapes"], "val": max(10, options["shapes"] // 8), "test": TEST_SHAPES}[split]
    return InMemory(StarShapes(split, count, (options["height"], options["width"])))


def _photographs(split: str, size: int, slope: float | None) -> InMemory:
    train = InMemory(PhotographPatches("train", PHOTOGRAPHS["train"], size))
    found = train if split == "train" else InMemory(PhotographPatches(split, PHOTOGRAPHS[split], size))
    if slope is not None:
        found.x = evened(found.x, train.x, slope)
    return found


def evened(images: Tensor, like: Tensor, slope: float) -> Tensor:
    """Images (N, H, W, C) with their waves of f per image brought to the strength (1 + f^2)^(-slope / 2), alike in all
    directions, from the strength that they have in `like`; their values then deviate from zero by 1."""
    change = lambda x: torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * scale, s=x.shape[1:3], dim=(1, 2))
    height, width = images.shape[1:3]
    squared = (torch.fft.fftfreq(height, 1 / height)[:, None] ** 2 + torch.fft.rfftfreq(width, 1 / width) ** 2)[
        ..., None
    ]
    strength = torch.fft.rfft2(like, dim=(1, 2)).abs().square().mean((0, 3)).sqrt()[..., None]
    scale = (1 + squared) ** (-slope / 2) / strength.clamp(min=1e-6)
    return change(images) / change(like).square().mean().sqrt()


def split_pairs(options: Mapping[str, Any], source, split: str) -> Dataset:
    """What the experiment trains, validates or is tested on, of a split's source. Validation and test do not change."""
    own: dict[str, Any] = {"seed": options["seed"], "shuffle": split == "train"}
    augment = split == "train" and options.get("augment", False)
    match options["experiment"]:
        case "laplacian":
            return ShiftedImages(source, stack=options["stack"], **own)
        case "hmnist_encode":
            return HomographyPairs(source, spread=options["spread"], **own)
        case "shrec_encode":
            return ShapePairs(source, shift=options["shift"], base_weight=options["base_weight"], **own)
        case "pose_encode":
            return SequenceWindows(source, 2, stride=options["stride"], augment=augment, **own)
        case "pose_pred":
            window = {"stride": options["stride"], "first_frame": options["first_frame"]}
            return SequenceWindows(source, options["frames"], augment=augment, **window, **own)
        case "hmnist_pred":
            warp = options["warp"] or split == "test"
            if split == "test" and options["data_path"] is not None:  # the shards' test set is warped
                warp = False
            return WarpedImages(source, spread=options["spread"] if warp else 0.0, **own)
    warp = options["warp"] or split == "test"
    return WarpedShapes(source, shift=options["shift"] if warp else None, **own)


def observations(options: Mapping[str, Any], source, count: int = 1) -> Tensor:
    """The first images, shapes or frames of a source: (count, H, W, C)."""
    if family(options) == "pose":
        return source.read(0, range(min(count, source.frames(0))))["video"]
    return torch.stack([source[i]["x"] for i in range(min(count, len(source)))]).flatten(0, -4)


def _stands_in(options: Mapping[str, Any]) -> bool:
    folder = options["data_path"]
    return folder is None or read_description(folder)["options"].get("dataset") in STAND_INS


def _noun(options: Mapping[str, Any]) -> str:
    return {"laplacian": "images", "hmnist": "images", "shrec": "shapes", "pose": "videos"}[family(options)]
