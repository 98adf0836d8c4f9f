"""Files that appear complete or not at all: written beside their target under another name, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["NpyWriter", "atomic_path", "output_folder", "require_h5py", "write_bytes", "write_text"]

OTHER_WRITERS = ("PytorchStreamWriter", "SafetensorError")  # whose errors are no OSErrors


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary name with the same suffix in the same folder; it becomes ``path`` if the block ends without
    an error and is removed otherwise. Missing parent folders are made.

    Raises:
        OSError: the folder cannot be made or written, or ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the new name must not reach the disk before the data
        os.replace(temporary, path)
    except OSError as error:
        # A failing write knows no name, or the temporary one; other errors here already say what they are about.
        if error.filename in (None, str(temporary), temporary) and error.errno is not None:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
        raise
    except Exception as error:
        if any(writer in f"{type(error).__name__} {error}" for writer in OTHER_WRITERS):
            raise OSError(f"cannot write {path}: {error} (is the disk full?)") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes ``content`` to ``path``, all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, content: str) -> None:
    """Writes ``content`` to ``path`` as UTF-8, all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, content.encode())


class NpyWriter:
    """Grows a ``.npy`` file along its first axis, one block at a time, without holding it in memory.

    Use as a context manager; the file gets its name when the block ends without an error.

    Args:
        path: the target, usually ending in ``.npy``.

    Raises:
        OSError: the file cannot be written.
        ValueError: nothing was appended, or a block's shape or dtype differs from the first one's.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.length = 0
        self.row_shape: tuple[int, ...] | None = None
        self.dtype: np.dtype | None = None

    def __enter__(self) -> "NpyWriter":
        self._stack = contextlib.ExitStack()
        with self._stack:
            temporary = self._stack.enter_context(atomic_path(self.path))
            self._file = self._stack.enter_context(open(temporary, "wb"))
            self._stack = self._stack.pop_all()
        return self

    def append(self, block: np.ndarray) -> None:
        """Adds ``block`` (n, ...) after what is there."""
        if self.row_shape is None:
            self.row_shape, self.dtype = block.shape[1:], block.dtype
            self._write_header()
        if block.shape[1:] != self.row_shape or block.dtype != self.dtype:
            raise ValueError(
                f"{self.path.name}: wanted rows of shape {self.row_shape} and dtype {self.dtype}, "
                f"got {block.shape[1:]} and {block.dtype}"
            )
        self._file.write(np.ascontiguousarray(block).data)
        self.length += len(block)

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis can grow to 21 digits in place.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length, *self.row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def __exit__(self, kind, error, trace) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, error, trace)
        with self._stack:
            if self.row_shape is None:
                raise ValueError(f"{self.path.name}: nothing was written")
            self._file.seek(0)
            self._write_header()
        return None


@contextlib.contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Makes the folder ``path`` and gives it; if the block fails, a folder that was made here and holds nothing goes.

    Raises:
        OSError: the folder cannot be made.
    """
    path = Path(path)
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        if created and not any(path.iterdir()):
            path.rmdir()
        raise


def require_h5py():
    """The package h5py.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need the package h5py: pip install 'fourdperf[train]'") from error
    return h5py
