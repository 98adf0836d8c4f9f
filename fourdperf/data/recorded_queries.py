"""Queries about recorded videos and the answers their truth allows, each exact or marked as not known.

A query is about a pixel of a depth map, or about a track:

    depth map   the pixel's centre, unprojected. At time t_src it is known in any camera whose pose is known. At another
                time only if its body moves rigidly and we know how (or nothing moves), and then exactly.
    track       where the frame of t_src shows the point. Its 3-D position is known at any time with xyz and poses;
                without them, uv and visibility of t_tgt in its own frame.

Only such times are asked for: where an answer needs t_tgt = t_src or t_cam = t_tgt, that is what the query has. Of N
queries half are about tracks where there are both (the paper is silent), and 30 % of all lie on depth or motion
boundaries, as the paper has it. The sharing out of times is that of `fourdperf.data.query_sampling`.

Visibility comes with tracks; of a pixel's point at another time it is judged by the depth map of that time, at the four
pixels around its projection (continued as planes where there is a normal map): hidden if it lies more than 1 % behind
all of them or turns away, visible if not behind any, and otherwise (edges) not known. Normals are those of the normal
map at t_src, turned with the body.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fourdperf.data.augment import View
from fourdperf.data.queries import Queries, Targets
from fourdperf.data.query_sampling import BOUNDARY_SHARE, SAME_TIME_SHARE, boundaries, sample_times
from fourdperf.data.sources import Window
from fourdperf.geometry import invert_rigid, project, transform, unproject

__all__ = ["Asked", "answer", "ask", "known_only"]

TRACK_SHARE = 0.5
DEPTH_TOLERANCE = 0.01
SAME_NORMAL = 0.98  # cosine


class Asked(NamedTuple):
    """Queries about a window's frames, uv of the whole frame, and what they are about: a track's number `(N,)`, or -1
    and the pixel's row and column in the depth map."""

    queries: Queries
    track: Tensor
    row: Tensor
    column: Tensor


def ask(
    window: Window,
    view: View,
    num_queries: int,
    size: int,
    generator: Generator,
    *,
    boundary_share: float = BOUNDARY_SHARE,
    same_time_share: float = SAME_TIME_SHARE,
) -> Asked:
    """`num_queries` queries inside the boxes of ``view``, whose frames are the window's, in their order.

    Boundaries are sought on a grid of ``size`` x ``size`` pixels of each box: those of what the model sees.

    Raises:
        ValueError: no depth is known and no track is visible there.
    """
    t_src, t_tgt, t_cam = sample_times(num_queries, len(window.frames), generator, same_time_share)
    same = t_tgt == t_cam
    row, column, known, edge = _pixels(window, view, size)
    shown = _shown_tracks(window, view)
    pixels, tracks = known.flatten().nonzero()[:, 0], shown.flatten().nonzero()[:, 0]
    if not len(pixels) and not len(tracks):
        raise ValueError(f"{window.name}: no pixel of these frames has a known depth, and no track is visible in them")
    about_tracks = round(num_queries * TRACK_SHARE) if len(pixels) else num_queries
    about_tracks = about_tracks if len(tracks) else 0

    track = torch.full((num_queries,), -1)
    chosen = tracks[_integers(len(tracks), about_tracks, generator)]
    track[:about_tracks] = chosen % max(1, shown.shape[1])
    t_src[:about_tracks] = chosen // max(1, shown.shape[1])

    about_pixels = num_queries - about_tracks
    chosen = pixels[_integers(len(pixels), about_pixels, generator)]
    edges = edge.flatten().nonzero()[:, 0]
    on_edge = min(round(boundary_share * num_queries), about_pixels) if len(edges) else 0
    chosen[:on_edge] = edges[_integers(len(edges), on_edge, generator)]
    t, y, x = (part.long() for part in torch.unravel_index(chosen, (len(window.frames), size, size)))
    t_src[about_tracks:] = t
    rows, columns = torch.zeros(2, num_queries, dtype=torch.int64)
    rows[about_tracks:], columns[about_tracks:] = row[t, y], column[t, x]

    uv = torch.zeros(num_queries, 2)
    if about_tracks:
        uv[:about_tracks] = torch.from_numpy(window.tracks.uv)[t_src[:about_tracks], track[:about_tracks]]
    if about_pixels:
        height, width = window.depth.shape[1:]
        pixel = torch.stack([columns, rows], -1)[about_tracks:].double()
        uv[about_tracks:] = ((pixel + 0.5) / torch.tensor([width, height])).float()
    asked = Asked(Queries(uv, t_src, t_tgt, t_cam), track, rows, columns)
    return asked._replace(queries=_answerable(window, asked, same))


def _integers(below: int, count: int, generator: Generator) -> Tensor:
    return torch.randint(max(1, below), (count,), generator=generator)


def _pixels(window: Window, view: View, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A grid over each frame's box: the depth map's rows and columns `(T, S)`, whether the depth is known and whether a
    boundary is there `(T, S, S)`."""
    frames = len(window.frames)
    nothing = torch.zeros(frames, size, size, dtype=torch.bool)
    if window.depth is None or window.intrinsics is None:
        empty = torch.zeros(frames, size, dtype=torch.int64)
        return empty, empty, nothing, nothing
    depth = torch.from_numpy(window.depth)
    step = (torch.arange(size) + 0.5) / size
    grids, inside = [], []
    for start, extent, count in zip(view.box[:, [1, 0]].T, view.box[:, [3, 2]].T, depth.shape[1:]):
        pixel = ((start[:, None] + extent[:, None] * step) * count).long().clamp(0, count - 1)
        place = ((pixel + 0.5) / count - start[:, None]) / extent[:, None]
        grids.append(pixel)
        inside.append((place >= 0) & (place <= 1))
    row, column = grids
    picked = (torch.arange(frames)[:, None, None], row[:, :, None], column[:, None])
    flow = None
    if window.flow is not None:
        flow = torch.from_numpy(window.flow)[tuple(part[: len(window.flow)] for part in picked)]
    known = depth[picked].isfinite() & inside[0][:, :, None] & inside[1][:, None]
    return row, column, known, boundaries(depth[picked], flow) & known


def _shown_tracks(window: Window, view: View) -> Tensor:
    """Which tracks each frame shows inside its box, `(T, N)`."""
    if window.tracks is None:
        return torch.zeros(len(window.frames), 0, dtype=torch.bool)
    place = (torch.from_numpy(window.tracks.uv) - view.box[:, None, :2]) / view.box[:, None, 2:]
    inside = ((place >= 0) & (place <= 1)).all(-1)  # NaN fails
    return inside & torch.from_numpy(window.tracks.visible)


def _answerable(window: Window, asked: Asked, same: Tensor) -> Queries:
    """The queries with times that have an answer; `same` tells where t_tgt = t_cam is wanted."""
    uv, t_src, t_tgt, t_cam = asked.queries
    about_track = asked.track >= 0
    followed = about_track.clone()
    if window.motion is not None and window.world_from_camera is not None:
        body = _bodies(window, asked)
        known = torch.from_numpy(np.isfinite(window.motion).all((-1, -2)))
        followed |= known[t_src, body] & known[t_tgt, body]
    # where t_tgt becomes t_src, t_cam goes with it or stays apart from it as before
    t_cam = torch.where(followed, t_cam, torch.where(same, t_src, torch.where(t_cam == t_src, t_tgt, t_cam)))
    t_tgt = torch.where(followed, t_tgt, t_src)
    own_camera = about_track if window.tracks is None or window.tracks.xyz is None else torch.zeros_like(about_track)
    if window.world_from_camera is None or window.intrinsics is None:
        own_camera = torch.ones_like(about_track)
    return Queries(uv, t_src, t_tgt, torch.where(own_camera, t_tgt, t_cam))


def _bodies(window: Window, asked: Asked) -> Tensor:
    """The body `(N,)` of each query about a pixel; 0 of those about tracks."""
    if window.instances is None:
        return torch.zeros_like(asked.track)
    found = torch.from_numpy(window.instances)[asked.queries.t_src, asked.row, asked.column]
    return torch.where(asked.track < 0, found, 0)


def answer(window: Window, asked: Asked) -> Targets:
    """The answers, float32, about the whole frames; 0 where not known. Computed in float64."""
    _, t_src, t_tgt, t_cam = asked.queries
    frames, about_track = len(window.frames), asked.track >= 0
    k = _tensor(window.intrinsics, torch.full((frames, 3, 3), torch.nan))
    pose = _tensor(window.world_from_camera, torch.eye(4).expand(frames, 4, 4))
    inverse = invert_rigid(pose)
    before, after, normal = _surface(window, asked, k, pose)  # (N, 3) each, world, at t_src and t_tgt
    xyz = _move(inverse[t_cam], after)
    moved = torch.where((t_src == t_tgt)[:, None], 0.0, _turn(inverse[t_cam], after - before))
    place, has_uv = _project(xyz, k[t_cam])
    there = _move(inverse[t_tgt], after)
    away = (_turn(inverse[t_tgt], normal) * there).sum(-1) > 0  # a normal that is not known is not away
    visibility, has_visibility = _visibility(window, asked, there, away, k[t_tgt])
    if window.tracks is not None:
        shown = torch.from_numpy(window.tracks.uv)[t_tgt, asked.track].double()
        seen = torch.from_numpy(window.tracks.visible)[t_tgt, asked.track].double()
        recorded = about_track & shown.isfinite().all(-1)
        own = recorded & (t_cam == t_tgt) & ~has_uv
        place, has_uv = torch.where(own[:, None], shown, place), has_uv | own
        visibility = torch.where(about_track, seen, visibility)
        has_visibility = torch.where(about_track, recorded, has_visibility)
    now = t_src == t_tgt
    normal = _turn(inverse[t_cam], normal)
    return known_only(
        Targets(
            xyz=xyz,
            uv=place,
            visibility=torch.where(now, 1.0, visibility),
            displacement=moved,
            normal=normal,
            has_xyz=xyz.isfinite().all(-1),
            has_uv=has_uv,
            has_visibility=has_visibility | now,
            has_displacement=moved.isfinite().all(-1),
            has_normal=normal.isfinite().all(-1),
        )
    )


def known_only(targets: Targets) -> Targets:
    """The same in float32 with 0 for what is not known, so that no NaN gets through a product with a mask."""
    parts = targets._asdict()
    for field in ("xyz", "uv", "visibility", "displacement", "normal"):
        known = parts[f"has_{field}"].reshape(-1, *[1] * (parts[field].ndim - 1))
        parts[field] = torch.where(known, parts[field].float(), 0.0)
    return Targets(**parts)


def _surface(window: Window, asked: Asked, k: Tensor, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In world coordinates `(N, 3)`: the points at t_src and t_tgt, and the normals at t_tgt; NaN where not known."""
    uv, t_src, t_tgt, _ = asked.queries
    unknown = torch.full((len(uv), 3), torch.nan, dtype=torch.float64)
    before = after = normal = unknown
    about_track = asked.track[:, None] >= 0
    if window.depth is not None:
        height, width = window.depth.shape[1:]
        centre = (torch.stack([asked.column, asked.row], -1).double() + 0.5) / torch.tensor([width, height])
        z = torch.from_numpy(window.depth)[t_src, asked.row, asked.column].double()
        before = torch.where(about_track, unknown, _move(pose[t_src], _unproject(centre, z, k[t_src])))
        turn = _motion(window, asked)
        after = torch.where((t_src == t_tgt)[:, None], before, _move(turn, before))
        normal = _normals(window, asked, k, pose, turn)
    if window.tracks is not None and window.tracks.xyz is not None and window.world_from_camera is not None:
        xyz = torch.from_numpy(window.tracks.xyz).double()
        before = torch.where(about_track, xyz[t_src, asked.track], before)
        after = torch.where(about_track, xyz[t_tgt, asked.track], after)
    return before, after, normal


def _motion(window: Window, asked: Asked) -> Tensor:
    """How each pixel's body moves from t_src to t_tgt, in the world `(N, 4, 4)`."""
    n = len(asked.track)
    if window.motion is None:
        return torch.full((n, 4, 4), torch.nan, dtype=torch.float64)
    _, t_src, t_tgt, _ = asked.queries
    motion, body = torch.from_numpy(np.array(window.motion)), _bodies(window, asked)
    return motion[t_tgt, body] @ invert_rigid(motion[t_src, body])


def _normals(window: Window, asked: Asked, k: Tensor, pose: Tensor, turn: Tensor) -> Tensor:
    """World normals at t_tgt of the surface that the frame of t_src shows at the query's place, on the side it sees."""
    uv, t_src, t_tgt, _ = asked.queries
    if window.normal is None:
        return torch.full((len(uv), 3), torch.nan, dtype=torch.float64)
    now, about_track = t_src == t_tgt, asked.track >= 0
    seen = torch.from_numpy(window.normal)[t_src, asked.row, asked.column].double()
    if window.tracks is not None and window.tracks.xyz is not None:
        # A track has a normal where the pixels around it show its surface, and a smooth one.
        depth, normal = _around(window, t_src, uv.double(), k[t_src])
        z = _move(invert_rigid(pose[t_src]), torch.from_numpy(window.tracks.xyz)[t_src, asked.track].double())[:, 2]
        mean = F.normalize(normal.sum(0), dim=-1)
        smooth = ((normal * mean).sum(-1) > SAME_NORMAL).all(0)
        fits = now & smooth & ((depth - z).abs() < DEPTH_TOLERANCE * z).all(0)
        seen = torch.where(about_track[:, None], torch.where(fits[:, None], mean, torch.nan), seen)
    else:
        seen = torch.where(about_track[:, None], torch.nan, seen)
    ray = _unproject(uv.double(), torch.ones(len(uv)).double(), k[t_src])
    seen = torch.where((seen * ray).sum(-1, keepdim=True) > 0, -seen, seen)
    world = _turn(pose[t_src], seen)
    return torch.where(now[:, None], world, _turn(turn, world))


def _around(window: Window, frame: Tensor, place: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The depths `(4, N)` and normals `(4, N, 3)` at the four pixels around places `(N, 2)` of frames `(N,)`; with
    normals, the depths are those of planes that go on from the pixels to the place."""
    size = torch.tensor(window.depth.shape[:0:-1])  # width, height
    last = size - 1
    corner = (place * size - 0.5).floor().long()
    depths, normals = [], []
    for offset in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = (corner + torch.tensor(offset)).clamp(torch.zeros_like(last), last).unbind(-1)
        depth = torch.from_numpy(window.depth)[frame, row, column].double()
        if window.normal is not None:
            normal = torch.from_numpy(window.normal)[frame, row, column].double()
            centre = (torch.stack([column, row], -1) + 0.5) / size
            rays = [_unproject(uv.double(), torch.ones_like(depth), k) for uv in (centre, place)]
            slope = (rays[0] * normal).sum(-1) / (rays[1] * normal).sum(-1)
            depth = torch.where((slope > 0.5) & (slope < 2), depth * slope, depth)
            normals.append(normal)
        depths.append(depth)
    return torch.stack(depths), torch.stack(normals) if normals else None


def _visibility(window: Window, asked: Asked, xyz: Tensor, away: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the frame of t_tgt shows the points `(N, 3)`, given in its camera, and whether this is known `(N,)`; what
    turns away from the camera is hidden."""
    known = xyz.isfinite().all(-1)
    if window.depth is None:
        return torch.zeros(len(xyz), dtype=torch.float64), torch.zeros_like(known)
    place, in_front = _project(xyz, k)
    inside = in_front & ((place >= 0) & (place <= 1)).all(-1)
    depth, _ = _around(window, asked.queries.t_tgt, torch.where(inside[:, None], place, 0.5), k)
    limit = depth * (1 + DEPTH_TOLERANCE)  # (4, N); one that is not known compares as False
    visible = inside & ~away & (xyz[:, 2] <= limit).all(0)
    hidden = ~inside | away | (xyz[:, 2] > limit).all(0)
    return visible.double(), known & (visible | hidden)


def _tensor(array: np.ndarray | None, otherwise: Tensor) -> Tensor:
    return otherwise.double() if array is None else torch.from_numpy(np.array(array, np.float64))


# The functions of fourdperf.geometry, with a camera or a motion for each point: (N, ...) and (N, ...) to (N, ...).


def _move(motion: Tensor, points: Tensor) -> Tensor:
    return transform(motion, points[:, None])[:, 0]


def _turn(motion: Tensor, directions: Tensor) -> Tensor:
    return (motion[:, :3, :3] @ directions[..., None])[..., 0]


def _unproject(uv: Tensor, z: Tensor, k: Tensor) -> Tensor:
    return unproject(uv[:, None], z[:, None], k)[:, 0]


def _project(xyz: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """uv `(N, 2)`, and where it exists: in front of the camera and finite."""
    uv = project(xyz[:, None], k)[0][:, 0]
    return uv, (xyz[:, 2] > 0) & uv.isfinite().all(-1)
