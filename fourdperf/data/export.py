"""Writes synthetic scenes in the layouts that recorded videos have: generic folders, PointOdyssey, Kubric, tar shards.

Good for tests of readers and for training through them, and as an example of each layout. A scene is anything with the
interface of :class:`fourdperf.data.scenes.Scene`: ``render()``, ``answer(queries)``, ``intrinsics`` and
``world_from_camera``. What a layout cannot say is lost: PointOdyssey's 16-bit depths have steps of 1/65 unit, Kubric
has no deforming bodies and only square pixels.

Each scene appears whole or not at all.
"""

import contextlib
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch

from fourdperf.data.cameras import OPENCV_FROM_BLENDER, quaternion_from_rotation
from fourdperf.data.files import atomic_path
from fourdperf.data.pointodyssey import MAX_DEPTH, WORLD_FROM_BLENDER
from fourdperf.data.queries import Queries, Targets
from fourdperf.geometry import transform, umeyama

__all__ = ["Layout", "Recording", "export_scene", "pack_shard", "record"]

Layout = Literal["folder", "pointodyssey", "movi"]

JPEG_QUALITY = 95
SENSOR_WIDTH = 32.0  # millimetres, Kubric's default
RIGID_TOLERANCE = 1e-4  # of the distance to the camera
POINTS_PER_BODY = 64


class Recording(NamedTuple):
    """A scene as arrays, T frames, N tracks, K bodies; see ``fourdperf.data.sources`` for the meaning.

    video uint8 (T, H, W, 3); depth, float32 (T, H, W); normal, float32 (T, H, W, 3), camera; instance int64 (T, H, W);
    flow float32 (T - 1, H, W, 2), uv units; intrinsics (T, 3, 3) normalised and world_from_camera (T, 4, 4), float64;
    world_from_body float64 (T, K, 4, 4), NaN for what deforms; uv (T, N, 2), xyz (T, N, 3) world, float32, NaN where
    not known; visible bool (T, N)
    """

    video: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    instance: np.ndarray
    flow: np.ndarray
    intrinsics: np.ndarray
    world_from_camera: np.ndarray
    world_from_body: np.ndarray
    uv: np.ndarray
    xyz: np.ndarray
    visible: np.ndarray


def record(scene: Any, num_tracks: int = 1024, scale: float = 1.0, seed: int = 0) -> Recording:
    """Renders a scene and follows points of it.

    Args:
        scene: see this module.
        num_tracks: points, at random places of all frames in turn, followed through all of them.
        scale: lengths are multiplied by it.
        seed: of the places.

    Raises:
        ValueError: `num_tracks` or `scale` is out of range.
    """
    if num_tracks < 0 or not 0 < scale < np.inf:
        raise ValueError(f"wanted num_tracks from 0 and scale above 0, got {num_tracks} and {scale}")
    rendering = scene.render()
    pose = scene.world_from_camera.double().cpu()
    frames, height, width = rendering.depth.shape
    places = torch.rand(num_tracks, 2, generator=torch.Generator().manual_seed(seed))
    uv, xyz, visible = _follow(scene, pose, places, torch.arange(num_tracks) % frames)
    bodies = _fit_bodies(scene, rendering.instance.cpu(), pose)
    pose, bodies, xyz = pose.numpy().copy(), bodies.numpy(), xyz.numpy()
    pose[:, :3, 3] *= scale
    bodies[..., :3, 3] *= scale
    return Recording(
        video=(rendering.video * 255).round().clamp(0, 255).byte().cpu().numpy(),
        depth=rendering.depth.float().cpu().numpy() * np.float32(scale),
        normal=rendering.normal.float().cpu().numpy(),
        instance=rendering.instance.cpu().numpy(),
        flow=rendering.flow.float().cpu().numpy(),
        intrinsics=scene.intrinsics.double().cpu().numpy(),
        world_from_camera=pose,
        world_from_body=bodies,
        uv=uv.numpy(),
        xyz=(xyz * scale).astype(np.float32),
        visible=visible.numpy(),
    )


def _follow(scene: Any, pose: torch.Tensor, places: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Points (N) named by places in their source frames, at all times: uv (T, N, 2), world xyz (T, N, 3) float64, NaN
    where not known, and visible (T, N)."""
    frames, points = len(pose), len(places)
    times = torch.arange(frames)[:, None].expand(frames, points)
    queries = Queries(places.expand(frames, points, 2), source.expand(frames, points), times, times)
    targets = Targets(*(part.cpu() for part in scene.answer(queries)))
    xyz = transform(pose, targets.xyz.double())
    return (
        torch.where(targets.has_uv[..., None], targets.uv, torch.nan),
        torch.where(targets.has_xyz[..., None], xyz, torch.nan),
        (targets.visibility > 0.5) & targets.has_visibility & targets.has_uv,
    )


def _fit_bodies(scene: Any, instance: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """world_from_body (T, K, 4, 4) of the instances, from where their points are at all times; body coordinates are
    world axes about the points' mean, at the time of the frame that shows most of the body. NaN for what is not rigid,
    or too small to tell."""
    frames, height, width = instance.shape
    count = int(instance.max()) + 1
    bodies = torch.full((frames, count, 4, 4), torch.nan, dtype=torch.float64)
    for k in range(count):
        there = instance == k
        best = int(there.flatten(1).sum(1).argmax())
        pixels = there[best].nonzero()
        pixels = pixels[torch.linspace(0, len(pixels) - 1, min(len(pixels), POINTS_PER_BODY)).long()]
        if len(pixels) < 8:
            continue
        places = (pixels.flip(-1) + 0.5) / torch.tensor([width, height])
        points = _follow(scene, pose, places, torch.full((len(pixels),), best))[1]  # (T, P, 3)
        middle = points[best].mean(0)
        local = (points[best] - middle).expand(frames, -1, -1)
        spread = torch.linalg.svdvals(local[0])
        fit = umeyama(local, points, with_scale=False)
        error = (fit(local) - points).norm(dim=-1).amax()
        if (
            spread[1] > 1e-2 * spread[0]
            and error < RIGID_TOLERANCE * (points - pose[:, None, :3, 3]).norm(dim=-1).max()
        ):
            bodies[:, k] = fit.matrix()
    return bodies


def export_scene(
    scene: Any, path: str | os.PathLike, layout: Layout = "folder", num_tracks: int = 1024, scale: float = 1.0
) -> None:
    """Writes a scene as a folder ``path`` in a layout; the arguments of :func:`record`.

    Raises:
        FileExistsError: there is something at ``path`` already.
        OSError: a file cannot be written; then nothing is left.
        ValueError: the layout cannot hold the scene, or an argument is out of range.
    """
    writers = {"folder": _write_folder, "pointodyssey": _write_pointodyssey, "movi": _write_movi}
    if layout not in writers:
        raise ValueError(f"layout: wanted one of {', '.join(writers)}, got {layout!r}")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path}: wanted a new folder, something is there already")
    recording = record(scene, num_tracks, scale)
    with _new_folder(path) as folder:
        writers[layout](recording, folder)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name ``path`` when the block ends well, and goes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_folder(recording: Recording, folder: Path) -> None:
    for what in ("frames", "depth", "normals", "instances"):
        (folder / what).mkdir()
    for i, frame in enumerate(recording.video):
        _write_image(folder / f"frames/{i:05d}.png", frame)
        np.save(folder / f"depth/{i:05d}.npy", recording.depth[i])
        np.save(folder / f"normals/{i:05d}.npy", recording.normal[i])
        _write_image(folder / f"instances/{i:05d}.png", recording.instance[i].astype(np.uint16))
    poses = recording.world_from_camera
    np.savez(folder / "cameras.npz", intrinsics=recording.intrinsics, poses=poses)
    np.savez(folder / "bodies.npz", world_from_body=recording.world_from_body)
    np.savez(folder / "tracks.npz", uv=recording.uv, xyz=recording.xyz, visible=recording.visible)
    notes = {"depth": "z", "normals": "camera", "intrinsics": "normalised", "poses": "world_from_camera"}
    _write_json(folder / "scene.json", notes | {"axes": "opencv", "tracks": "normalised"})


def _write_pointodyssey(recording: Recording, folder: Path) -> None:
    for what in ("rgbs", "depths", "normals", "masks"):
        (folder / what).mkdir()
    colours = _palette(int(recording.instance.max()) + 1)
    frames, height, width = recording.depth.shape
    for i in range(frames):
        _write_image(folder / f"rgbs/rgb_{i:05d}.jpg", recording.video[i])
        _write_image(folder / f"masks/mask_{i:05d}.png", colours[recording.instance[i]])
        depth = np.rint(recording.depth[i].clip(0, MAX_DEPTH) / MAX_DEPTH * 65535).astype(np.uint16)
        _write_image(folder / f"depths/depth_{i:05d}.png", depth)
        blender = recording.normal[i] @ recording.world_from_camera[i, :3, :3].T @ WORLD_FROM_BLENDER
        _write_image(
            folder / f"normals/normal_{i:05d}.jpg", np.rint((blender + 1) * 127.5).clip(0, 255).astype(np.uint8)
        )
    pixels = np.array([width, height, 1])
    arrays = {
        "trajs_2d": recording.uv * np.float32([width, height]),
        "trajs_3d": recording.xyz,
        "valids": np.isfinite(recording.xyz).all(-1) & np.isfinite(recording.uv).all(-1),
        "visibs": recording.visible,
        "intrinsics": (recording.intrinsics * pixels[:, None]).astype(np.float32),
        "extrinsics": np.linalg.inv(recording.world_from_camera).astype(np.float32),
    }
    np.savez(folder / "anno.npz", **arrays)
    np.savez(folder / "info.npz", **{key: np.array(array.shape) for key, array in arrays.items()})


def _write_movi(recording: Recording, folder: Path) -> None:
    frames, height, width = recording.depth.shape
    k = recording.intrinsics
    square = np.abs(k[:, 0, 0] * width / (k[:, 1, 1] * height) - 1).max() < 1e-5
    if not square or np.abs(k[:, :2, 2] - 0.5).max() > 1e-6:
        raise ValueError(
            "layout 'movi': wanted square pixels and the principal point in the middle, got other intrinsics"
        )
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    pixels = recording.flow * np.float32([width, height])
    pixels = np.concatenate([pixels, np.zeros_like(recording.depth[-1:, ..., None].repeat(2, -1))])
    low, high = float(pixels.min()), float(max(pixels.max(), pixels.min() + 1e-6))
    turn = recording.world_from_camera @ OPENCV_FROM_BLENDER
    for i in range(frames):
        opaque = np.full((height, width, 1), 255, np.uint8)
        _write_image(folder / f"rgba_{i:05d}.png", np.concatenate([recording.video[i], opaque], -1))
        stretch = np.sqrt(1 + (x / k[i, 0, 0]) ** 2 + (y[:, None] / k[i, 1, 1]) ** 2)
        _write_image(folder / f"depth_{i:05d}.tiff", (recording.depth[i] * stretch).astype(np.float32))
        world = recording.normal[i] @ recording.world_from_camera[i, :3, :3].T
        _write_image(folder / f"normal_{i:05d}.png", np.rint((world.clip(-1, 1) + 1) * 32767.5).astype(np.uint16))
        flow = np.rint((pixels[i, ..., ::-1] - low) / (high - low) * 65535).astype(np.uint16)  # rows, columns
        _write_image(folder / f"forward_flow_{i:05d}.png", np.concatenate([flow, 0 * flow[..., :1]], -1))
        (folder / f"segmentation_{i:05d}.png").write_bytes(_palette_png(recording.instance[i]))
    _write_json(folder / "data_ranges.json", {"forward_flow": {"min": low, "max": high}})
    focal = k[:, 0, 0] * SENSOR_WIDTH
    bodies = [_path(recording.world_from_body[:, k]) for k in range(1, recording.world_from_body.shape[1])]
    metadata = {
        "metadata": {"num_frames": frames, "resolution": [width, height], "num_instances": len(bodies)},
        "camera": {
            "focal_length": float(focal[0]) if np.ptp(focal) == 0 else focal.tolist(),
            "sensor_width": SENSOR_WIDTH,
            **_path(turn),
        },
        "instances": bodies,
    }
    _write_json(folder / "metadata.json", metadata)


def _path(poses: np.ndarray) -> dict[str, Any]:
    """Kubric's positions and quaternions of poses (T, 4, 4), null where they are not known."""
    if not np.isfinite(poses).all():
        return {"positions": None, "quaternions": None}
    turns = quaternion_from_rotation(poses[:, :3, :3])
    return {"positions": poses[:, :3, 3].tolist(), "quaternions": turns.tolist()}


def pack_shard(path: str | os.PathLike, scenes: Sequence[str | os.PathLike]) -> None:
    """Packs generic folders into one tar shard for WebDataset: the file SCENE/frames/00000.png is named
    SCENE.frames.00000.png, so that a scene is one sample (`fourdperf.data.shards` reads them).

    Raises:
        OSError: a file cannot be read or written.
        ValueError: there is no scene, two have one name, or a name has a dot.
    """
    folders = [Path(scene) for scene in scenes]
    names = [folder.name for folder in folders]
    if not folders or len(set(names)) != len(names) or any("." in name for name in names):
        raise ValueError(f"{path}: wanted scenes with different names without dots, got {names}")
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as shard:
        for folder in folders:
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                content = file.read_bytes()
                info = tarfile.TarInfo(".".join((folder.name, *file.relative_to(folder).parts)))
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def _write_image(path: Path, image: np.ndarray) -> None:
    """One channel, RGB or RGBA."""
    if image.ndim == 3:
        image = image[..., [2, 1, 0, 3][: image.shape[2]]]
    flags = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    found, content = cv2.imencode(path.suffix, np.ascontiguousarray(image), flags)
    if not found:
        raise ValueError(f"cannot encode {path.name}: {image.dtype} {image.shape}")
    path.write_bytes(content.tobytes())


def _palette(count: int) -> np.ndarray:
    """Different colours (count, 3) uint8, black first."""
    hues = np.arange(count)[None] * 180 // max(1, count)
    colours = np.stack([hues, np.full_like(hues, 255), 128 + np.arange(count)[None] % 128], -1).astype(np.uint8)
    colours = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)[0]
    colours[0] = 0
    return colours


def _palette_png(ids: np.ndarray) -> bytes:
    """A PNG whose pixels are indices into a palette, which OpenCV cannot write."""
    colours = _palette(int(ids.max()) + 1)
    if len(colours) > 256:
        raise ValueError(f"layout 'movi': wanted at most 255 instances, got {len(colours) - 1}")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = ids.shape
    rows = np.pad(ids.astype(np.uint8), ((0, 0), (1, 0)))  # each row begins with its filter, 0
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", colours.tobytes()),
            chunk(b"IDAT", zlib.compress(rows.tobytes())),
            chunk(b"IEND", b""),
        )
    )
