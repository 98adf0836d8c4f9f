"""The reference numbers in tests/goldens (format: README in each folder), and what tests of models do with them."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parents[1] / "goldens"


def names(folder: Path, prefix: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"{prefix}*.npz"))


class Golden:
    """One file: `spec`, its config; `params`, `inputs`, `outputs`, `grads` without their prefixes."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as golden:
            arrays = {key: torch.from_numpy(golden[key]) for key in golden.files if key != "config"}
            self.spec = json.loads(str(golden["config"]))
        part = lambda prefix: {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
        self.params, self.inputs, self.outputs, self.grads = (part(p) for p in ("params/", "in/", "out/", "grad/"))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a, b, rtol=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= rtol * b.abs().max().clamp(min=1e-300), (a - b).abs().max() / b.abs().max()
