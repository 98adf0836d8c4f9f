"""TAPVid-3D's metrics: answers known beforehand, invariances, and misuse."""

import math
from pathlib import Path

import numpy as np
import pytest

from fourdperf.metrics import track_metrics

GOLDEN = Path(__file__).parents[1] / "goldens" / "d4rt" / "b_metrics.npz"
CAMERA = np.array([[2.0, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])  # sqrt(fx fy) = 1, or 256 pixels of 256


def tracks(count=20, frames=6, seed=0):
    random = np.random.default_rng(seed)
    true = random.uniform(-1, 1, (count, frames, 3)) + [0, 0, 4]
    return true, random.random((count, frames)) < 0.7, random


def test_perfect_tracks():
    true, visible, _ = tracks()
    found = track_metrics(true, visible, true, visible, CAMERA)
    assert all(found[name] == 1 for name in ("AJ", "APD", "OA")) and found["EPE"] == 0
    assert all(found[f"{kind}_{pixels}"] == 1 for kind in ("jaccard", "within") for pixels in (1, 2, 4, 8, 16))


def test_thresholds_are_pixels_at_the_true_depth():
    true, visible, _ = tracks()
    for pixels, within in ((0.99, 5), (1.01, 4), (3.9, 3), (7.9, 2), (15.9, 1), (16.1, 0)):
        moved = true.copy()
        moved[..., 0] += pixels * true[..., 2] / 256
        found = track_metrics(moved, visible, true, visible, CAMERA, scaling="none")
        assert found["APD"] == pytest.approx(within / 5)
        assert found["within_16"] == (within >= 1) and found["within_1"] == (within == 5)
        assert found["AJ"] == pytest.approx(within / 5)  # all right or all wrong
        half = track_metrics(moved, visible, true, visible, CAMERA, scaling="none", resolution=128)
        assert half["APD"] >= found["APD"]


def test_jaccard_counts():
    # one true positive, one close but not predicted, one far, one wrongly visible, one rightly occluded
    true = np.zeros((1, 5, 3)) + [0, 0, 1.0]
    predicted = true.copy()
    predicted[0, 2] += [1, 0, 0]
    visible = np.array([[True, True, True, False, False]])
    predicted_visible = np.array([[True, False, True, True, False]])
    found = track_metrics(predicted, predicted_visible, true, visible, CAMERA, scaling="none", thresholds=(4,))
    assert found["jaccard_4"] == pytest.approx(1 / (3 + 2))  # 3 truly visible, 2 false positives
    assert found["within_4"] == pytest.approx(2 / 3)
    assert found["OA"] == pytest.approx(3 / 5)
    assert found["EPE"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("scaling", ["median", "mean", "per_trajectory"])
def test_scale_does_not_matter(scaling):
    true, visible, random = tracks()
    predicted = true + 0.02 * random.normal(size=true.shape)
    query = random.integers(0, true.shape[1], len(true))
    frames = {"scaling": scaling, "query_frame": query}
    wanted = track_metrics(predicted, visible, true, visible, CAMERA, **frames)
    found = track_metrics(0.01 * predicted, visible, true, visible, CAMERA, **frames)
    assert found == pytest.approx(wanted) and 0 < found["APD"] < 1
    if scaling == "per_trajectory":
        each = np.exp(random.normal(size=(len(true), 1, 1)))
        assert track_metrics(each * predicted, visible, true, visible, CAMERA, **frames) == pytest.approx(wanted)
    else:
        assert track_metrics(0.01 * true, visible, true, visible, CAMERA, **frames)["APD"] == 1


def test_the_scale_is_taken_where_both_see():
    true, visible, random = tracks()
    seen = random.random(visible.shape) < 0.5
    predicted = true.copy()
    predicted[~(visible & seen)] *= 100
    found = track_metrics(predicted, seen, true, visible, CAMERA)
    assert found["within_1"] == pytest.approx((visible & seen).sum() / visible.sum())


def test_lengths_in_place_of_pixels():
    file = np.load(GOLDEN)
    visible = file["in/visibility"] > 0.5
    found = track_metrics(
        file["in/tracks_pred"], visible, file["in/tracks_gt"], visible, scaling="none", thresholds=(0.1,)
    )
    assert found["EPE"] == pytest.approx(file["out/tracking/l1"].item(), abs=1e-6)
    # upstream's "aj" is this share: it predicts no occlusion
    assert found["within_0.1"] == pytest.approx(file["out/tracking/aj"].item(), abs=1e-6)


def test_world_coordinates_and_changing_focal_lengths():
    true, visible, random = tracks()
    predicted = true + 0.02 * random.normal(size=true.shape)
    wanted = track_metrics(predicted, visible, true, visible, CAMERA, scaling="none")
    turned, shifted = true[..., [2, 0, 1]], predicted[..., [2, 0, 1]]
    found = track_metrics(shifted, visible, turned, visible, CAMERA, scaling="none", depth=true[..., 2])
    assert found == pytest.approx(wanted)
    zoom = np.stack([CAMERA] * true.shape[1]) * np.array([1.0, 2, 4, 8, 16, 32])[:, None, None]
    zoomed = track_metrics(predicted, visible, true, visible, zoom, scaling="none")
    by_frame = [
        track_metrics(predicted[:, [t]], visible[:, [t]], true[:, [t]], visible[:, [t]], zoom[t], scaling="none")
        for t in range(true.shape[1])
    ]
    weights = visible.sum(0)
    assert zoomed["APD"] == pytest.approx(np.average([m["APD"] for m in by_frame], weights=weights))


def test_what_is_not_known_does_not_count():
    true, visible, random = tracks()
    predicted, seen = true + 0.02 * random.normal(size=true.shape), random.random(visible.shape) < 0.6
    valid = np.ones_like(visible)
    valid[:, 3:] = False
    wanted = track_metrics(predicted[:, :3], seen[:, :3], true[:, :3], visible[:, :3], CAMERA)
    true[:, 3:] = np.nan
    assert track_metrics(predicted, seen, true, visible, CAMERA, valid=valid) == pytest.approx(wanted)
    nothing = track_metrics(predicted, seen, true, np.zeros_like(visible), CAMERA)
    assert math.isnan(nothing["APD"]) and math.isnan(nothing["EPE"])
    empty = track_metrics(true[:0], visible[:0], true[:0], visible[:0], CAMERA)
    assert all(map(math.isnan, empty.values()))


def test_misuse():
    true, visible, _ = tracks()
    with pytest.raises(
        ValueError, match=r"predicted, true: wanted \(K, T, 3\) both, got \(20, 5, 3\) and \(20, 6, 3\)"
    ):
        track_metrics(true[:, :5], visible, true, visible)
    with pytest.raises(ValueError, match=r"predicted_visible: wanted shape \(20, 6\), got \(20, 5\)"):
        track_metrics(true, visible[:, :5], true, visible)
    with pytest.raises(ValueError, match="scaling: wanted .* got 'sim3'"):
        track_metrics(true, visible, true, visible, scaling="sim3")
    with pytest.raises(ValueError, match="query_frame: wanted one frame"):
        track_metrics(true, visible, true, visible, scaling="per_trajectory")
