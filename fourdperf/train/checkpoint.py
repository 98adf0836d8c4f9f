"""A trained D4RT from whatever a run leaves behind."""

from pathlib import Path

import torch

from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.d4rt import D4RT, Config

__all__ = ["load_d4rt", "read_run"]


def load_d4rt(path: Path) -> D4RT:
    """The model of a folder with weights and config, of a run's folder (its `model`), or of a run's last.ckpt.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError (a ValueError): it is none of these, or cut off.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.is_dir():
        return D4RT.from_pretrained(path / "model" if (path / "model").is_dir() else path)
    state = read_run(path)
    model = D4RT(Config.from_dict(state["model_config"]))
    weights = {name.removeprefix("model."): x for name, x in state["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)
    return model


def read_run(path: Path, map_location: str | torch.device = "cpu") -> dict:
    """What a run's last.ckpt holds, read without unpickling code.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError (a ValueError): it is no such checkpoint, or cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a complete checkpoint of fourdperf train: {error}") from error
    if not isinstance(state, dict) or "state_dict" not in state or "model_config" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of fourdperf train: it lacks state_dict or model_config")
    return state
