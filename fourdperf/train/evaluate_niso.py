"""How good Neural Isometries are: functions against the torus Laplacian's, digits and shapes against a plain network,
poses against an essential matrix.

Every experiment is measured on held-out data that does not change: `measure` gives {table: {who: {measure: value}}}.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from fourdperf.data.toric import eigenspaces, toric_eigs
from fourdperf.geometry import relative_pose, rotation_angle
from fourdperf.metrics import pose_metrics
from fourdperf.models.niso import Autoencoder, Basis, Classifier, Model, PosePredictor
from fourdperf.train.evaluate_d4rt import format_table
from fourdperf.train.niso import collate_frames, collate_items
from fourdperf.train.niso_runs import family, source, split_pairs

__all__ = [
    "PlainNet",
    "accuracy",
    "chain",
    "essential_poses",
    "format_tables",
    "measure",
    "measure_plain",
    "toric_match",
    "torus_tables",
]

Table = dict[str, dict[str, float]]
CLUSTER = 0.1  # eigenvalues of which neighbours differ by less are one: the mask is above 0.9 there
POSE_BATCH = 16


@torch.inference_mode()
def measure(options: Mapping[str, Any], model: Model, items: int = 512) -> dict[str, Table]:
    """The tables of a run, on at most so many pairs, images or sequences of its test split."""
    if isinstance(model, Classifier):
        tests = _tests(options, items)
        return {"accuracy": {"isometries": {name: accuracy(model, test) for name, test in tests.items()}}}
    test = _first(split_pairs(options, source(options, "test"), "test"), items)
    if isinstance(model, PosePredictor):
        return {"poses": _poses(model, test)}
    if options["experiment"] == "laplacian":
        return {**torus_tables(model.operator.basis(), model.config.grid), "shifts": _shifts(model, test)}
    return {"views": _views(options, model, test)}


def _first(items: Dataset, count: int) -> Dataset:
    return Subset(items, range(min(count, len(items))))


# The torus


def toric_match(functions: Tensor, size: tuple[int, int]) -> tuple[list[slice], Tensor, Tensor, Tensor]:
    """The exact eigenspaces, eigenvalues (N,) and eigenvectors (N, N), and how much of each function's square lies in
    each eigenspace, (spaces, k)."""
    values, vectors, _ = toric_eigs(*size)
    spaces = eigenspaces(values)
    functions = F.normalize(functions.double(), dim=0)
    power = (vectors.mT @ functions).square()
    return spaces, values, vectors, torch.stack([power[space].sum(0) for space in spaces])


def torus_tables(basis: Basis, size: tuple[int, int]) -> dict[str, Table]:
    """Learned functions against the toric Laplacian's.

    eigenspaces, by exact eigenvalue, of those that the functions reach:
        exact        its multiplicity
        learned      functions that lie mostly in it
        degrees      largest principal angle to the span of as many functions as it has dimensions, those most in it
        mean         of the principal angles
    functions: how much of a function's square lies in the eigenspace, and in the pair of waves that shifts rotate, that
        it lies most in; the mean and the least over the functions
    mass: the smallest and the largest over their mean, which are 1 for the exact one
    clusters: how many runs of eigenvalues, with neighbours closer than CLUSTER, have one member, two and so on
    """
    spaces, values, vectors, share = toric_match(basis.functions.cpu(), size)
    functions, owner, table = basis.functions.double().cpu(), share.argmax(0), {}
    for number, space in enumerate(spaces):
        dimension, learned = space.stop - space.start, int((owner == number).sum())
        if not learned:
            continue
        most = share[number].argsort(descending=True)[:dimension]
        cosines = torch.linalg.svdvals(vectors[:, space].mT @ torch.linalg.qr(functions[:, most])[0])
        angles = cosines.clamp(max=1).arccos().rad2deg()
        row = {"exact": dimension, "learned": learned, "degrees": angles.max().item(), "mean": angles.mean().item()}
        table[f"{values[space].mean().item():.3f}"] = row
    waves = wave_power(functions, size)
    best, wave = share.amax(0), waves.amax(0)
    names = {"eigenspace": best, "waves": wave}
    mass = basis.mass / basis.mass.mean()
    return {
        "eigenspaces": table,
        "functions": {name: {"mean": x.mean().item(), "least": x.min().item()} for name, x in names.items()},
        "clusters": {
            "learned": _sizes(basis.eigenvalues.cpu()),
            "exact": _sizes(values[: functions.shape[1]], 1e-6),
        },
        "mass": {"over its mean": {"smallest": mass.min().item(), "largest": mass.max().item()}},
    }


def wave_power(functions: Tensor, size: tuple[int, int]) -> Tensor:
    """How much of the square of each function (N, k) lies in each pair of waves of one frequency, which shifts rotate
    into each other: (N, k), where a pair counts twice, once for each sign of its frequency."""
    images = F.normalize(functions.double(), dim=0).mT.unflatten(1, size)
    power = torch.fft.fft2(images, norm="ortho").abs().square()
    other = power.flip(1, 2).roll((1, 1), (1, 2))
    rows, columns = (-torch.arange(n) % n == torch.arange(n) for n in size)
    alone = rows[:, None] & columns
    return torch.where(alone, power, power + other).flatten(1).mT


def _shifts(model: Autoencoder, test: Dataset, batch_size: int = 4) -> Table:
    """Mean |found - Tx| over mean |Tx| of shifted images, found with the pair's tau, with another's, or x itself."""
    rows: dict[str, list[float]] = {}
    for x, shifted in DataLoader(test, batch_size, collate_fn=collate_items):
        related = model(x, shifted)
        other = model.operator.unproject(related.tau.roll(1, 0) @ related.coefficients_a, related.basis)
        found = {"tau of the pair": related.recon_b, "tau of another pair": model.decode(other), "x in place of Tx": x}
        for name, y in found.items():
            rows.setdefault(name, []).append(((y - shifted).abs().mean() / shifted.abs().mean()).item())
    return {name: {"error": float(np.mean(found))} for name, found in rows.items()}


def _sizes(eigenvalues: Tensor, tolerance: float = CLUSTER) -> dict[str, float]:
    """How many clusters have one member, two .. eight, more."""
    sizes = clusters(eigenvalues, tolerance)
    return {**{str(n): float(sizes.count(n)) for n in range(1, 9)}, "more": float(sum(n > 8 for n in sizes))}


def clusters(eigenvalues: Tensor, tolerance: float = CLUSTER) -> list[int]:
    """The sizes of runs of ascending eigenvalues (k,) whose neighbours differ by less than `tolerance`."""
    new = (eigenvalues.diff() >= tolerance).nonzero()[:, 0] + 1
    ends = [0, *new.tolist(), len(eigenvalues)]
    return [b - a for a, b in zip(ends, ends[1:])]


# Views


def _views(options: Mapping[str, Any], model: Autoencoder, test: Dataset) -> Table:
    """PSNR in dB of b, decoded from a's coefficients that tau has moved; of b from its own; and of a in place of b.

    tau comes from both views; `other` uses, for each pair, the tau of the pair before, so tau must carry what relates
    them.
    """
    collate = collate_frames if family(options) == "pose" else collate_items
    rows: dict[str, list[Tensor]] = {}
    for a, b in DataLoader(test, 32, collate_fn=collate):
        related = model(a, b)
        wrong = related.tau.roll(1, 0) @ related.coefficients_a
        other, own = (model.decode(model.operator.unproject(c, related.basis)) for c in (wrong, related.coefficients_b))
        found = {
            "tau of the pair": related.recon_b,
            "tau of another pair": other,
            "b itself, through the functions": own,
            "a in place of b": a,
        }
        for name, x in found.items():
            rows.setdefault(name, []).append(-10 * (x - b).square().flatten(1).mean(1).clamp(min=1e-10).log10())
    return {name: {"PSNR": torch.cat(x).mean().item()} for name, x in rows.items()}


# Classes


@torch.inference_mode()
def accuracy(model: nn.Module, items: Dataset) -> float:
    """The share of right answers, of images and labels."""
    device = next(model.parameters()).device
    right = [
        model(x.to(device)).argmax(-1).cpu() == labels for x, labels in DataLoader(items, 64, collate_fn=collate_items)
    ]
    return torch.cat(right).double().mean().item()


class PlainNet(nn.Module):
    """Images (B, H, W, C) -> logits: three levels of two 3 x 3 convolutions, batch norm and ReLU, 2 x 2 maxima between
    them, the mean over what is left, a linear layer. `width`, `2 width` and `4 width` channels."""

    def __init__(self, channels: int, num_classes: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for level in range(3):
            for features in (width << level,) * 2:
                layers += [nn.Conv2d(channels, features, 3, padding=1, bias=False), nn.BatchNorm2d(features), nn.ReLU()]
                channels = features
            layers.append(nn.MaxPool2d(2) if level < 2 else nn.AdaptiveAvgPool2d(1))
        self.layers, self.out = nn.Sequential(*layers), nn.Linear(channels, num_classes)

    @classmethod
    def of_size(cls, channels: int, num_classes: int, parameters: int) -> "PlainNet":
        """The one whose number of parameters is closest to `parameters`."""
        count = lambda net: sum(p.numel() for p in net.parameters())
        with torch.device("meta"):
            width = min(range(1, 257), key=lambda w: abs(count(cls(channels, num_classes, w)) - parameters))
        return cls(channels, num_classes, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x.movedim(-1, 1)).flatten(1))


def _tests(options: Mapping[str, Any], items: int) -> dict[str, Dataset]:
    """Test images, warped, and validation images as they are."""
    plain = {**options, "warp": False}
    return {
        "warped": _first(split_pairs(options, source(options, "test"), "test"), items),
        "as they are": _first(split_pairs(plain, source(options, "val"), "val"), items),
    }


def measure_plain(
    options: Mapping[str, Any], model: Classifier, items: int = 512, steps: int | None = None, seed: int = 0
) -> Table:
    """Accuracies, on the data of `measure`, of plain nets of as many parameters as the classifier has with its encoder:
    trained on images as they are, and on warped ones.

    steps: batches of the run's size; by default as many as the run and its encoder's have had.
    """
    if steps is None:
        steps = options["max_steps"] + _read_steps(options["encoder"])
    table, size = {}, sum(p.numel() for p in model.parameters())
    images, tests = source(options, "train"), _tests(options, items)
    for name, warp in (("as they are", False), ("warped", True)):
        torch.manual_seed(seed)
        net = PlainNet.of_size(model.config.channels, model.config.num_classes, size)
        train_plain(net, split_pairs({**options, "warp": warp}, images, "train"), steps, options["batch_size"])
        who = f"plain net, trained on images {name}"
        table[who] = {key: accuracy(net.eval(), test) for key, test in tests.items()}
    return table


def _read_steps(encoder: Path) -> int:
    try:
        return json.loads((encoder / "options.json").read_bytes())["max_steps"]
    except (OSError, ValueError, KeyError):
        return 0  # weights alone


def train_plain(net: nn.Module, items: Dataset, steps: int, batch_size: int, lr: float = 2e-3) -> None:
    """AdamW on cross-entropy, with a cosine to zero."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        x, labels = collate_items(items.__getitems__(range(step * batch_size, (step + 1) * batch_size)))
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        schedule.step()


# Poses


def chain(relative: Tensor) -> Tensor:
    """Poses (T, 4, 4), the first the identity, of poses of each frame seen from the one before (T - 1, 4, 4)."""
    poses = [torch.eye(4).to(relative)]
    for step in relative:
        poses.append(poses[-1] @ step)
    return torch.stack(poses)


def essential_poses(video: Tensor, intrinsics: Tensor, enlarge: int = 4) -> Tensor:
    """Poses (T - 1, 4, 4) of frames (T, H, W, 3) in [0, 1] seen from the one before, translations of length 1: SIFT,
    ratio test, essential matrix by RANSAC, with the true (normalised) intrinsics (T, 3, 3). Where there are too few
    matches, the identity.

    enlarge: frames are enlarged, so that SIFT finds anything in small ones.
    """
    height, width = (enlarge * n for n in video.shape[1:3])
    frames = [_grey(frame, (width, height)) for frame in video]
    pixels = torch.tensor([[width, 0, 0], [0, height, 0], [0, 0, 1.0]]).double()
    cameras = (pixels @ intrinsics.double()).numpy()
    sift = cv2.SIFT_create(contrastThreshold=0.01)
    seen = [sift.detectAndCompute(frame, None) for frame in frames]
    return torch.stack([_essential(*seen[t], *seen[t + 1], cameras[t], cameras[t + 1]) for t in range(len(frames) - 1)])


def _grey(frame: Tensor, size: tuple[int, int]) -> np.ndarray:
    pixels = (frame * 255).round().clamp(0, 255).byte().numpy()
    return cv2.cvtColor(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), cv2.COLOR_RGB2GRAY)


def _essential(keys_a, words_a, keys_b, words_b, camera_a: np.ndarray, camera_b: np.ndarray) -> Tensor:
    """The pose of b seen from a."""
    if words_a is None or words_b is None or min(len(words_a), len(words_b)) < 8:
        return torch.eye(4)
    matches = cv2.BFMatcher().knnMatch(words_a, words_b, k=2)
    good = [m[0] for m in matches if len(m) == 2 and m[0].distance < 0.8 * m[1].distance]
    if len(good) < 8:
        return torch.eye(4)
    a = cv2.undistortPoints(np.array([keys_a[m.queryIdx].pt for m in good])[:, None], camera_a, None)
    b = cv2.undistortPoints(np.array([keys_b[m.trainIdx].pt for m in good])[:, None], camera_b, None)
    threshold = 1.5 / camera_a[0, 0]
    matrix, inliers = cv2.findEssentialMat(a, b, np.eye(3), cv2.RANSAC, 0.999, threshold)
    if matrix is None or matrix.shape != (3, 3):
        return torch.eye(4)
    _, rotation, translation, _ = cv2.recoverPose(matrix, a, b, np.eye(3), mask=inliers)
    b_from_a = np.eye(4)
    b_from_a[:3] = np.hstack([rotation, translation])
    return torch.from_numpy(np.linalg.inv(b_from_a)).float()


def _poses(model: PosePredictor, test: Dataset) -> Table:
    """Errors of the model, of cameras that do not move or always to the right, which is what is known of these sequences
    before any is seen, and of essential matrices, averaged over sequences and steps.

    rotation     degrees between true and found rotations from frame to frame
    direction    degrees between the true and found direction of translation; the identity's has none: 90
    axis         the same, where the sequence's directions may all be reversed, as the original's loss lets them
    position     |s t - t*| / |t*|, means over the motions from frame to frame, s >= 0 the best factor of a sequence
    ATE          of the trajectory, after the best similarity (`fourdperf.metrics.pose_metrics`), which forgives much: a
                 few frames are nearly on a line, and any line can be turned into any other
    """
    rows: dict[str, list[dict[str, float]]] = {}
    right = torch.eye(4)
    right[0, 3] = 1
    for video, poses, intrinsics in DataLoader(test, POSE_BATCH, collate_fn=collate_items):
        truth, ours = relative_pose(poses[:, :-1], poses[:, 1:]), model(video).float()
        for i in range(len(video)):
            found = {
                "isometries": ours[i],
                "identity": torch.eye(4).expand_as(truth[i]),
                "to the right": right.expand_as(truth[i]),
                "essential matrix": essential_poses(video[i], intrinsics[i]),
            }
            for name, relative in found.items():
                rows.setdefault(name, []).append(pose_errors(relative, truth[i]))
    return {
        name: {key: float(np.mean([row[key] for row in found])) for key in found[0]} for name, found in rows.items()
    }


def pose_errors(relative: Tensor, truth: Tensor) -> dict[str, float]:
    """The measures of `_poses` of a sequence's motions (T - 1, 4, 4)."""
    relative, truth = relative.double(), truth.double()
    angle = rotation_angle(relative[:, :3, :3].mT @ truth[:, :3, :3]).rad2deg()
    ours, true = relative[:, :3, 3], truth[:, :3, 3]
    cosine = F.cosine_similarity(ours, true, dim=-1).clamp(-1, 1)
    scale = (ours * true).sum().clamp(min=0) / ours.square().sum().clamp(min=1e-12)
    position = (scale * ours - true).norm(dim=-1).mean() / true.norm(dim=-1).mean().clamp(min=1e-12)
    direction = cosine.arccos().mean().rad2deg()
    return {
        "rotation": angle.mean().item(),
        "direction": direction.item(),
        "axis": torch.minimum(direction, 180 - direction).item(),
        "position": position.item(),
        "ATE": pose_metrics(chain(relative), chain(truth))["ATE"],
    }


def format_tables(tables: Mapping[str, Table]) -> str:
    """Each table under its name."""
    return "\n".join(f"\n{name}\n{format_table(table)}" for name, table in tables.items())
