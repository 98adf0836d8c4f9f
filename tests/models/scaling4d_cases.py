"""The reference numbers in tests/goldens/scaling4d (format: README there) as configs, parameters, inputs, outputs."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fourdperf.convert.scaling4d import readout_table, table
from fourdperf.models.scaling4d import AttentionReadout, Config, ReadoutConfig, Scaling4D

GOLDENS = Path(__file__).parents[1] / "goldens" / "scaling4d"
BLOCKS = {"PreNormBlock": "pre_norm", "PostNormBlock": "post_norm", "ParallelAttentionBlock": "parallel"}
TOLERANCE = 1e-5  # of the largest value of each output: the README's figure


def names(*prefixes: str) -> list[str]:
    return sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem.startswith(prefixes))


class Case(NamedTuple):
    """One golden file."""

    spec: dict
    parameters: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def config(self) -> Config:
        spec = dict(self.spec["encoder"])
        common = {"video_size": self.spec["video"][1:4], "channels": self.spec["video"][4]}
        if "variant" in spec:
            return Config.from_variant(spec["variant"], patch_size=spec["patch_size"], **spec["overrides"], **common)
        block = BLOCKS[spec.pop("block_type")]
        readout = None
        if "readout" in self.spec:
            link = self.spec["encoder_to_readout"]
            readout = self.spec["readout"] | {"num_frames": link["num_input_frames"], "depth": link["readout_depth"]}
        return Config.from_dict(spec | common | {"block": block, "readout": readout})

    @property
    def readout_config(self) -> ReadoutConfig:
        queries = self.spec.get("queries")
        return ReadoutConfig(
            **self.spec["readout"], num_frames=self.spec["features"][1], query_features=queries and queries[2]
        )

    def model(self) -> Scaling4D:
        model = Scaling4D(self.config).eval()
        model.load_state_dict({row.key: pack(row, self.parameters) for row in table(self.config)})
        return model

    def readout(self) -> AttentionReadout:
        readout = AttentionReadout(self.readout_config, self.spec["features"][3]).eval()
        rows = readout_table(self.readout_config, self.spec["features"][3], "layers_2/")
        assert {name for row in rows for name, _ in row.sources} == set(self.parameters)
        readout.load_state_dict({row.key.removeprefix("readout."): pack(row, self.parameters) for row in rows})
        return readout


@cache
def case(name: str) -> Case:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        parts = {
            part: {key.removeprefix(part): file[key] for key in file.files if key.startswith(part)}
            for part in ("params/", "in/", "out/")
        }
        return Case(json.loads(str(file["config"])), *parts.values())


def pack(row, parameters: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(row.pack([parameters[name] for name, _ in row.sources]))


def unpack(model: Scaling4D, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors named and shaped as the model's parameters -> arrays named and shaped as Flax's."""
    return {
        name: part
        for row in table(model.config)
        for (name, _), part in zip(row.sources, row.unpack(state[row.key].detach().float().numpy()))
    }


def tree(parameters: dict[str, np.ndarray]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    nested = {}
    for key, value in parameters.items():
        *path, last = key.split("/")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def flax_apply(model, variables: dict, arrays: dict, taps: dict | None = None, **options):
    """`model.apply(variables, **arrays, taps=taps, **options)` as one program: op by op, XLA compiles each op for each
    shape. `taps` are filled in the model's order."""
    import jax

    order = []

    @jax.jit
    def apply(variables, arrays):
        found = {}
        out = model.apply(variables, **arrays, **options, **({} if taps is None else {"taps": found}))
        order.extend(found)  # jit sorts what it gives back
        return out, found

    out, found = apply(variables, arrays)
    if taps is not None:
        taps.update({name: found[name] for name in order})
    return out


def difference(actual, expected) -> float:
    """max |actual - expected| / max |expected|; shapes must be equal."""
    actual, expected = (
        np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x, np.float32) for x in (actual, expected)
    )
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No bias zero and no scale one, so that nothing hides behind an initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1 / parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "norm.weight" in name:
                parameter.add_(1)
    return model.eval()
