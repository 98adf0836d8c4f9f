"""Point clouds: upstream's numbers, answers known beforehand, and misuse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fourdperf.metrics import point_metrics, points

GOLDEN = Path(__file__).parents[1] / "goldens" / "d4rt" / "b_metrics.npz"


@pytest.mark.parametrize(
    "case, true, align", [("same", "pc_gt_same", "mean"), ("noalign", "pc_gt_same", "none"), ("diff", "pc_gt", "mean")]
)
def test_upstream_s_numbers(case, true, align, monkeypatch):
    file = np.load(GOLDEN)
    tolerance = json.loads(str(file["config"]))["atol"]
    for block in (points.BLOCK, 100):
        monkeypatch.setattr(points, "BLOCK", block)
        found = point_metrics(file["in/pc_pred"], file[f"in/{true}"], align)
        for name in ("chamfer",) if case == "diff" else ("chamfer", "l1"):
            key = f"out/cloud_{case}/{name}"
            assert abs(found[name] - file[key]) <= tolerance[key], name
    assert math.isnan(found["l1"]) == (case == "diff")


def test_known_distances():
    true = np.array([[0.0, 0, 0], [3, 0, 0]])
    predicted = np.array([[0.0, 1, 0], [3, 0, 0], [3, 0, 0.5]])
    assert point_metrics(predicted, true, "none")["chamfer"] == pytest.approx((1.5 / 3 + 1 / 2) / 2)
    assert point_metrics(predicted[:2], true, "none")["l1"] == pytest.approx(1 / 6)


def test_alignment():
    true = np.random.default_rng(0).normal(size=(50, 3))
    moved = 3 * true + [1, 2, 3]
    assert point_metrics(moved, true, "mean")["l1"] < 1e-12
    turned = moved[:, [1, 2, 0]]
    assert point_metrics(turned, true, "mean")["l1"] > 0.1 and point_metrics(turned, true, "sim3")["l1"] < 1e-12
    assert point_metrics(turned, true, "sim3")["chamfer"] < 1e-12
    same = np.ones((4, 3))
    assert point_metrics(same, same * 2)["l1"] == 0


def test_misuse():
    cloud = np.zeros((5, 3))
    assert math.isnan(point_metrics(cloud[:0], cloud, "none")["chamfer"])
    with pytest.raises(ValueError, match=r"wanted \(N, 3\) both, got \(5, 2\) and \(5, 3\)"):
        point_metrics(cloud[:, :2], cloud)
    with pytest.raises(ValueError, match="align='sim3': wanted as many points in both, got 4 and 5"):
        point_metrics(cloud[:4], cloud, "sim3")
    with pytest.raises(ValueError, match="align: wanted 'mean', 'sim3' or 'none', got 'icp'"):
        point_metrics(cloud, cloud, "icp")
