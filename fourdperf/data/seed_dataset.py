"""A user's own data set with the dictionaries of the seed's ``__getitem__``, as clips.

The dictionary, tensors or arrays, T frames of H x W and N queries:

    video         (T, 3, H, W)  uint8, or floats in [0, 1]
    depth_maps    (T, h, w)     z-depth in scene units, of any resolution; 0, negative, NaN and infinite mean "unknown"
    coords_uv     (N, 2)        in [0, 1], see ``fourdperf.data.queries``
    t_src, t_tgt, t_cam  (N,)   whole numbers from 0 to T - 1
    gt_3d         (N, 3)        optional: the point at time t_tgt in the camera of t_cam, scene units; NaN: unknown
    intrinsics    (3, 3)        of all frames, or (T, 3, 3)
    aspect_ratio  number        width / height before any squeeze

There are no poses in it, so that the depth maps answer only what needs none:

    xyz           gt_3d; without it, the unprojected depth where t_src = t_tgt = t_cam
    uv            the projection of xyz
    visibility    1 where t_src = t_tgt; 0 where t_tgt = t_cam and the projection falls outside the frame
    displacement  0 where t_src = t_tgt; where t_src = t_cam and gt_3d is known, gt_3d minus the unprojected depth
    normal        never

The seed's own trainer ignores gt_3d and takes the depth of frame t_tgt at the place (u, v) of frame t_src, which
is the true answer only if nothing moves; ``targets="seed"`` does the same (goldens ``a_trainer_ground_truth``).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.cameras import normalise_intrinsics
from fourdperf.data.queries import Clip, Queries, Targets, as_tensor
from fourdperf.data.recorded_queries import known_only
from fourdperf.geometry import project, unproject

__all__ = ["SeedDataset", "clip_from_seed"]

IntrinsicsUnits = Literal["normalised", "pixels", "pixels_integer_centres"]


class SeedDataset(Dataset[Clip]):
    """Wraps a map-style data set of such dictionaries; its items are :class:`fourdperf.data.queries.Clip`.

    Args:
        dataset: anything with ``__getitem__`` and ``__len__``; the items as this module says.
        intrinsics: what their units are, since it cannot be told from the numbers: "normalised" (u = fx X/Z + cx),
            "pixels" of `video` with the first pixel's centre at (0.5, 0.5), or "pixels_integer_centres", at (0, 0).
        targets: "exact", or "seed" for the targets that the seed's trainer makes itself.

    Raises:
        ValueError: an item is no such dictionary; the message names the item, the key, what was wanted and what came.
    """

    def __init__(
        self, dataset: Any, *, intrinsics: IntrinsicsUnits, targets: Literal["exact", "seed"] = "exact"
    ) -> None:
        for method in ("__getitem__", "__len__"):
            if not hasattr(dataset, method):
                raise ValueError(f"dataset: wanted an object with {method}, got {type(dataset).__name__}")
        if intrinsics not in ("normalised", "pixels", "pixels_integer_centres"):
            raise ValueError(
                f"intrinsics: wanted 'normalised', 'pixels' or 'pixels_integer_centres', got {intrinsics!r}"
            )
        if targets not in ("exact", "seed"):
            raise ValueError(f"targets: wanted 'exact' or 'seed', got {targets!r}")
        self.dataset, self.intrinsics, self.targets = dataset, intrinsics, targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Clip:
        return clip_from_seed(self.dataset[index], self.intrinsics, self.targets, name=f"item {index}")


def clip_from_seed(
    item: Mapping[str, Any],
    intrinsics: IntrinsicsUnits,
    targets: Literal["exact", "seed"] = "exact",
    name: str = "item",
) -> Clip:
    """The clip of one dictionary; arguments and errors as :class:`SeedDataset`."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{name}: wanted a dictionary, got {type(item).__name__}")
    video = _video(item, name)
    frames, height, width = video.shape[:3]
    depth = _depth(item, frames, name)
    queries = _queries(item, frames, name)
    k = _array(item, "intrinsics", name)
    if tuple(k.shape) not in ((3, 3), (frames, 3, 3)):
        raise ValueError(f"{name}: intrinsics: wanted (3, 3) or ({frames}, 3, 3), got {tuple(k.shape)}")
    centre = "integer" if intrinsics == "pixels_integer_centres" else "half"
    size = None if intrinsics == "normalised" else (height, width)
    k = torch.from_numpy(normalise_intrinsics(k.numpy(), size, f"{name}: intrinsics", centre)).expand(frames, 3, 3)
    ratio = _array(item, "aspect_ratio", name)
    if ratio.numel() != 1 or not 0 < ratio.item() < float("inf"):
        raise ValueError(f"{name}: aspect_ratio: wanted one number above 0, got {ratio.tolist()}")
    answer = _seed_targets if targets == "seed" else _exact_targets
    points = None
    if item.get("gt_3d") is not None:
        points = _array(item, "gt_3d", name).double()
        if tuple(points.shape) != (len(queries.uv), 3):
            raise ValueError(f"{name}: gt_3d: wanted ({len(queries.uv)}, 3), got {tuple(points.shape)}")
    if depth is None and (points is None or targets == "seed"):
        raise ValueError(f"{name}: depth_maps: wanted (T, H, W), got none, and no gt_3d to do without")
    return Clip(video, ratio.float().reshape(()), video, queries, answer(queries, depth, points, k))


def _array(item: Mapping[str, Any], key: str, name: str) -> Tensor:
    if item.get(key) is None:
        raise ValueError(f"{name}: wanted a key {key!r}, got only {sorted(map(str, item))}")
    try:
        return as_tensor(np.asarray(item[key]) if isinstance(item[key], list) else item[key]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {key}: wanted a tensor or an array, got {type(item[key]).__name__}") from error


def _video(item: Mapping[str, Any], name: str) -> Tensor:
    video = _array(item, "video", name)
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"{name}: video: wanted (T, 3, H, W), got {tuple(video.shape)}")
    if video.dtype == torch.uint8:
        video = video.float() / 255
    if not video.is_floating_point():
        raise ValueError(f"{name}: video: wanted uint8 or floats, got {video.dtype}")
    low, high = (x.item() for x in video.aminmax())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # NaN fails both
        raise ValueError(f"{name}: video: wanted floats in [0, 1], or uint8; got values from {low:.4g} to {high:.4g}")
    return video.float().clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def _depth(item: Mapping[str, Any], frames: int, name: str) -> Tensor | None:
    if item.get("depth_maps") is None:
        return None
    depth = _array(item, "depth_maps", name)
    if depth.ndim != 3 or len(depth) != frames or 0 in depth.shape:
        raise ValueError(f"{name}: depth_maps: wanted ({frames}, H, W), as many as frames, got {tuple(depth.shape)}")
    return depth.double()


def _queries(item: Mapping[str, Any], frames: int, name: str) -> Queries:
    uv = _array(item, "coords_uv", name).float()
    if uv.ndim != 2 or uv.shape[1] != 2:
        raise ValueError(f"{name}: coords_uv: wanted (N, 2), got {tuple(uv.shape)}")
    if not bool(((uv >= 0) & (uv <= 1)).all()):
        raise ValueError(
            f"{name}: coords_uv: wanted values in [0, 1], got {uv[~((uv >= 0) & (uv <= 1))][0].item():.4g}"
        )
    times = []
    for key in ("t_src", "t_tgt", "t_cam"):
        t = _array(item, key, name)
        if tuple(t.shape) != (len(uv),) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"{name}: {key}: wanted integers ({len(uv)},), got {t.dtype} {tuple(t.shape)}")
        if t.numel() and not (0 <= int(t.min()) and int(t.max()) < frames):
            raise ValueError(
                f"{name}: {key}: wanted frames from 0 to {frames - 1}, got {int(t.min())} to {int(t.max())}"
            )
        times.append(t.long())
    return Queries(uv, *times)


def _exact_targets(queries: Queries, depth: Tensor | None, points: Tensor | None, k: Tensor) -> Targets:
    uv, t_src, t_tgt, t_cam = queries
    same_time = t_src == t_tgt
    unknown = torch.full((len(uv), 3), torch.nan, dtype=torch.float64)
    at_source = unknown if depth is None else _unproject(queries, depth, t_src, k[t_src])  # (N, 3), camera of t_src
    xyz = torch.where((same_time & (t_src == t_cam))[:, None], at_source, unknown) if points is None else points
    projection, has_uv = _project(xyz, k[t_cam])
    has_xyz = xyz.isfinite().all(-1)
    outside = ~((projection >= 0) & (projection <= 1)).all(-1) | ~has_uv
    moved = torch.where(same_time[:, None], torch.zeros_like(xyz), xyz - at_source)
    has_moved = same_time | ((t_src == t_cam) & moved.isfinite().all(-1))
    return _targets(
        xyz=xyz,
        uv=projection,
        visibility=same_time.double(),
        displacement=moved,
        has_xyz=has_xyz,
        has_uv=has_uv,
        has_visibility=same_time | ((t_tgt == t_cam) & has_xyz & outside),
        has_displacement=has_moved,
    )


def _seed_targets(queries: Queries, depth: Tensor, points: Tensor | None, k: Tensor) -> Targets:
    xyz = _unproject(queries, depth, queries.t_tgt, k[queries.t_tgt[:1]])
    known = xyz.isfinite().all(-1)
    never = torch.zeros_like(known)
    return _targets(
        xyz=xyz,
        uv=queries.uv.double(),
        visibility=known.double(),
        displacement=torch.zeros_like(xyz),
        has_xyz=known,
        has_uv=known,
        has_visibility=known,
        has_displacement=never,
    )


def _unproject(queries: Queries, depth: Tensor, frame: Tensor, k: Tensor) -> Tensor:
    """The surface at (u, v) by the nearest pixel's depth in `frame` (N,): (N, 3), NaN where the depth is unknown."""
    height, width = depth.shape[1:]
    # in the coordinates' own float32, as a caller computes the pixel
    column, row = ((x * n).long().clamp(0, n - 1) for x, n in zip(queries.uv.unbind(-1), (width, height)))
    z = depth[frame, row, column]
    z = torch.where(z.isfinite() & (z > 0), z, torch.nan)
    return unproject(queries.uv.double()[:, None], z[:, None], k)[:, 0]


def _project(xyz: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """uv (N, 2), and where the point is known and in front of the camera."""
    uv, depth = project(xyz[:, None], k)
    return uv[:, 0], xyz.isfinite().all(-1) & (depth[:, 0] > 0)


def _targets(**parts: Tensor) -> Targets:
    """Without normals, and 0 for whatever is not known."""
    n = len(parts["xyz"])
    return known_only(Targets(**parts, normal=torch.zeros(n, 3), has_normal=torch.zeros(n, dtype=torch.bool)))
