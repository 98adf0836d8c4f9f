"""The reference numbers of the seed's port in tests/goldens/d4rt (format: README there) as models, inputs, outputs."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourdperf.convert.d4rt import load_state
from fourdperf.data.queries import Queries
from fourdperf.models.d4rt import D4RT

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"


class Case:
    """One golden file; `params`, `inputs`, `outputs`, `grads` without their prefixes."""

    def __init__(self, name: str):
        with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as golden:
            arrays = {key: torch.from_numpy(golden[key]) for key in golden.files if key != "config"}
            self.config = json.loads(str(golden["config"]))
        part = lambda prefix: {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
        self.params, self.inputs, self.outputs, self.grads = (part(p) for p in ("params/", "in/", "out/", "grad/"))
        if "recipe" in self.config:
            seed, entries = self.config["recipe"]["seed"], self.config["recipe"]["entries"]
            self.params = {key: recipe(key, *entry, seed) for key, entry in entries.items()}

    @property
    def hyper(self) -> dict:
        return self.config.get("model", self.config)

    def model(self) -> D4RT:
        overrides = {"num_heads": self.hyper["encoder_num_heads"], "decoder_heads": self.hyper["decoder_num_heads"]}
        return load_state(self.params, overrides, self.config["case"])

    def video(self, name: str = "video") -> Tensor | None:
        """`(B, T, C, H, W)` there, `(B, T, H, W, C)` here."""
        return self.inputs[name].movedim(2, -1) if name in self.inputs else None

    def queries(self) -> Queries:
        return Queries(*(self.inputs[name] for name in ("coords_uv", "t_src", "t_tgt", "t_cam")))

    def check(self, name: str, got: Tensor, want: Tensor | None = None) -> None:
        """`got` against out/name or grad/name (or `want`), within the file's tolerance for that array."""
        where, key = name.split("/", 1)
        want = (self.outputs if where == "out" else self.grads)[key] if want is None else want
        error, allowed = (got.detach() - want).abs().max().item(), self.config["atol"][name]
        assert got.shape == want.shape and error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def recipe(key: str, shape: list[int], centre: float, scale: float, seed: int) -> Tensor:
    """The README's formula for weights that are not stored."""
    mask = np.uint64(0xFFFFFFFF)
    h = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(zlib.crc32(key.encode()))
    h = (h + np.uint64((seed * 0x85EBCA6B) & 0xFFFFFFFF)) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    values = centre + scale * (2 * (h.astype(np.float64) + 0.5) / 2**32 - 1)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))
