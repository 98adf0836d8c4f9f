"""A model on disk: a directory with `model.safetensors` and `config.json`.

Files are written beside their final name and renamed when complete, one tensor at a time, so that a killed process or a
full disk leaves the old checkpoint or none. Nothing here reads or writes a pickle.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fourdperf.data.files import atomic_path, write_text
from fourdperf.models.config import BaseConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it claims to be; the message names the file and the key."""


class Entry(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(path: Path, entries: list[Entry], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file, holding one tensor in memory at a time; `tensors` come in the order of `entries`."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(f"{entry.name}: announced {entry}, got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_checkpoint(
    path: str | os.PathLike, model: str, config: dict, entries: list[Entry], tensors: Iterable[Tensor]
) -> None:
    """Write a checkpoint directory for the model family `model`.

    Raises OSError where the disk refuses; what was there before stays, and a directory made here goes again.
    """
    path = Path(path)
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(path / WEIGHTS, entries, tensors)
        write_text(path / CONFIG, json.dumps({"model": model, **config}, indent=2) + "\n")
    except BaseException:
        if created:
            (path / WEIGHTS).unlink(missing_ok=True)
            path.rmdir()
        raise


def save_model(
    model: nn.Module, path: str | os.PathLike, name: str, config: dict, dtype: torch.dtype | None = None
) -> None:
    """Write a model's parameters (floating ones in `dtype`, if given) and config to the directory `path`."""
    state = model.state_dict()
    dtypes = {key: dtype if dtype and tensor.is_floating_point() else tensor.dtype for key, tensor in state.items()}
    entries = [Entry(key, dtypes[key], tuple(tensor.shape)) for key, tensor in state.items()]
    write_checkpoint(path, name, config, entries, (tensor.to(dtypes[key]) for key, tensor in state.items()))


def read_config(path: str | os.PathLike, model: str) -> dict:
    """The config of the checkpoint directory `path`, without the name of the model, which must be `model`."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path}: no {CONFIG} here; expected a directory with {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    found = config.pop("model", None) if isinstance(config, dict) else None
    if found != model:
        raise CheckpointError(f"{file}: expected a config with model {model!r}, got {found!r}")
    return config


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file; raises CheckpointError for a file that is none, or not complete."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: no {file.name} here; expected a directory with {CONFIG} and {WEIGHTS}")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error


def read_tensor(
    file: Path, key: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """One tensor of a safetensors file, in `dtype` if it is floating, copied: no window on a file that may change.

    The file is mapped anew each time, so that the pages of tensors read before do not stay in memory.
    """
    with safe_open(file, framework="pt") as tensors:
        tensor = tensors.get_tensor(key)
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Fill `model` (built on the meta device or not) from the checkpoint directory `path`, tensor by tensor.

    dtype: convert to it; by default the dtype stored. Raises CheckpointError naming missing, extra or misshapen keys.
    """
    file = Path(path) / WEIGHTS
    shapes = read_shapes(file)
    check_keys(str(file), {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, shapes)
    model.load_state_dict({key: read_tensor(file, key, dtype, device) for key in shapes}, assign=True)


def check_keys(where: str, wanted: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless both tables hold the same keys and shapes; the message names those that differ."""
    problems = [f"missing {key}" for key in wanted if key not in got]
    problems += [f"unknown {key}" for key in got if key not in wanted]
    for key, shape in wanted.items():
        if key in got and got[key] != shape:
            problems.append(f"{key}: expected shape {shape}, got {got[key]}")
    if problems:
        more = f" (and {len(problems) - 12} more)" if len(problems) > 12 else ""
        raise CheckpointError(f"{where}: " + "; ".join(problems[:12]) + more)


class PretrainedModel(nn.Module):
    """A model that reads and writes checkpoint directories; subclasses take a config, and keep it as `config`.

    MODEL, CONFIG: the model family's name, and its config's class. DTYPE: what stored weights become by default; None
    leaves them as they are.
    """

    MODEL: str
    CONFIG: type[BaseConfig]
    DTYPE: torch.dtype | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """The model of a directory written by `save_pretrained` or `fourdperf convert`, in eval mode.

        dtype: convert to it; by default DTYPE. Raises CheckpointError (a ValueError) that names the file, and the keys
        that are missing, unknown or misshapen.
        """
        fields = read_config(path, cls.MODEL)
        try:
            with torch.device("meta"):
                model = cls(cls.CONFIG.from_dict(fields))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        load_weights(model, path, dtype or cls.DTYPE, device)
        return model.eval()

    def save_pretrained(self, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` (in `dtype`, by default as the parameters are) and `config.json` into `path`.

        Each file is complete or not there at all.
        """
        save_model(self, path, self.MODEL, self.config.to_dict(), dtype)
