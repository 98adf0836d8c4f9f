"""Camera trajectories against the truth, after the similarity that fits them best."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fourdperf.geometry import relative_pose, rotation_angle, umeyama

__all__ = ["align_poses", "pose_metrics", "step_errors"]


def pose_metrics(
    predicted: ArrayLike, true: ArrayLike, *, with_scale: bool = True, auc_limit: int = 30
) -> dict[str, float]:
    """Compares the poses world_from_camera `(T, 4, 4)` of a clip.

    Returns:
        ATE    root mean square distance of the camera centres, after :func:`align_poses`
        RPE_T  root mean square error of the motion from frame to frame: length, units of the truth, after alignment
        RPE_R  the same: angle, degrees
        AUC    mean, over thresholds of 1, 2, ... ``auc_limit`` degrees, of the share of all pairs of frames whose
               relative rotation and direction of translation are both wrong by less (VGGT's measure, but opposite
               directions are 180 degrees apart here, and no motion is 90 degrees from any); where two true centres
               coincide, to 1e-6 of the trajectory's extent, only the rotation counts. 1 is perfect.

    RPE and AUC need two frames, and are NaN otherwise.

    Raises:
        ValueError: wrong shapes.
    """
    predicted, true = (torch.as_tensor(poses).double() for poses in (predicted, true))
    if true.ndim != 3 or true.shape[-2:] != (4, 4) or predicted.shape != true.shape:
        raise ValueError(
            f"predicted, true: wanted (T, 4, 4) both, got {tuple(predicted.shape)} and {tuple(true.shape)}"
        )
    aligned = align_poses(predicted, true, with_scale)
    distance = torch.linalg.vector_norm(aligned[:, :3, 3] - true[:, :3, 3], dim=-1)
    step_t, step_r = step_errors(aligned, true)
    metrics = {
        "ATE": distance.square().mean().sqrt(),
        "RPE_T": step_t.square().mean().sqrt(),
        "RPE_R": step_r.square().mean().sqrt(),
        "AUC": _auc(_pair_errors(predicted, true), auc_limit),
    }
    return {name: value.item() for name, value in metrics.items()}


def align_poses(predicted: Tensor, true: Tensor, with_scale: bool = True) -> Tensor:
    """Poses `(T, 4, 4)`, moved by the similarity (or rigid motion) that brings their centres closest to the truth."""
    fit = umeyama(predicted[:, :3, 3], true[:, :3, 3], with_scale=with_scale)
    return fit.pose(predicted)


def step_errors(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the motion from each frame to the next: length, in the units given, and angle in degrees `(T - 1,)`."""
    steps = (relative_pose(poses[:-1], poses[1:]) for poses in (true, predicted))
    error = relative_pose(*steps)
    return torch.linalg.vector_norm(error[:, :3, 3], dim=-1), rotation_angle(error[:, :3, :3]).rad2deg()


def _pair_errors(predicted: Tensor, true: Tensor) -> Tensor:
    first, second = torch.combinations(torch.arange(len(true)), 2).unbind(-1)
    motion, true_motion = (relative_pose(poses[first], poses[second]) for poses in (predicted, true))
    rotation = rotation_angle(relative_pose(true_motion, motion)[:, :3, :3])
    a, b = motion[:, :3, 3], true_motion[:, :3, 3]
    across, along = torch.linalg.vector_norm(torch.linalg.cross(a, b), dim=-1), (a * b).sum(-1)
    direction = torch.where(a.any(-1), torch.atan2(across, along), torch.pi / 2)
    centres = true[:, :3, 3]
    extent = torch.linalg.vector_norm(centres - centres.mean(0), dim=-1).amax()
    moves = torch.linalg.vector_norm(b, dim=-1) > 1e-6 * extent
    return torch.maximum(rotation, torch.where(moves, direction, 0)).rad2deg()


def _auc(errors: Tensor, limit: int) -> Tensor:
    thresholds = torch.arange(1, limit + 1)
    return (errors[:, None] < thresholds).double().mean()
