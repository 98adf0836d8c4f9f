"""Triangle meshes of files: Wavefront .obj, .off and Stanford .ply (text, or binary of either byte order).

Read are the vertices, the faces (polygons become fans of triangles) and, of .ply, every other number per vertex. All
else (normals, texture coordinates, materials, colours of .off) is skipped.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["SUFFIXES", "Mesh", "read_mesh"]

SUFFIXES = (".obj", ".off", ".ply")
PLY_TYPES = {
    **{name: f"{kind}{size}" for kind, size, names in (
        ("i", 1, "char int8"), ("u", 1, "uchar uint8"), ("i", 2, "short int16"), ("u", 2, "ushort uint16"),
        ("i", 4, "int int32"), ("u", 4, "uint uint32"), ("f", 4, "float float32"), ("f", 8, "double float64"),
    ) for name in names.split()}
}  # fmt: skip


class Mesh(NamedTuple):
    """vertices (V, 3) float64, faces (F, 3) int64, properties: (V,) float64 by name."""

    vertices: np.ndarray
    faces: np.ndarray
    properties: dict[str, np.ndarray]


def read_mesh(path: Path) -> Mesh:
    """The mesh of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, or not a mesh of triangles.
    """
    readers = {".obj": _read_obj, ".off": _read_off, ".ply": _read_ply}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: wanted a mesh ({' '.join(SUFFIXES)})")
    content = path.read_bytes()
    try:
        vertices, polygons, properties = readers[path.suffix.lower()](content)
        faces = [(face[0], *face[i : i + 2]) for face in polygons for i in range(1, len(face) - 1)]
        mesh = Mesh(np.array(vertices, np.float64).reshape(-1, 3), np.array(faces, np.int64).reshape(-1, 3), properties)
    except (ValueError, IndexError, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cut off, corrupt or no mesh: {error}") from error
    count = len(mesh.vertices)
    if not len(mesh.faces) or mesh.faces.min() < 0 or mesh.faces.max() >= count or not np.isfinite(mesh.vertices).all():
        raise ValueError(f"{path}: wanted finite vertices and faces between them, got {count} and {len(mesh.faces)}")
    return mesh


def _read_obj(content: bytes):
    vertices, faces = [], []
    for line in content.decode().splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(x) for x in rest[:3]])
        elif word == "f":
            numbers = [int(corner.split("/")[0]) for corner in rest]
            faces.append([n - 1 if n > 0 else len(vertices) + n for n in numbers])
    return vertices, faces, {}


def _read_off(content: bytes):
    lines = [line.split("#")[0] for line in content.decode().splitlines()]
    rows = iter([row for row in (line.split() for line in lines) if row])
    first = next(rows)
    if not first[0].upper().startswith("OFF"):
        raise ValueError(f"it begins with {first[0]!r}")
    counts = first[1:] or next(rows)
    vertices = [[float(x) for x in next(rows)[:3]] for _ in range(int(counts[0]))]
    faces = []
    for _ in range(int(counts[1])):
        count, *row = next(rows)
        faces.append(_corners(int(count), [int(x) for x in row[: int(count)]]))
    return vertices, faces, {}


def _read_ply(content: bytes):
    end = content.index(b"end_header")
    header, body = content[:end].decode(), content[content.index(b"\n", end) + 1 :]
    lines = [line.split() for line in header.splitlines()]
    if lines[0] != ["ply"]:
        raise ValueError(f"it begins with {header[:12]!r}")
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[
        next(line[1] for line in lines if line and line[0] == "format")
    ]
    stream = iter(body.split()) if not order else io.BytesIO(body)

    def take(kind: str):
        if not order:
            return float(next(stream)) if kind[0] == "f" else int(next(stream))
        return np.frombuffer(stream.read(int(kind[1])), order + kind, 1)[0]

    found: dict[str, dict[str, list]] = {}
    for name, count, properties in _elements(lines):
        if order and all(len(kinds) == 1 for kinds in properties.values()):
            dtype = np.dtype([(key, order + kinds[0]) for key, kinds in properties.items()])
            table = np.frombuffer(stream.read(count * dtype.itemsize), dtype, count)
            found[name] = {key: table[key] for key in properties}
            continue
        found[name] = {key: [] for key in properties}
        for _ in range(count):
            for key, kinds in properties.items():
                listed = len(kinds) == 2
                value = [take(kinds[1]) for _ in range(take(kinds[0]))] if listed else take(kinds[0])
                found[name][key].append(value)
    vertex = {key: np.asarray(values, np.float64) for key, values in found["vertex"].items()}
    corners = next(found["face"][key] for key in ("vertex_indices", "vertex_index") if key in found["face"])
    positions = np.stack([vertex.pop(axis) for axis in "xyz"], -1)
    return positions, [[int(n) for n in face] for face in corners], vertex


def _elements(lines: list[list[str]]) -> list[tuple[str, int, dict[str, list[str]]]]:
    """Name, count and properties of each element of a .ply; a property has one type, or that of its length and its
    own."""
    elements: list[tuple[str, int, dict[str, list[str]]]] = []
    for line in lines:
        if line[:1] == ["element"]:
            elements.append((line[1], int(line[2]), {}))
        elif line[:1] == ["property"]:
            kinds = line[2:4] if line[1] == "list" else line[1:2]
            elements[-1][2][line[-1]] = [PLY_TYPES[kind] for kind in kinds]
    return elements


def _corners(count: int, row: list[int]) -> list[int]:
    if len(row) != count or count < 3:
        raise ValueError(f"wanted a face of {count} corners, got {len(row)}")
    return row
