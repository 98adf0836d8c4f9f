"""Files of tokens: what a tokenizer makes of many pictures, a few dozen bytes each, read at random.

    8 bytes    magic
    4          version
    4          length of the header
    4          its CRC-32
    header     JSON under zlib: a `Description`
    records    of each picture the same number of bytes: codes of ceil(log2 K) bits, or latents in fp16
    CRCs       of each block of BLOCK records, 4 bytes each

Numbers are little-endian; bits of codes are packed from the highest, and a record ends at a byte. The size of the file
is exact, and every block is compared with its CRC when it is first read, so a file that is cut off or damaged is told
from a good one.
"""

import contextlib
import json
import os
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.files import atomic_path

__all__ = ["Description", "TokenFile", "TokenFileError", "TokenWriter"]

MAGIC, VERSION = b"4DTOKENS", 1
PREAMBLE = struct.Struct("<8sIII")
BLOCK = 256


class TokenFileError(ValueError):
    """A file of tokens that cannot be read as such, or is another tokenizer's; the message names it."""


@dataclass(frozen=True)
class Description:
    """What a file holds, and who made it.

    model, fingerprint: the tokenizer's name, and whose its codes are (`fourdperf.models.tokenizers.fingerprint`).
    image_size: (H, W), what it decodes to. num_tokens: N of each picture. count: of pictures.
    codebook_size: K, or None where they are latents of `channels` numbers.
    names: of the pictures, or None. labels: their classes' numbers, or None; classes: the classes' names.
    """

    model: str
    fingerprint: str
    image_size: tuple[int, int]
    num_tokens: int
    count: int
    codebook_size: int | None = None
    channels: int | None = None
    names: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.codebook_size is None) == (self.channels is None):
            raise ValueError(f"codebook_size, channels: wanted one, got {self.codebook_size} and {self.channels}")
        for name in ("num_tokens", "codebook_size", "channels"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= 2**31:
                raise ValueError(f"{name}: wanted a number from 1 to 2^31, got {getattr(self, name)}")
        for name in ("names", "labels"):
            if getattr(self, name) is not None and len(getattr(self, name)) != self.count:
                raise ValueError(f"{name}: wanted {self.count}, one a picture, got {len(getattr(self, name))}")

    @property
    def bits(self) -> int:
        """Of a code."""
        return max(1, (self.codebook_size - 1).bit_length())

    @property
    def record_bytes(self) -> int:
        """Of a picture."""
        if self.codebook_size is None:
            return 2 * self.num_tokens * self.channels
        return -(-self.num_tokens * self.bits // 8)

    def pack(self, tokens: Tensor) -> np.ndarray:
        """Codes `(B, N)`, or latents `(B, N, C)` -> uint8 `(B, record_bytes)`; raises ValueError for others."""
        shape = (self.num_tokens,) if self.channels is None else (self.num_tokens, self.channels)
        if tuple(tokens.shape[1:]) != shape or tokens.is_floating_point() != (self.codebook_size is None):
            wanted = "codes" if self.channels is None else "latents"
            raise ValueError(f"tokens: wanted {wanted} (B, {', '.join(map(str, shape))}), got {tuple(tokens.shape)}")
        if self.codebook_size is None:
            halves = tokens.detach().cpu().to(torch.float16)
            if not halves.isfinite().all():
                raise ValueError("tokens: wanted latents that fp16 can hold, got infinity or NaN")
            return halves.numpy().astype("<f2").reshape(len(tokens), self.num_tokens * self.channels).view(np.uint8)
        codes = tokens.cpu().numpy()
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise ValueError(f"tokens: wanted codes 0 .. {self.codebook_size - 1}, got {codes.min()} .. {codes.max()}")
        bits = codes[..., None] >> np.arange(self.bits)[::-1] & 1
        return np.packbits(bits.astype(np.uint8).reshape(len(codes), self.num_tokens * self.bits), axis=1)

    def unpack(self, records: np.ndarray) -> Tensor:
        """The inverse of `pack`: int64 codes, or fp32 latents; raises ValueError for codes beyond the codebook."""
        if self.codebook_size is None:
            halves = records.view("<f2").astype(np.float32)
            return torch.from_numpy(halves.reshape(-1, self.num_tokens, self.channels))
        bits = np.unpackbits(records, axis=1, count=self.num_tokens * self.bits)
        places = 1 << np.arange(self.bits, dtype=np.int64)[::-1]
        codes = bits.reshape(-1, self.num_tokens, self.bits) @ places
        if codes.size and codes.max() >= self.codebook_size:
            raise ValueError(f"a code is {codes.max()}, beyond the codebook's {self.codebook_size}")
        return torch.from_numpy(codes)


class TokenWriter:
    """Writes a file batch by batch, as a context manager: `append` takes the codes or latents of the next pictures,
    `description.count` in all. The file gets its name when the block ends without an error.

    Raises ValueError where there are more or fewer, or tokens do not fit; OSError where the disk refuses.
    """

    def __init__(self, path: str | os.PathLike, description: Description):
        self.path, self.description = Path(path), description
        self.written, self.pending, self.checks = 0, b"", []

    def __enter__(self) -> "TokenWriter":
        self._stack = contextlib.ExitStack()
        with self._stack:
            temporary = self._stack.enter_context(atomic_path(self.path))
            self._file = self._stack.enter_context(open(temporary, "wb"))
            header = zlib.compress(json.dumps(asdict(self.description)).encode(), 9)
            self._file.write(PREAMBLE.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
            self._stack = self._stack.pop_all()
        return self

    def append(self, tokens: Tensor) -> None:
        """Codes `(B, N)`, or latents `(B, N, C)`."""
        records = self.description.pack(tokens)
        self.written += len(records)
        if self.written > self.description.count:
            raise ValueError(f"{self.path}: wanted {self.description.count} pictures, got {self.written}")
        self.pending += records.tobytes()
        block = BLOCK * self.description.record_bytes
        while len(self.pending) >= block:
            self._flush(block)

    def _flush(self, size: int) -> None:
        block, self.pending = self.pending[:size], self.pending[size:]
        self.checks.append(zlib.crc32(block))
        self._file.write(block)

    def __exit__(self, kind, error, trace) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, error, trace)
        with self._stack:
            if self.written != self.description.count:
                raise ValueError(f"{self.path}: wanted {self.description.count} pictures, got {self.written}")
            if self.pending:
                self._flush(len(self.pending))
            self._file.write(np.array(self.checks, "<u4").tobytes())
        return None


class TokenFile(Dataset[tuple[Tensor, int]]):
    """A file of tokens: `file[i]` is (codes `(N,)` int64, or latents `(N, C)` fp32; label, 0 where there is none), and
    `file.read(start, stop)` many pictures' at once.

    Raises:
        FileNotFoundError: there is no such file.
        TokenFileError (a ValueError): it is no file of tokens, of another version, cut off, or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(PREAMBLE.size)
            if start[: len(MAGIC)] != MAGIC:
                raise TokenFileError(f"{path}: wanted a file of tokens, got one that begins {start[:8]!r}")
            if len(start) < PREAMBLE.size:
                raise TokenFileError(f"{path}: cut off after {size} bytes")
            _, version, length, check = PREAMBLE.unpack(start)
            if version != VERSION:
                raise TokenFileError(f"{path}: wanted version {VERSION} of the format, got {version}")
            header = file.read(min(length, size))
            if len(header) < length:
                raise TokenFileError(f"{path}: cut off after {size} bytes, in the header")
            if zlib.crc32(header) != check:
                raise TokenFileError(f"{path}: corrupt: the header does not match its CRC")
            self.description = _described(path, header)
            self.start = PREAMBLE.size + length
            data = len(self) * self.description.record_bytes
            blocks = -(-len(self) // BLOCK)
            wanted = self.start + data + 4 * blocks
            if size != wanted:
                what = "cut off" if size < wanted else "too long"
                raise TokenFileError(f"{path}: {what}: wanted {wanted} bytes for {len(self)} pictures, got {size}")
            file.seek(self.start + data)
            self.checks = np.frombuffer(file.read(4 * blocks), "<u4")
        self.checked = np.zeros(blocks, bool)

    def __len__(self) -> int:
        return self.description.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: wanted 0 .. {len(self) - 1}, got {index}")
        index %= len(self)
        labels = self.description.labels
        return self.read(index, index + 1)[0], 0 if labels is None else labels[index]

    def read(self, start: int, stop: int) -> Tensor:
        """Codes `(B, N)`, or latents `(B, N, C)`, of pictures from `start` to before `stop`."""
        start, stop = max(0, start), min(stop, len(self))
        if stop <= start:
            return self.description.unpack(np.empty((0, self.description.record_bytes), np.uint8))
        first, width = start // BLOCK, self.description.record_bytes
        blocks = range(first, -(-stop // BLOCK))
        whole = not self.checked[blocks.start : blocks.stop].all()  # only for the CRCs
        begin, end = (blocks.start * BLOCK, min(blocks.stop * BLOCK, len(self))) if whole else (start, stop)
        with open(self.path, "rb") as file:
            file.seek(self.start + begin * width)
            records = np.frombuffer(file.read((end - begin) * width), np.uint8)
        if records.size != (end - begin) * width:
            raise TokenFileError(f"{self.path}: cut off since it was opened")
        records = records.reshape(-1, width)
        if whole:
            for number, block in zip(blocks, np.split(records, range(BLOCK, len(records), BLOCK))):
                if zlib.crc32(block) != self.checks[number]:
                    last = min(BLOCK * (number + 1), len(self)) - 1
                    raise TokenFileError(f"{self.path}: corrupt: pictures {BLOCK * number} to {last} fail their CRC")
                self.checked[number] = True
        try:
            return self.description.unpack(records[start - begin : stop - begin])
        except ValueError as error:
            raise TokenFileError(f"{self.path}: {error}") from error

    def check_made_by(self, model: str, fingerprint: str) -> None:
        """Raises TokenFileError that names both, unless the tokenizer of this fingerprint has made the file."""
        if fingerprint != self.description.fingerprint:
            raise TokenFileError(
                f"{self.path}: these are the tokens of {self.description.model} (fingerprint "
                f"{self.description.fingerprint}), and mean nothing to {model} (fingerprint {fingerprint})"
            )


def _described(path: str | os.PathLike, header: bytes) -> Description:
    try:
        values = json.loads(zlib.decompress(header))
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Description(**{**values, **lists})
    except (zlib.error, ValueError, TypeError, AttributeError) as error:
        raise TokenFileError(f"{path}: corrupt: no description in the header: {error}") from error
