"""Flax models that read the directories of the PyTorch class of their name, whose parameters have the same names here,
in Flax's layouts."""

import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from jax import Array

from fourdperf.convert.flax_tree import nested
from fourdperf.jax.models.layers import read_pretrained


class Pretrained:
    """Reads the directories that the PyTorch class TORCH writes."""

    TORCH: type

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> tuple[nn.Module, dict]:
        """The model of a directory, and its variables in fp32.

        Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
        """
        config, state = read_pretrained(path, cls.TORCH.MODEL, cls.TORCH.CONFIG, cls.TORCH)
        return cls(config), {"params": flax_params(state)}


def flax_params(state: Mapping[str, torch.Tensor]) -> dict:
    """A PyTorch model's tensors, by name, as the tree of parameters of the class of its name here, fp32."""
    return nested({flax_name(key, x.ndim): flax_array(key, x) for key, x in state.items()})


def flax_name(key: str, axes: int) -> str:
    """blocks.0.attention.qkv.weight -> blocks_0/attention/qkv/kernel."""
    *path, name = key.split(".")
    if name == "weight":
        name = "scale" if axes == 1 else "kernel"
    found = []
    for part in path:
        if part.isdigit():
            found[-1] += f"_{part}"
        else:
            found.append(part)
    return "/".join([*found, name])


def flax_array(key: str, x: torch.Tensor) -> Array:
    """Kernels (out, in) to (in, out), and (out, in, h, w) to (h, w, in, out); the rest stays."""
    array = x.detach().float().cpu().numpy()
    if key.endswith(".weight") and array.ndim > 1:
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return jnp.asarray(np.ascontiguousarray(array))
