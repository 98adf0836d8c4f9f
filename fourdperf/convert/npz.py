"""`.npz` files, an array at a time.

`numpy.load` would do for small files; here headers are read without their data, so that a checkpoint is checked before
any of it is converted, and what is wrong with a file is said in one sentence. Pickled objects are refused.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from fourdperf.data.files import atomic_path
from fourdperf.models.checkpoint import CheckpointError

FLOATS = (np.float16, np.float32, np.float64)


class NpzReader:
    """The float arrays of an open `.npz`: `shapes` and `dtypes` by name without `.npy`, and `read(name)`."""

    def __init__(self, path: str | os.PathLike, archive: zipfile.ZipFile):
        self.path = path
        self._archive = archive
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name == member:
                raise CheckpointError(f"{path}: {member} is no .npy array")
            if name in self.shapes:
                raise CheckpointError(f"{path}: {name} is there twice")
            self.shapes[name], self.dtypes[name] = self._header(member)

    def _header(self, member: str) -> tuple[tuple[int, ...], np.dtype]:
        with self._archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise CheckpointError(f"{self.path}: {member}: expected .npy version 1 or 2, got {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise CheckpointError(f"{self.path}: {member} holds pickled objects, which are never loaded")
        if dtype.newbyteorder("=") not in FLOATS:
            raise CheckpointError(f"{self.path}: {member}: expected float16, float32 or float64, got {dtype}")
        return shape, dtype.newbyteorder("=")

    def read(self, name: str) -> np.ndarray:
        with _explained(self.path), self._archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            # Reading on to the end is what makes zipfile verify the checksum.
            if stream.read(1):
                raise CheckpointError(f"{self.path}: {name} is longer than its header says")
        return array.astype(self.dtypes[name], copy=False)


@contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[NpzReader]:
    """An NpzReader; raises CheckpointError for what is no intact `.npz` of floats, FileNotFoundError for no file."""
    with _explained(path):
        with open(path, "rb") as file:
            if file.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
                raise CheckpointError(f"{path}: not an .npz file (a zip archive of .npy arrays)")
        archive = zipfile.ZipFile(path)
    with archive:
        with _explained(path):
            reader = NpzReader(path, archive)
        yield reader


@contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
    """Turn the many ways in which zipfile, zlib and numpy report a damaged file into one."""
    try:
        yield
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or truncated .npz: {error}") from error


def write_npz(path: str | os.PathLike, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write an uncompressed `.npz`, as `numpy.savez` does, holding one array in memory at a time."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
