"""What functa reaches on digits: PSNR and accuracy by the number of latents, and training beside its Flax mirror.

    python -m fourdperf.benchmarks.functa_digits [FOLDER]      writes digits.csv, mirror.csv and mirror.png

digits.csv: per size a functa of 1000 steps of 16 images (`fourdperf fit functa`), a functaset with 50 signals per
training image, and an MLP of 3000 steps on its latents and on the pixels of the same signals, everything else equal.
Accuracy is that of the 179 test images. Rows that are in digits.csv are not made again.

mirror.csv: the same weights, batches, optimizer and schedule in torch and in Flax under jit, step by step; seconds are
those of the steps alone, compilation not counted, the two taking turns.
"""

import csv
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from fourdperf.cli.fit import LEARNED, LR, MODELS
from fourdperf.cli.main import main
from fourdperf.data.chart import line_chart
from fourdperf.data.images import open_images
from fourdperf.data.video import write_png
from fourdperf.models.functa import Config, Functa, fit, psnr
from fourdperf.train.functa import FunctaTraining, signals
from fourdperf.train.schedule import learning_rate

FOLDER = Path("benchmarks/results/functa")
SIZES = {"1 x 1": (1, (16, 32, 64)), "2 x 2": (2, (4, 8, 16))}
STEPS, BATCH, EVERY = 300, 16, 25


def digits(folder: Path) -> None:
    path, header = folder / "digits.csv", ("map", "latents", "psnr", "on", "accuracy")
    known = set()
    if path.exists():
        with open(path, newline="") as file:
            known = {(row["map"], int(row["latents"])) for row in csv.DictReader(file)}
    for name, (side, channels) in SIZES.items():
        for channel in channels:
            latents = side * side * channel
            if (name, latents) in known:
                continue
            rows = [(name, latents, *found) for found in _size(side, channel)]
            with open(path, "a", newline="") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(header)
                writer.writerows(rows)
            print(*rows, sep="\n", flush=True)


def _size(side: int, channels: int):
    """(PSNR of the test images, what a classifier sees, its accuracy on the test images)."""
    with tempfile.TemporaryDirectory() as scratch:
        run, signals, out = (Path(scratch) / name for name in ("run", "functaset", "classifier"))
        sizes = (f"--model.latent_size={side}", f"--model.latent_channels={channels}")
        main(["fit", "functa", "--max_steps=1000", "--val_every=500", "--save_every=1000", "--log_every=500", *sizes, f"--out={run}"])
        main(["functaset", "create", f"--functa={run}", f"--out={signals}"])
        reached = _test_psnr(signals)
        for on in ("latents", "pixels"):
            options = (f"--on={on}", "--model.kind=mlp", f"--out={out}-{on}", "--max_steps=3000", "--log_every=1000")
            main(["train", "functa_classifier", f"--functaset={signals}", *options])
            found = json.loads(Path(f"{out}-{on}", "results.json").read_text())
            yield f"{reached:.2f}", on, f"{found['test_accuracy']:.4f}"


def _test_psnr(functaset: Path) -> float:
    from fourdperf.data.functaset import open_functaset

    return float(open_functaset(functaset, "test").psnr().mean())


def mirror(folder: Path) -> None:
    """Both train on the same batches, each step one after the other."""
    import jax
    import jax.numpy as jnp
    import optax

    from fourdperf.jax.models import functa as flax

    train, val = (open_images("digits", split) for split in ("train", "val"))
    fields = {**LEARNED, **MODELS["digits"], "image_size": train.image_size, "channels": train.channels}
    torch.manual_seed(0)
    ours = FunctaTraining(Functa(Config.from_dict(fields)), STEPS, lr=LR["digits"], final_lr=LR["digits"] / 100)
    network = flax.Functa(ours.model.config)
    state = flax.flax_params(ours.model.state_dict(), ours.model.config)

    rate = lambda scale: optax.adam(lambda step: scale * jnp.asarray(rates)[step])
    rates = [learning_rate(step, STEPS, 0, ours.lr, ours.final_lr) for step in range(STEPS + 1)]
    label = lambda path, _: "rates" if path[0].key == "lrs" else "others"
    labels = jax.tree_util.tree_map_with_path(label, state)
    adam = optax.multi_transform({"others": rate(1.0), "rates": rate(ours.rates_lr)}, labels)
    optimizer = optax.chain(optax.clip_by_global_norm(ours.clip), adam)
    step = jax.jit(lambda state, y: flax.train_step(network, optimizer, state, y))
    theirs = flax.State(state, optimizer.init(state))
    setup = ours.configure_optimizers()
    adam, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]

    images = signals(torch.stack([train[i][0] for i in range(len(train))]))
    held = signals(torch.stack([val[i][0] for i in range(len(val))]))
    order = torch.cat([torch.randperm(len(images)) for _ in range(STEPS * BATCH // len(images) + 1)]).view(-1)
    step(theirs, jnp.asarray(images[:BATCH].numpy()))  # compiles
    score = jax.jit(lambda params, y: flax.psnr(flax.fit(network, {"params": params}, y).recon, y).mean())

    rows, seconds = [], [0.0, 0.0]
    for number in range(STEPS):
        batch = images[order[number * BATCH : (number + 1) * BATCH]]
        start = time.perf_counter()
        adam.zero_grad()
        fit(ours.model, batch, order=2).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), ours.clip)
        adam.step()
        schedule.step()
        middle = time.perf_counter()
        theirs, found = step(theirs, jnp.asarray(batch.numpy()))
        found["loss"].block_until_ready()
        seconds[0] += middle - start
        seconds[1] += time.perf_counter() - middle
        if (number + 1) % EVERY == 0:
            found = fit(ours.model, held)
            here = float(psnr(found.recon, held).mean()), float(score(theirs.params, jnp.asarray(held.numpy())))
            rows.append((number + 1, *seconds, *here))
            print(*rows[-1], flush=True)
    with open(folder / "mirror.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "torch_seconds", "flax_seconds", "torch_psnr", "flax_psnr"))
        writer.writerows([[f"{value:.5g}" for value in row] for row in rows])
    columns = list(zip(*rows))
    curves = {"fourdperf": (columns[1], columns[3]), "Flax, jit": (columns[2], columns[4])}
    title = "digits, the same 300 steps in both: PSNR held out by time"
    write_png(folder / "mirror.png", line_chart(curves, title=title, x_label="seconds", y_label="dB"))


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    where.mkdir(parents=True, exist_ok=True)
    mirror(where)
    digits(where)
