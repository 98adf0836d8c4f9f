"""Films and pictures of a reconstruction: depth beside the video, and tracks with fading trails over it."""

import os
from collections.abc import Iterator

import cv2
import numpy as np

from fourdperf.data.pictures import DepthColours, enlarge, label, side_by_side, stack
from fourdperf.data.video import write_png, write_video
from fourdperf.reconstruct.result import Reconstruction

__all__ = ["track_hues", "write_depth_movie", "write_depth_sheet", "write_track_movie"]

SMALLEST = 320  # smaller frames are enlarged to about this height or width, so that thin lines are seen
SHEET_COLUMNS, SHEET_WIDTH = 8, 160
FADE = 0.82  # what is left of a trail's opacity a frame later
SUBPIXELS = 4  # bits


def write_depth_movie(path: str | os.PathLike, reconstruction: Reconstruction, fps: float = 10.0) -> None:
    """Writes an MP4 with the video on the left and its depth on the right, one colour scale for all frames.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no frame.
    """
    colours = DepthColours.fit(reconstruction.depth)

    def frames() -> Iterator[np.ndarray]:
        for frame, depth in zip(_enlarged(reconstruction.video), reconstruction.depth):
            right = enlarge(colours(depth), *frame.shape[:2])
            yield side_by_side([label(frame, "video"), label(right, f"depth {colours.low:.3g} to {colours.high:.3g}")])

    write_video(path, frames(), fps)


def write_depth_sheet(path: str | os.PathLike, reconstruction: Reconstruction) -> None:
    """Writes a PNG with up to 8 frames spread over the video, their depth and how sure the model is of it, above the
    scale of the depth.

    Confidences are shown by rank, black for the least of the video and white for the highest: where the loss lets them,
    all are near 1.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no frame.
    """
    total = reconstruction.num_frames
    if not total:
        raise ValueError(f"cannot write {path}: wanted at least one frame, got none")
    colours = DepthColours.fit(reconstruction.depth)
    ranks = np.sort(reconstruction.depth_confidence, axis=None)
    columns = []
    for t in np.unique(np.linspace(0, total - 1, min(total, SHEET_COLUMNS)).round().astype(int)):
        frame = reconstruction.video[t]
        size = max(1, round(SHEET_WIDTH * frame.shape[0] / frame.shape[1])), SHEET_WIDTH
        sure = np.searchsorted(ranks, reconstruction.depth_confidence[t], side="right") / ranks.size
        cells = {
            f"frame {t}": cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA),
            "depth": enlarge(colours(reconstruction.depth[t]), *size),
            "confidence": enlarge((255 * sure[..., None].repeat(3, -1)).round().astype(np.uint8), *size),
        }
        columns.append(stack([label(image, name) for name, image in cells.items()]))
    write_png(path, stack([side_by_side(columns), colours.legend(min(488, SHEET_WIDTH * len(columns)))]))


def write_track_movie(
    path: str | os.PathLike, reconstruction: Reconstruction, fps: float = 10.0, max_tracks: int = 800
) -> None:
    """Writes an MP4 of the video with its tracks on it: a disc where a track is visible, and a trail that fades.

    Of more than ``max_tracks`` a random selection is drawn.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no frame.
    """
    total = len(reconstruction.tracks)
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:max_tracks])
    uv, colours = reconstruction.tracks_uv[chosen], track_hues(reconstruction)[chosen].tolist()
    near = (np.abs(uv - 0.5) < 2).all(-1, keepdims=True)  # NaN is not
    drawable, uv = reconstruction.tracks_visible[chosen] & near[..., 0], np.where(near, uv, 0)

    def frames() -> Iterator[np.ndarray]:
        trails = opacity = None
        for t, frame in enumerate(_enlarged(reconstruction.video)):
            size = np.array([frame.shape[1], frame.shape[0]])
            # a pixel's centre is a whole number for OpenCV
            place = ((uv[:, max(0, t - 1) : t + 1] * size - 0.5) * 2**SUBPIXELS).round().astype(int)
            if trails is None:
                trails, opacity = np.zeros_like(frame), np.zeros(frame.shape[:2], np.float32)
            opacity *= FADE
            line = {"thickness": 2, "lineType": cv2.LINE_AA, "shift": SUBPIXELS}
            for k in np.flatnonzero(drawable[:, t] & drawable[:, max(0, t - 1)]):
                ends = place[k, 0].tolist(), place[k, -1].tolist()
                cv2.line(trails, *ends, colours[k], **line)
                cv2.line(opacity, *ends, 1.0, thickness=2, shift=SUBPIXELS)
            image = np.rint(frame + opacity[..., None] * (trails.astype(np.float32) - frame)).astype(np.uint8)
            for k in np.flatnonzero(drawable[:, t]):
                centre = place[k, -1].tolist()
                cv2.circle(image, centre, 4 << SUBPIXELS, (20, 20, 20), -1, cv2.LINE_AA, SUBPIXELS)
                cv2.circle(image, centre, 3 << SUBPIXELS, colours[k], -1, cv2.LINE_AA, SUBPIXELS)
            yield image

    write_video(path, frames(), fps)


def track_hues(reconstruction: Reconstruction) -> np.ndarray:
    """A bright colour for each track, (K, 3) uint8, that follows its place in the frame it was asked for: neighbours
    look alike, and tracks stand out from what has the colours of the video."""
    u, v = np.nan_to_num(reconstruction.track_source[:, 1:].T).clip(0, 1)
    hsv = np.stack([150 * (0.75 * u + 0.25 * v), np.full_like(u, 175), np.full_like(u, 255)], -1).round()
    return cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0] if len(u) else np.zeros((0, 3), np.uint8)


def _enlarged(video: np.ndarray) -> Iterator[np.ndarray]:
    scale = max(1, round(SMALLEST / max(1, min(video.shape[1:3]))))
    for frame in video:
        yield cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else frame
