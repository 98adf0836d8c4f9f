"""Tiny runs of `fourdperf train tokenizer` for tests: pictures of two colours in a folder, small networks."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fourdperf.cli.main import main
from fourdperf.data.video import write_png
from fourdperf.models.tokenizers import load_tokenizer
from tests.train.processes import ENVIRONMENT

SIZES = ["--image_size=16", "--model.patch_size=8", "--model.num_latents=3", "--model.latent_channels=4"]
SIZES += ["--model.hidden_size=24", "--model.num_layers=1", "--model.codebook_size=16", "--model.decoder_size=16"]
SIZES += ["--model.restart=null"]
SEED = ["--model.mlp_size=32", "--model.decoder_channels=32", "--model.channel_multipliers=[1,1]"]
SEED += ["--model.attention_sizes=[]"]
TITOK = ["--family=titok", "--model.decoder_layers=1", "--model.decoder_heads=2"]
RUN = ["--accelerator=cpu", "--batch_size=4", "--log_every=1", "--val_every=100", "--val_items=4", "--max_steps=6"]
RUN += ["--save_every=3", "--loss.perceptual=0", "--discriminator_width=32", "--discriminator_layers=1"]


def write_pictures(folder: Path, count: int = 20, size: int = 16) -> Path:
    """Two colours and a border between them, somewhere."""
    for number in range(count):
        random = np.random.default_rng(number)
        image = np.empty((size, size, 3), np.uint8)
        border = random.integers(2, size - 2)
        image[:, :border], image[:, border:] = random.integers(0, 256, (2, 3))
        write_png(folder / f"{number:02d}.png", image)
    return folder


def options(family: str) -> list[str]:
    return [*SIZES, *(SEED if family == "tokenizer" else TITOK), *RUN]


def train(data: Path, out: Path, *more, family: str = "tokenizer") -> int:
    arguments = [*options(family), f"--data_path={data}", f"--out={out}", *map(str, more)]
    return main(["train", "tokenizer", *arguments])


def command(data: Path, out: Path, *more, family: str = "tokenizer") -> list[str]:
    arguments = [*options(family), f"--data_path={data}", f"--out={out}", *map(str, more)]
    return [sys.executable, "-m", "fourdperf", "train", "tokenizer", *arguments]


def start(data: Path, out: Path, *more, family: str = "tokenizer") -> subprocess.CompletedProcess:
    """The command in processes of its own."""
    arguments = command(data, out, *more, family=family)
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


def curve(out: Path, name: str = "train") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def column(out: Path, name: str, file: str = "train") -> list[float]:
    return [float(row[name]) for row in curve(out, file)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_tokenizer(out).state_dict()


def same(a: Path, b: Path) -> bool:
    equal = [torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True)]
    return curve(a) == curve(b) and all(equal)


def distance(a: Path, b: Path) -> float:
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)
