"""Models end to end: 4DS-B on one clip of 16x224x224, the encoder alone and with the depth readout.

Floor: the FLOPs of the matrix products at the measured matmul rate. Peers: the Flax reference under jax.jit (which
like ours runs no layer that nothing reads), in the same dtype and, for bfloat16, in float32 too; and the same torch
model with plain F.scaled_dot_product_attention and F.interpolate, as it is and under torch.compile.
"""

import copy
from unittest import mock

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.convert.scaling4d import table
from fourdperf.models import layers, scaling4d
from fourdperf.models.scaling4d import Config, ReadoutConfig, Scaling4D

CONFIGS = {
    "4DS-B encoder 16x224x224": Config.from_variant("B"),
    "4DS-B depth 16x224x224": Config.from_variant("B", readout=ReadoutConfig.dense()),
}


def cases(device: str):
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = Scaling4D(config).eval().requires_grad_(False)
        arrays = {
            key: part
            for row in table(config)
            for (key, _), part in zip(row.sources, row.unpack(model.state_dict()[row.key].numpy()))
        }
        model.to(device)
        video = torch.rand(1, *config.video_size, config.channels, device=device)
        for dtype in ("float32", "bfloat16"):
            torch.compiler.reset()
            yield _case(name, model, arrays, video, dtype)


def _case(name: str, model: Scaling4D, arrays: dict, video: torch.Tensor, dtype: str) -> Case:
    model, clip = (copy.deepcopy(x).to(getattr(torch, dtype)) for x in (model, video))
    compiled = torch.compile(model)
    providers = {
        "fourdperf": lambda: model(clip),
        "plain torch": lambda: _plain(model, clip),
        "plain torch, compiled": lambda: _plain(compiled, clip),
        "JAX jit": _jax(model.config, arrays, video, dtype),
    }
    if dtype != "float32":
        providers["JAX jit, float32"] = _jax(model.config, arrays, video, "float32")
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    return Case("models", name, dtype, providers, flops=flops(model.config), tolerance=tolerance)


def flops(config: Config) -> int:
    """Of the matrix products of one clip, without the layers that nothing reads."""
    tokens, width = config.num_tokens, config.hidden_size
    index = config.feature_index if config.readout else config.num_layers
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2] * config.channels
    projections = 2 * config.qk_features + 2 * config.v_features
    layer = 2 * tokens * width * (projections + 2 * config.mlp_size)
    layer += 2 * tokens**2 * (config.qk_features + config.v_features)
    total = 2 * tokens * patch * width + max(0, index - 1) * layer
    if config.readout:
        readout, size = config.readout, config.readout.num_params
        queries, keys = readout.num_queries, readout.num_frames * config.grid[1] * config.grid[2]
        total += 4 * keys * width * size + 4 * queries * keys * size
        total += 2 * queries * size * (9 * size + readout.num_classes)
    return total


def _plain(model: torch.nn.Module, video: torch.Tensor) -> torch.Tensor:
    """The model as one would write it: no blocks in the attention, the resize by F.interpolate."""
    with (
        mock.patch.object(layers, "attention", _sdpa),
        mock.patch.object(scaling4d, "attention", _sdpa),
        mock.patch.object(scaling4d, "resize", _interpolate),
    ):
        return model(video)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _interpolate(x: torch.Tensor, sizes: tuple, dims: tuple, method: str) -> torch.Tensor:
    """Along time: the height of an image as wide as space and channels; in fp32, which is what it takes on a CPU."""
    image = x.flatten(2)[:, None].float()
    resized = F.interpolate(image, (*sizes, image.shape[-1]), mode="bicubic", antialias=True)
    return resized[:, 0].unflatten(-1, x.shape[2:]).to(x.dtype)


def _jax(config: Config, arrays: dict, video: torch.Tensor, dtype: str):
    if why_not := jax_why_not(video.device.type, "flax"):
        return why_not
    import jax

    from fourdperf.jax.models import scaling4d as flax4d

    parameters = {}
    for key, array in arrays.items():
        *path, last = key.split("/")
        node = parameters
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jax.numpy.asarray(array, dtype)
    model = flax4d.Scaling4D(config, dtype=jax.numpy.dtype(dtype))
    function = jax.jit(lambda parameters, video: model.apply({"params": parameters}, video))
    clip = jax.numpy.asarray(video.cpu().numpy(), dtype)
    return lambda: function(parameters, clip)
