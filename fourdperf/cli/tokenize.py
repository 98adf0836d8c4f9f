"""``fourdperf tokenize``: images as a file of tokens."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from fourdperf.cli.checkpoints import Device, open_tokenizer
from fourdperf.cli.training import check_at_least_one, plain_error
from fourdperf.data.image_sets import FilePictures, ImageSet, open_image_set
from fourdperf.data.images import Split, list_images
from fourdperf.data.token_file import Description, TokenWriter
from fourdperf.models.titok import TiTok
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import encode, fingerprint

__all__ = ["describe", "open_files", "tokenize"]


@torch.inference_mode()
def tokenize(
    images: list[Path] | None = None,
    model: Path | None = None,
    out: Path = Path("codes.tok"),
    split: Split | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: Device = "auto",
) -> None:
    """Writes the codes of images, or a VAE's latents, to one file; fourdperf detokenize is the way back.

    Images are cut to the model's size: the middle of each, as large as possible.

    Args:
        images: Files and folders of images. With --split, one set as fourdperf train tokenizer reads it.
        model: The folder of a tokenizer, or of a run of fourdperf train tokenizer.
        out: The file.
        split: Take this split of a set of images, with its labels; without --images that of the offline set.
        batch_size: Images at once.
        workers: Processes that read them.
        device: Where to compute.
    """
    check_at_least_one(locals(), "batch_size")
    tokenizer = open_tokenizer(model, device)
    size, names, labels, classes = tokenizer.config.image_size, None, None, ()
    if split is None:
        items = open_files(images, size)
        names = tuple(str(path) for path in items.pictures.paths)
    elif images is not None and len(images) > 1:
        raise ValueError(f"--images: wanted one set of images with --split, got {len(images)}")
    else:
        items = open_image_set(images[0] if images else None, split, size)
        classes = items.classes
        labels = tuple(int(items.labels[number]) for number in items.mine) if classes else None
    described = describe(tokenizer, str(model), len(items), names=names, labels=labels, classes=classes)
    where = tokenizer.encoder.positions.device
    with TokenWriter(out, described) as writer, tqdm(total=len(items), unit="image", disable=None) as bar:
        try:
            for pictures, _ in DataLoader(items, batch_size, num_workers=workers):
                writer.append(encode(tokenizer, pictures.to(where)))
                bar.update(len(pictures))
        except (ValueError, OSError) as error:
            raise plain_error(error) from error
    total, each = out.stat().st_size, described.record_bytes
    print(
        f"wrote {len(items):,} images as {described.num_tokens} tokens, {each} bytes each; {total:,} in all, to {out}"
    )


def open_files(images: list[Path] | None, size: tuple[int, int]) -> ImageSet:
    """Files, and those in folders, cut to `size`; raises FileNotFoundError or ValueError where there are none."""
    if not images:
        raise ValueError("--images: wanted files or folders of images, got none")
    paths = []
    for path in images:
        if not path.exists():
            raise FileNotFoundError(f"--images: no such file or folder: {path}")
        paths += list_images(path) if path.is_dir() else [path]
    return ImageSet("files", FilePictures(paths), [0] * len(paths), (), size, np.arange(len(paths)))


def describe(model: Tokenizer | TiTok, name: str, count: int, **more) -> Description:
    """Of a file with so many images' tokens; `name` is the model's, `more` the optional fields."""
    config = model.config
    vae = getattr(config, "mode", "vq") == "vae"
    kind = {"channels": config.latent_channels} if vae else {"codebook_size": config.codebook_size}
    return Description(name, fingerprint(model), config.image_size, config.num_latents, count, **kind, **more)
