"""Curves as pictures, with nothing but OpenCV: axes, round ticks, a legend. Images are uint8 (H, W, 3), RGB."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

__all__ = ["line_chart"]

COLOURS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (255, 127, 14),
    (148, 103, 189),
    (23, 190, 207),
    (127, 127, 127),
)
INK, GRID, PAPER = (30, 30, 30), (225, 225, 225), 255
FONT, SIZE, SUBPIXELS = cv2.FONT_HERSHEY_SIMPLEX, 0.45, 4
LEFT, RIGHT, TOP, BOTTOM, LINE = 56, 16, 28, 44, 18


def line_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    size: tuple[int, int] = (420, 680),
) -> np.ndarray:
    """The curves by their names, each as (x, y), with a legend on the right if there are several; a value that is not
    finite is a gap.

    Raises:
        ValueError: a curve's x and y differ in length, or no value at all is finite.
    """
    values = {name: np.array([xs, ys], np.float64) for name, (xs, ys) in _checked(curves).items()}
    points = np.concatenate(list(values.values()), axis=1)
    points = points[:, np.isfinite(points).all(0)]
    if not points.size:
        raise ValueError("curves: wanted at least one finite point, got none")
    height, width = size
    (x_ticks, y_ticks) = (_ticks(axis.min(), axis.max()) for axis in points)
    low = np.array([min(points[0].min(), x_ticks[0]), min(points[1].min(), y_ticks[0])])
    high = np.array([max(points[0].max(), x_ticks[-1]), max(points[1].max(), y_ticks[-1])])
    names = list(values) if len(values) > 1 else []
    legend = max((cv2.getTextSize(name, FONT, SIZE, 1)[0][0] + 40 for name in names), default=0)
    right = width - RIGHT - legend
    corner, span = np.array([LEFT, height - BOTTOM]), np.array([right - LEFT, TOP + BOTTOM - height])
    place = lambda xy: corner + (np.asarray(xy) - low) / (high - low) * span

    image = np.full((height, width, 3), PAPER, np.uint8)
    for x in x_ticks:
        at = int(place((x, low[1]))[0])
        cv2.line(image, (at, TOP), (at, height - BOTTOM), GRID, 1)
        _write(image, f"{x:g}", at, height - BOTTOM + LINE, 0.5)
    for y in y_ticks:
        at = int(place((low[0], y))[1])
        cv2.line(image, (LEFT, at), (right, at), GRID, 1)
        _write(image, f"{y:g}", LEFT - 6, at + 5, 1)
    cv2.rectangle(image, (LEFT, TOP), (right, height - BOTTOM), INK, 1)
    for number, curve in enumerate(values.values()):
        colour = COLOURS[number % len(COLOURS)]
        shown = np.isfinite(curve).all(0)
        for part in np.split(np.arange(curve.shape[1]), np.flatnonzero(np.diff(shown)) + 1):
            if shown[part].all():
                line = np.rint(place(curve[:, part].T) * 2**SUBPIXELS).astype(np.int32)
                cv2.polylines(image, [line], len(part) == 1, colour, 2, cv2.LINE_AA, SUBPIXELS)
    for number, name in enumerate(names):
        y = TOP + LINE * number + 12
        cv2.line(image, (right + 10, y), (right + 30, y), COLOURS[number % len(COLOURS)], 2, cv2.LINE_AA)
        _write(image, name, right + 36, y + 5, 0)
    _write(image, title, (LEFT + right) // 2, 18, 0.5)
    _write(image, x_label, (LEFT + right) // 2, height - 8, 0.5)
    _write(image, y_label, 4, 18, 0)
    return image


def _checked(curves):
    for name, (xs, ys) in curves.items():
        if len(xs) != len(ys):
            raise ValueError(f"{name}: wanted as many x as y, got {len(xs)} and {len(ys)}")
    return curves


def _ticks(low: float, high: float) -> np.ndarray:
    """About five round numbers that lie in or just around [low, high]."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    return np.round(np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step, 12)


def _write(image: np.ndarray, text: str, x: int, y: int, share: float) -> None:
    """`text` on the baseline y; `share` of its width lies left of x."""
    wide = cv2.getTextSize(text, FONT, SIZE, 1)[0][0]
    cv2.putText(image, text, (round(x - share * wide), y), FONT, SIZE, INK, 1, cv2.LINE_AA)
