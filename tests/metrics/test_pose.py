"""Trajectory metrics: upstream's numbers, answers known beforehand, invariance, and misuse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf.geometry import invert_rigid, nearest_rotation, rigid, umeyama
from fourdperf.metrics import align_poses, pose_metrics
from fourdperf.metrics.pose import step_errors

GOLDEN = Path(__file__).parents[1] / "goldens" / "d4rt" / "b_camera.npz"


def turn(degrees, axis=2):
    angle = math.radians(degrees)
    matrix = torch.eye(3, dtype=torch.float64)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def trajectory(frames=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rotations = nearest_rotation(torch.randn(frames, 3, 3, dtype=torch.float64, generator=generator))
    return rigid(rotations, torch.randn(frames, 3, dtype=torch.float64, generator=generator))


def test_upstream_s_numbers():
    file = np.load(GOLDEN)
    tolerance = json.loads(str(file["config"]))["atol"]
    predicted, true = (torch.from_numpy(file[f"in/{name}_poses"]).double() for name in ("pred", "gt"))

    def check(key, value):
        assert abs(float(value) - float(file[f"out/{key}"])) <= tolerance[f"out/{key}"], key

    aligned = align_poses(predicted, true)
    distance = (aligned - true)[:, :3, 3].norm(dim=-1)
    check("pose_aligned/ate", distance.mean())  # upstream takes means
    assert pose_metrics(predicted, true)["ATE"] == pytest.approx(distance.square().mean().sqrt())
    step_t, step_r = step_errors(predicted, true)
    check("pose_raw/rpe_trans", step_t.mean())
    check("pose_raw/rpe_rot", step_r.mean())
    check("pose_raw/ate", (predicted - true)[:, :3, 3].norm(dim=-1).mean())
    # upstream moves the centres and leaves the orientations as they are
    moved = predicted.clone()
    moved[:, :3, 3] = aligned[:, :3, 3]
    check("pose_aligned/rpe_trans", step_errors(moved, true)[0].mean())


def test_a_similarity_of_the_truth_is_perfect():
    true = trajectory()
    fit = umeyama(torch.eye(3, dtype=torch.float64), 3 * turn(50, 1) @ turn(20) + torch.tensor([1.0, 2, 3]))
    found = pose_metrics(fit.pose(true), true)
    assert found["ATE"] < 1e-12 and found["RPE_T"] < 1e-12 and found["RPE_R"] < 1e-5 and found["AUC"] == 1
    rigidly = pose_metrics(fit.pose(true), true, with_scale=False)
    assert rigidly["ATE"] > 0.1 and rigidly["RPE_R"] < 1e-5


def test_known_errors():
    true = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    true[:, 0, 3] = torch.arange(4.0)
    true[2, 1, 3] = 1.0  # not on one line
    predicted = true.clone()
    predicted[3, :3, :3] = turn(12)
    found = pose_metrics(predicted, true)
    assert found["ATE"] < 1e-12 and found["RPE_T"] < 1e-12
    assert found["RPE_R"] == pytest.approx(12 / math.sqrt(3))
    # Frame 3 against the three others: wrong by 12 degrees, below the 18 thresholds of 13 to 30.
    assert found["AUC"] == pytest.approx((3 * 30 + 3 * 18) / (6 * 30))
    predicted = true.clone()
    predicted[1, 1, 3] += 0.3
    assert pose_metrics(predicted, true, with_scale=False)["ATE"] > 0
    step_t, step_r = step_errors(predicted, true)
    assert step_t.tolist() == pytest.approx([0.3, 0.3, 0]) and step_r.tolist() == [0, 0, 0]


def test_directions_of_translation():
    true = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    true[1, 0, 3] = 1.0
    for degrees, share in ((0, 30), (9.5, 21), (29.5, 1), (180, 0)):
        predicted = true.clone()
        predicted[1, :3, 3] = 7 * turn(degrees) @ true[1, :3, 3]
        assert pose_metrics(predicted, true)["AUC"] == pytest.approx(share / 30)
    still = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    assert pose_metrics(true, still)["AUC"] == 1  # no direction to get wrong
    assert pose_metrics(still, true)["AUC"] == 0 and pose_metrics(still, true)["ATE"] == pytest.approx(0.5)


def test_short_clips():
    one = pose_metrics(trajectory(1), trajectory(1, seed=1))
    assert one["ATE"] < 1e-12 and math.isnan(one["RPE_T"]) and math.isnan(one["AUC"])
    assert pose_metrics(trajectory().numpy(), trajectory().float().numpy())["RPE_R"] < 1e-2


def test_camera_from_world_is_another_thing():
    assert pose_metrics(invert_rigid(trajectory()), trajectory())["ATE"] > 0.1


def test_misuse():
    with pytest.raises(ValueError, match=r"predicted, true: wanted \(T, 4, 4\) both, got \(7, 4, 4\) and \(8, 4, 4\)"):
        pose_metrics(trajectory(7), trajectory(8))
    with pytest.raises(ValueError, match=r"wanted \(T, 4, 4\) both"):
        pose_metrics(trajectory()[:, :3], trajectory()[:, :3])
