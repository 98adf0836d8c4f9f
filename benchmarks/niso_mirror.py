"""What niso.laplacian learns in PyTorch and in the Flax mirror, from the same weights and batches, by step and second.

    OPENBLAS_NUM_THREADS=1 python -m fourdperf.benchmarks.niso_mirror [FOLDER] [STEPS]     writes mirror.csv

Data, model, rates and schedule are those of `fourdperf train niso.laplacian`, with its default of 4000 steps or fewer.
The mirror is trained by optax under jax.jit; steps are taken in turn. Seconds are the processor's, of all threads, without
compilation and the drawing of batches. Losses are those of 64 held-out pairs; `share` is how much of a function's square lies in one eigenspace of
the torus, averaged over the functions. Steps from the same weights agree to rounding, which Adam then amplifies: after a hundred
the two are as far apart as two seeds, hence several seeds.
"""

import csv
import inspect
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from fourdperf.cli import train_niso
from fourdperf.convert.flax_tree import flat
from fourdperf.jax.models import niso as flax
from fourdperf.train.evaluate_niso import toric_match
from fourdperf.train.niso import NisoTraining, collate_items
from fourdperf.train.niso_loss import laplacian_loss
from fourdperf.train.niso_runs import Run, open_run
from fourdperf.train.schedule import learning_rate, warmup_within

FOLDER, EVERY, SEEDS = Path("benchmarks/results/niso"), 250, (0, 1, 2)
COLUMNS = ("seed", "step", "torch_seconds", "flax_seconds", "torch_loss", "flax_loss", "torch_share", "flax_share")


def opened(seed: int, max_steps: int | None) -> Run:
    """The run of the command's defaults, but for the seed and the steps."""
    experiment = train_niso.EXPERIMENTS["laplacian"]
    defaults = (inspect.signature(function).parameters for function in (train_niso._train, train_niso.laplacian))
    options = {name: p.default for found in defaults for name, p in found.items() if p.default is not p.empty}
    options |= experiment.options | {"experiment": "laplacian", "out": Path(tempfile.gettempdir()), "seed": seed}
    options["max_steps"] = max_steps or options["max_steps"]
    torch.manual_seed(seed)
    return open_run(options, experiment.small, experiment.full)


class Torch:
    """NisoTraining's optimiser and schedule, without its trainer."""

    def __init__(self, run: Run):
        o = run.options
        rates = {"lr": o["lr"], "final_lr": o["lr"] / 50, "warmup_steps": warmup_within(o["max_steps"])}
        rates |= {"mass_lr": o["mass_lr"], "eigenvalues_lr": o["eigenvalues_lr"], "weight_decay": o["weight_decay"]}
        self.run, self.clip = run, o["clip"]
        made = NisoTraining(run.model, run.objective, o["max_steps"], **rates).configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def step(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.run.objective(self.run.model, (a, b))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.run.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def measure(self, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
        related = self.run.model(a, b)
        loss = laplacian_loss(related, a, b, beta=self.run.options["beta"])["loss"].item()
        return loss, share(related.basis.functions, self.run)


class Flax:
    """The mirror from the same weights, with optax."""

    def __init__(self, run: Run):
        o, config = run.options, run.model.config
        model, self.run, clip = flax.Autoencoder(config), run, o["clip"]
        self.params = flax.flax_params(run.model.state_dict(), config)
        steps = o["max_steps"], warmup_within(o["max_steps"]), o["lr"], o["lr"] / 50
        table = jnp.asarray([learning_rate(step, *steps) for step in range(o["max_steps"] + 1)])

        def adamw(multiple: float, weight_decay: float) -> optax.GradientTransformation:
            return optax.adamw(lambda step: multiple * table[step], weight_decay=weight_decay)

        kinds = {"Phi": adamw(1.0, o["weight_decay"]), "M": adamw(o["mass_lr"], 0.0)}
        kinds["Lambda"] = adamw(o["eigenvalues_lr"], 0.0)
        labels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, self.params)
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.multi_transform(kinds, labels))
        self.state = optimizer.init(self.params)

        def parts(params, a, b):
            related = model.apply({"params": params}, a, b)
            return flax.laplacian_loss(related, a, b, beta=o["beta"])["loss"], related.basis.functions

        def update(params, state, a, b):
            gradient, _ = jax.grad(parts, has_aux=True)(params, a, b)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.update, self.parts = jax.jit(update), jax.jit(parts)
        assert set(flat(self.params)) == {"kernel/M", "kernel/Phi", "kernel/Lambda"}

    def updated(self, a: torch.Tensor, b: torch.Tensor):
        return jax.block_until_ready(self.update(self.params, self.state, a.numpy(), b.numpy()))

    def step(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.params, self.state = self.updated(a, b)

    def measure(self, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
        loss, functions = self.parts(self.params, a.numpy(), b.numpy())
        return float(loss), share(torch.from_numpy(np.array(functions)), self.run)


def share(functions: torch.Tensor, run: Run) -> float:
    return toric_match(functions, run.model.config.grid)[3].amax(0).mean().item()


def mirror(seed: int, max_steps: int | None) -> list[tuple[float, ...]]:
    """The rows of a seed."""
    run = opened(seed, max_steps)
    size, held_out = run.options["batch_size"], collate_items(run.data.val.dataset.__getitems__(range(64)))[:2]
    sides, seconds, rows = (Torch(run), Flax(run)), [0.0, 0.0], []
    sides[1].updated(*(x[:size] for x in held_out))  # compiles
    for step in range(run.options["max_steps"] + 1):
        if step % EVERY == 0:
            losses, shares = zip(*(side.measure(*held_out) for side in sides))
            rows.append((seed, step, *seconds, *losses, *shares))
            print("  ".join(f"{name} {value:.4g}" for name, value in zip(COLUMNS, rows[-1])), flush=True)
        if step < run.options["max_steps"]:
            batch = collate_items(run.data.train.__getitems__(range(step * size, (step + 1) * size)))[:2]
            for index, side in enumerate(sides):
                start = time.process_time()
                side.step(*batch)
                seconds[index] += time.process_time() - start
    return rows


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else None
    rows = [row for seed in SEEDS for row in mirror(seed, steps)]
    with open(folder / "mirror.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"{value:.5g}" for value in row] for row in rows)
