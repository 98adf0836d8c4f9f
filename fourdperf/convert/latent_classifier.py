"""Latent classifiers as parameter trees of Flax, in the seed's names and layouts, to a checkpoint directory and back.

The seed is the unofficial JAX implementation of "Spatial Functa". It has an MLP (`Dense_0` ..) and a transformer
(`cls_token`, `transformer_0/attn/query` ..); the ResNet (`stem`, `blocks_0` ..) has the names of
fourdperf.jax.models.latent_classifier, which names the other two as the seed does.
"""

import math
import re
from collections.abc import Mapping

from fourdperf.convert.flax_tree import SUFFIXES, TreeFormat
from fourdperf.convert.table import ConvRow, Row, shape_of
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.config import check_int
from fourdperf.models.latent_classifier import MODEL, Config, LatentClassifier

__all__ = ["MODEL", "SUFFIXES", "convert", "export", "infer_config", "load", "load_tree", "table"]


def table(config: Config) -> list[Row]:
    """All rows of a classifier."""
    return {"mlp": _mlp, "transformer": _transformer, "resnet": _resnet}[config.kind](config)


def _mlp(c: Config) -> list[Row]:
    sizes = [c.latent_size**2 * c.latent_channels, *[c.hidden_size] * c.num_layers]
    rows = []
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        rows += _linear(f"body.layers.{index}", f"Dense_{index}", inputs, outputs)
    return rows + _linear("head", f"Dense_{c.num_layers}", c.hidden_size, c.num_classes)


def _transformer(c: Config) -> list[Row]:
    width, tokens, heads = c.hidden_size, 1 + c.latent_size**2, (c.num_heads, c.hidden_size // c.num_heads)
    rows = [
        *_linear("body.embedding", "input_layer", c.latent_channels, width),
        Row("body.class_token", (width,), (("cls_token", (1, width)),)),
        Row("body.positions", (tokens, width), (("pos_embedding", (tokens, width)),)),
    ]
    for index in range(c.num_layers):
        ours, theirs = f"body.blocks.{index}", f"transformer_{index}"
        parts = [f"{theirs}/attn/{name}" for name in ("query", "key", "value")]
        rows += [
            *_norm(f"{ours}.attention_norm", f"{theirs}/layer_norm_1", width),
            Row(
                f"{ours}.attention.qkv.weight",
                (3 * width, width),
                tuple((f"{part}/kernel", (width, *heads)) for part in parts),
                transpose=True,
            ),
            Row(f"{ours}.attention.qkv.bias", (3 * width,), tuple((f"{part}/bias", heads) for part in parts)),
            Row(
                f"{ours}.attention.out.weight",
                (width, width),
                ((f"{theirs}/attn/out/kernel", (*heads, width)),),
                transpose=True,
            ),
            Row(f"{ours}.attention.out.bias", (width,), ((f"{theirs}/attn/out/bias", (width,)),)),
            *_norm(f"{ours}.mlp_norm", f"{theirs}/layer_norm_2", width),
            *_linear(f"{ours}.mlp.dense_in", f"{theirs}/linear_0", width, c.mlp_size),
            *_linear(f"{ours}.mlp.dense_out", f"{theirs}/linear_3", c.mlp_size, width),
        ]
    return [
        *rows,
        *_norm("body.norm", "mlp_head/layers_0", width),
        *_linear("head", "mlp_head/layers_1", width, c.num_classes),
    ]


def _resnet(c: Config) -> list[Row]:
    width = c.hidden_size
    rows = _conv("body.stem", "stem", c.latent_channels, width)
    for index in range(c.num_layers):
        ours, theirs = f"body.blocks.{index}", f"blocks_{index}"
        for name in ("in", "out"):
            rows += _norm(f"{ours}.norm_{name}", f"{theirs}/norm_{name}", width)
            rows += _conv(f"{ours}.conv_{name}", f"{theirs}/conv_{name}", width, width)
    return [*rows, *_norm("body.norm", "norm", width), *_linear("head", "head", width, c.num_classes)]


def _linear(ours: str, theirs: str, inputs: int, outputs: int) -> list[Row]:
    return [
        Row(f"{ours}.weight", (outputs, inputs), ((f"{theirs}/kernel", (inputs, outputs)),), transpose=True),
        Row(f"{ours}.bias", (outputs,), ((f"{theirs}/bias", (outputs,)),)),
    ]


def _conv(ours: str, theirs: str, inputs: int, outputs: int) -> list[Row]:
    return [
        ConvRow(f"{ours}.weight", (outputs, inputs, 3, 3), ((f"{theirs}/kernel", (3, 3, inputs, outputs)),)),
        Row(f"{ours}.bias", (outputs,), ((f"{theirs}/bias", (outputs,)),)),
    ]


def _norm(ours: str, theirs: str, width: int) -> list[Row]:
    return [
        Row(f"{ours}.weight", (width,), ((f"{theirs}/scale", (width,)),)),
        Row(f"{ours}.bias", (width,), ((f"{theirs}/bias", (width,)),)),
    ]


def infer_config(shapes: Mapping[str, tuple[int, ...]], overrides: Mapping | None = None) -> Config:
    """The config of a tree, from the names and shapes of its arrays; `overrides`, fields of Config, replace these.

    No array shows `normalizing_factor` (1) nor `dropout` (0), `latent_size` of an MLP (1, with all numbers as channels)
    and of a ResNet, which takes any.
    """
    overrides = dict(overrides or {})
    if "cls_token" in shapes:
        channels, width = shape_of(shapes, "input_layer/kernel", 2)
        tokens = shape_of(shapes, "pos_embedding", 2)[0] - 1
        size = math.isqrt(max(tokens, 0))
        if size**2 != tokens or not tokens:
            raise CheckpointError(f"pos_embedding: expected 1 + s s positions, got {1 + tokens}")
        fields = {
            "kind": "transformer",
            "latent_size": size,
            "latent_channels": channels,
            "num_classes": shape_of(shapes, "mlp_head/layers_1/kernel", 2)[1],
            "hidden_size": width,
            "num_layers": _count(shapes, "transformer_"),
            "num_heads": shape_of(shapes, "transformer_0/attn/query/kernel", 3)[1],
            "mlp_size": shape_of(shapes, "transformer_0/linear_0/kernel", 2)[1],
        }
    elif "stem/kernel" in shapes:
        *_, channels, width = shape_of(shapes, "stem/kernel", 4)
        fields = {
            "kind": "resnet",
            "latent_channels": channels,
            "num_classes": shape_of(shapes, "head/kernel", 2)[1],
            "hidden_size": width,
            "num_layers": _count(shapes, "blocks_"),
        }
    elif "Dense_0/kernel" in shapes:
        layers, size = _count(shapes, "Dense_") - 1, overrides.get("latent_size", 1)
        check_int("latent_size", size)
        inputs, width = shape_of(shapes, "Dense_0/kernel", 2)
        fields = {
            "kind": "mlp",
            "latent_size": size,
            "latent_channels": inputs // size**2,
            "num_classes": shape_of(shapes, f"Dense_{layers}/kernel", 2)[1],
            "hidden_size": width,
            "num_layers": layers,
        }
    else:
        raise CheckpointError(
            "missing cls_token (a transformer's), Dense_0/kernel (an MLP's) or stem/kernel (a ResNet's)"
        )
    return Config.from_dict({**fields, **overrides})


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    matches = (re.match(rf"{prefix}(\d+)/", name) for name in shapes)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


FORMAT = TreeFormat(MODEL, Config, LatentClassifier, table, infer_config)
load_tree, load, convert, export = FORMAT.load_tree, FORMAT.load, FORMAT.convert, FORMAT.export
