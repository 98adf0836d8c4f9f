"""Depth of a clip against the truth, after its scale, or scale and shift, was fitted."""

from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["align_depth", "depth_metrics"]

Alignment = Literal["none", "median", "scale", "scale_shift"]

NEAR = 1e-6
STEPS = 100


def depth_metrics(
    predicted: ArrayLike, true: ArrayLike, mask: ArrayLike | None = None, align: Alignment = "scale"
) -> dict[str, float]:
    """Compares depth maps of any one shape, `(T, H, W)` say, over all pixels at once.

    Args:
        mask: True where to compare; everywhere by default. Pixels whose truth is not finite and positive, or whose
            prediction is not finite, are left out in any case.
        align: as in :func:`align_depth`; one scale, or one scale and shift, for the whole clip.

    Returns:
        abs_rel    mean |d - d*| / d*
        sq_rel     mean (d - d*)^2 / d*
        rmse       root of the mean (d - d*)^2
        rmse_log   root of the mean (log d - log d*)^2, aligned depths below 1e-6 taken as 1e-6
        delta1, delta2, delta3   share of pixels with max(d / d*, d* / d) < 1.25, 1.25^2, 1.25^3

    Raises:
        ValueError: the shapes differ, or ``align`` is unknown.
    """
    predicted, true = (torch.as_tensor(depth).double() for depth in (predicted, true))
    if predicted.shape != true.shape:
        raise ValueError(f"predicted: wanted the shape of true, {tuple(true.shape)}, got {tuple(predicted.shape)}")
    valid = true.isfinite() & (true > 0) & predicted.isfinite()
    if mask is not None:
        mask = torch.as_tensor(mask).bool()
        if mask.shape != true.shape:
            raise ValueError(f"mask: wanted the shape of true, {tuple(true.shape)}, got {tuple(mask.shape)}")
        valid = valid & mask
    predicted, true = predicted[valid], true[valid]
    scale, shift = align_depth(predicted, true, align)
    predicted = scale * predicted + shift

    difference, above = predicted - true, predicted.clamp_min(NEAR)
    ratio = torch.maximum(above / true, true / above)
    metrics = {
        "abs_rel": (difference.abs() / true).mean(),
        "sq_rel": (difference.square() / true).mean(),
        "rmse": difference.square().mean().sqrt(),
        "rmse_log": (above.log() - true.log()).square().mean().sqrt(),
    }
    metrics |= {f"delta{power}": (ratio < 1.25**power).double().mean() for power in (1, 2, 3)}
    return {name: value.item() for name, value in metrics.items()}


def align_depth(predicted: Tensor, true: Tensor, align: Alignment) -> tuple[Tensor, Tensor]:
    """Scale and shift that bring predicted depths `(N,)` to the true ones, all finite.

    none         1 and 0
    median       the median of true / predicted; classical in single-image depth
    scale        the scale that minimises sum |scale d - d*|, exactly: a weighted median of those quotients
    scale_shift  scale and shift that minimise sum |scale d + shift - d*|, by iteratively reweighted least squares

    The last two are robust as the evaluation of video depth wants them (MonST3R's protocol, which later work and
    D4RT's "AbsRel (S)" and "(SS)" follow). Both medians are the lower one of an even number.
    """
    one, zero = true.new_ones(()), true.new_zeros(())
    if align == "none" or not len(true):
        return one, zero
    quotient = true / predicted
    if align == "median":
        return quotient.median(), zero
    if align == "scale":
        return _weighted_median(quotient, predicted.abs()), zero
    if align == "scale_shift":
        return _least_absolute(predicted, true)
    raise ValueError(f"align: wanted 'none', 'median', 'scale' or 'scale_shift', got {align!r}")


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    values, order = values.sort()
    reached = weights[order].cumsum(0)
    return values[torch.searchsorted(reached, reached[-1] / 2).clamp_max(len(values) - 1)]


def _least_absolute(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    floor = 1e-6 * true.mean()
    weights = torch.ones_like(true)
    for _ in range(STEPS):
        weights = weights / weights.sum()
        mean, true_mean = (weights * predicted).sum(), (weights * true).sum()
        centred = predicted - mean
        variance = (weights * centred.square()).sum()
        scale = (weights * centred * (true - true_mean)).sum() / torch.where(variance > 0, variance, 1)
        shift = true_mean - scale * mean
        weights = 1 / (scale * predicted + shift - true).abs().clamp_min(floor)
    return scale, shift
