"""Quality against the number of tokens, of small tokenizers of the offline images; JPEG and WebP of as many bytes.

    python -m fourdperf.benchmarks.tokenizer_curve [RUNS [START ..]]    writes curve.csv, codecs.csv and their pictures

A run for each number of tokens and each START: random, an encoder with random weights; image_mae, one that starts from
1000 steps of `fourdperf train image_mae`, which is run first. Everything else is equal: a TiTok of 4 + 4 layers of 192,
1000 steps of 16 images with Muon, L1 and the losses of the codes alone, the same seed. Measured on the 512 test images, whose scenes and parts of photographs no
other split has. Runs, in the folder RUNS, go on where they were stopped; what is in curve.csv is not run again. Several
processes may have a START each.

A token of 1024 codes takes 10 bits. JPEG and WebP are `fourdperf.metrics.codecs.best_within`: headers and tables not
counted, the picture made smaller first where that helps, the best PSNR that fits.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fourdperf.cli.main import main
from fourdperf.data.chart import line_chart
from fourdperf.data.image_sets import open_image_set
from fourdperf.data.pictures import label, side_by_side, stack, to_pixels
from fourdperf.data.video import write_png
from fourdperf.metrics.codecs import CODECS, best_within
from fourdperf.metrics.features import open_features
from fourdperf.metrics.images import ssim
from fourdperf.models.perceptual import perceptual_or_substitute
from fourdperf.models.tokenizers import decode, encode, load_tokenizer
from fourdperf.train.evaluate_tokenizer import measure
from fourdperf.train.tokenizer_views import panel

FOLDER, RUNS = Path("benchmarks/results/tokenizer"), Path("tokenizer_curve_runs")
TOKENS, STARTS, BITS = (16, 32, 64, 128), ("random", "image_mae"), 10
SIZE, SHOWN, SEED = (64, 64), (0, 6, 11, 12, 18, 24, 35, 47), 0
COMMON = ("--precision=bf16-mixed", "--log_every=20", "--val_every=500", "--save_every=100", f"--seed={SEED}")
MAE = ("--max_steps=1000", "--batch_size=64")
TOKENIZER = ("--family=titok", "--max_steps=1000", "--batch_size=16", "--optimizer=muon", "--lr=2e-3")
LOSS = ("--discriminator=none", "--loss.perceptual=0")


def run(out: Path, command: str, *options: str) -> None:
    """A run from its start, or from where it was stopped."""
    checkpoint = out / "last.ckpt"
    resumed = (f"--ckpt={checkpoint}",) if checkpoint.exists() else ()
    if main(["train", command, *COMMON, *options, f"--out={out}", *resumed]):
        raise SystemExit(1)


def curve(runs: Path, starts: Sequence[str]) -> None:
    """Trains and measures what is missing in curve.csv."""
    for start in starts:
        options = ()
        if start == "image_mae":
            run(runs / "image_mae", "image_mae", *MAE)
            options = ("--init_encoder=image_mae", f"--init_weights={runs / 'image_mae'}")
        for tokens in TOKENS:
            if (start, str(tokens)) in {(row["start"], row["tokens"]) for row in rows("curve")}:
                continue
            out = runs / f"{start}_{tokens}"
            run(out, "tokenizer", *TOKENIZER, *LOSS, f"--model.num_latents={tokens}", *options)
            images = open_image_set(None, "test", SIZE)
            found = measure(load_tokenizer(out), images, open_features(), perceptual_or_substitute()).measures
            names = ("PSNR", "SSIM", "usage", "perplexity")
            append(
                "curve", start=start, tokens=tokens, bytes=tokens * BITS // 8, **{name: found[name] for name in names}
            )


def codecs() -> None:
    """JPEG and WebP of the test images, within the tokens' bytes."""
    images = open_image_set(None, "test", SIZE)
    for codec in CODECS:
        for tokens in TOKENS:
            budget = tokens * BITS // 8
            if (codec, str(budget)) in {(row["codec"], row["bytes"]) for row in rows("codecs")}:
                continue
            found = [best_within(to_pixels(images[i][0]), budget, codec) for i in range(len(images))]
            there = [i for i, coded in enumerate(found) if coded is not None]
            mean = {"PSNR": float("nan"), "SSIM": float("nan")}
            if there:
                coded = torch.from_numpy(np.stack([found[i].image for i in there])).float() / 255
                similar = ssim(coded, torch.stack([images[i][0] for i in there])).mean().item()
                mean = {"PSNR": float(np.mean([found[i].psnr for i in there])), "SSIM": similar}
            append("codecs", codec=codec, bytes=budget, images=len(there), **mean)


def rows(name: str) -> list[dict[str, str]]:
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(name: str, **row) -> None:
    with open(FOLDER / f"{name}.csv", "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(row)
        writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in row.values()])
    print(row, flush=True)


def charts() -> None:
    """psnr.png and ssim.png, over bytes, and perplexity.png, over tokens."""
    for measured, unit in (("PSNR", "dB"), ("SSIM", "")):
        curves = {f"tokens, {start}": points("curve", "start", start, "bytes", measured) for start in STARTS}
        curves |= {codec: points("codecs", "codec", codec, "bytes", measured) for codec in CODECS}
        title = f"{measured} of 512 test images of 64 x 64"
        picture = line_chart(curves, title=title, x_label="bytes an image (10 bits a token)", y_label=unit)
        write_png(FOLDER / f"{measured.lower()}.png", picture)
    curves = {start: points("curve", "start", start, "tokens", "perplexity") for start in STARTS}
    title = "how many of 1024 codes are in use, by perplexity"
    write_png(FOLDER / "perplexity.png", line_chart(curves, title=title, x_label="tokens an image"))


def points(name: str, column: str, value: str, x: str, y: str) -> tuple[list[float], list[float]]:
    found = sorted((float(row[x]), float(row[y])) for row in rows(name) if row[column] == value)
    return [x for x, _ in found], [y for _, y in found]


def grid(runs: Path) -> None:
    """reconstructions.png: some test images, by each tokenizer, and by the codecs within the bytes of 128 tokens."""
    items = open_image_set(None, "test", SIZE)
    images = torch.stack([items[i][0] for i in SHOWN])
    shown = {"original": to_pixels(images)}
    for start in STARTS:
        for tokens in TOKENS:
            model = load_tokenizer(runs / f"{start}_{tokens}")
            shown[f"{tokens}, {start}"] = to_pixels(decode(model, encode(model, images)))
    budget = TOKENS[-1] * BITS // 8
    for codec in CODECS:
        shown[f"{codec}, {budget} B"] = [best_within(image, budget, codec).image for image in shown["original"]]
    lines = [side_by_side([label(panel(image), name) for image in found]) for name, found in shown.items()]
    write_png(FOLDER / "reconstructions.png", stack(lines))


if __name__ == "__main__":
    runs, starts = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS, sys.argv[2:] or STARTS
    FOLDER.mkdir(parents=True, exist_ok=True)
    curve(runs, starts)
    if len(rows("curve")) == len(STARTS) * len(TOKENS):
        codecs()
        charts()
        grid(runs)
