"""Depth metrics: upstream's numbers, answers known beforehand, and misuse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf.metrics import depth_metrics
from fourdperf.metrics.depth import align_depth

GOLDEN = Path(__file__).parents[1] / "goldens" / "d4rt" / "b_metrics.npz"
NAMES = {"abs_rel": "abs_rel", "sq_rel": "sq_rel", "rmse": "rmse", "rmse_log": "rmse_log"}
NAMES |= {f"delta{power}": f"a{power}" for power in (1, 2, 3)}


def depths(seed=0, shape=(3, 8, 10)):
    random = np.random.default_rng(seed)
    return random.uniform(1, 6, shape), random


@pytest.mark.parametrize("align, case", [("median", "depth_scale"), ("none", "depth_raw")])
def test_upstream_s_numbers(align, case):
    file = np.load(GOLDEN)
    tolerance = json.loads(str(file["config"]))["atol"]
    found = depth_metrics(file["in/depth_pred"], file["in/depth_target"], align=align)
    for ours, theirs in NAMES.items():
        key = f"out/{case}/{theirs}"
        assert abs(found[ours] - file[key]) <= tolerance[key], ours


def test_known_errors():
    true = np.full((2, 4), 2.0)
    predicted = np.array([[2.0, 2, 2, 2], [2.4, 1.5, 3.0, 4.0]])
    found = depth_metrics(predicted, true, align="none")
    assert found["abs_rel"] == pytest.approx((0.2 + 0.25 + 0.5 + 1.0) / 8)
    assert found["sq_rel"] == pytest.approx((0.16 + 0.25 + 1 + 4) / 2 / 8)
    assert found["rmse"] == pytest.approx(math.sqrt((0.16 + 0.25 + 1 + 4) / 8))
    logs = [math.log(1.2), math.log(0.75), math.log(1.5), math.log(2)]
    assert found["rmse_log"] == pytest.approx(math.sqrt(sum(x * x for x in logs) / 8))
    assert (found["delta1"], found["delta2"], found["delta3"]) == (5 / 8, 7 / 8, 7 / 8)


@pytest.mark.parametrize(
    "align, scale, shift", [("none", 1, 0), ("median", 3, 0), ("scale", 0.2, 0), ("scale_shift", 2.5, 0.5)]
)
def test_alignment_makes_them_equal(align, scale, shift):
    true, random = depths()
    predicted = (true - shift) / scale
    outliers = random.permutation(true.size)[:48]  # a fifth
    true.ravel()[outliers] *= 3
    clean = np.ones_like(true, bool)
    clean.ravel()[outliers] = False
    found = depth_metrics(predicted, true, align=align)
    assert found["delta1"] == clean.mean() and found["abs_rel"] == pytest.approx(0.2 * 2 / 3, abs=1e-6)
    aligned = depth_metrics(predicted, true, clean, align)
    assert aligned["abs_rel"] < 1e-7 and aligned["delta1"] == 1


def test_alignments_are_the_best_of_their_kind():
    true, random = depths(1)
    predicted = true * random.uniform(0.5, 1.5, true.shape) + 0.3

    def cost(scale, shift):
        return np.abs(scale * predicted + shift - true).sum()

    flat = torch.from_numpy(predicted.ravel()), torch.from_numpy(true.ravel())
    best, zero = align_depth(*flat, "scale")
    assert zero == 0
    for factor in (0.99, 0.999, 1.001, 1.01):
        assert cost(float(best) * factor, 0) >= cost(float(best), 0)
    scale, shift = map(float, align_depth(*flat, "scale_shift"))
    for change in ((0.003, 0), (-0.003, 0), (0, 0.01), (0, -0.01), (0.003, -0.01), (-0.003, 0.01)):
        assert cost(scale + change[0], shift + change[1]) >= cost(scale, shift)


def test_what_is_not_known_does_not_count():
    true, _ = depths()
    predicted = 1.1 * true
    wanted = depth_metrics(predicted[1:], true[1:], align="none")
    for unknown in (0.0, -1.0, np.nan, np.inf):
        partly = true.copy()
        partly[0] = unknown
        assert depth_metrics(predicted, partly, align="none") == pytest.approx(wanted)
    predicted[0] = np.nan
    assert depth_metrics(predicted, true, align="none") == pytest.approx(wanted)
    for align in ("none", "median", "scale", "scale_shift"):
        assert all(map(math.isnan, depth_metrics(predicted, true * 0, align=align).values()))


def test_negative_predictions_are_wrong_but_finite():
    true, _ = depths()
    found = depth_metrics(-true, true, align="none")
    assert found["abs_rel"] == pytest.approx(2) and found["delta3"] == 0 and math.isfinite(found["rmse_log"])
    assert math.isfinite(depth_metrics(np.zeros_like(true), true, align="scale_shift")["abs_rel"])


def test_misuse():
    true, _ = depths()
    with pytest.raises(ValueError, match=r"predicted: wanted the shape of true, \(3, 8, 10\), got \(2, 8, 10\)"):
        depth_metrics(true[:2], true)
    with pytest.raises(ValueError, match="mask: wanted the shape of true"):
        depth_metrics(true, true, np.ones((8, 10)))
    with pytest.raises(ValueError, match="align: wanted 'none', .* got 'ssi'"):
        depth_metrics(true, true, align="ssi")
