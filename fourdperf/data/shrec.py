"""SHREC'11 under conformal maps: closed surfaces that are mapped to the sphere, as equirectangular maps of features.

A shape of a class has K copies, the original and conformal changes of it. Each copy is a mesh, and the same triangles
on the sphere. Files, where EXT is obj, off or ply (`fourdperf.data.meshes`):

    [train/|test/]CLASS/NAME.EXT                  the surface
                        NAME_sphere.EXT           its triangles with vertices on a sphere around the origin
                        NAME_aug_1.EXT, NAME_aug_1_sphere.EXT, ...    copies 1, 2, ...; one without a surface of its own
                                                  is another map of NAME's to the sphere
                        NAME.npy, NAME_aug_1.npy  (V, C) features of the vertices; by default they are computed

A .ply can have all in one file: its vertices (x, y, z), their places on the sphere in the properties sx, sy, sz, and
every other property as a feature. Without folders train and test, as many shapes of each class as wanted are for
training, drawn with a seed, and the others for tests. All shapes have the number of copies of the first; more are left
out.

Computed features are heat kernel signatures (Sun et al., SGP 2009) of the surface, which bending does not change: with
the eigenpairs of the cotangent Laplacian and the area as mass, at C times,

    h_t(v) = sum_k exp(-lambda_k t) phi_k(v)^2 / sum_k exp(-lambda_k t) * area

whose mean over the surface is 1, squeezed to h / (1 + h), in [0, 1). Features of files are taken as they are.

A map's pixel gets the features of the triangle that its direction goes through, linearly between its corners.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from fourdperf.data.meshes import SUFFIXES, Mesh, read_mesh
from fourdperf.data.warps import sphere_grid

__all__ = ["Shrec", "heat_kernel_signatures", "rasterise"]

SOURCE = (
    "get SHREC_11_CONF.zip (the link is in the README of github.com/vsitzmann/neural-isometries), unpack it, and bring "
    "it to the layout that fourdperf/data/shrec.py tells"
)
FILE = re.compile(r"(?P<name>.+?)(?:_aug_(?P<copy>\d+))?(?P<sphere>_sphere)?")
EIGENPAIRS = 128
CONNECTED = 1e-9  # the second eigenvalue, which is zero for each piece but the first, over the last


class Shrec(Dataset):
    """Items {"x": (K, H, W, C) float32, "label": int}.

    Args:
        root: the folder.
        split: "train" or "test".
        size: (H, W) of the maps.
        times: C of computed features.
        train_per_class, seed: how many shapes of each class are for training where the folder does not say, and which.

    Attributes:
        classes: their names. shapes: names of the split's shapes, class first.

    Raises:
        FileNotFoundError: there is no such folder, or no shapes in it.
        ValueError: a shape has no map to the sphere, or a file is corrupt; of items, that files do not fit together.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        size: tuple[int, int] = (96, 192),
        *,
        times: int = 16,
        train_per_class: int = 10,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise ValueError(f"split: wanted train or test, got {split!r}")
        self.root, self.size, self.times = Path(root), tuple(size), times
        if not self.root.is_dir():
            raise FileNotFoundError(f"shrec: no folder {root}; {SOURCE}")
        folders = [self.root / name for name in ("train", "test") if (self.root / name).is_dir()]
        top = self.root / split if len(folders) == 2 else self.root
        found = {folder.name: _shapes(folder) for folder in sorted(top.iterdir()) if folder.is_dir()}
        found = {name: shapes for name, shapes in found.items() if shapes}
        if not found:
            raise FileNotFoundError(
                f"shrec: no shapes ({', '.join(SUFFIXES)}) in folders of classes in {top}; {SOURCE}"
            )
        self.classes = tuple(found)
        self.items: list[tuple[int, Path, dict[int, dict[str, Path]]]] = []
        for label, (name, shapes) in enumerate(found.items()):
            names = sorted(shapes)
            if len(folders) != 2:
                order = np.random.default_rng((seed, label)).permutation(len(names))
                mine = order[:train_per_class] if split == "train" else order[train_per_class:]
                names = [names[i] for i in sorted(mine)]
            self.items += [(label, top / name / shape, shapes[shape]) for shape in names]
        if not self.items:
            raise ValueError(f"shrec: {top}: no class has more than {train_per_class} shapes, so none is for {split}")
        self.shapes = [f"{path.parent.name}/{path.name}" for _, path, _ in self.items]
        self.copies = len(self.items[0][2])
        for _, path, files in self.items:
            if set(range(self.copies)) - files.keys():
                raise ValueError(f"{path}: wanted copies 0 to {self.copies - 1}, got {sorted(files)}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        label, path, copies = self.items[index]
        base, base_features, maps = None, None, []
        for k in range(self.copies):
            files, name = copies[k], f"{path}, copy {k}"
            one = read_mesh(files["surface"]) if "surface" in files else base
            if one is None:
                raise FileNotFoundError(f"{path}: the surface is missing")
            sphere, features = self._sphere(one, files, path)
            if features is None:
                own = one is not base or base_features is None
                features = heat_kernel_signatures(one, self.times, name=name) if own else base_features
            if k == 0:
                base, base_features = one, features
            maps.append(rasterise(sphere, one.faces, features, self.size, name))
        if len({x.shape for x in maps}) > 1:
            raise ValueError(f"{path}: wanted copies with as many features each, got {[x.shape[-1] for x in maps]}")
        return {"x": torch.from_numpy(np.stack(maps).astype(np.float32)), "label": label}

    def _sphere(self, mesh: Mesh, files: dict[str, Path], path: Path) -> tuple[np.ndarray, np.ndarray | None]:
        """Places on the sphere (V, 3), and features (V, C) if a file has some."""
        axes, others = ("sx", "sy", "sz"), sorted(mesh.properties.keys() - {"sx", "sy", "sz"})
        features = np.stack([mesh.properties[name] for name in others], -1) if others else None
        if "sphere" in files:
            sphere = read_mesh(files["sphere"])
            if not np.array_equal(sphere.faces, mesh.faces):
                raise ValueError(f"{files['sphere']}: wanted the triangles of the surface {path}, got others")
            places = sphere.vertices
        elif set(axes) <= mesh.properties.keys():
            places = np.stack([mesh.properties[axis] for axis in axes], -1)
        else:
            raise ValueError(
                f"{path}: wanted {path.name}_sphere, its triangles on the sphere, or properties sx, sy, sz of a .ply"
            )
        if "features" in files:
            features = _read_features(files["features"])
        if features is not None and (len(features) != len(mesh.vertices) or not np.isfinite(features).all()):
            raise ValueError(f"{path}: wanted finite features of {len(mesh.vertices)} vertices, got {features.shape}")
        return places, features


def _shapes(folder: Path) -> dict[str, dict[int, dict[str, Path]]]:
    """The files of a class by shape, copy and purpose: surface, sphere, features."""
    shapes: dict[str, dict[int, dict[str, Path]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix in (*SUFFIXES, ".npy") and not path.name.startswith("."):
            parts = FILE.fullmatch(path.stem)
            purpose = "features" if suffix == ".npy" else "sphere" if parts["sphere"] else "surface"
            shapes[parts["name"]][int(parts["copy"] or 0)][purpose] = path
    return {name: dict(copies) for name, copies in shapes.items()}


def _read_features(path: Path) -> np.ndarray:
    try:
        features = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cut off, corrupt or no .npy: {error}") from error
    if features.ndim != 2 or features.dtype.kind not in "iuf":
        raise ValueError(f"{path}: wanted numbers (V, C), got {features.dtype} {features.shape}")
    return features


def heat_kernel_signatures(mesh: Mesh, times: int = 16, eigenpairs: int = EIGENPAIRS, name: str = "mesh") -> np.ndarray:
    """(V, times) in [0, 1); see the module. Times lie evenly, by their logarithm, from 4 ln 10 / lambda_max to
    4 ln 10 / lambda_1, as in the paper.

    Raises:
        ImportError: scipy is not installed.
        ValueError: the mesh is too small, in several pieces, or its triangles have no area.
    """
    try:
        from scipy.sparse import coo_matrix, diags
        from scipy.sparse.linalg import eigsh
    except ImportError as error:
        raise ImportError("heat kernel signatures need scipy: pip install 'fourdperf[train]'") from error
    vertices, faces = mesh.vertices, mesh.faces
    corners = vertices[faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1) / 2
    count, total = len(vertices), area.sum()
    if count < 16 or not total > 0:
        raise ValueError(f"{name}: wanted at least 16 vertices and an area, got {count} and {total}")
    mass = np.bincount(faces.ravel(), np.repeat(area / 3, 3), count)
    mass = np.maximum(mass, 1e-9 * total / count) / total
    rows, columns, values = [], [], []
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        a, b = corners[:, j] - corners[:, i], corners[:, k] - corners[:, i]
        cotangent = (a * b).sum(-1) / np.maximum(np.linalg.norm(np.cross(a, b), axis=-1), 1e-12 * total)
        rows += [faces[:, j], faces[:, k]]
        columns += [faces[:, k], faces[:, j]]
        values += [cotangent / 2, cotangent / 2]
    weights = coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (count, count))
    laplacian = (diags(np.asarray(weights.sum(1)).ravel()) - weights).tocsc()
    pairs = min(eigenpairs, count // 2)
    start = np.random.default_rng(0).normal(size=count)  # ARPACK's own differs from run to run
    values, vectors = eigsh(laplacian, pairs, diags(mass).tocsc(), sigma=-1e-6, v0=start)
    values = np.maximum(values, 0)
    if values[1] <= CONNECTED * values[-1]:
        raise ValueError(f"{name}: wanted a surface in one piece, got a second eigenvalue of {values[1]:.1e}")
    moments = np.geomspace(4 * np.log(10) / values[-1], 4 * np.log(10) / values[1], times)
    decay = np.exp(-values[:, None] * moments)
    heat = vectors**2 @ decay / decay.sum(0)
    return heat / (1 + heat)


def rasterise(
    sphere: np.ndarray, faces: np.ndarray, features: np.ndarray, size: tuple[int, int], name: str = "mesh"
) -> np.ndarray:
    """Features (V, C) of vertices at directions (V, 3), of any length, as a map (H, W, C); see `fourdperf.data.warps`.

    Raises:
        ValueError: a vertex is at the origin, or the triangles leave a part of the sphere free.
        ImportError: scipy is not installed.
    """
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise ImportError("maps of meshes need scipy: pip install 'fourdperf[train]'") from error
    length = np.linalg.norm(sphere, axis=-1, keepdims=True)
    if not length.min() > 0:
        raise ValueError(f"{name}: wanted vertices on a sphere around the origin, got one at it")
    directions = sphere_grid(size, torch.float64).numpy().reshape(-1, 3)
    corners = (sphere / length)[faces]
    # each triangle may cover the pixels in a ball around it
    middle = corners.mean(1)
    reach = np.linalg.norm(corners - middle[:, None], axis=-1).max(1)
    covered = cKDTree(directions).query_ball_point(middle, 2 * reach + 1e-9)
    triangle = np.repeat(np.arange(len(faces)), [len(pixels) for pixels in covered])
    pixel = np.concatenate([np.asarray(pixels, np.int64) for pixels in covered])
    # the ray through the pixel in terms of the corners; all above 0 inside
    a, b, c = np.moveaxis(corners[triangle], 1, 0)
    ray = directions[pixel]
    weights = np.stack([(ray * np.cross(u, v)).sum(-1) for u, v in ((b, c), (c, a), (a, b))], -1)
    weights *= np.sign((a * np.cross(b, c)).sum(-1))[:, None]
    size_of = np.abs(weights).sum(-1, keepdims=True)
    weights = np.where(size_of > 0, weights / np.maximum(size_of, 1e-300), -1)  # flat triangles cover nothing
    order = np.lexsort((-weights.min(-1), pixel))  # the triangle that it is best inside of, for each pixel
    seen, first = np.unique(pixel[order], return_index=True)
    best = order[first]
    free = len(directions) - (weights[best].min(-1) > -1e-6).sum()
    if free:
        raise ValueError(f"{name}: the triangles on the sphere leave {free} of {len(directions)} directions free")
    inside = np.maximum(weights[best], 0)
    inside /= inside.sum(-1, keepdims=True)
    return np.einsum("nk,nkc->nc", inside, features[faces[triangle[best]]]).reshape(*size, -1)
