"""Pictures of Neural Isometries: learned functions, beside the torus Laplacian's, operators and their eigenvalues, maps
tau, what they make of observations, answers, trajectories, curves."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fourdperf.data.chart import line_chart
from fourdperf.data.pictures import enlarge, label, side_by_side, stack
from fourdperf.data.toric import heat_kernel, toric_eigs
from fourdperf.data.video import write_png
from fourdperf.geometry import relative_pose
from fourdperf.models.niso import Autoencoder, Basis, Classifier, PosePredictor
from fourdperf.train.callbacks import RunPictures, curve_picture
from fourdperf.train.evaluate_niso import chain, toric_match
from fourdperf.train.niso_runs import Run, source, split_pairs

__all__ = [
    "NisoPictures",
    "answers_picture",
    "eigenvalues_picture",
    "functions_picture",
    "isometries_picture",
    "operator_picture",
    "reconstructions_picture",
    "torus_functions_picture",
    "torus_operator_picture",
    "trajectories_picture",
]

ITEMS, PANEL, CELL, FUNCTIONS = 6, 112, 64, 24
COLUMNS = 12


class NisoPictures(RunPictures):
    """Of the first items of validation, or for a classifier of the warped test set; at the end the curves as well."""

    def __init__(self, out: Path, run: Run) -> None:
        super().__init__(out)
        self.run, shown = run, run.data.val
        if isinstance(run.model, Classifier):
            shown = split_pairs(run.options, source(run.options, "test"), "test")
        shown = Subset(shown, range(min(ITEMS, len(shown))))
        (self.batch,) = DataLoader(shown, ITEMS, collate_fn=run.data.collate)

    @torch.no_grad()
    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        training, batch = module.model.training, [x.to(module.device) for x in self.batch]
        drawn = pictures(module.model.eval(), batch, self.run)
        module.model.train(training)
        return drawn

    def finish(self, module: LightningModule) -> None:
        if (self.out / "train.csv").exists():
            write_png(self.out / "curves.png", curve_picture(self.out, "loss", "loss"))


def pictures(model, batch: Sequence[Tensor], run: Run) -> dict[str, np.ndarray]:
    """Those of the model's kind, by name."""
    if isinstance(model, Classifier):
        return {"answers": answers_picture(model, *batch[:2], run.data.train.source.classes)}
    if isinstance(model, PosePredictor):
        return {"trajectories": trajectories_picture(model(batch[0]), batch[1])}
    grid, related = model.config.grid, model(*batch[:2])
    found = {"isometries": isometries_picture(related.tau)}
    if run.options["experiment"] == "laplacian":
        found["functions"] = torus_functions_picture(related.basis, grid)
        found["operator"] = torus_operator_picture(related.basis, grid)
        found["eigenvalues"] = eigenvalues_picture(related.basis, grid)
    else:
        found["functions"] = functions_picture(related.basis, grid)
        found["operator"] = operator_picture(related.basis)
        found["reconstructions"] = reconstructions_picture(model, *batch[:2])
    return found


# Functions and operators


def functions_picture(basis: Basis, grid: tuple[int, int], most: int = FUNCTIONS) -> np.ndarray:
    """The first functions on their grid (h, w), with their eigenvalues, and the mass."""
    functions, values = basis.functions.detach().cpu(), basis.eigenvalues.tolist()
    panels = [label(_signed(basis.mass.detach().cpu().view(grid), zero=False), "mass")]
    for number in range(min(most, functions.shape[1])):
        panels.append(label(_signed(functions[:, number].view(grid)), f"{values[number]:.2f}"))
    return _rows(panels)


def torus_functions_picture(basis: Basis, grid: tuple[int, int], most: int = FUNCTIONS) -> np.ndarray:
    """Two rows for each eigenspace of the torus: the exact functions, turned within the eigenspace to be next to the
    learned ones, over the learned functions most in it, with how much of their square lies in it."""
    functions = basis.functions.detach().cpu().double()
    spaces, values, vectors, share = toric_match(functions, grid)
    owner, blocks, shown = share.argmax(0), [], 0
    for number, space in enumerate(spaces):
        dimension = space.stop - space.start
        mine = (owner == number).nonzero()[:, 0]
        if not len(mine) or shown >= most:
            continue
        mine = mine[share[number, mine].argsort(descending=True)][:dimension]
        exact, learned = vectors[:, space], torch.nn.functional.normalize(functions[:, mine], dim=0)
        u, _, v = torch.linalg.svd(exact.mT @ learned, full_matrices=False)
        turned = exact @ (u @ v)  # orthonormal functions of the eigenspace, next to the learned ones
        name = f"{values[space].mean():.2f}"
        above = [label(_signed(turned[:, i].view(grid)), f"exact {name}") for i in range(len(mine))]
        below = [
            label(_signed(learned[:, i].view(grid)), f"learned {100 * share[number, j]:.0f}%")
            for i, j in enumerate(mine)
        ]
        blocks.append(stack([side_by_side(above), side_by_side(below)]))
        shown += len(mine)
    return _wrap(blocks)


def operator_picture(basis: Basis) -> np.ndarray:
    """The mask of maps tau, and the learned operator Phi diag(Lambda) Phi^T M on the grid."""
    operator = (basis.functions * basis.eigenvalues) @ (basis.functions * basis.mass[:, None]).mT
    mask = _heat(basis.mask.detach().cpu())
    return side_by_side([label(mask, "mask, 0 to 1"), label(_matrix(operator.detach().cpu()), "operator on the grid")])


def torus_operator_picture(basis: Basis, grid: tuple[int, int]) -> np.ndarray:
    """Learned and exact: the projection onto the functions, row by row of the grid, and onto as many first eigenvectors
    of the torus; the heat kernels of both."""
    values, vectors, _ = toric_eigs(*grid)
    k = len(basis.eigenvalues)
    functions, mass = basis.functions.detach().cpu(), basis.mass.detach().cpu()
    learned = (functions * torch.exp(-basis.eigenvalues.detach().cpu())) @ (functions * mass[:, None]).mT
    exact = heat_kernel(values[:k], vectors[:, :k])
    return side_by_side(
        [
            label(_heat(basis.mask.detach().cpu()), "learned mask, 0 to 1"),
            label(_heat((values[:k, None] - values[:k]).abs().neg().exp()), "mask of the exact eigenvalues"),
            label(_matrix(learned), "learned heat kernel"),
            label(_matrix(exact), "exact heat kernel"),
        ]
    )


def eigenvalues_picture(basis: Basis, grid: tuple[int, int]) -> np.ndarray:
    """Learned and exact eigenvalues, each over its largest: learned ones are known up to how they are spaced."""
    learned = basis.eigenvalues.detach().cpu().double()
    exact = toric_eigs(*grid)[0][: len(learned)]
    numbers = list(range(len(learned)))
    curves = {
        f"learned / {learned[-1]:.1f}": (numbers, (learned / learned[-1].clamp(min=1e-12)).tolist()),
        f"exact / {exact[-1]:.2f}": (numbers, (exact / exact[-1].clamp(min=1e-12)).tolist()),
    }
    return line_chart(curves, title="eigenvalues", x_label="number", y_label="share")


def isometries_picture(tau: Tensor) -> np.ndarray:
    """Maps tau (B, k, k), entries from -1 (blue) to 1 (red); rows and columns by ascending eigenvalue."""
    size = max(2 * PANEL, tau.shape[-1])
    return side_by_side(
        [label(_matrix(x, 1.0, size), f"tau of pair {i}") for i, x in enumerate(tau.detach().cpu()[:4])]
    )


# Observations


def reconstructions_picture(model: Autoencoder, a: Tensor, b: Tensor) -> np.ndarray:
    """A column for each pair: a, b; b decoded from its own coefficients, and from a's moved by tau; the same of a."""
    related = model(a, b)
    decode = lambda c: model.decode(model.operator.unproject(c, related.basis))
    rows = {
        "a": a,
        "b": b,
        "b through the basis": decode(related.coefficients_b),
        "tau a": related.recon_b,
        "a through the basis": decode(related.coefficients_a),
        "tau^T b": related.recon_a,
    }
    columns = []
    for i in range(len(a)):
        columns.append(stack([label(_image(x[i]), name) for name, x in rows.items()]))
    return side_by_side(columns)


def answers_picture(model: Classifier, x: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """Images with their class, and the two that the model finds most likely."""
    likely = model(x).float().softmax(-1).topk(2)
    columns = []
    for image, truth, shares, found in zip(x, labels.tolist(), likely.values.tolist(), likely.indices.tolist()):
        panel = label(_image(image), f"{classes[truth]}")
        lines = [f"{'right' if found[0] == truth else 'WRONG'}: {classes[found[0]]} {100 * shares[0]:.0f}%"]
        lines.append(f"then {classes[found[1]]} {100 * shares[1]:.0f}%")
        blank = np.full((0, panel.shape[1], 3), 255, np.uint8)
        columns.append(stack([panel, *(label(blank, line) for line in lines)], gap=0))
    return side_by_side(columns)


def trajectories_picture(relative: Tensor, poses: Tensor) -> np.ndarray:
    """The camera's way through each sequence, in the first camera's x to the right and z forward: true, and found
    (relative poses (B, T - 1, 4, 4), brought to the true ones' size, as in the loss)."""
    relative, poses = relative.detach().cpu().double(), poses.cpu().double()
    charts = []
    for found, true in zip(relative, poses):
        steps = relative_pose(true[:-1], true[1:])
        scale = steps[:, :3, 3].norm() / found[:, :3, 3].norm().clamp(min=1e-6)
        found = found.clone()
        found[:, :3, 3] *= scale
        curves = {}
        for name, motion in (("true", steps), ("found", found)):
            x, _, z = chain(motion)[:, :3, 3].T.tolist()
            curves[name] = (x, z)
        charts.append(line_chart(curves, x_label="x", y_label="z", size=(300, 460)))
    return stack([side_by_side(charts[i : i + 3]) for i in range(0, len(charts), 3)])


# Panels


def _rows(panels: Sequence[np.ndarray]) -> np.ndarray:
    return stack([side_by_side(panels[i : i + COLUMNS]) for i in range(0, len(panels), COLUMNS)])


def _wrap(blocks: Sequence[np.ndarray], width: int = COLUMNS * (CELL + 4)) -> np.ndarray:
    """Blocks from left to right, in as many rows as they need."""
    rows, row = [], []
    for block in blocks:
        if row and sum(b.shape[1] + 12 for b in row) + block.shape[1] > width:
            rows.append(side_by_side(row, gap=12))
            row = []
        row.append(block)
    return stack([*rows, side_by_side(row, gap=12)], gap=12)


def _signed(values: Tensor, zero: bool = True) -> np.ndarray:
    """A function (h, w), from blue over white at zero to red, or from its least to its largest value."""
    if not zero:
        values = values - values.mean()
    return _matrix(values, float(values.abs().max()), CELL)


def _matrix(values: Tensor, largest: float | None = None, size: int = 2 * PANEL) -> np.ndarray:
    """Values (h, w) from -largest (blue) over 0 (white) to largest (red), `size` pixels high."""
    x = (values.double() / max(largest or float(values.abs().max()), 1e-12)).clamp(-1, 1).numpy()
    red, blue = np.array([178, 24, 43.0]), np.array([33, 102, 172.0])
    colour = np.where(x[..., None] > 0, red, blue)
    pixels = np.rint(255 + np.abs(x[..., None]) * (colour - 255)).astype(np.uint8)
    return _fit(pixels, size)


def _heat(values: Tensor, size: int = 2 * PANEL) -> np.ndarray:
    """Values (h, w) from 0 (dark) to 1 (yellow)."""
    levels = np.rint(255 * values.double().clamp(0, 1).numpy()).astype(np.uint8)
    return _fit(cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB), size)


def _image(x: Tensor) -> np.ndarray:
    """An observation (H, W, C) in [0, 1]: RGB of the first three channels, or grey."""
    x = x.detach().float().cpu().clamp(0, 1)[..., : 3 if x.shape[-1] >= 3 else 1]
    return _fit(np.rint(255 * x.numpy()).astype(np.uint8).repeat(3 // x.shape[-1], -1), PANEL)


def _fit(pixels: np.ndarray, height: int) -> np.ndarray:
    """To `height`, or by means where there are more pixels than that."""
    width = max(1, round(height * pixels.shape[1] / pixels.shape[0]))
    if pixels.shape[0] > height:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return enlarge(pixels, height, width)
