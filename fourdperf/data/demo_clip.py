"""A clip that needs no download: a camera flies over one photograph while a flower cut from another crosses the scene.

Both photographs ship with scikit-learn (china.jpg and flower.jpg). The same frames come out every time.
"""

from importlib.resources import files

import cv2
import numpy as np

__all__ = ["demo_clip"]


def demo_clip(frames: int = 48, height: int = 256, width: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Renders the clip.

    Args:
        frames: number of frames, at least 1.
        height, width: pixels.

    Returns:
        The frames, uint8 (frames, height, width, 3), RGB, and the depth they were rendered with, float32
        (frames, height, width), in arbitrary units: the background from 1 at its top down to 0.4, the flower 0.
    """
    background = _photograph("china.jpg")
    flower, mask = _cut_flower(_photograph("flower.jpg"))
    relief = np.repeat(np.linspace(1, 0.4, background.shape[0], dtype=np.float32)[:, None], background.shape[1], 1)
    video = np.empty((frames, height, width, 3), np.uint8)
    depth = np.empty((frames, height, width), np.float32)
    for i, time in enumerate(np.linspace(0, 1, frames)):
        camera = _camera(time, background.shape, height, width)
        scene = _warp(background, camera, height, width)
        scene_depth = _warp(relief, camera, height, width)
        path = _flower_path(time, flower.shape, height, width)
        alpha = _warp(mask, path, height, width, border=cv2.BORDER_CONSTANT)
        front = _warp(flower, path, height, width, border=cv2.BORDER_REPLICATE)
        blended = scene + alpha[..., None] * (front.astype(np.float32) - scene)
        video[i] = np.rint(blended).astype(np.uint8)
        depth[i] = np.where(alpha > 0.5, 0, scene_depth)
    return video, depth


def _photograph(name: str) -> np.ndarray:
    content = np.frombuffer(files("sklearn.datasets.images").joinpath(name).read_bytes(), np.uint8)
    return cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)


def _cut_flower(photograph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The flower's bounding box, uint8 (h, w, 3), and how opaque it is, float32 (h, w)."""
    # Orange petals before blue-green leaves. Closing fills the flower's dark heart, and opening cuts off the bud and
    # the stem below it, so that the largest region is the flower alone.
    orange = (cv2.subtract(photograph[..., 0], photograph[..., 2]) > 20).astype(np.uint8)
    filled = cv2.morphologyEx(orange, cv2.MORPH_CLOSE, _disc(15))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.morphologyEx(filled, cv2.MORPH_OPEN, _disc(121)))
    solid = (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    # Eroding before the blur keeps the leaves behind the flower out of its soft rim.
    mask = cv2.GaussianBlur(cv2.erode(solid, _disc(5)).astype(np.float32), (5, 5), 0)
    x, y, w, h = cv2.boundingRect(solid)
    box = np.s_[max(0, y - 4) : y + h + 4, max(0, x - 4) : x + w + 4]
    return photograph[box], mask[box]


def _disc(diameter: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def _camera(time: float, shape: tuple[int, ...], height: int, width: int) -> np.ndarray:
    """Affine map (2, 3) from the photograph to the frame: zoom in, pan, a slight roll. ``time`` runs from 0 to 1."""
    zoom = max(height / shape[0], width / shape[1]) * (1.15 + 0.35 * time)
    centre = (shape[1] * (0.46 - 0.06 * time), shape[0] * (0.52 - 0.06 * np.sin(np.pi * time)))
    return _similarity(centre, (width / 2, height / 2), zoom, 3 * np.sin(2 * np.pi * time))


def _flower_path(time: float, shape: tuple[int, ...], height: int, width: int) -> np.ndarray:
    """Affine map (2, 3) from the cut-out to the frame: from the right to the left on an arc, growing and turning."""
    zoom = height / shape[0] * (0.34 + 0.14 * time)
    target = (width * (0.92 - 0.62 * time), height * (0.76 - 0.26 * np.sin(np.pi * time)))
    return _similarity((shape[1] / 2, shape[0] / 2), target, zoom, 60 * time)


def _similarity(source: tuple[float, float], target: tuple[float, float], zoom: float, degrees: float) -> np.ndarray:
    matrix = cv2.getRotationMatrix2D(source, degrees, zoom)
    matrix[:, 2] += np.subtract(target, source)
    return matrix


def _warp(image: np.ndarray, matrix: np.ndarray, height: int, width: int, border: int = cv2.BORDER_REFLECT):
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border)
