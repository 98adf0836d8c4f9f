"""Coloured point clouds as binary PLY files, which MeshLab, CloudCompare, Blender and Open3D read."""

import os

import numpy as np

from fourdperf.data.files import write_bytes

__all__ = ["write_ply"]

VERTEX = np.dtype([(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")])


def write_ply(path: str | os.PathLike, points: np.ndarray, colors: np.ndarray) -> int:
    """Writes ``points`` (P, 3), any unit, with ``colors`` (P, 3) uint8 RGB to a little-endian PLY.

    Points that are not finite are left out, since most readers choke on them.

    Returns:
        How many points were left out.

    Raises:
        OSError: the file cannot be written.
        ValueError: a shape or dtype is wrong.
    """
    points, colors = np.asarray(points), np.asarray(colors)
    if points.ndim != 2 or points.shape[1] != 3 or not np.issubdtype(points.dtype, np.floating):
        raise ValueError(f"points: wanted floats (P, 3), got {points.dtype} {points.shape}")
    if colors.shape != points.shape or colors.dtype != np.uint8:
        raise ValueError(f"colors: wanted uint8 {points.shape}, got {colors.dtype} {colors.shape}")
    single = points.astype(np.float32)
    finite = np.isfinite(single).all(1)
    vertices = np.empty(finite.sum(), VERTEX)
    for i, name in enumerate(VERTEX.names):
        vertices[name] = (single if i < 3 else colors)[finite, i % 3]
    types = {"<f4": "float", "|u1": "uchar"}
    properties = [f"property {types[VERTEX[name].str]} {name}" for name in VERTEX.names]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *properties, "end_header"]
    write_bytes(path, "\n".join([*header, ""]).encode() + vertices.tobytes())
    return int((~finite).sum())
