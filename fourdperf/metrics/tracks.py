"""TAPVid-3D: how well points were followed through space and through occlusions."""

from collections.abc import Sequence
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["track_metrics"]

Scaling = Literal["median", "mean", "per_trajectory", "none"]


def track_metrics(
    predicted: ArrayLike,
    predicted_visible: ArrayLike,
    true: ArrayLike,
    true_visible: ArrayLike,
    intrinsics: ArrayLike | None = None,
    *,
    depth: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    scaling: Scaling = "median",
    query_frame: ArrayLike | None = None,
    thresholds: Sequence[float] = (1, 2, 4, 8, 16),
    resolution: int = 256,
) -> dict[str, float]:
    """The metrics of TAPVid-3D (arXiv 2407.05921) for K tracks over T frames.

    A point is close where |predicted - true| < threshold * z / f: a ball about the truth that looks ``threshold``
    pixels wide in a picture of resolution x resolution pixels, with z the true depth and f = sqrt(fx fy).

    Args:
        predicted, true: `(K, T, 3)`, in the camera of their frame; in one world with ``depth`` given.
        predicted_visible, true_visible: `(K, T)` bool.
        intrinsics: `(3, 3)` or `(T, 3, 3)`, normalised. None: ``thresholds`` are lengths in the units of ``true``.
        depth: `(K, T)`, the true depth where it is not the last coordinate of ``true``.
        valid: `(K, T)` bool, True where the truth is known; everywhere by default.
        scaling: what the predictions are multiplied with before, since the scale of a video is not known. "median":
            median |true| / median |predicted| over the points visible in both; "mean": the same with means;
            "per_trajectory": for each track, true depth / predicted depth in its ``query_frame``; "none".
        query_frame: `(K,)`, the frame in which each point was asked for; only for "per_trajectory".

    Returns:
        AJ     average Jaccard: over thresholds, mean of true positives / (true visible + false positives); a true
               positive is close and visible in both, a false positive is predicted visible without being one
        APD    average share of the truly visible points that are close ("points within delta", APD3D)
        OA     occlusion accuracy: share of points whose visibility is predicted rightly
        EPE    mean |predicted - true| over the truly visible points, after scaling
        jaccard_<threshold>, within_<threshold>   the terms of AJ and APD

    Raises:
        ValueError: shapes that do not fit, an unknown scaling, or no ``query_frame`` where it is needed.
    """
    predicted, true = (torch.as_tensor(tracks).double() for tracks in (predicted, true))
    if true.ndim != 3 or true.shape[-1] != 3 or predicted.shape != true.shape:
        raise ValueError(
            f"predicted, true: wanted (K, T, 3) both, got {tuple(predicted.shape)} and {tuple(true.shape)}"
        )
    valid = torch.ones(true.shape[:2], dtype=torch.bool) if valid is None else _flags("valid", valid, true)
    predicted_visible = _flags("predicted_visible", predicted_visible, true) & valid
    visible = _flags("true_visible", true_visible, true) & valid

    predicted = predicted * _scale(predicted, true, visible & predicted_visible, scaling, query_frame)
    distance = torch.linalg.vector_norm(predicted - true, dim=-1)
    unit = torch.ones_like(distance)
    if intrinsics is not None:
        focal = torch.as_tensor(intrinsics).double()[..., [0, 1], [0, 1]].prod(-1).sqrt() * resolution  # () or (T,)
        unit = (true[..., 2] if depth is None else torch.as_tensor(depth).double()) / focal

    metrics = {}
    for threshold in thresholds:
        close = distance < threshold * unit
        hits = (close & visible & predicted_visible).sum()
        false = (predicted_visible & ~(close & visible)).sum()
        metrics[f"jaccard_{threshold:g}"] = (hits / (visible.sum() + false)).item()
        metrics[f"within_{threshold:g}"] = (close & visible).sum().div(visible.sum()).item()
    average = {
        name: sum(metrics[f"{term}_{threshold:g}"] for threshold in thresholds) / len(thresholds)
        for name, term in (("AJ", "jaccard"), ("APD", "within"))
    }
    right = (predicted_visible == visible) & valid
    average["OA"] = (right.sum() / valid.sum()).item()
    average["EPE"] = distance[visible].mean().item()
    return average | metrics


def _flags(name: str, flags: ArrayLike, true: Tensor) -> Tensor:
    flags = torch.as_tensor(flags).bool()
    if flags.shape != true.shape[:2]:
        raise ValueError(f"{name}: wanted shape {tuple(true.shape[:2])}, got {tuple(flags.shape)}")
    return flags


def _scale(predicted: Tensor, true: Tensor, both: Tensor, scaling: Scaling, query_frame: ArrayLike | None) -> Tensor:
    if scaling == "none":
        return predicted.new_ones(())
    if scaling in ("median", "mean"):
        middle = torch.mean if scaling == "mean" else _median
        over, under = (middle(torch.linalg.vector_norm(tracks[both], dim=-1)) for tracks in (true, predicted))
        return over / under
    if scaling == "per_trajectory":
        if query_frame is None:
            raise ValueError("query_frame: wanted one frame (K,) per track for scaling='per_trajectory', got None")
        rows, frame = torch.arange(len(true)), torch.as_tensor(query_frame).long()
        over, under = (tracks[rows, frame, 2].clamp_min(1e-12) for tracks in (true, predicted))
        return (over / under)[:, None, None]
    raise ValueError(f"scaling: wanted 'median', 'mean', 'per_trajectory' or 'none', got {scaling!r}")


def _median(values: Tensor) -> Tensor:
    """The mean of the two in the middle, as NumPy has it; NaN of nothing."""
    if not len(values):
        return values.new_tensor(torch.nan)
    return (values.median() - (-values).median()) / 2
