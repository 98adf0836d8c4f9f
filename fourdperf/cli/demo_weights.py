"""Weights for the demo, as no released ones can be downloaded: a small 4DS depth model in the released .npz layout.

Names and shapes are those of the Flax reference. The encoder is random, and random patch projections already tell sky
from roof from petal. For the depth readout to show more than noise, three things are not random:

- 30 of the features carry the position of their token and nothing else, as sines and cosines along time, height, width;
- the readout's queries and keys look at these alone, so that each query sees the tokens around its own pixels;
- the readout's last layer is a least-squares fit to the depth that the demo clip was rendered with.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fourdperf.convert.npz import write_npz
from fourdperf.data.demo_clip import demo_clip
from fourdperf.jax.models.scaling4d import Scaling4D
from fourdperf.models.scaling4d import Config, ReadoutConfig

__all__ = ["write_demo_checkpoint"]

CONFIG = Config.from_variant("Ti", readout=ReadoutConfig.dense(num_params=128, num_heads=4))
FREQUENCIES = np.array([0.5, 1.25, 2.0, 3.0, 4.25])
AXIS = 2 * len(FREQUENCIES)
POSITION = 3 * AXIS

GREY = 0.45
BLOCK_GAIN = 0.4
SPATIAL_AMPLITUDE = 0.3
TEMPORAL_AMPLITUDE = 0.4
KEY_GAIN = 20.0
RIDGE = 1e-3

Arrays = dict[str, np.ndarray]


def write_demo_checkpoint(path: Path, seed: int = 0) -> None:
    """Writes the checkpoint to ``path``; the same seed gives the same file.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = _random(seed)
    _place_positions(arrays)
    _fit_depth(arrays)
    write_npz(path, ((f"params/{name}", array) for name, array in arrays.items()))


def _random(seed: int) -> Arrays:
    """Normal kernels over the square root of their fan-in; biases and norms a little off their usual start, so that a
    converter that drops one is found out."""
    video = jnp.zeros((1, *CONFIG.video_size, CONFIG.channels))
    shapes = jax.eval_shape(Scaling4D(CONFIG).init, jax.random.key(0), video)["params"]
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, leaf in flatten_dict(shapes, sep="/").items():
        *_, layer, kind = name.split("/")
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if kind == "kernel":
            splits_heads = layer in ("query", "key", "value", "key_embedding", "value_embedding")
            fan_in = leaf.shape[0] if splits_heads else np.prod(leaf.shape[:-1])
            arrays[name] = noise / np.float32(np.sqrt(fan_in))
        else:
            arrays[name] = np.float32(kind == "scale") + np.float32(0.02) * noise
    return arrays


def _place_positions(arrays: Arrays) -> None:
    """Reserves the first POSITION features for the token's position, and aims the readout's queries by them."""
    _, height, width = CONFIG.grid
    patches = arrays["layers_0/encoder/patch_embedding/Conv_0/kernel"]
    patches[..., :POSITION] = 0
    # A grey video gives tokens near zero, so that what differs between patches stands out.
    arrays["layers_0/encoder/patch_embedding/Conv_0/bias"] = -GREY * patches.sum((0, 1, 2, 3))
    for name, array in arrays.items():
        if name.startswith("layers_0/processor/") and name.split("/")[-2] in ("out", "dense_out"):
            array *= BLOCK_GAIN
            array[..., :POSITION] = 0

    code = arrays["layers_0/encoder/posenc/embeddings"]
    code[..., :POSITION] = 0
    code[..., AXIS : 2 * AXIS] = SPATIAL_AMPLITUDE * _code(height)[:, None]
    code[..., 2 * AXIS : POSITION] = SPATIAL_AMPLITUDE * _code(width)
    times = arrays["layers_2/temporal_posenc/embeddings"]
    times[..., :AXIS] = TEMPORAL_AMPLITUDE * _code(len(times))[:, None]

    key = arrays["layers_2/key_embedding/kernel"]
    key[:] = 0
    key[np.arange(POSITION), :, np.arange(POSITION)] = KEY_GAIN
    arrays["layers_2/value_embedding/kernel"][:POSITION] = 0
    t, h, w = CONFIG.readout.num_patches
    query = np.zeros((t, h, w, 1, POSITION), np.float32)
    query[..., :AXIS] = _code(t)[:, None, None, None]
    query[..., AXIS : 2 * AXIS] = _code(h)[:, None, None]
    query[..., 2 * AXIS :] = _code(w)[:, None]
    arrays["layers_2/query"][:, :, :POSITION] = query.reshape(-1, 1, POSITION)


def _code(length: int) -> np.ndarray:
    """Cosines and sines, float32 (length, AXIS), at the centres of ``length`` cells that divide the unit interval."""
    angles = 2 * np.pi * FREQUENCIES * ((np.arange(length) + 0.5) / length)[:, None]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _fit_depth(arrays: Arrays) -> None:
    """Ridge regression of the readout's last layer on the demo clip."""
    readout = CONFIG.readout
    size = readout.num_params
    undecoded = dataclasses.replace(readout, num_classes=size, output_shape=None, decoding_patch_size=None)
    model = Scaling4D(dataclasses.replace(CONFIG, readout=undecoded))
    kernel, bias = "layers_2/Dense_1/kernel", "layers_2/Dense_1/bias"
    identity = {kernel: np.eye(size, dtype=np.float32), bias: np.zeros(size, np.float32)}
    variables = {"params": unflatten_dict(arrays | identity, sep="/")}
    forward = jax.jit(model.apply)

    length, *shape = CONFIG.video_size
    video, depth = demo_clip(3 * length, *shape)
    clips = (video.astype(np.float32) / 255).reshape(-1, 1, length, *shape, CONFIG.channels)
    x = np.concatenate([np.asarray(forward(variables, clip))[0] for clip in clips]).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)

    a, b, c = readout.decoding_patch_size
    t, h, w = readout.num_patches
    y = depth.reshape(-1, t, a, h, b, w, c).transpose(0, 1, 3, 5, 2, 4, 6).reshape(len(x), -1).astype(np.float64)
    solution = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(size + 1), x.T @ y).astype(np.float32)
    arrays[kernel], arrays[bias] = solution[:-1], solution[-1]
