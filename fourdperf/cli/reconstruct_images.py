"""``fourdperf reconstruct-images``: images through tokenizers of any numbers of tokens, side by side."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fourdperf.cli.checkpoints import Device, open_tokenizer
from fourdperf.cli.tokenize import describe, open_files
from fourdperf.data.pictures import label, side_by_side, stack, to_pixels
from fourdperf.data.video import write_png
from fourdperf.metrics.codecs import CODECS, Coded, best_within
from fourdperf.metrics.images import psnr
from fourdperf.models.titok import TiTok
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import decode, encode
from fourdperf.train.evaluate_d4rt import format_table
from fourdperf.train.tokenizer_views import panel

__all__ = ["reconstruct_images"]

MISSING = 224


@torch.inference_mode()
def reconstruct_images(
    images: list[Path] | None = None,
    models: list[Path] | None = None,
    out: Path = Path("grid.png"),
    codecs: bool = True,
    device: Device = "auto",
) -> None:
    """Writes one picture with each image as it is and as each tokenizer makes it again, with bytes and PSNR.

    Below are the best JPEG and WebP of as many bytes, of which headers and tables are not counted, and for which the
    image is made smaller where that helps.

    Args:
        images: Files and folders of images; the middle of each is cut out.
        models: Folders of tokenizers, or of runs of fourdperf train tokenizer, such as those of 16, 32, .. 256 tokens.
        out: The PNG.
        codecs: Also JPEG and WebP.
        device: Where to compute.
    """
    if not models:
        raise ValueError("--models: wanted folders of tokenizers, or of their runs, got none")
    tokenizers = {path: open_tokenizer(path, device, "--models") for path in models}
    sizes = {model.config.image_size for model in tokenizers.values()}
    if len(sizes) > 1:
        raise ValueError(f"--models: wanted tokenizers of one image size, got {', '.join(map(str, sorted(sizes)))}")
    items = open_files(images, sizes.pop())
    blocks, rows = [], {}
    for number in tqdm(range(len(items)), unit="image", disable=None):
        image = items[number][0]
        columns = [[label(label(panel(to_pixels(image)), "as it is"), items.pictures.paths[number].name)]]
        for path, model in tokenizers.items():
            found = {"tokens": reconstructed(model, path.name, image)}
            if codecs:
                found |= {codec: best_within(to_pixels(image), found["tokens"].bytes, codec) for codec in CODECS}
            tokens = f"{model.config.num_latents} tokens"
            columns.append([_cell(tokens if name == "tokens" else name, x, image) for name, x in found.items()])
            for name, x in found.items():
                rows.setdefault(f"{path}: {tokens if name == 'tokens' else name}", []).append(x)
        blocks.append(side_by_side([stack(column) for column in columns]))
    write_png(out, stack(blocks, gap=16))
    print(format_table({name: _mean(found) for name, found in rows.items()}))
    print(f"wrote {out}")


def reconstructed(model: Tokenizer | TiTok, name: str, image: torch.Tensor) -> Coded:
    """What a tokenizer makes again of an image (H, W, 3), and in how many bytes."""
    codes = encode(model, image[None].to(model.encoder.positions.device))
    described = describe(model, name, 1)
    records = described.pack(codes)  # what a file would hold
    again = to_pixels(decode(model, described.unpack(records).to(codes.device))[0])
    return Coded(again, records.shape[1], psnr(torch.from_numpy(again)[None] / 255, image[None]).item())


def _cell(name: str, found: Coded | None, image: torch.Tensor) -> np.ndarray:
    if found is None:
        return label(label(panel(np.full(image.shape, MISSING, np.uint8)), "not in so few"), name)
    return label(label(panel(found.image), f"{found.bytes} B, {found.psnr:.1f} dB"), name)


def _mean(found: list[Coded | None]) -> dict[str, float]:
    """Of those that there are."""
    there = [x for x in found if x is not None]
    mean = lambda values: float(np.mean(values)) if values else float("nan")
    return {"bytes": mean([x.bytes for x in there]), "PSNR": mean([x.psnr for x in there]), "images": len(there)}
