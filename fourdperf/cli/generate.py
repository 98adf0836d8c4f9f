"""``fourdperf generate``: new images from a token generator and a tokenizer."""

from pathlib import Path
from typing import Literal

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
from fourdperf.models.tokenizers import decode, fingerprint, load_generator
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
    schedule: Literal["none", "constant", "linear", "power-cosine"] | None = None,
    guidance_power: float | None = None,
    temperature: float | None = None,
    anneal: bool | None = None,
    out: Path = Path("generated"),
    seed: int = 0,
    batch_size: int = 16,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Writes new images: a PNG each, grid.png, and codes.tok with their codes.

    Args:
        generator: The folder of a token generator, or of a run of fourdperf train token_generator.
        tokenizer: The folder of the tokenizer whose codes it learned, or of its run; another is refused, where the
            generator tells.
        classes: Numbers of the classes to show; by default no class is told.
        count: Images of each class.
        steps: Of the generation; by default the generator's own, as for what follows.
        guidance: How much the class counts.
        schedule: Of the guidance from step to step: none; constant; linear, from zero; power-cosine, from one.
        guidance_power: Of power-cosine: the more, the later guidance rises.
        temperature: Of the noise at the start: more is more diverse, and worse.
        anneal: Make choices more random at first, and surer at the end.
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
    options = {"steps": steps, "guidance": guidance, "schedule": schedule, "guidance_power": guidance_power}
    options |= {"temperature": temperature, "anneal": anneal}
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
    """Raises ValueError unless the generator learned the tokenizer's codes; where it does not tell whose, as many."""
    if tokenizer.quantizer is None:
        raise ValueError("--tokenizer: wanted one with codes, got a VAE")
    ours = generator.config.num_tokens, generator.config.codebook_size
    theirs = tokenizer.config.num_latents, tokenizer.config.codebook_size
    if ours != theirs:
        raise ValueError(f"--tokenizer: wanted {ours[0]} tokens of {ours[1]} codes, got {theirs[0]} of {theirs[1]}")
    learned, got = generator.config.tokenizer, fingerprint(tokenizer)
    if learned not in (None, got):
        raise ValueError(f"--tokenizer: wanted the one whose codes were learned (fingerprint {learned}), got {got}")
