"""D4RT's loss (arXiv 2512.08924, section 3.3): six terms over independent queries, each where its truth is known.

    xyz           c |g(x / d(x)) - g(x' / d(x'))|   g(x) = sign(x) log(1 + |x|), d the mean depth of a clip's points
    confidence    -log c                            c = sigmoid(logit), so that nothing pays for doubting everything
    uv            |uv - uv'|
    visibility    binary cross-entropy of the logit
    displacement  |m / d(x) - m' / d(x')|
    normal        1 - cos(n, n')

|.| is the mean over the coordinates. Where the paper is silent (and where its literal reading breaks):

    d             the mean of max(z, 0) over the clip's valid points, at least 1e-6: the mean depth as long as all lie
                  in front of the camera, and when some do not, never negative, nor smaller for being pulled forward
    displacement  divided like xyz, because it has the same unit, without the logarithm, because it is small; its
                  gradient does not reach the prediction's d
    uv            a projection further than one frame size outside the frame does not count: its value is unbounded
    mean          over a clip's valid queries, then over the clips, a clip without any giving 0. So the loss of a batch
                  is exactly the mean over its parts, on however many processes and accumulation steps

Two ports differ, and `formula` reproduces their numbers: "seed_a" (the seed repository: signed mean z of all points
+ 1e-6; one mean over the batch, sum / (count + 1e-6); -log(c + 1e-6); displacement as it is; every uv) and "seed_b"
(the same with max(|mean z|, 0.1) and c clamped to [1e-6, 1 - 1e-6]).
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fourdperf.data.queries import Targets
from fourdperf.models.d4rt import Prediction

__all__ = ["Formula", "Weights", "d4rt_loss", "mean_depth", "signed_log"]

Formula = Literal["paper", "seed_a", "seed_b"]
UV_REACH = 1.5
TINY = 1e-6


@dataclass(frozen=True)
class Weights:
    """What each term counts in the total; the paper's values."""

    xyz: float = 1.0
    uv: float = 0.1
    confidence: float = 0.2
    visibility: float = 0.1
    displacement: float = 0.1
    normal: float = 0.5


def signed_log(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def d4rt_loss(
    prediction: Prediction,
    targets: Targets,
    weights: Weights | None = None,
    formula: Formula = "paper",
    *,
    normalize: bool = True,
    log: bool = True,
) -> dict[str, Tensor]:
    """The terms of the loss, unweighted, by name, and under "loss" their weighted sum; fp32 scalars.

    prediction: raw outputs for `(B, N)` queries, any float dtype; targets: `(B, N)`, values where `has_*` is False are
    not read (they may be NaN), but for xyz in the seeds' formulas, whose mean depth is of all points. normalize, log:
    the seed's switches of the 3-D term.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.xyz.shape != targets.xyz.shape or targets.has_xyz.shape != targets.xyz.shape[:-1]:
        raise ValueError(
            f"prediction and targets: wanted xyz (B, N, 3) of one shape and has_xyz (B, N), got "
            f"{tuple(prediction.xyz.shape)}, {tuple(targets.xyz.shape)} and {tuple(targets.has_xyz.shape)}"
        )
    weights = weights or Weights()
    prediction = Prediction(*(x.float() for x in prediction))
    known = {
        "xyz": targets.has_xyz,
        "confidence": targets.has_xyz,
        "uv": targets.has_uv,
        "visibility": targets.has_visibility,
        "displacement": targets.has_displacement,
        "normal": targets.has_normal,
    }
    truth = {
        name: torch.where(has if name == "visibility" else has[..., None], getattr(targets, name).float(), 0)
        for name, has in known.items()
        if name != "confidence"
    }
    if formula == "paper":
        known["uv"] = known["uv"] & ((truth["uv"] - 0.5).abs() <= UV_REACH).all(-1)

    depth, true_depth = (mean_depth(x, targets.has_xyz, formula) for x in (prediction.xyz, targets.xyz.float()))
    xyz, true_xyz = (prediction.xyz / depth, truth["xyz"] / true_depth) if normalize else (prediction.xyz, truth["xyz"])
    if log:
        xyz, true_xyz = signed_log(xyz), signed_log(true_xyz)
    shift, true_shift = prediction.displacement, truth["displacement"]
    if formula == "paper" and normalize:
        shift, true_shift = shift / depth.detach(), true_shift / true_depth

    errors = {  # (B, N) each
        "xyz": (xyz - true_xyz).abs().mean(-1) * prediction.confidence.sigmoid(),
        "confidence": _penalty(prediction.confidence, formula),
        "uv": (prediction.uv - truth["uv"]).abs().mean(-1),
        "visibility": F.binary_cross_entropy_with_logits(prediction.visibility, truth["visibility"], reduction="none"),
        "displacement": (shift - true_shift).abs().mean(-1),
        "normal": 1 - F.cosine_similarity(prediction.normal, truth["normal"], dim=-1),
    }
    terms = {name: _mean(error, known[name], formula) for name, error in errors.items()}
    terms["loss"] = sum(getattr(weights, field.name) * terms[field.name] for field in fields(weights))
    return terms


def mean_depth(xyz: Tensor, valid: Tensor, formula: Formula = "paper") -> Tensor:
    """What a clip's points `(B, N, 3)` are divided by, `(B, 1, 1)`."""
    z = xyz[..., 2:]
    if formula == "seed_a":
        return z.mean(1, keepdim=True) + TINY
    if formula == "seed_b":
        return z.mean(1, keepdim=True).abs().clamp(min=0.1)
    total = torch.where(valid[..., None], z.clamp(min=0), 0).sum(1, keepdim=True)
    return (total / valid.sum(1)[:, None, None].clamp(min=1)).clamp(min=TINY)


def _penalty(logit: Tensor, formula: Formula) -> Tensor:
    """-log c."""
    if formula == "seed_a":
        return -(logit.sigmoid() + TINY).log()
    if formula == "seed_b":
        return -logit.sigmoid().clamp(TINY, 1 - TINY).log()
    return F.softplus(-logit)


def _mean(error: Tensor, valid: Tensor, formula: Formula) -> Tensor:
    """The mean of `(B, N)` over valid queries."""
    if formula == "paper":
        return ((error * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()
    return (error * valid).sum() / (valid.sum() + TINY)
