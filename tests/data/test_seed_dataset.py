"""The seed's dictionaries as clips: a plane that a known camera sees, the golden of the seed's trainer, bad items."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fourdperf.data.queries import stack_clips
from fourdperf.data.seed_dataset import SeedDataset, clip_from_seed

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"
T, H, W = 3, 12, 16
K = np.array([[20.0, 0, 8.0], [0, 18.0, 6.0], [0, 0, 1]])


def item(**changes) -> dict:
    """Depth 2 + frame number everywhere. Queries: same frame; other camera; other time, source camera; outside."""
    made = {
        "video": torch.rand(T, 3, H, W, generator=torch.Generator().manual_seed(0)),
        "depth_maps": (2.0 + torch.arange(T).float())[:, None, None].expand(T, H, W).clone(),
        "coords_uv": torch.tensor([[8.5 / W, 2.5 / H], [0.25, 0.5], [0.75, 0.25], [0.5, 0.5]]),
        "t_src": torch.tensor([1, 0, 2, 0]),
        "t_tgt": torch.tensor([1, 0, 0, 2]),
        "t_cam": torch.tensor([1, 2, 2, 2]),
        "gt_3d": torch.tensor([[0.1, 0.2, 3.0], [0.5, 0.5, 4.0], [1.0, 0.0, 5.0], [9.0, 0.0, 4.0]]),
        "intrinsics": torch.tensor(K).float(),
        "aspect_ratio": torch.tensor(1.5),
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def test_exact_answers_from_depth_maps():
    clip = clip_from_seed(item(gt_3d=None), "pixels")
    assert clip.video.shape == (T, H, W, 3) and clip.video.dtype == torch.float32 and clip.aspect_ratio.item() == 1.5
    assert torch.equal(clip.video, item()["video"].permute(0, 2, 3, 1))
    targets = clip.targets
    assert targets.has_xyz.tolist() == [True, False, False, False] == targets.has_uv.tolist()
    torch.testing.assert_close(targets.xyz[0], torch.tensor([0.5 / 20 * 3, -3.5 / 18 * 3, 3.0]))
    torch.testing.assert_close(targets.uv[0], clip.queries.uv[0])
    assert targets.has_visibility.tolist() == [True, True, False, False] and (targets.visibility[:2] == 1).all()
    assert targets.has_displacement.tolist() == [True, True, False, False] and (targets.displacement == 0).all()
    assert not targets.has_normal.any() and targets.normal.shape == (4, 3)
    assert all(part.isfinite().all() for part in targets)


def test_exact_answers_from_points():
    targets = clip_from_seed(item(), "pixels").targets
    assert targets.has_xyz.all() and torch.equal(targets.xyz, item()["gt_3d"])
    torch.testing.assert_close(targets.uv[2], torch.tensor([1.0 / 5 * 20 / W + 0.5, 0.5]))
    # the last one is at its target's own camera, and off the frame
    assert targets.has_visibility.tolist() == [True, True, False, True] and targets.visibility.tolist() == [1, 1, 0, 0]
    assert targets.has_displacement.tolist() == [True, True, True, False]
    source = torch.tensor([0.25 * W / 20 * 4, -0.25 * H / 18 * 4, 4.0])
    torch.testing.assert_close(targets.displacement[2], torch.tensor([1.0, 0.0, 5.0]) - source)


def test_behind_the_camera_and_unknown_points():
    points = item()["gt_3d"]
    points[1, 2], points[3] = -1.0, torch.nan
    targets = clip_from_seed(item(gt_3d=points), "pixels").targets
    assert targets.has_xyz.tolist() == [True, True, True, False]
    assert targets.has_uv.tolist() == [True, False, True, False]
    assert all(part.isfinite().all() for part in targets)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_unknown_depth(bad):
    depth = item()["depth_maps"]
    depth[1, 2, 8] = bad
    targets = clip_from_seed(item(gt_3d=None, depth_maps=depth), "pixels").targets
    assert not targets.has_xyz.any() and all(part.isfinite().all() for part in targets)
    targets = clip_from_seed(item(depth_maps=None), "pixels").targets
    assert targets.has_xyz.all() and targets.has_displacement.tolist() == [True, True, False, False]


def test_units_of_the_intrinsics():
    scale = np.diag([1 / W, 1 / H, 1])
    integer = K - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    cases = {"pixels": K, "normalised": scale @ K, "pixels_integer_centres": integer}
    clips = [clip_from_seed(item(intrinsics=k), units) for units, k in cases.items()]
    for clip in clips[1:]:
        torch.testing.assert_close(clip.targets.uv, clips[0].targets.uv, atol=1e-6, rtol=0)
    per_frame = clip_from_seed(item(intrinsics=np.stack([K] * T)), "pixels")
    assert torch.equal(per_frame.targets.uv, clips[0].targets.uv)
    with pytest.raises(ValueError, match="intrinsics: wanted 'normalised'"):
        SeedDataset([item()], intrinsics="px")


def test_golden_of_the_seeds_trainer():
    golden = np.load(GOLDENS / "a_trainer_ground_truth.npz")
    atol = json.loads(str(golden["config"]))["atol"]
    for b in range(2):
        depth = golden["in/depths"][b, :, 0]
        frames, height, width = depth.shape
        # upstream clamps the frame; its intrinsics' last row is noise that it never reads
        t_tgt = torch.from_numpy(golden["in/t_tgt"][b]).clamp(max=frames - 1)
        k = golden["in/pix_T_cams"][b].copy()
        k[:, 2, 2] = 1
        clip = clip_from_seed(
            {
                "video": torch.zeros(frames, 3, height, width),
                "depth_maps": depth,
                "coords_uv": golden["in/coords_uv"][b],
                "t_src": t_tgt * 0,
                "t_tgt": t_tgt,
                "t_cam": t_tgt * 0,
                "intrinsics": k,
                "aspect_ratio": 1.0,
            },
            "pixels",
            targets="seed",
        )
        mask = golden["out/mask"][b] == 1
        targets = clip.targets
        assert np.array_equal(targets.has_xyz.numpy(), mask) and 0 < (~mask).sum()
        wanted = golden["out/gt_3d"][b]
        np.testing.assert_allclose(targets.xyz.numpy()[mask], wanted[mask], atol=atol["out/gt_3d"], rtol=0)
        pixels = targets.uv.numpy() * [width, height]
        np.testing.assert_allclose(pixels[mask], golden["out/gt_2d"][b][mask], atol=atol["out/gt_2d"], rtol=0)
        assert np.array_equal(targets.visibility.numpy(), golden["out/gt_visibility"][b])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": None}, "wanted a key 'video'"),
        ({"video": torch.zeros(T, H, W, 3)}, r"video: wanted \(T, 3, H, W\)"),
        ({"video": torch.full((T, 3, H, W), 200.0)}, "video: wanted floats in"),
        ({"video": torch.full((T, 3, H, W), torch.nan)}, "video: wanted floats in"),
        ({"video": torch.zeros(T, 3, H, W, dtype=torch.int32)}, "video: wanted uint8 or floats"),
        ({"video": "clip.mp4"}, "video: wanted a tensor or an array, got str"),
        ({"depth_maps": torch.zeros(T - 1, H, W)}, r"depth_maps: wanted \(3, H, W\)"),
        ({"depth_maps": None, "gt_3d": None}, "depth_maps: wanted"),
        ({"coords_uv": torch.zeros(4, 3)}, r"coords_uv: wanted \(N, 2\)"),
        ({"coords_uv": torch.full((4, 2), 7.0)}, r"coords_uv: wanted values in \[0, 1\], got 7"),
        ({"coords_uv": torch.full((4, 2), torch.nan)}, "coords_uv: wanted values"),
        ({"t_tgt": torch.tensor([0, 1, 2, 3])}, "t_tgt: wanted frames from 0 to 2, got 0 to 3"),
        ({"t_cam": torch.zeros(4)}, "t_cam: wanted integers"),
        ({"t_src": torch.zeros(5, dtype=torch.int64)}, "t_src: wanted integers"),
        ({"gt_3d": torch.zeros(5, 3)}, r"gt_3d: wanted \(4, 3\)"),
        ({"intrinsics": torch.zeros(3, 3)}, "intrinsics: wanted focal lengths above 0"),
        ({"intrinsics": torch.zeros(2, 3, 3)}, r"intrinsics: wanted \(3, 3\) or \(3, 3, 3\)"),
        ({"intrinsics": K * np.nan}, "not finite"),
        ({"intrinsics": K + [[0, 1, 0], [0, 0, 0], [0, 0, 0]]}, "wanted .*fx, 0, cx"),
        ({"aspect_ratio": 0.0}, "aspect_ratio: wanted one number above 0"),
        ({"aspect_ratio": torch.ones(2)}, "aspect_ratio: wanted one number above 0"),
    ],
)
def test_bad_items(changes, message):
    with pytest.raises(ValueError, match=f"item 0: .*{message}"):
        SeedDataset([item(**changes)], intrinsics="pixels")[0]


def test_frames_turned_round():
    frames = np.random.default_rng(0).random((T, H, W, 3), np.float32)
    clip = SeedDataset([item(video=frames[..., ::-1].transpose(0, 3, 1, 2))], intrinsics="pixels")[0]
    assert np.array_equal(clip.video, frames[..., ::-1])


def test_bad_data_sets():
    with pytest.raises(ValueError, match="dataset: wanted an object with __getitem__, got int"):
        SeedDataset(3, intrinsics="pixels")
    with pytest.raises(ValueError, match="item 0: wanted a dictionary, got tuple"):
        SeedDataset([()], intrinsics="pixels")[0]
    with pytest.raises(ValueError, match="targets: wanted"):
        SeedDataset([item()], intrinsics="pixels", targets="best")


def test_in_a_data_loader():
    dataset = SeedDataset([item(), item(video=np.zeros((T, 3, H, W), np.uint8))], intrinsics="pixels")
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=stack_clips, num_workers=1)))
    assert batch.video.shape == (2, T, H, W, 3) and batch.targets.xyz.shape == (2, 4, 3)
    empty = {"coords_uv": torch.zeros(0, 2), "gt_3d": torch.zeros(0, 3)}
    empty |= {key: torch.zeros(0, dtype=torch.int64) for key in ("t_src", "t_tgt", "t_cam")}
    assert clip_from_seed(item(**empty), "pixels").targets.xyz.shape == (0, 3)
