"""``fourdperf generate``: new images from a token generator and a tokenizer."""

from pathlib import Path

import torch
from tqdm import tqdm

from fourdperf.cli.checkpoints import Device, Dtype, open_tokenizer, pick_device
from fourdperf.cli.tokenize import describe
from fourdperf.cli.training import check_at_least_one
from fourdperf.data.files import output_folder
from fourdperf.data.pictures import label, side_by_side, stack, to_pixels
from fourdperf.data.token_file import TokenWriter
from fourdperf.data.video import write_png
from fourdperf.models.titok import TiTok
from fourdperf.models.token_generator import TokenGenerator
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import decode, load_generator
from fourdperf.train.tokenizer_views import panel

__all__ = ["generate"]

COLUMNS, ROWS = 8, 12


@torch.inference_mode()
def generate(
    generator: Path | None = None,
    tokenizer: Path | None = None,
    classes: list[int] | None = None,
    count: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    out: Path = Path("generated"),
    seed: int = 0,
    batch_size: int = 16,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Writes new images: a PNG each, grid.png, and codes.tok with their codes.

    Args:
        generator: The folder of a token generator, or of a run of fourdperf train token_generator.
        tokenizer: The folder of the tokenizer whose codes it learned, or of its run.
        classes: Numbers of the classes to show; by default no class is told.
        count: Images of each class.
        steps: Of the generation; by default the generator's own, as for what follows.
        guidance: How much the class counts.
        temperature: Of the noise at the start: more is more diverse, and worse.
        out: The folder for the images.
        seed: Of the noise; with --batch_size it decides the images.
        batch_size: Images at once.
        dtype: Number type of the computation: bfloat16 is several times as fast where the processor has it, and gives
            other images of the same seed.
        device: Where to compute.
    """
    check_at_least_one(locals(), "count", "steps", "batch_size")
    if generator is None:
        raise ValueError("--generator: wanted the folder of a token generator, or of its run, got none")
    decoder = open_tokenizer(tokenizer, device, "--tokenizer").to(getattr(torch, dtype))
    model = load_generator(generator).to(pick_device(device), getattr(torch, dtype)).requires_grad_(False)
    check_fit(model, decoder)
    told = [None] * count if classes is None else [number for number in classes for _ in range(count)]
    options = {"steps": steps, "guidance": guidance, "temperature": temperature}
    device_of_noise = model.tokens.device
    noise = torch.Generator(device_of_noise).manual_seed(seed)
    described = describe(decoder, str(tokenizer), len(told), labels=None if classes is None else tuple(told))
    shown = []
    with (
        output_folder(out),
        TokenWriter(out / "codes.tok", described) as writer,
        tqdm(total=len(told), unit="image", disable=None) as bar,
    ):
        for first in range(0, len(told), batch_size):
            part = told[first : first + batch_size]
            wanted = None if classes is None else torch.tensor(part, device=device_of_noise)
            codes = model.generate(wanted, batch=len(part), generator=noise, **options)
            writer.append(codes)
            for number, picture in enumerate(to_pixels(decode(decoder, codes)), start=first):
                name = "" if classes is None else f"_class{told[number]}"
                write_png(out / f"{number:06d}{name}.png", picture)
                if number < COLUMNS * ROWS:
                    shown.append(label(panel(picture), "" if classes is None else f"class {told[number]}"))
            bar.update(len(part))
    write_png(out / "grid.png", stack([side_by_side(shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)]))
    print(f"wrote {len(told):,} images to {out}, {out / 'grid.png'} and {out / 'codes.tok'}")


def check_fit(generator: TokenGenerator, tokenizer: Tokenizer | TiTok) -> None:
    """Raises ValueError unless the generator's codes are as many, of as many, as the tokenizer's."""
    if tokenizer.quantizer is None:
        raise ValueError("--tokenizer: wanted one with codes, got a VAE")
    ours = generator.config.num_tokens, generator.config.codebook_size
    theirs = tokenizer.config.num_latents, tokenizer.config.codebook_size
    if ours != theirs:
        raise ValueError(f"--tokenizer: wanted {ours[0]} tokens of {ours[1]} codes, got {theirs[0]} of {theirs[1]}")
