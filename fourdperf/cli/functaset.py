"""``fourdperf functaset``: fit every image of a data set with a trained functa, and look at what the latents hold."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import torch
import torch.distributed as dist

from fourdperf.cli.checkpoints import Device, pick_device
from fourdperf.cli.report import Table
from fourdperf.data.pictures import enlarge, label, side_by_side, stack
from fourdperf.data.video import write_animation, write_png
from fourdperf.train.processes import own_gpu, processes

if TYPE_CHECKING:
    from fourdperf.data.functaset import Functaset, Recipe
    from fourdperf.data.images import Images
    from fourdperf.models.functa import Functa

__all__ = ["create", "functaset", "interpolate", "load_functa", "open_recipe_images", "render"]

PANEL = 128
FPS = 12


def create(
    functa: Path = Path("functa_run"),
    dataset: Literal["digits", "mnist", "cifar10", "folder"] | None = None,
    data_path: Path | None = None,
    augmentations: int = 50,
    out: Path = Path("functaset"),
    augment: dict[str, Any] | None = None,
    images: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    block: int = 256,
    device: Device = "auto",
) -> None:
    """Fits every image of a data set and writes the latents to train.h5, val.h5 and test.h5.

    The same command goes on where a kill has stopped it, and fits nothing twice. Under torchrun the processes share the
    images. Beside the files: model (config and weights of the functa) and functaset.json.

    Args:
        functa: A run's folder (fourdperf fit functa), or one with config.json and model.safetensors.
        dataset: What to fit; by default what the functa was trained on.
        data_path: Where the files are; by default where the functa's were, or the environment's DATA_PATH.
        augmentations: Signals per training image: the image itself, and changed copies of it; the paper has 50.
        out: The folder for the results.
        augment: What copies differ in, where that is not the data set's usual: --augment.shift 0.1 --augment.zoom 1.2
            --augment.turn 10 --augment.flip true --augment.border reflection.
        images: Take only so many images of each split.
        steps: Gradient steps per signal; by default those that the functa was trained with.
        seed: Of the copies.
        batch_size: Signals that are fitted together.
        block: Signals per file until a split is complete; a kill costs at most these.
        device: Where to compute.
    """
    from fourdperf.data.functaset import AUGMENTATIONS, SPLITS, Recipe, create_functaset

    if batch_size < 1:
        raise ValueError(f"--batch_size: wanted at least 1, got {batch_size}")
    where = pick_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", own_gpu())
    known, model = _options(functa), load_functa(functa).to(where)
    if dataset is None:
        if "dataset" not in known:
            raise ValueError(f"--dataset: wanted one of {', '.join(AUGMENTATIONS)}: {functa} does not tell its own")
        dataset = known["dataset"]
    if data_path is None and known.get("dataset") == dataset and known.get("data_path"):
        data_path = Path(known["data_path"])
    fields = {**vars(AUGMENTATIONS[dataset]), **(augment or {})}
    unknown = fields.keys() - vars(AUGMENTATIONS[dataset]).keys()
    if unknown:
        raise ValueError(f"--augment: wanted {', '.join(vars(AUGMENTATIONS[dataset]))}, got {', '.join(unknown)}")
    recipe = Recipe(dataset, augmentations, seed, type(AUGMENTATIONS[dataset])(**fields), images, steps, block)
    pictures = {split: open_recipe_images(recipe, split, data_path, model) for split in SPLITS}
    start = time.monotonic()
    with processes() as (rank, ranks):
        done = create_functaset(
            model,
            pictures,
            out,
            recipe,
            rank=rank,
            ranks=ranks,
            barrier=dist.barrier if ranks > 1 else lambda: None,
            batch_size=batch_size,
            root=data_path,
            progress=rank == 0,
        )
    if rank == 0:
        size = " x ".join(map(str, model.zeros(1).shape[1:]))
        rows = [[split, f"{found.signals:,}", f"{found.psnr:.2f}"] for split, found in done.items()]
        print(Table(f"{dataset}: latents {size}", ["split", "signals", "PSNR, dB"], rows).text())
        print(f"wrote {out} in {time.monotonic() - start:.0f} s")


def render(
    functaset: Path = Path("functaset"),
    split: Literal["train", "val", "test"] = "test",
    first: int = 0,
    count: int = 6,
    scale: float = 8.0,
    data_path: Path | None = None,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Draws fields finer than the images that they were fitted to, beside these and their bicubic enlargement (PNG).

    Fields are fitted at the pixels' centres alone. What lies between is smooth where the functa has a low omega_0 and
    many pixels per latent, and else it is noise.

    Args:
        functaset: A folder of fourdperf functaset create.
        split: Whose signals.
        first: The first signal to draw.
        count: How many.
        scale: Pixels of the rendering per pixel of the image, along each axis.
        data_path: Where the images are, if they have moved.
        out: The picture; by default render_<split>.png in the functaset.
        device: Where to compute.
    """
    if count < 1 or not scale > 0:
        raise ValueError(f"wanted --count of at least 1 and a positive --scale, got {count} and {scale}")
    signals, model = _open(functaset, split, device)
    numbers = range(first, min(first + count, len(signals)))
    if first < 0 or not numbers:
        raise ValueError(f"--first: wanted a signal from 0 to {len(signals) - 1}, got {first}")
    originals = _originals(functaset, signals, split, numbers, data_path, model)
    size = model.config.image_size
    large = tuple(max(1, round(n * scale)) for n in size)
    latents, psnr = signals[numbers][0].to(_device(model)), signals.psnr()[first : numbers.stop]
    small, fine = (_frames(model, latents, to) for to in (size, large))
    height = large[0] * max(1, round(PANEL / large[0]))
    show = lambda image, text: label(enlarge(_rgb(image), height, round(height * size[1] / size[0])), text)
    by = lambda n: f"{n[1]}x{n[0]}"
    rows = []
    for original, field, finer, quality in zip(originals, small, fine, psnr):
        bicubic = cv2.resize(original, large[::-1], interpolation=cv2.INTER_CUBIC)
        rows.append(
            side_by_side(
                [
                    show(original, f"image {by(size)}"),
                    show(field, f"field {quality:.1f} dB"),
                    show(bicubic, f"bicubic {by(large)}"),
                    show(finer, f"field {by(large)}"),
                ]
            )
        )
    out = out or functaset / f"render_{split}.png"
    write_png(out, stack(rows))
    print(f"wrote {out}")


def interpolate(
    functaset: Path = Path("functaset"),
    split: Literal["train", "val", "test"] = "test",
    signals: list[int] | None = None,
    steps: int = 8,
    scale: float = 1.0,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Draws what lies between latents: a strip (PNG) for each pair of signals, with the mix of their pixels below, and
    a walk through all of them and back (animated WebP).

    Args:
        functaset: A folder of fourdperf functaset create.
        split: Whose signals.
        signals: Their numbers, such as --signals '[3, 14, 15]'; by default the first ones of four different labels.
        steps: Steps from a signal to the next.
        scale: Pixels of the rendering per pixel of the image, along each axis.
        out: The strip; the walk is written beside it as .webp; by default interpolate_<split>.png in the functaset.
        device: Where to compute.
    """
    if steps < 1 or not scale > 0:
        raise ValueError(f"wanted --steps of at least 1 and a positive --scale, got {steps} and {scale}")
    found, model = _open(functaset, split, device)
    if signals is None:
        _, firsts = np.unique(found.labels, return_index=True)
        signals = sorted(firsts.tolist())[:4]
        signals = signals if len(signals) > 1 else list(range(min(4, len(found))))
    if len(signals) < 2 or not all(0 <= n < len(found) for n in signals):
        raise ValueError(f"--signals: wanted two or more from 0 to {len(found) - 1}, got {signals}")
    size = tuple(max(1, round(n * scale)) for n in model.config.image_size)
    latents = found[signals][0].to(_device(model))
    share = torch.linspace(0, 1, steps + 1, device=latents.device).reshape(-1, 1, 1, 1)
    height = size[0] * max(1, round(PANEL / size[0]))
    show = lambda image: enlarge(_rgb(image), height, round(height * size[1] / size[0]))
    rows, walk = [], []
    for i, (a, b) in enumerate(zip(latents, latents[1:])):
        between = _frames(model, a + share * (b - a), size)
        mixed = [between[0] + float(t) * (between[-1] - between[0]) for t in share.flatten()]
        names = f"signal {signals[i]} to {signals[i + 1]}"
        rows.append(label(side_by_side([show(frame) for frame in between], 2), f"{names}: latents"))
        rows.append(label(side_by_side([show(frame) for frame in mixed], 2), f"{names}: pixels"))
        walk += [show(frame) for frame in between[:-1]]
    walk.append(show(between[-1]))
    out = out or functaset / f"interpolate_{split}.png"
    write_png(out, stack(rows))
    write_animation(out.with_suffix(".webp"), walk + walk[-2:0:-1], FPS)
    print(f"wrote {out} and {out.with_suffix('.webp').name}")


functaset = {"create": create, "render": render, "interpolate": interpolate}


def load_functa(path: Path) -> "Functa":
    """The functa of a run's folder, or of one with config.json and model.safetensors.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError (a ValueError): it holds no functa, or a damaged one.
    """
    from fourdperf.models.functa import Functa

    if not path.is_dir():
        raise FileNotFoundError(f"no such functa: {path}; fourdperf fit functa makes one")
    return Functa.from_pretrained(path / "model" if (path / "model").is_dir() else path)


def open_recipe_images(recipe: "Recipe", split: str, root: str | Path | None, model: "Functa") -> "Images":
    """The images of a recipe, in the functa's size if it is a folder's."""
    from fourdperf.data.images import open_images

    own = {}
    if recipe.dataset == "folder":
        own = {"image_size": model.config.image_size, "channels": model.config.channels}
    return open_images(recipe.dataset, split, root, **own)


def _options(run: Path) -> dict:
    """What a run was started with, or nothing."""
    try:
        known = json.loads((run / "options.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _open(folder: Path, split: str, device: Device) -> tuple["Functaset", "Functa"]:
    from fourdperf.data.functaset import open_functaset

    signals = open_functaset(folder, split)
    model = load_functa(folder).to(pick_device(device))
    if model.config.axes != 2 or model.config.channels not in (1, 3):
        c = model.config
        raise ValueError(
            f"{folder}: wanted images of 1 or 3 channels, got {c.channels} channels of size {c.image_size}"
        )
    return signals, model


def _originals(
    folder: Path, signals: "Functaset", split: str, numbers: range, data_path: Path | None, model: "Functa"
) -> list[np.ndarray]:
    """What signals were fitted to, (H, W, C) float32 each."""
    from fourdperf.data.functaset import read_recipe, signal_images

    root = read_recipe(folder)["root"] if data_path is None else data_path
    images = open_recipe_images(signals.recipe, split, root, model)
    pixels, labels = signal_images(images, split, numbers, signals.recipe)
    if not np.array_equal(labels, signals.labels[numbers.start : numbers.stop]):
        raise ValueError(f"--data_path: its images are not those that {folder} was made from: their labels differ")
    return list(pixels.numpy())


@torch.inference_mode()
def _frames(model: "Functa", latents: torch.Tensor, size: tuple[int, ...]) -> list[np.ndarray]:
    """(H, W, C) float32 of each latent, one at a time."""
    return [model.render(latent[None], size)[0].float().cpu().numpy() for latent in latents]


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of an image (H, W) or (H, W, 1 or 3) in [0, 1]."""
    image = image.reshape(*image.shape[:2], -1)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8).repeat(3 // image.shape[2], -1)
