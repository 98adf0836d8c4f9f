"""A whole video, of any length, to one `Reconstruction`: overlapping chunks, each as long as the model's clips, joined
by similarities.

    frames    0 ............ L
                      s ............ s + L         the next chunk starts `overlap` frames before this one ends
    owned     |--------->|<-------->|              each frame is answered by the chunk whose middle is nearest

Every chunk has a world of its own, the camera of its first frame, with its own scale. The points that the frames of an
overlap show are asked for in both worlds; the 85 % of them with the highest product of confidences give the similarity
that takes one to the other (Umeyama), and chained they lead to the world of frame 0. A track goes on in the next chunk
from the frame of the overlap in which it is visible with the highest confidence, and there from the place where it is;
in the same way backwards. Where it is visible in no frame of an overlap it ends, and is NaN from there on.

A video that fits the model is one chunk. Only one encoded chunk is in memory.

Source: D4RT (arXiv 2512.08924), section 3.2, for chunks and the 85 %. It is silent on the length of the overlap (half a
clip here), on who answers for a frame, and on tracks beyond a chunk.
"""

import math
import time
from typing import Literal, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fourdperf.data.queries import as_tensor
from fourdperf.geometry import Sim3, umeyama
from fourdperf.reconstruct.dense import cells, dense_tracks
from fourdperf.reconstruct.recipes import (
    Cloud,
    EncodedVideo,
    Intrinsics,
    Tracks,
    check_frames,
    check_source,
    depth,
    extrinsics,
    follow,
    intrinsics,
    pixel_centres,
    point_cloud,
)
from fourdperf.reconstruct.result import Reconstruction

__all__ = ["Chunk", "chunks", "join", "reconstruct"]

CONFIDENT = 0.85
JOIN_GRID = (16, 16)


class Chunk(NamedTuple):
    """Frames start .. stop - 1 are shown to the model together; it answers for first .. last - 1 of them."""

    start: int
    stop: int
    first: int
    last: int

    def local(self, first: int, last: int) -> range:
        """Frames first .. last - 1 of the video, counted in the chunk."""
        return range(first - self.start, last - self.start)

    @property
    def owned(self) -> range:
        return self.local(self.first, self.last)


def chunks(frames: int, length: int, overlap: int) -> list[Chunk]:
    """Cuts a video into chunks of ``length`` frames (one, of all frames, if they fit); the last starts so that it is
    full. Neighbours share at least ``overlap`` frames, 1 to ``length`` - 1, and halve what they share."""
    starts = [0]
    while starts[-1] + length < frames:
        starts.append(min(starts[-1] + length - overlap, frames - length))
    stops = [min(start + length, frames) for start in starts]
    cuts = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops)), frames]
    return [Chunk(*parts) for parts in zip(starts, stops, cuts, cuts[1:])]


def join(source: Cloud, target: Cloud) -> Sim3:
    """The similarity from ``source`` to ``target``, clouds of the same pixels, by the 85 % of the points whose product
    of confidences is highest."""
    confidence = (source.confidence * target.confidence).flatten()
    best = confidence.topk(math.ceil(CONFIDENT * len(confidence))).indices
    return umeyama(*(cloud.points.view(-1, 3)[best].double() for cloud in (source, target)))


def reconstruct(
    model: nn.Module,
    frames: ArrayLike,
    *,
    track: ArrayLike | int | Literal["all"] = 16,
    depth_size: tuple[int, int] | None = None,
    cloud_size: tuple[int, int] | None = None,
    camera_grid: tuple[int, int] = (16, 16),
    shared_intrinsics: bool = False,
    distortion: bool = False,
    high_resolution: bool = False,
    keep: float = 1.0,
    overlap: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Reconstruction:
    """Depth, cameras, coloured points and tracks of a video.

    Args:
        model: a D4RT, where and in the precision it is to run.
        frames: `(T, H, W, 3)`, uint8 or floating in [0, 1], in their original size; any T.
        track: the points to follow: n for an n x n grid over frame 0, sources (t, u, v) `(K, 3)`, or "all" for every
            pixel of every frame, or rather every cell of ``cloud_size`` (see :mod:`fourdperf.reconstruct.dense`).
        depth_size, cloud_size: (h, w) of the depth maps, and of the grid over each frame that gives the point cloud;
            by default the model's frame size.
        camera_grid, shared_intrinsics, distortion: see :func:`fourdperf.reconstruct.recipes.intrinsics`.
        high_resolution: see :class:`fourdperf.reconstruct.recipes.EncodedVideo`.
        keep: share of the cloud's points to keep, the most confident ones, in (0, 1].
        overlap: frames that neighbouring chunks of a longer video share; half the model's clip by default.
        seed: of the order of pixels for track="all".
        progress: show progress bars.

    Returns:
        a Reconstruction. Cloud and tracks come from queries in the camera of a chunk's first frame, poses from
        `extrinsics`. Its ``stats``: frames, chunks, queries, track_queries (of the queries), seconds (of all of it),
        encode_seconds, decode_seconds, queries_per_second (of the decoder), fps (frames / seconds), device, and for
        track="all" naive_queries: what a track of every pixel through all chunks would have taken.

    Raises:
        ValueError: frames or sources that do not fit, or an option out of range.
    """
    began = time.perf_counter()
    given, length = as_tensor(frames), model.config.num_frames
    frames = check_frames(given)
    overlap = max(1, length // 2) if overlap is None else overlap
    if len(frames) > length and not 1 <= overlap < length:
        raise ValueError(f"overlap: wanted 1 to {length - 1} frames of the model's {length}, got {overlap}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: wanted a share in (0, 1], got {keep}")
    cloud_size = tuple(cloud_size or model.config.image_size)
    parts = chunks(len(frames), length, overlap)
    source = None if isinstance(track, str) and track == "all" else _source(track, len(frames))
    book = _TrackBook(parts, source, cloud_size, seed)

    videos, worlds, answers = [], [], []
    ending = None  # of the chunk before: its cloud of the frames that it shares with the next

    def show(chunk: Chunk) -> EncodedVideo:
        if videos:
            videos[-1].forget()
        shown = given[chunk.start : chunk.stop]
        videos.append(EncodedVideo(model, shown, high_resolution=high_resolution, progress=progress))
        return videos[-1]

    for k, chunk in enumerate(parts):
        video = show(chunk)
        world = _identity()
        if k:
            shared = chunk.local(chunk.start, parts[k - 1].stop)
            world = worlds[-1] @ join(point_cloud(video, 0, JOIN_GRID, shared), ending)
        if k + 1 < len(parts):
            shared = chunk.local(parts[k + 1].start, chunk.stop)
            ending = point_cloud(video, 0, JOIN_GRID, shared)
        worlds.append(world)
        cameras = intrinsics(video, camera_grid, shared=shared_intrinsics, distortion=distortion)
        answers.append(_answer(video, chunk.owned, world, depth_size, cloud_size, camera_grid, cameras))
        book.forward(k, video, world)
    for k in reversed(range(len(parts) - 1)):
        if book.reaches_back(k):
            book.backward(k, show(parts[k]), worlds[k])

    answer = _Answer(*(torch.cat(found) for found in zip(*answers)))
    if shared_intrinsics:
        matrix, k = (found.median(0).values.expand_as(found) for found in (answer.intrinsics, answer.distortion))
        answer = answer._replace(intrinsics=matrix, distortion=k)
    frame = torch.arange(len(frames)).repeat_interleave(math.prod(cloud_size))
    colours = _colours(frames, frame, pixel_centres(cloud_size).repeat(len(frames), 1))
    best = answer.confidence.topk(math.ceil(keep * len(answer.confidence))).indices.sort().values
    tracks = book.tracks(len(frames))
    arrays = {
        "video": frames,
        "depth": answer.depth,
        "depth_confidence": answer.depth_confidence,
        "world_from_camera": answer.poses,
        "intrinsics": answer.intrinsics,
        "distortion": answer.distortion,
        "points": answer.points[best],
        "point_colors": colours[best],
        "point_frame": frame[best],
        "tracks": tracks.xyz,
        "tracks_uv": tracks.uv,
        "tracks_visible": tracks.visible,
        "track_colors": _colours(frames, tracks.source[:, 0].long(), tracks.source[:, 1:]),
        "track_source": tracks.source,
    }
    stats = _stats(videos, parts, time.perf_counter() - began) | {"track_queries": book.queries}
    if source is None:
        stats["naive_queries"] = 2 * len(frames) * math.prod(cloud_size) * sum(c.stop - c.start for c in parts)
    return Reconstruction(**{name: array.numpy() for name, array in arrays.items()}, stats=stats)


class _Answer(NamedTuple):
    """What a chunk says of its frames, n of them: depth and its confidence `(n, h, w)`; points `(n h' w', 3)` and their
    confidence; poses, intrinsics, distortion. In the world of the whole video."""

    depth: Tensor
    depth_confidence: Tensor
    points: Tensor
    confidence: Tensor
    poses: Tensor
    intrinsics: Tensor
    distortion: Tensor


def _answer(
    video: EncodedVideo,
    frames: range,
    world: Sim3,
    depth_size: tuple[int, int] | None,
    cloud_size: tuple[int, int],
    camera_grid: tuple[int, int],
    cameras: Intrinsics,
) -> _Answer:
    maps = depth(video, depth_size, frames)
    cloud = point_cloud(video, 0, cloud_size, frames)
    return _Answer(
        depth=world.scale.float() * maps.depth,
        depth_confidence=maps.confidence,
        points=world(cloud.points.view(-1, 3).double()).float(),
        confidence=cloud.confidence.flatten(),
        poses=world.pose(extrinsics(video, camera_grid).double())[list(frames)],
        intrinsics=cameras.matrix[list(frames)],
        distortion=cameras.distortion[list(frames)],
    )


def _stats(videos: list[EncodedVideo], parts: list[Chunk], seconds: float) -> dict[str, float | int | str]:
    names = ("queries", "encode_seconds", "decode_seconds")
    totals = {name: sum(getattr(video, name) for video in videos) for name in names}
    return totals | {
        "frames": parts[-1].last,
        "chunks": len(parts),
        "seconds": seconds,
        "queries_per_second": totals["queries"] / totals["decode_seconds"],
        "fps": parts[-1].last / seconds,
        "device": str(videos[0].device),
    }


def _identity() -> Sim3:
    one = torch.ones((), dtype=torch.float64)
    return Sim3(one, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def _source(track: ArrayLike | int, number: int) -> Tensor:
    if isinstance(track, str) or (isinstance(track, int) and track < 0):
        raise ValueError(f"track: wanted a number of points per side, sources (K, 3) or 'all', got {track!r}")
    if isinstance(track, int):
        uv = pixel_centres((track, track)) if track else torch.empty(0, 2)
        return torch.cat([torch.zeros_like(uv[:, :1]), uv], dim=-1)
    return check_source(track, number)


def _colours(frames: Tensor, frame: Tensor, uv: Tensor) -> Tensor:
    """The colours of the pixels that hold uv `(N, 2)` in `frame` `(N,)`."""
    height, width = frames.shape[1:3]
    column, row = ((uv[:, i] * n).long().clamp(0, n - 1) for i, n in ((0, width), (1, height)))
    return frames[frame, row, column]


class _Run(NamedTuple):
    """What one chunk says of some tracks: their numbers `(n,)`, and the tracks over its frames, in the world."""

    ids: Tensor
    tracks: Tracks


class _TrackBook:
    """Tracks over all chunks. ``source`` None means all pixels, cells of ``size``."""

    def __init__(self, parts: list[Chunk], source: Tensor | None, size: tuple[int, int], seed: int):
        self.parts, self.size, self.seed = parts, size, seed
        self.dense = source is None
        self.source = torch.empty(0, 3) if source is None else source
        self.runs: list[_Run] = []
        self.queries = 0

    def forward(self, k: int, video: EncodedVideo, world: Sim3) -> None:
        """Goes on with the tracks of chunk k - 1, and starts those whose source chunk k owns."""
        before, chunk = video.queries, self.parts[k]
        ids, source = self._hand_over(k - 1, k) if k else (torch.empty(0, dtype=torch.long), torch.empty(0, 3))
        if not self.dense:
            started = ((self.source[:, 0] >= chunk.first) & (self.source[:, 0] < chunk.last)).nonzero()[:, 0]
            ids = torch.cat([ids, started])
            source = torch.cat([source, self.source[started] - torch.tensor([chunk.start, 0, 0])])
        found = follow(video, source, 0, "tracks")
        if self.dense:
            visited = torch.zeros(len(video), *self.size, dtype=torch.bool)
            visited[: self.parts[k - 1].stop - chunk.start if k else 0] = True  # chunk k - 1 left no cell of these
            visited.view(-1)[cells(found.uv, self.size)[found.visible & found.uv.isfinite().all(-1)]] = True
            more = dense_tracks(video, self.size, camera=0, visited=visited, seed=self.seed + k).tracks
            found = Tracks(*(torch.cat(parts) for parts in zip(found, more)))
            ids = torch.cat([ids, len(self.source) + torch.arange(len(more.source))])
            self.source = torch.cat([self.source, more.source + torch.tensor([chunk.start, 0, 0])])
        self.runs.append(_Run(ids, _moved(found, world)))
        self.queries += video.queries - before

    def reaches_back(self, k: int) -> bool:
        """Are there tracks of chunk k + 1 that go on backwards in chunk k?"""
        return len(self._hand_over(k + 1, k)[0]) > 0

    def backward(self, k: int, video: EncodedVideo, world: Sim3) -> None:
        """Goes on with the tracks of chunk k + 1 that chunk k does not have."""
        before = video.queries
        ids, source = self._hand_over(k + 1, k)
        found, run = _moved(follow(video, source, 0, "tracks, backwards"), world), self.runs[k]
        merged = Tracks(*(torch.cat(parts) for parts in zip(run.tracks, found)))
        self.runs[k] = _Run(torch.cat([run.ids, ids]), merged)
        self.queries += video.queries - before

    def _hand_over(self, giver: int, taker: int) -> tuple[Tensor, Tensor]:
        """Numbers of the tracks that go on from one chunk in its neighbour, and their sources (t, u, v) there."""
        run, (a, b) = self.runs[giver], (self.parts[giver], self.parts[taker])
        first, last = max(a.start, b.start), min(a.stop, b.stop)
        shared = slice(first - a.start, last - a.start)
        uv = run.tracks.uv[:, shared]
        there = run.tracks.visible[:, shared] & ((uv >= 0) & (uv <= 1)).all(-1)
        alive = there.any(1)
        if taker < len(self.runs):
            alive &= ~torch.isin(run.ids, self.runs[taker].ids)
        best = torch.where(there, run.tracks.confidence[:, shared], -1.0)[alive].argmax(1)
        place = uv[alive][torch.arange(len(best)), best]
        return run.ids[alive], torch.cat([(first - b.start + best)[:, None].float(), place], dim=-1)

    def tracks(self, frames: int) -> Tracks:
        """All tracks over all frames, NaN and not visible where they are not known."""
        shape = (len(self.source), frames)
        xyz, uv = (torch.full((*shape, n), torch.nan) for n in (3, 2))
        visible, confidence = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        for chunk, (ids, found) in zip(self.parts, self.runs):
            owned = slice(chunk.owned.start, chunk.owned.stop)
            for whole, part in zip((xyz, uv, visible, confidence), found):
                whole[ids, chunk.first : chunk.last] = part[:, owned]
        return Tracks(xyz, uv, visible, confidence, self.source)


def _moved(tracks: Tracks, world: Sim3) -> Tracks:
    return tracks._replace(xyz=world(tracks.xyz.flatten(0, 1).double()).float().view(tracks.xyz.shape))
