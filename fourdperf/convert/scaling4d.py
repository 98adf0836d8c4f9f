"""4DS checkpoints: the released `.npz` files (Flax names and layouts) to a checkpoint directory of ours, and back.

A file of the encoder alone has `encoder/...` and `processor/...`; with a readout these lie under `layers_0/`, and the
readout under `layers_2/`. All keys may start with `params/`, as those of the released files do.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from fourdperf.convert.npz import open_npz, write_npz
from fourdperf.convert.table import Row, shape_of
from fourdperf.models.checkpoint import (
    WEIGHTS,
    CheckpointError,
    Entry,
    check_keys,
    read_config,
    read_shapes,
    read_tensor,
    write_checkpoint,
)
from fourdperf.models.scaling4d import MODEL, Config, ReadoutConfig, Scaling4D

ROOT = "params/"


def table(config: Config) -> list[Row]:
    """All rows of a model; source keys without `params/`."""
    if config.readout is None:
        return encoder_table(config)
    return encoder_table(config, "layers_0/") + readout_table(config.readout, config.hidden_size, "layers_2/")


def encoder_table(config: Config, root: str = "") -> list[Row]:
    """Rows of the encoder, whose source keys start with `root`."""
    width, heads, mlp = config.hidden_size, config.num_heads, config.mlp_size
    qk, v = config.qk_features // heads, config.v_features // heads
    rows = [
        *_linear(
            "encoder.tokenizer.patch_embedding.projection",
            {f"{root}encoder/patch_embedding/Conv_0": ((*config.patch_size, config.channels), (width,))},
        ),
        Row(
            "encoder.tokenizer.posenc",
            (*config.grid, width),
            ((f"{root}encoder/posenc/embeddings", _without_leading_ones((*config.grid, width))),),
        ),
    ]
    for index in range(config.num_layers):
        ours, theirs = f"encoder.processor.layers.{index}", f"{root}processor/layers_{index}"
        rows += [
            *_norm(f"{ours}.attention_norm", f"{theirs}/attention_norm", width),
            *_linear(
                f"{ours}.attention.qkv",
                {
                    f"{theirs}/attention/query": ((width,), (heads, qk)),
                    f"{theirs}/attention/key": ((width,), (heads, qk)),
                    f"{theirs}/attention/value": ((width,), (heads, v)),
                },
            ),
            *_linear(f"{ours}.attention.out", {f"{theirs}/attention/out": ((heads, v), (width,))}),
            *_norm(f"{ours}.mlp_norm", f"{theirs}/mlp_norm", width),
            *_linear(f"{ours}.mlp.dense_in", {f"{theirs}/mlp/dense_in": ((width,), (mlp,))}),
            *_linear(f"{ours}.mlp.dense_out", {f"{theirs}/mlp/dense_out": ((mlp,), (width,))}),
        ]
    return rows


def readout_table(readout: ReadoutConfig, features: int, root: str = "") -> list[Row]:
    """Rows of a readout on features of that width, whose source keys start with `root`."""
    width, vjepa = readout.num_params, readout.match_vjepa_implementation
    heads = (readout.num_heads, width // readout.num_heads)
    # Flax numbers unnamed layers in the order of their calls, and each option adds or removes one.
    dense = (f"{root}Dense_{index}" for index in range(3))
    rows = []
    if vjepa:
        rows += _norm("readout.norm", f"{root}LayerNorm_0", features)
    if readout.add_temporal_posenc:
        shape = (readout.num_frames, 1, features)
        source = (f"{root}temporal_posenc/embeddings", _without_leading_ones(shape))
        rows.append(Row("readout.temporal_posenc", shape, (source,)))
    if readout.query_features is None:
        rows.append(
            Row("readout.query", (readout.num_queries, width), ((f"{root}query", (readout.num_queries, *heads)),))
        )
    else:
        rows += _linear("readout.query_projection", {next(dense): ((readout.query_features,), (width,))})
    rows += _linear(
        "readout.key_value",
        {f"{root}key_embedding": ((features,), heads), f"{root}value_embedding": ((features,), heads)},
        bias=vjepa,
    )
    if vjepa:
        rows += [
            *_linear("readout.out", {next(dense): ((width,), (width,))}),
            *_norm("readout.mlp_norm", f"{root}LayerNorm_1", width),
            *_linear("readout.mlp.dense_in", {f"{root}MLP_0/Dense_0": ((width,), (4 * width,))}),
            *_linear("readout.mlp.dense_out", {f"{root}MLP_0/Dense_1": ((4 * width,), (width,))}),
        ]
    return rows + _linear("readout.head", {next(dense): ((width,), (readout.num_classes,))})


def _linear(ours: str, theirs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], bias: bool = True) -> list[Row]:
    """A linear layer of ours from one or more Flax layers: name -> (shape of the input axes, of the output axes)."""
    inputs = math.prod(next(iter(theirs.values()))[0])
    outputs = sum(math.prod(shape) for _, shape in theirs.values())
    kernels = tuple((f"{name}/kernel", into + out) for name, (into, out) in theirs.items())
    rows = [Row(f"{ours}.weight", (outputs, inputs), kernels, transpose=True)]
    if bias:
        rows.append(Row(f"{ours}.bias", (outputs,), tuple((f"{name}/bias", out) for name, (_, out) in theirs.items())))
    return rows


def _norm(ours: str, theirs: str, width: int) -> list[Row]:
    return [
        Row(f"{ours}.weight", (width,), ((f"{theirs}/scale", (width,)),)),
        Row(f"{ours}.bias", (width,), ((f"{theirs}/bias", (width,)),)),
    ]


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that Kauldron gives a learned embedding."""
    first = next((i for i, size in enumerate(shape[:-1]) if size > 1), len(shape) - 1)
    return shape[first:]


def infer_config(shapes: Mapping[str, tuple[int, ...]], overrides: Mapping | None = None) -> Config:
    """The config of a checkpoint, from the names and shapes of its arrays (with or without `params/`).

    What no array shows has a default, and `overrides` (fields of Config; "readout" may hold a dictionary of some
    fields) replaces it: video_size (grid x patch), n_iter (1), block (pre_norm), readout.depth (0.95),
    readout.num_test_clips (1), readout.num_frames where there is no temporal embedding (the frames of the video), and
    output_shape with decoding_patch_size. The latter two are filled in when the learned queries cover a one-channel
    video of the encoder's size with patches as long as the encoder's and square in space, as in the released depth
    model; else the readout returns its queries' outputs undecoded.
    """
    shapes = {name.removeprefix(ROOT): tuple(shape) for name, shape in shapes.items()}
    overrides = dict(overrides or {})
    readout = any(name.startswith("layers_2/") for name in shapes)
    root = "layers_0/" if readout else ""
    *patch, channels, width = shape_of(shapes, f"{root}encoder/patch_embedding/Conv_0/kernel", 5)
    grid = shape_of(shapes, f"{root}encoder/posenc/embeddings", 1, 2, 3, 4)[:-1]
    grid = (1,) * (3 - len(grid)) + grid
    block = f"{root}processor/layers_0"
    _, heads, qk = shape_of(shapes, f"{block}/attention/query/kernel", 3)
    indices = {int(m[1]) for m in (re.match(rf"{root}processor/layers_(\d+)/", name) for name in shapes) if m}
    fields = {
        "hidden_size": width,
        "num_layers": max(indices) + 1,
        "num_heads": heads,
        "mlp_size": shape_of(shapes, f"{block}/mlp/dense_in/kernel", 2)[1],
        "patch_size": tuple(patch),
        "video_size": tuple(size * p for size, p in zip(grid, patch)),
        "channels": channels,
        "qk_features": heads * qk,
        "v_features": heads * shape_of(shapes, f"{block}/attention/value/kernel", 3)[2],
    }
    given = overrides.pop("readout", None)
    fields |= overrides
    if readout:
        fields["readout"] = {**_infer_readout(shapes, fields, given or {}), **(given or {})}
    elif given:
        raise CheckpointError("readout: given, but the checkpoint has no arrays under layers_2/")
    return Config.from_dict(fields)


def _infer_readout(shapes: Mapping[str, tuple[int, ...]], encoder: Mapping, given: Mapping) -> dict:
    root = "layers_2/"
    features, heads, size = shape_of(shapes, f"{root}key_embedding/kernel", 3)
    width = heads * size
    vjepa, learned = f"{root}key_embedding/bias" in shapes, f"{root}query" in shapes
    posenc = f"{root}temporal_posenc/embeddings" in shapes
    frames = encoder["video_size"][0]
    if posenc:
        shape = shape_of(shapes, f"{root}temporal_posenc/embeddings", 1, 3)
        frames = shape[0] if len(shape) == 3 else 1
    head = f"{root}Dense_{vjepa + (not learned)}/kernel"
    fields = {
        "num_classes": shape_of(shapes, head, 2)[1],
        "num_params": width,
        "num_heads": heads,
        "num_frames": frames,
        "match_vjepa_implementation": vjepa,
        "add_temporal_posenc": posenc,
    }
    if not learned:
        return fields | {"query_features": shape_of(shapes, f"{root}Dense_0/kernel", 2)[0]}
    fields["num_queries"] = shape_of(shapes, f"{root}query", 3)[0]
    if "output_shape" not in given:
        fields |= _infer_patches(fields, (frames, *encoder["video_size"][1:]), encoder["patch_size"][0])
    return fields


def _infer_patches(readout: Mapping, video: tuple[int, int, int], frames: int) -> dict:
    """output_shape and decoding_patch_size, where the queries fit a video of one channel; else nothing."""
    side = math.isqrt(readout["num_classes"] // frames)
    patch = (frames, side, side)
    fits = math.prod(patch) == readout["num_classes"] and all(size % p == 0 for size, p in zip(video, patch))
    if not fits or readout["num_queries"] * readout["num_classes"] != math.prod(video):
        return {}
    return {"output_shape": (*video, 1), "decoding_patch_size": patch}


def read_npz(npz_path: str | os.PathLike, overrides: Mapping | None, receive) -> Config:
    """Check a released `.npz` and pass its config, entries and an iterator over its tensors to `receive`."""
    with open_npz(npz_path) as npz:
        names = {name.removeprefix(ROOT): name for name in npz.shapes}
        if len(names) != len(npz.shapes):
            raise CheckpointError(f"{npz_path}: some keys are there with {ROOT} and without")
        shapes = {name: npz.shapes[source] for name, source in names.items()}
        try:
            config = infer_config(shapes, overrides)
        except ValueError as error:
            raise CheckpointError(f"{npz_path}: {error}") from error
        rows = table(config)
        check_keys(str(npz_path), {name: shape for row in rows for name, shape in row.sources}, shapes)

        entries = [Entry(row.key, _torch_dtype(npz.dtypes[names[row.sources[0][0]]]), row.shape) for row in rows]

        def tensors() -> Iterator[torch.Tensor]:
            for row, entry in zip(rows, entries):
                array = row.pack([npz.read(names[name]) for name, _ in row.sources])
                yield torch.from_numpy(np.ascontiguousarray(array)).to(entry.dtype)

        receive(config, entries, tensors())
    return config


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}[dtype.name]


def convert(npz_path: str | os.PathLike, out_dir: str | os.PathLike, *, overrides: Mapping | None = None) -> Config:
    """Convert a released `.npz` to a directory for `Scaling4D.from_pretrained`; returns the config.

    Streams: one array at a time is in memory. Raises CheckpointError (a ValueError) that names the file and every key
    that is missing, unknown or misshapen; OSError for a missing file or a full disk. Nothing half-written stays.
    """
    return read_npz(
        npz_path,
        overrides,
        lambda config, entries, tensors: write_checkpoint(out_dir, MODEL, config.to_dict(), entries, tensors),
    )


def export(directory: str | os.PathLike, npz_path: str | os.PathLike) -> None:
    """The inverse of `convert`: the `.npz` that upstream's code reads. bfloat16 becomes float32, without loss."""
    rows = table(Config.from_dict(read_config(directory, MODEL)))
    file = Path(directory) / WEIGHTS
    check_keys(str(file), {row.key: row.shape for row in rows}, read_shapes(file))

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for row in rows:
            tensor = read_tensor(file, row.key)
            parts = row.unpack((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
            yield from ((ROOT + name, part) for (name, _), part in zip(row.sources, parts))

    write_npz(npz_path, arrays())


def load_npz(
    npz_path: str | os.PathLike,
    *,
    overrides: Mapping | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Scaling4D:
    """A model straight from a released `.npz`, in eval mode; errors as in `convert`."""
    models = []

    def receive(config: Config, entries: list[Entry], tensors: Iterator[torch.Tensor]) -> None:
        with torch.device("meta"):
            model = Scaling4D(config)
        state = {entry.name: tensor.to(device=device, dtype=dtype) for entry, tensor in zip(entries, tensors)}
        model.load_state_dict(state, assign=True)
        models.append(model.eval())

    read_npz(npz_path, overrides, receive)
    return models[0]
