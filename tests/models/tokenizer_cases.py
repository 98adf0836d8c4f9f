"""The reference numbers in tests/goldens/tokenizer (format: README there) as models, inputs, outputs."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import goldens

GOLDENS = goldens.GOLDENS / "tokenizer"
# The three largest files are not in the repository; where the goldens' own folder is beside it, they are tested too.
SHARED = Path(__file__).parents[3] / "shared" / "goldens" / "tokenizer"
names = functools.partial(goldens.names, GOLDENS)

# Small live models
SEED = {
    **{"image_size": (16, 24), "patch_size": 8, "num_latents": 5, "latent_channels": 4, "hidden_size": 24},
    **{
        "num_layers": 2,
        "num_heads": 3,
        "mlp_size": 40,
        "codebook_size": 20,
        "decoder_size": 16,
        "decoder_channels": 32,
    },
    **{"channel_multipliers": (1, 2), "res_blocks": 1, "attention_sizes": (8,)},
}
TITOK = {
    **{"image_size": (16, 24), "patch_size": 8, "num_latents": 5, "latent_channels": 4, "codebook_size": 20},
    **{"hidden_size": 24, "num_layers": 2, "num_heads": 3, "decoder_size": 16, "decoder_layers": 2, "decoder_heads": 2},
}
PIXELS = {"channels": 32, "channel_multipliers": (1, 2), "res_blocks": 1, "latent_channels": 6, "codebook_size": 12}
TOKENS = {
    **{"codebook_size": 11, "num_tokens": 6, "num_classes": 3, "hidden_size": 24, "num_layers": 4, "num_heads": 3},
    **{"mlp_size": 40, "steps": 4, "temperature": 2.0},
}


def keys(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a real configuration's tensors."""
    listed = json.loads((GOLDENS / f"keys_{name}.json").read_text())["keys"]
    return {key: tuple(entry["shape"]) for key, entry in listed.items()}


class Case(goldens.Golden):
    """One golden file; recipes are filled in."""

    def __init__(self, name: str):
        path = next((x for x in (GOLDENS / f"{name}.npz", SHARED / f"{name}.npz") if x.exists()), None)
        if path is None:
            pytest.skip(f"{name}.npz is not in the repository")
        super().__init__(path)
        if "recipe" in self.spec:
            recipe, prefix = self.spec["recipe"], self.spec.get("recipe_prefix", "")
            for key, entry in recipe["entries"].items():
                self.params[prefix + key] = recipe_tensor(key, *entry, recipe["seed"])

    def check(self, name: str, got: Tensor, where: str = "out") -> None:
        """`got` against out/.. or grad/..; integers exactly, the others to the README's tolerance."""
        want = (self.outputs if where == "out" else self.grads)[name]
        assert tuple(got.shape) == tuple(want.shape), (name, tuple(got.shape), tuple(want.shape))
        if not want.is_floating_point():
            assert torch.equal(got, want), name
            return
        error, allowed = (got.detach() - want).abs().max().item(), self.spec["atol"][f"{where}/{name}"]
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def recipe_tensor(key: str, shape: list[int], center: float, scale: float, seed: int) -> Tensor:
    """A tensor of the README's recipe."""
    mask = 0xFFFFFFFF
    start = (zlib.crc32(key.encode()) + seed * 0x85EBCA6B) & mask
    h = np.arange(int(np.prod(shape)), dtype=np.uint32)
    h *= np.uint32(0x9E3779B1)
    h += np.uint32(start)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    value = h.astype(np.float64)
    value += 0.5
    value *= 2 / 2**32
    value -= 1
    value *= scale
    value += center
    return torch.from_numpy(value.astype(np.float32).reshape(shape))


def first(x: Tensor) -> Tensor:
    """Upstream's latents `(B, C, 1, N)` as ours `(B, N, C)`, and pictures `(B, C, H, W)` as `(B, H, W, C)`."""
    return x.squeeze(2).transpose(1, 2) if x.shape[2] == 1 else x.permute(0, 2, 3, 1)


def last(x: Tensor) -> Tensor:
    """The inverse of `first`."""
    return x.transpose(1, 2).unsqueeze(2) if x.ndim == 3 else x.permute(0, 3, 1, 2)
