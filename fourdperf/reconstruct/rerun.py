"""A recording for the Rerun viewer (https://rerun.io), where ``pip install rerun-sdk`` has brought its library."""

import os

import numpy as np

from fourdperf.data.files import write_bytes
from fourdperf.reconstruct.movie import track_hues
from fourdperf.reconstruct.result import Reconstruction

__all__ = ["write_rerun"]


def write_rerun(path: str | os.PathLike, reconstruction: Reconstruction) -> None:
    """Writes a `.rrd` with a timeline `frame`: the points of each frame, the tracks and their paths so far, the camera
    with the video and its depth map. `rerun FILE` shows it.

    Points and tracks that are not finite are left out. Rerun's cameras know no distortion.

    Raises:
        ImportError: rerun-sdk is not installed.
        OSError: the file cannot be written.
    """
    try:
        import rerun
    except ImportError as error:
        raise ImportError(f"a Rerun recording needs rerun-sdk (pip install rerun-sdk): {error}") from error

    recording = rerun.RecordingStream("fourdperf")
    # Held in memory until it is whole: Rerun's own file sink hangs on a full disk.
    content = recording.memory_recording()
    recording.log("world", rerun.ViewCoordinates.RIGHT_HAND_Y_DOWN, static=True)
    for t in range(reconstruction.num_frames):
        recording.set_time("frame", sequence=t)
        _log_camera(rerun, recording, reconstruction, t)
        _log_points(rerun, recording, reconstruction, t)
        _log_tracks(rerun, recording, reconstruction, t)
    write_bytes(path, content.drain_as_bytes())


def _log_camera(rerun, recording, reconstruction: Reconstruction, t: int) -> None:
    pose, k = reconstruction.world_from_camera[t], reconstruction.intrinsics[t]
    recording.log("world/camera", rerun.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
    for name, image in (
        ("video", rerun.Image(reconstruction.video[t])),
        ("depth", rerun.DepthImage(reconstruction.depth[t])),
    ):
        height, width = (reconstruction.video if name == "video" else reconstruction.depth).shape[1:3]
        pixels = k * np.array([[width], [height], [1]], np.float32)
        axes = rerun.ViewCoordinates.RDF
        camera = rerun.Pinhole(image_from_camera=pixels, resolution=[width, height], camera_xyz=axes)
        recording.log(f"world/camera/{name}", camera)
        recording.log(f"world/camera/{name}/image", image)


def _log_points(rerun, recording, reconstruction: Reconstruction, t: int) -> None:
    chosen = (reconstruction.point_frame == t) & np.isfinite(reconstruction.points).all(1)
    points = rerun.Points3D(reconstruction.points[chosen], colors=reconstruction.point_colors[chosen])
    recording.log("world/points", points)


def _log_tracks(rerun, recording, reconstruction: Reconstruction, t: int) -> None:
    known = np.isfinite(reconstruction.tracks).all(-1)  # (K, T)
    colours = track_hues(reconstruction)
    recording.log("world/tracks", rerun.Points3D(reconstruction.tracks[known[:, t], t], colors=colours[known[:, t]]))
    moving = np.flatnonzero(known[:, : t + 1].sum(1) > 1)
    paths = [reconstruction.tracks[k, : t + 1][known[k, : t + 1]] for k in moving]
    recording.log("world/paths", rerun.LineStrips3D(paths, colors=colours[moving]))
