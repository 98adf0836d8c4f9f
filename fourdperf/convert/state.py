"""State dictionaries of other projects: `.safetensors`, or what `torch.save` and Lightning wrote; no pickle is run."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fourdperf.models.checkpoint import CheckpointError, check_keys

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    A dictionary inside the file under one of WRAPPERS (Lightning's `state_dict`, VideoMAE's `model`) is taken out.
    Raises CheckpointError for a file that is none of these, is not complete, or holds more than tensors and plain
    values (which would have to be unpickled as code); OSError where it cannot be read.
    """
    if Path(path).suffix == ".safetensors":
        with open(path, "rb"):  # the OSError of the system, where there is one
            pass
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a file of tensors and plain values alone, so not opened: {error}"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a complete file of torch.save: {error}") from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name}: expected a tensor, got {type(value).__name__}")
    return dict(state)


def load_checked(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Fills `module`; raises CheckpointError that names missing, unknown and misshapen keys of `where`."""
    shapes = lambda tensors: {name: tuple(x.shape) for name, x in tensors.items()}
    check_keys(where, shapes(module.state_dict()), shapes(state))
    module.load_state_dict(state)


def hub_folder() -> Path:
    """Where torch.hub keeps files once they have been fetched; below TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def without_prefix(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors below the first of the prefixes that any name has, named without it; all of them where none has."""
    for prefix in prefixes:
        inner = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        if inner:
            return inner
    return dict(state)
