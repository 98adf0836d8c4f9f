"""The files of one scene, in a folder or in memory, and their decoding: images, depth maps, `.npz` arrays row by row.

Whatever is missing, cut off or of another kind than wanted is one OSError or ValueError that names the file.
"""

import contextlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

__all__ = ["FolderFiles", "MemoryFiles", "Npz", "SceneFiles", "decode_image", "numbered", "read_json", "read_npy"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ENDS = {b"\x89PNG": (b"IEND", 12), b"\xff\xd8\xff": (b"\xff\xd9", 64)}  # magic: what the last so many bytes hold


class FolderFiles:
    """The files under a folder; names are relative, with slashes."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = self.path.name
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: wanted a folder, there is none")

    def label(self, name: str) -> str:
        """How an error calls the file."""
        return str(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def list(self, folder: str = "") -> list[str]:
        """The names of the files directly in a sub-folder, sorted, with it; none if there is no such folder."""
        where = self.path / folder
        if not where.is_dir():
            return []
        prefix = f"{folder}/" if folder else ""
        return sorted(prefix + entry.name for entry in os.scandir(where) if entry.is_file())

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.label(name)}: the file is missing") from None

    def local(self, name: str) -> Path:
        """A path on this machine for what reads only from there."""
        return self.path / name


class MemoryFiles:
    """Files by name in memory, as a tar shard holds them; ``name`` is that of the scene."""

    def __init__(self, name: str, contents: Mapping[str, bytes]):
        self.name = name
        self.contents = dict(contents)
        self._folder: tempfile.TemporaryDirectory | None = None

    def label(self, name: str) -> str:
        return f"{self.name}/{name}"

    def has(self, name: str) -> bool:
        return name in self.contents or any(other.startswith(f"{name}/") for other in self.contents)

    def list(self, folder: str = "") -> list[str]:
        return sorted(name for name in self.contents if name.rpartition("/")[0] == folder)

    def read(self, name: str) -> bytes:
        if name not in self.contents:
            raise FileNotFoundError(f"{self.label(name)}: the file is missing")
        return self.contents[name]

    def local(self, name: str) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fourdperf-")
        path = Path(self._folder.name) / Path(name).name
        if not path.exists():
            path.write_bytes(self.read(name))
        return path


SceneFiles = FolderFiles | MemoryFiles


def numbered(files: SceneFiles, folder: str, count: int, pattern: str) -> list[str]:
    """The names ``folder`` + ``pattern.format(i)`` of frames 0 to ``count`` - 1, all there; none if none of them is.

    Raises:
        FileNotFoundError: some are there, but not all: the first that is missing.
    """
    prefix = f"{folder}/" if folder else ""
    names = [prefix + pattern.format(i) for i in range(count)]
    there = set(files.list(folder))
    missing = [name for name in names if name not in there]
    if missing and len(missing) < count:
        raise FileNotFoundError(
            f"{files.label(missing[0])}: the file is missing (and {len(missing) - 1} more of {count} frames)"
        )
    return [] if missing else names


def decode_image(content: bytes, label: str, flags: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    """The image of a file's content as OpenCV gives it for ``flags`` (colours of IMREAD_UNCHANGED are BGR).

    Raises:
        ValueError: it is empty, cut off, or no image.
    """
    for magic, (end, reach) in ENDS.items():
        if content.startswith(magic) and end not in content[-reach:]:
            raise ValueError(f"{label}: the image is cut off after {len(content)} bytes")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:
        image = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None:
        raise ValueError(f"{label}: wanted an image that OpenCV can read, got {len(content)} bytes that it cannot")
    return image


def read_npy(files: SceneFiles, name: str) -> np.ndarray:
    """A `.npy` file; pickled objects are refused."""
    try:
        return np.load(io.BytesIO(files.read(name)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{files.label(name)}: wanted an intact .npy array: {error}") from error


def read_json(files: SceneFiles, name: str) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        found = json.loads(files.read(name))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{files.label(name)}: wanted JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{files.label(name)}: wanted a JSON object, got {type(found).__name__}")
    return found


class Npz:
    """An `.npz` by rows of its arrays' first axis: memory-mapped where an array is stored as it is (``numpy.savez``),
    read as a stream, and only as far as needed, where it is compressed (``numpy.savez_compressed``).

    Nothing stays open, so that it can be pickled and forked.

    Attributes:
        shapes, dtypes: of the arrays by their names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no intact `.npz`, or holds pickled objects, which are never loaded.
    """

    def __init__(self, files: SceneFiles, name: str):
        self.files, self.name, self.label = files, name, files.label(name)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._fortran: set[str] = set()
        with self._open() as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    self._header(archive, member)

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def shape(self, key: str, wanted: tuple[int | str, ...]) -> tuple[int, ...]:
        """The array's shape, checked: numbers must agree, names stand for any size, the same name for the same."""
        if key not in self:
            raise ValueError(f"{self.label}: wanted an array {key!r}, got only {sorted(self.shapes)}")
        shape, names = self.shapes[key], {}
        fits = len(shape) == len(wanted) and all(
            size == names.setdefault(axis, size) if isinstance(axis, str) else size == axis
            for axis, size in zip(wanted, shape)
        )
        if not fits:
            raise ValueError(f"{self.label}: {key}: wanted shape ({', '.join(map(str, wanted))}), got {shape}")
        return shape

    def all(self, key: str) -> np.ndarray:
        """The whole array, in memory."""
        with self._open() as archive, self._explained(key), archive.open(f"{key}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def rows(self, key: str, rows: Sequence[int]) -> np.ndarray:
        """Rows of the array, in memory: (len(rows), ...); their numbers ascend."""
        if key in self._fortran:
            return self.all(key)[np.asarray(rows, int)]
        shape, dtype = self.shapes[key], self.dtypes[key]
        if len(rows) and not 0 <= min(rows) <= max(rows) < shape[0]:
            raise ValueError(f"{self.label}: {key}: wanted rows below {shape[0]}, got {min(rows)} to {max(rows)}")
        with self._open() as archive, self._explained(key), archive.open(f"{key}.npy") as stream:
            _read_header(stream)
            info = archive.getinfo(f"{key}.npy")
            if info.compress_type == zipfile.ZIP_STORED and isinstance(self.files, FolderFiles):
                offset = self._data_offset(info) + stream.tell()
                mapped = np.memmap(self.files.local(self.name), dtype, "r", offset, shape)
                return np.array(mapped[np.asarray(rows, int)])
            return self._stream_rows(stream, shape, dtype, rows)

    def _stream_rows(self, stream, shape: tuple[int, ...], dtype: np.dtype, rows: Sequence[int]) -> np.ndarray:
        out = np.empty((len(rows), *shape[1:]), dtype)
        length = out[:1].nbytes if len(rows) else 0
        at = 0
        for place, row in enumerate(rows):
            for _ in range(row - at):
                self._exactly(stream, length)
            out[place] = np.frombuffer(self._exactly(stream, length), dtype).reshape(shape[1:])
            at = row + 1
        return out

    def _exactly(self, stream, length: int) -> bytes:
        content = stream.read(length)
        if len(content) != length:
            raise EOFError(f"wanted {length} bytes more, got {len(content)}")
        return content

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: after the local header, whose name and extra field have their own lengths."""
        with open(self.files.local(self.name), "rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = np.frombuffer(file.read(4), "<u2")
        return info.header_offset + 30 + int(name) + int(extra)

    def _open(self) -> zipfile.ZipFile:
        if isinstance(self.files, FolderFiles):
            if not self.files.has(self.name):
                raise FileNotFoundError(f"{self.label}: the file is missing")
            content = self.files.local(self.name)
        else:
            content = io.BytesIO(self.files.read(self.name))
        try:
            return zipfile.ZipFile(content)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.label}: no .npz, or a corrupt or cut off one: {error}") from error

    def _header(self, archive: zipfile.ZipFile, member: str) -> None:
        key = member.removesuffix(".npy")
        with self._explained(key), archive.open(member) as stream:
            shape, fortran, dtype = _read_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{self.label}: {key} holds pickled objects, which are never loaded")
        self.shapes[key], self.dtypes[key] = shape, dtype
        if fortran and len(shape) > 1:
            self._fortran.add(key)

    def _explained(self, key: str) -> contextlib.AbstractContextManager[None]:
        return _explained(f"{self.label}: {key}")


def _read_header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) from the start of a `.npy` stream, which then stands at the data."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"wanted .npy version 1 or 2, got {version}")


@contextlib.contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turns the many ways in which zipfile, zlib and numpy report a damaged array into one."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{label}: corrupt or cut off: {error}") from error
