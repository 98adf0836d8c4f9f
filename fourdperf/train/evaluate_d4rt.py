"""How good a D4RT is: on queries of any data set, and on synthetic scenes against `fourdperf.train.baselines`.

Everything is measured clip by clip and averaged over the clips. A model does not know the scale of a scene: depth,
points and tracks get one scale per clip, poses one similarity, as the metrics say (`fourdperf.metrics`).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fourdperf.data.queries import Clip, Queries, Targets
from fourdperf.data.scenes import Scene
from fourdperf.geometry import relative_pose
from fourdperf.metrics import depth_metrics, pose_metrics, track_metrics
from fourdperf.models.d4rt import D4RT, Prediction
from fourdperf.reconstruct import recipes
from fourdperf.train.baselines import Averages, Followed, flow_tracks, still_tracks
from fourdperf.train.d4rt_loss import UV_REACH, d4rt_loss, mean_depth
from fourdperf.train.data import collate
from fourdperf.train.pictures import depth_queries

__all__ = ["evaluate_queries", "evaluate_scenes", "format_table"]

Row = dict[str, float]
TRACK_GRID = (8, 8)
CAMERA_GRID = (16, 16)
PIXELS = 256  # what distances in a frame are multiplied with


@torch.inference_mode()
def evaluate_queries(model: D4RT, clips: Iterable[Clip]) -> Row:
    """Of the clips' own queries, the terms of the loss under their names with loss_ before, the loss, and

    abs_rel              |z - z*| / z* of the points in front of their camera, after one scale per clip
    xyz_error            |x / d - x* / d*|, d the mean depth of the clip's points
    uv_error             |uv - uv*|, in frame widths, of projections up to one frame size outside
    visibility_accuracy  share of right visibilities; always_visible is what "visible" as only answer gets
    normal_degrees       angle between normals

    Raises:
        ValueError: there is no clip.
    """
    device = next(model.parameters()).device
    rows = []
    for clip in tqdm(clips, "queries", unit="clip", disable=None):
        batch = collate([clip])
        batch = Clip(*(Queries(*map(_to(device), part)) if isinstance(part, Queries) else part for part in batch))
        inputs = (batch.video.to(device), batch.queries, batch.aspect_ratio.to(device), batch.patch_video.to(device))
        prediction = Prediction(*(x.cpu() for x in model(*inputs)))
        terms = d4rt_loss(prediction, batch.targets)
        row = {f"loss_{name}" if name != "loss" else name: value.item() for name, value in terms.items()}
        rows.append(row | query_metrics(prediction, batch.targets))
    return _mean(rows)


def _to(device: torch.device):
    return lambda x: x.to(device)


def query_metrics(prediction: Prediction, targets: Targets) -> Row:
    """The measures of `evaluate_queries` of one clip, (1, N)."""
    ours, true = (x / mean_depth(x, targets.has_xyz) for x in (prediction.xyz, targets.xyz))
    z, true_z = prediction.xyz[..., 2], targets.xyz[..., 2]
    visible = targets.visibility > 0.5
    near = targets.has_uv & ((targets.uv - 0.5).abs() <= UV_REACH).all(-1)
    angle = torch.nn.functional.cosine_similarity(prediction.normal, targets.normal, dim=-1).clamp(-1, 1).arccos()
    return {
        "abs_rel": depth_metrics(z, true_z, targets.has_xyz)["abs_rel"],
        "xyz_error": _over((ours - true).norm(dim=-1), targets.has_xyz),
        "uv_error": _over((prediction.uv - targets.uv).norm(dim=-1), near),
        "visibility_accuracy": _over((prediction.visibility > 0) == visible, targets.has_visibility),
        "always_visible": _over(visible, targets.has_visibility),
        "normal_degrees": _over(angle.rad2deg(), targets.has_normal),
    }


def _over(values: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean where the mask is; NaN of nothing."""
    return values[mask].double().mean().item()


def evaluate_scenes(
    model: D4RT, scenes: Sequence[Scene], averages: Averages, size: tuple[int, int] = (32, 32)
) -> dict[str, dict[str, Row]]:
    """Depth, tracks, poses and focal lengths of scenes, as the recipes of `fourdperf.reconstruct` find them, and of
    every baseline: {"depth": {"D4RT": {...}, ...}, "tracks": ..., "poses": ..., "focal": ...}.

    Args:
        scenes: held out, of the model's number of frames; the queries' RGB patches are cut from their frames as they
            are, while the model sees them in its own size.
        averages: of training scenes, on the grid ``size``.
        size: (h, w) of the depth maps. Tracks are those of an 8 x 8 grid of frame 0, judged where the points are truly
            visible: EPE in 3-D and scene units, `pixels` in the frame as if it had 256 x 256. `hidden` is the EPE where
            they are not, with a scale of its own.

    Raises:
        ValueError: there is no scene, or one that does not fit the model.
    """
    rows: dict[str, dict[str, list[Row]]] = {}
    for scene in tqdm(scenes, "scenes", unit="scene", disable=None):
        frames = (scene.render().video * 255).round().clamp(0, 255).byte()
        video = recipes.EncodedVideo(model, frames, high_resolution=True)
        parts = {
            "depth": _depth(video, scene, averages, size),
            "tracks": _tracks(video, scene, frames.numpy()),
            "poses": _poses(video, scene),
            "focal": _focal(video, scene, averages),
        }
        for task, found in parts.items():
            for name, row in found.items():
                rows.setdefault(task, {}).setdefault(name, []).append(row)
    if not rows:
        raise ValueError("scenes: wanted at least one, got none")
    return {task: {name: _mean(found) for name, found in table.items()} for task, table in rows.items()}


def _depth(video: recipes.EncodedVideo, scene: Scene, averages: Averages, size: tuple[int, int]) -> dict[str, Row]:
    true = scene.answer(depth_queries(len(video), size)).xyz[:, 2].view(-1, *size)
    found = {
        "D4RT": recipes.depth(video, size).depth,
        "best constant": torch.ones_like(true),
        "mean of training scenes": averages.depth,
    }
    return {name: depth_metrics(depth, true) for name, depth in found.items()}


def _tracks(video: recipes.EncodedVideo, scene: Scene, frames: np.ndarray) -> dict[str, Row]:
    source, number = recipes.grid(video, *TRACK_GRID), len(video)
    uv, start = source[:, 1:], torch.zeros(len(source), dtype=torch.int64)
    t = torch.arange(number).expand(len(uv), -1)
    true = scene.answer(Queries(uv[:, None].expand(-1, number, -1), torch.zeros_like(t), t, t))
    ours = recipes.tracks(video, source)
    flow = flow_tracks(scene, frames, uv)
    found = {
        "D4RT": Followed(ours.xyz, ours.visible, ours.uv),
        "does not move, true depth": still_tracks(scene.answer(Queries(uv, start, start, start)).xyz, uv, number),
        "does not move, D4RT's depth": still_tracks(ours.xyz[:, 0], uv, number),
        "DIS flow, true depth": flow,
        "DIS flow, D4RT's depth": flow._replace(xyz=_points_at(video, flow.uv)),
    }
    return {name: _track_row(tracks, true, scene) for name, tracks in found.items()}


def _points_at(video: recipes.EncodedVideo, uv: Tensor) -> Tensor:
    """What the model sees at places `(K, T, 2)` of each frame, at its own time and in its own camera: `(K, T, 3)`."""
    places = uv.clamp(0, 1).flatten(0, 1).to(video.device)

    def make(index: Tensor) -> Queries:
        t = index % uv.shape[1]
        return Queries(places[index], t, t, t)

    return video.ask(len(places), make, ("xyz",))[0].view(*uv.shape[:2], 3)


def _track_row(found: Followed, true: Targets, scene: Scene) -> Row:
    visible = true.visibility > 0.5
    metrics = track_metrics(found.xyz, found.visible, true.xyz, visible, scene.intrinsics)
    everywhere = torch.ones_like(visible)
    hidden = track_metrics(found.xyz, everywhere, true.xyz, everywhere, scene.intrinsics, valid=~visible)
    pixels = (found.uv - true.uv).norm(dim=-1)[visible].mean().item() * PIXELS
    row = {"EPE": metrics["EPE"], "hidden": hidden["EPE"], "pixels": pixels}
    return row | {name: metrics[name] for name in ("APD", "AJ", "OA")}


def _poses(video: recipes.EncodedVideo, scene: Scene) -> dict[str, Row]:
    true = relative_pose(scene.world_from_camera[:1].double(), scene.world_from_camera.double())
    found = {"D4RT": recipes.extrinsics(video, CAMERA_GRID), "identity": torch.eye(4).expand_as(true)}
    return {name: pose_metrics(poses, true) for name, poses in found.items()}


def _focal(video: recipes.EncodedVideo, scene: Scene, averages: Averages) -> dict[str, Row]:
    true = scene.intrinsics[:, [0, 1], [0, 1]]
    ours = recipes.intrinsics(video, CAMERA_GRID).matrix[:, [0, 1], [0, 1]]
    found = {"D4RT": ours, "median of training scenes": averages.focal.expand_as(true)}
    return {name: {"relative_error": ((focal - true).abs() / true).mean().item()} for name, focal in found.items()}


def _mean(rows: Sequence[Row]) -> Row:
    """The mean over the clips where a measure exists."""
    if not rows:
        raise ValueError("clips: wanted at least one, got none")
    means = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        known = values[np.isfinite(values)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    return means


def format_table(table: dict[str, Row]) -> str:
    """One line per name, one column per measure."""
    names = list(next(iter(table.values())))
    width = max(map(len, table))
    lines = [" " * width + "".join(f"{name:>12}" for name in names)]
    lines += [f"{who:<{width}}" + "".join(f"{row[name]:>12.4f}" for name in names) for who, row in table.items()]
    return "\n".join(lines)
