"""Point clouds against the truth."""

from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fourdperf.geometry import umeyama

__all__ = ["point_metrics"]

Alignment = Literal["mean", "sim3", "none"]

BLOCK = 1 << 22  # distances held at once


def point_metrics(predicted: ArrayLike, true: ArrayLike, align: Alignment = "mean") -> dict[str, float]:
    """Compares clouds `(P, 3)` and `(Q, 3)`; point i of one belongs to point i of the other where P = Q.

    Args:
        align: "mean" moves the cloud's mean and scales its mean distance from there to those of the truth; "sim3"
            takes the best similarity, for which points must belong together; "none".

    Returns:
        l1       mean of |dx|, |dy| and |dz| over points that belong together; NaN where P and Q differ
        chamfer  (mean distance to the nearest true point + mean distance of true points to the nearest) / 2

    Raises:
        ValueError: wrong shapes, "sim3" with P != Q, or an unknown alignment.
    """
    predicted, true = (torch.as_tensor(points).double() for points in (predicted, true))
    if predicted.ndim != 2 or true.ndim != 2 or predicted.shape[1] != 3 or true.shape[1] != 3:
        raise ValueError(f"predicted, true: wanted (N, 3) both, got {tuple(predicted.shape)} and {tuple(true.shape)}")
    predicted = _align(predicted, true, align)
    l1 = (predicted - true).abs().mean().item() if len(predicted) == len(true) else float("nan")
    chamfer = (_nearest(predicted, true).mean() + _nearest(true, predicted).mean()) / 2
    return {"l1": l1, "chamfer": chamfer.item()}


def _align(predicted: Tensor, true: Tensor, align: Alignment) -> Tensor:
    if align == "none":
        return predicted
    if align == "mean":
        predicted, mean = predicted - predicted.mean(0), true.mean(0)
        spread, wanted = (torch.linalg.vector_norm(points, dim=-1).mean() for points in (predicted, true - mean))
        return mean + predicted * torch.where(spread > 0, wanted / spread, 1)
    if align == "sim3":
        if len(predicted) != len(true):
            raise ValueError(f"align='sim3': wanted as many points in both, got {len(predicted)} and {len(true)}")
        return umeyama(predicted, true)(predicted)
    raise ValueError(f"align: wanted 'mean', 'sim3' or 'none', got {align!r}")


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """The distance of each point to the nearest of the others; NaN where there are none."""
    if not len(others):
        return points.new_full((len(points),), torch.nan)
    rows = max(1, BLOCK // len(others))
    nearest = [
        torch.cdist(block, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1) for block in points.split(rows)
    ]
    return torch.cat(nearest)
