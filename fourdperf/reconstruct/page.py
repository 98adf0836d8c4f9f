"""One HTML page that shows a reconstruction: coloured points that move, tracks with fading trails, the cameras.

The page needs no network and no library: `viewer.html` is its frame, `viewer.js` draws with WebGL 2 (or, without it, on
a plain canvas), and the arrays are put in as base64. Positions are 16 bits an axis in a cube around almost all points,
so that a page of 300,000 points is about 4 MB. Its address takes what to show first: `page.html#frame=3&cloud=all`, and
likewise size, tracks and trail (numbers), cameras, follow and play (0 or 1).
"""

import base64
import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files

import cv2
import numpy as np

from fourdperf.data.files import write_text
from fourdperf.data.pictures import DepthColours
from fourdperf.reconstruct.movie import track_hues
from fourdperf.reconstruct.result import Reconstruction

__all__ = ["page", "write_page"]

TRACK_VALUES = 250_000  # places of tracks in a page, 8 bytes each
MARGIN = 0.5  # how far points may lie outside the inner 99 % of all, in sizes of it, before they are left out
JPEG_QUALITY = 82
COORDINATE = 65535


def write_page(path: str | os.PathLike, reconstruction: Reconstruction, **options) -> None:
    """Writes :func:`page`, which takes the options, to ``path``.

    Raises:
        OSError: the file cannot be written.
        ValueError: an option is out of range.
    """
    write_text(path, page(reconstruction, **options))


def page(
    reconstruction: Reconstruction,
    title: str = "Reconstruction",
    table: Sequence[Sequence[str]] = (),
    fps: float = 10.0,
    max_points: int = 300_000,
    picture_width: int = 320,
) -> str:
    """The HTML of the page.

    Points that are not finite, or very far from all others, are left out, and the page says how many. Of more than
    ``max_points``, an even selection of each frame's is shown, drawn larger to fill the gaps.

    Args:
        reconstruction: what to show.
        title: the heading.
        table: rows of a short table under it; the first cell is a name, the others its values.
        fps: frames per second of the playback.
        max_points: points in the page.
        picture_width: largest width of the video frames and depth maps in the page, pixels.

    Raises:
        ValueError: an option is out of range, or there is no frame.
    """
    if not fps > 0 or max_points < 0 or picture_width < 1:
        raise ValueError(
            f"wanted fps > 0, max_points >= 0 and picture_width >= 1, got {fps}, {max_points} and {picture_width}"
        )
    if not reconstruction.num_frames:
        raise ValueError("wanted a reconstruction with at least one frame, got none")
    low, span = _cube(reconstruction)
    cloud, summary = _cloud(reconstruction, low, span, max_points)
    tracks = _tracks(reconstruction, low, span)
    colours = DepthColours.fit(reconstruction.depth)
    distance = _usual_depth(reconstruction)
    data = {
        "frames": reconstruction.num_frames,
        "fps": fps,
        "low": low.tolist(),
        "span": span,
        "distance": distance,
        "frustum": 0.14 * distance,
        **cloud,
        "tracks": tracks,
        "cameras": _cameras(reconstruction),
        "video": [_jpeg(frame, picture_width) for frame in reconstruction.video],
        "depth": [_jpeg(colours(depth), picture_width) for depth in reconstruction.depth],
    }
    shown, total = tracks["count"], len(reconstruction.tracks)
    summary += f", {shown:,} tracks" if shown == total else f", {shown:,} of {total:,} tracks"
    summary += f", {reconstruction.num_frames} frame{'s' * (reconstruction.num_frames > 1)}."
    rows = ("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in table)
    here = files("fourdperf.reconstruct")
    parts = {
        "title": html.escape(title),
        "summary": summary,
        "table": f"<table>{''.join(rows)}</table>" if table else "",
        "near": f"{colours.low:.3g}",
        "far": f"{colours.high:.3g}",
        "gradient": _gradient(colours),
        "script": here.joinpath("viewer.js").read_text("utf-8"),
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    text = here.joinpath("viewer.html").read_text("utf-8")
    head, *pieces = text.split("{{")
    return head + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces))


def _cube(reconstruction: Reconstruction) -> tuple[np.ndarray, float]:
    """Lowest corner (3,) and side of the cube that positions are stored in."""
    places = np.concatenate([reconstruction.points, reconstruction.tracks.reshape(-1, 3)]).astype(np.float64)
    places = places[np.isfinite(places).all(-1)]
    centres = reconstruction.world_from_camera[:, :3, 3]
    if not len(places):
        places = centres
    low, high = np.percentile(places, (0.5, 99.5), axis=0)
    edge = MARGIN * (high - low).max()
    low, high = np.minimum(low - edge, centres.min(0)), np.maximum(high + edge, centres.max(0))
    span = (high - low).max()
    return low, float(span if span > 0 else 1.0)


def _cloud(reconstruction: Reconstruction, low: np.ndarray, span: float, limit: int) -> tuple[dict, str]:
    """The cloud's part of the data, and a phrase that tells how many points there are."""
    points, frame = reconstruction.points, reconstruction.point_frame
    finite = np.isfinite(points).all(-1)
    inside = finite & ((points >= low) & (points <= low + span)).all(-1)
    kept = np.flatnonzero(inside & (frame >= 0) & (frame < reconstruction.num_frames))
    kept = kept[np.argsort(frame[kept], kind="stable")]
    near = len(kept)
    if near > limit:
        # one of each run of neighbours, at random, so that no columns of a frame's grid are favoured
        edges = np.linspace(0, near, limit + 1)
        kept = kept[(edges[:-1] + np.random.default_rng(0).random(limit) * np.diff(edges)).astype(int)]
    frame = frame[kept]
    counts = np.bincount(frame, minlength=reconstruction.num_frames)
    size = np.log(_footprints(reconstruction, points[kept], frame))
    smallest, largest = (float(size.min()), float(size.max())) if len(size) else (0.0, 0.0)
    codes = (size - smallest) / max(largest - smallest, 1e-9) * 255
    colours = np.concatenate([reconstruction.point_colors[kept], codes[:, None].round().astype(np.uint8)], 1)
    phrases = [f"{near:,} points" if near == len(kept) else f"{len(kept):,} of {near:,} points"]
    for number, why in (((~finite).sum(), "not finite"), ((finite & ~inside).sum(), "too far away")):
        phrases += [f"{number:,} left out: {why}"] * bool(number)
    cloud = {
        "positions": _base64(_quantise(points[kept], low, span)),
        "colours": _base64(colours),
        "starts": [0, *np.cumsum(counts).tolist()],
    }
    return {"cloud": cloud, "sizes": [smallest, largest]}, ", ".join(phrases)


def _footprints(reconstruction: Reconstruction, points: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """How wide discs must be to cover their frame, world units (n,): at unit depth, the n points of a frame share
    1 / (fx fy), and a disc covers the square inside it."""
    counts = np.bincount(frame)
    poses, intrinsics = reconstruction.world_from_camera[frame], reconstruction.intrinsics[frame]
    depth = np.einsum("ni,ni->n", points - poses[:, :3, 3], poses[:, :3, 2])
    focal = np.sqrt(np.abs(intrinsics[:, 0, 0] * intrinsics[:, 1, 1]))
    return np.sqrt(2) * np.maximum(np.abs(depth), 1e-6) / (np.maximum(focal, 1e-6) * np.sqrt(counts[frame]))


def _tracks(reconstruction: Reconstruction, low: np.ndarray, span: float) -> dict:
    """Of all tracks a random selection in random order, so that the first n are always a fair picture of all."""
    count = min(len(reconstruction.tracks), TRACK_VALUES // reconstruction.num_frames)
    chosen = np.random.default_rng(0).permutation(len(reconstruction.tracks))[:count]
    places = reconstruction.tracks[chosen].swapaxes(0, 1)  # (T, K, 3)
    known = ((places >= low) & (places <= low + span)).all(-1)
    state = np.where(known, np.where(reconstruction.tracks_visible[chosen].T, COORDINATE, COORDINATE // 2), 0)
    positions = np.concatenate([_quantise(places, low, span), state[..., None].astype("<u2")], -1)
    colours = np.pad(track_hues(reconstruction)[chosen], ((0, 0), (0, 1)), constant_values=255)
    return {"positions": _base64(positions), "colours": _base64(colours), "count": count}


def _cameras(reconstruction: Reconstruction) -> list[dict]:
    cameras = zip(reconstruction.world_from_camera, reconstruction.intrinsics, reconstruction.distortion)
    return [
        {
            "pose": [round(float(x), 7) for x in pose.T.ravel()],  # columns one after the other
            **dict(zip(("fx", "fy", "cx", "cy"), k[[0, 1, 0, 1], [0, 1, 2, 2]].tolist())),
            **dict(zip(("k1", "k2"), bend.tolist())),
        }
        for pose, k, bend in cameras
    ]


def _usual_depth(reconstruction: Reconstruction) -> float:
    """The median depth, the scale of the view; 1 where there is none."""
    depth = reconstruction.depth[np.isfinite(reconstruction.depth) & (reconstruction.depth > 0)]
    return float(np.median(depth)) if depth.size else 1.0


def _quantise(places: np.ndarray, low: np.ndarray, span: float) -> np.ndarray:
    scaled = np.nan_to_num((places - low) / span).clip(0, 1)
    return (scaled * COORDINATE).round().astype("<u2")


def _jpeg(image: np.ndarray, width: int) -> str:
    if image.shape[1] > width:
        height = max(1, round(image.shape[0] * width / image.shape[1]))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return _base64(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def _gradient(colours: DepthColours) -> str:
    stops = colours(np.linspace(colours.low, colours.high, 9)[None])[0]
    return f"linear-gradient(90deg, {', '.join(f'rgb({r} {g} {b})' for r, g, b in stops.tolist())})"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
