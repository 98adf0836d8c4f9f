"""The classifiers' reference numbers in tests/goldens/functa (format: README there), and models of every kind."""

import json
from pathlib import Path

import numpy as np
import torch

from fourdperf.convert.latent_classifier import load_tree, table
from fourdperf.models.latent_classifier import Config, LatentClassifier
from tests.models.scaling4d_cases import randomize

GOLDENS = Path(__file__).parents[1] / "goldens" / "functa"
FORWARD = ("classifier_mlp", "classifier_transformer", "classifier_transformer_fewer_patches")
TRAJECTORY = "classifier_trajectory_transformer"

SIZES = {"latent_size": 3, "latent_channels": 5, "num_classes": 7, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
LIVE = {
    "mlp": {},
    "transformer": {"mlp_size": 40},
    "transformer of one head": {"hidden_size": 13, "num_heads": 1, "num_layers": 1, "latent_size": 1},
    "resnet": {},
    "resnet, odd width": {"hidden_size": 13, "num_layers": 1},
}


def build(name: str, **fields) -> LatentClassifier:
    """A model with random parameters, in eval mode."""
    kind = name.split(",")[0].split(" ")[0]
    return randomize(
        LatentClassifier(Config(**{**SIZES, "kind": kind, "normalizing_factor": 0.5, **LIVE[name], **fields}))
    )


def latents(model: LatentClassifier, batch: int = 4) -> torch.Tensor:
    c = model.config
    return torch.randn(
        batch, c.latent_size, c.latent_size, c.latent_channels, generator=torch.Generator().manual_seed(1)
    )


class Case:
    """One golden file: `params`, `inputs`, `outputs`, `grads` without their prefixes."""

    def __init__(self, name: str):
        with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as golden:
            self.config = json.loads(str(golden["config"]))
            part = lambda prefix: {k.removeprefix(prefix): golden[k] for k in golden.files if k.startswith(prefix)}
            self.params, self.inputs, self.outputs, self.grads = map(part, ("params/", "in/", "out/", "grad/"))

    def model(self) -> LatentClassifier:
        factor = self.config.get("normalizing_factor") or self.config["train"]["normalizing_factor"]
        return load_tree(self.params, {"normalizing_factor": factor}, self.config["case"])

    def input(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.inputs[name])

    def check(self, name: str, got: np.ndarray | torch.Tensor) -> None:
        """`got` against out/name or grad/name within the README's tolerance, unless that is rounding noise alone."""
        where, key = name.split("/", 1)
        want = (self.outputs if where == "out" else self.grads)[key]
        got = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got)
        assert got.shape == want.shape, name
        if name not in self.config["noise_only_keys"]:
            noise = self.config["float32_noise"][name]
            assert np.abs(got - want).max() <= 30 * noise["max_abs"] + 3e-6 * noise["ref_max"], name


def in_flax(config: Config, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors named and shaped as the model's parameters -> arrays by Flax's paths."""
    return {
        name: part
        for row in table(config)
        for (name, _), part in zip(row.sources, row.unpack(state[row.key].detach().numpy()))
    }
