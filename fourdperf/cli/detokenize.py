"""``fourdperf detokenize``: the images of a file of tokens."""

from pathlib import Path

import torch
from tqdm import tqdm

from fourdperf.cli.checkpoints import Device, open_tokenizer
from fourdperf.cli.training import check_at_least_one
from fourdperf.data.files import output_folder
from fourdperf.data.pictures import to_pixels
from fourdperf.data.token_file import TokenFile
from fourdperf.data.video import write_png
from fourdperf.models.tokenizers import decode, fingerprint

__all__ = ["detokenize"]


@torch.inference_mode()
def detokenize(
    tokens: Path,
    model: Path | None = None,
    out: Path | None = None,
    start: int = 0,
    count: int | None = None,
    batch_size: int = 16,
    device: Device = "auto",
) -> None:
    """Decodes a file that fourdperf tokenize or fourdperf generate wrote, to one PNG an image.

    Args:
        tokens: The file.
        model: The folder of the tokenizer, or of the run, that made it; another is refused.
        out: The folder for the images, named by their number and by what they were; by default <tokens> here.
        start: The first image.
        count: How many; by default all.
        batch_size: Images at once.
        device: Where to compute.
    """
    check_at_least_one(locals(), "count", "batch_size")
    file, tokenizer = TokenFile(tokens), open_tokenizer(model, device)
    file.check_made_by(str(model), fingerprint(tokenizer))
    if not 0 <= start < max(1, len(file)):
        raise ValueError(f"--start: wanted 0 .. {len(file) - 1}, got {start}")
    stop = len(file) if count is None else min(len(file), start + count)
    names, where = file.description.names, tokenizer.encoder.positions.device
    out = out or Path(tokens.stem)
    with output_folder(out), tqdm(total=stop - start, unit="image", disable=None) as bar:
        for first in range(start, stop, batch_size):
            pictures = decode(tokenizer, file.read(first, min(stop, first + batch_size)).to(where))
            for number, picture in enumerate(to_pixels(pictures), start=first):
                name = f"_{Path(names[number]).stem}" if names else ""
                write_png(out / f"{number:06d}{name}.png", picture)
            bar.update(len(pictures))
    print(f"wrote {stop - start:,} images to {out}")
