"""An exact reconstruction to test what is written from one: a box turns in a room, and a camera moves past it."""

import numpy as np

from fourdperf.data.demo_clip import demo_clip
from fourdperf.reconstruct import Reconstruction

BOX = np.array([0.0, 0.15, 4.0])
HALF = np.array([0.8, 0.65, 0.8])
FLOOR, WALL = 0.9, 7.0


def example(frames: int = 8, height: int = 48, width: int = 64, spacing: int = 6, stride: int = 1) -> Reconstruction:
    """A video with its true depth, cameras, cloud (every pixel of every ``stride``-th row and column) and tracks (of
    every ``spacing``-th pixel of the first frame)."""
    time = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    poses = np.stack([_pose(t) for t in time])
    poses = np.linalg.inv(poses[0]) @ poses  # the world is the first camera
    box = np.stack([_turn(1.9 * t + 0.5) for t in time])
    focal = 1.1
    intrinsics = np.array([[focal, 0, 0.5], [0, focal * width / height, 0.5], [0, 0, 1]])
    u, v = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T  # z = 1: the distance is the depth
    wall = np.ascontiguousarray(demo_clip(1, 256, 256)[0][0])

    shots = [_shoot(rays @ pose[:3, :3].T, pose[:3, 3], turn, wall) for pose, turn in zip(poses, box)]
    depth, video, _ = (np.stack(part) for part in zip(*shots))
    world = np.einsum("tij,thwj->thwi", poses[:, :3, :3], rays * depth[..., None]) + poses[:, None, None, :3, 3]
    kept = np.s_[:, ::stride, ::stride]

    pick = np.s_[spacing // 2 :: spacing, spacing // 2 :: spacing]
    start, on_box = world[0][pick].reshape(-1, 3), shots[0][2][pick].reshape(-1)
    local = (start - BOX) @ box[0]
    moved = np.einsum("tij,kj->kti", box, local) + BOX
    tracks = np.where(on_box[:, None, None], moved, start[:, None])
    seen = np.einsum("tji,ktj->kti", poses[:, :3, :3], tracks - poses[:, :3, 3])
    uv = (seen / seen[..., 2:]) @ intrinsics.T
    column, row = (np.floor(uv[..., i] * n).astype(int) for i, n in ((0, width), (1, height)))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    shown = depth[np.arange(frames), row.clip(0, height - 1), column.clip(0, width - 1)]
    return Reconstruction(
        video=video,
        depth=depth,
        depth_confidence=np.full(depth.shape, 0.9),
        world_from_camera=poses,
        intrinsics=np.repeat(intrinsics[None], frames, 0),
        distortion=np.zeros((frames, 2)),
        points=world[kept].reshape(-1, 3),
        point_colors=video[kept].reshape(-1, 3),
        point_frame=np.arange(frames).repeat(world[kept][0, ..., 0].size),
        tracks=tracks,
        tracks_uv=uv[..., :2],
        tracks_visible=inside & (np.abs(shown - seen[..., 2]) < 0.1 * seen[..., 2]),
        track_colors=video[0][pick].reshape(-1, 3),
        track_source=np.stack([np.zeros(len(start)), u[pick].ravel(), v[pick].ravel()], -1),
        stats={"queries": int(depth.size), "seconds": 1.5},
    )


def _turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _pose(time: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = _turn(0.35 * (0.5 - time))
    pose[:3, 3] = [1.6 * (time - 0.5), -0.25 * np.sin(np.pi * time), 0.4 * time]
    return pose


def _shoot(rays, origin, turn, wall):
    """Depth (H, W), colours (H, W, 3) and whether the box is hit (H, W), for rays (H, W, 3) from ``origin``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(rays[..., 1] > 0, (FLOOR - origin[1]) / rays[..., 1], np.inf)
        back = (WALL - origin[2]) / rays[..., 2]
        local, centre = rays @ turn, (origin - BOX) @ turn
        near, far = (-np.sign(local) * HALF - centre) / local, (np.sign(local) * HALF - centre) / local
    entry, face = near.max(-1), near.argmax(-1)
    hit = (entry < far.min(-1)) & (entry < np.minimum(floor, back))
    depth = np.where(hit, entry, np.minimum(floor, back))
    x, y, z = np.moveaxis(rays * depth[..., None] + origin, -1, 0)
    squares = np.floor(x * 1.5).astype(int) + np.floor(z * 1.5).astype(int) & 1
    ground = np.where(squares[..., None], (205, 190, 165), (110, 95, 85))
    column, row = ((x / 12 + 0.5) * 255).clip(0, 255).astype(int), ((y + 4) / 5 * 255).clip(0, 255).astype(int)
    colours = np.where((floor < back)[..., None], ground, wall[row, column])
    place = np.moveaxis(local * depth[..., None] + centre, -1, 0) / HALF[:, None, None]
    a, b = np.where(face == 0, place[1], place[0]), np.where(face == 2, place[1], place[2])
    paint = np.array([[230, 80, 60], [240, 200, 70], [60, 140, 220]])[face]
    stripes = np.abs(np.round(2.5 * a) - 2.5 * a) + np.abs(np.round(2.5 * b) - 2.5 * b) < 0.45
    colours = np.where(hit[..., None], np.where(stripes[..., None], paint, paint * 0.55 + 40), colours)
    return depth, colours.clip(0, 255).astype(np.uint8), hit
