"""D4RT checkpoints of the seed (the public port called "d4rt") to a checkpoint directory of ours, and back.

Read are its `.pth` state dictionaries and the `.ckpt` files of its Lightning module, whose names start with `model.`.
The result computes what the port computes: `Config.seed` names every choice of the port that is not ours.
"""

import io
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from fourdperf.convert.state import read_state, without_prefix
from fourdperf.convert.table import shape_of
from fourdperf.data.files import write_bytes
from fourdperf.models.checkpoint import CheckpointError, check_keys, load_weights, read_config
from fourdperf.models.d4rt import D4RT, MODEL, Config
from fourdperf.ops import linear_range

SUFFIXES = (".pth", ".ckpt", ".safetensors")
# What the port leaves no choice in.
FIXED = (
    *("positions", "window_border", "centered", "norm_eps", "gelu", "patch_norm", "aspect_token"),
    *("drop_last_frames", "fourier", "rgb_sampling", "rgb_embedding"),
)
LIGHTNING = "2.0.0"  # whose checkpoint format a .ckpt has; Lightning opens none without a version
SLOTS = 50  # temporal positions of every model of the port
# A table that the port makes and never reads, and a buffer that follows from its length.
UNUSED = "encoder.pos_embed"
FREQUENCIES = "query_builder.fourier_embed.freq_bands"
FOURIER = "query_builder.fourier_embed.proj.weight"
TEMPORAL, SPATIAL = "encoder.temporal_pos_embed", "encoder.spatial_pos_embed"
SOURCES = "query_builder.t_src_embed.weight"
TIMES = ("t_src", "t_tgt", "t_cam")


class Rule(NamedTuple):
    """One tensor of ours: the name and shape of the source's, and how ours is made of it.

    Without a source, ours is zeros of that shape: the bias that the port's local attention lacks. `make` only moves or
    drops elements, so that it says by itself how to go back (`exported`).
    """

    key: str
    source: str | None
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = torch.clone


def table(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """All rules of a model; `shapes` (of the source) says what the config does not: lengths of tables, biases there."""
    return encoder_table(config, shapes) + query_table(config, shapes) + decoder_table(config)


def encoder_table(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    width, (frames, *space), (t, h, w) = config.hidden_size, config.grid, config.patch_size
    embed = "encoder.tokenizer"
    rules = [
        Rule(f"{embed}.aspect.token", "encoder.aspect_ratio_token", (1, 1, width), lambda x: x[0, 0]),
        Rule(f"{embed}.temporal", TEMPORAL, shape_of(shapes, TEMPORAL, 3), lambda x: x[0, :frames]),
        Rule(f"{embed}.spatial", SPATIAL, (1, math.prod(space), width), lambda x: x[0].unflatten(0, space)),
        Rule(
            f"{embed}.patch_embedding.projection.weight",
            "encoder.patch_embed.proj.weight",
            (width, 3, t, h, w),
            lambda x: x.permute(0, 2, 3, 4, 1).flatten(1),
        ),
        Rule(f"{embed}.patch_embedding.projection.bias", "encoder.patch_embed.proj.bias", (width,)),
        *_norm(f"{embed}.norm", "encoder.patch_embed.norm", width),
    ]
    for index in range(config.num_layers):
        rules += block_table(config, f"encoder.layers.{index}", f"encoder.blocks.{index}", shapes)
    return rules + _norm("encoder.norm", "encoder.norm", width)


def block_table(config: Config, ours: str, theirs: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """One encoder block: local attention is called `attn.qkv` there, global attention is torch's, under `attn.attn`."""
    width, qkv = config.hidden_size, f"{ours}.attention.qkv"
    if f"{theirs}.attn.qkv.weight" in shapes:
        bias = f"{theirs}.attn.qkv.bias"
        rules = [
            Rule(f"{qkv}.weight", f"{theirs}.attn.qkv.weight", (3 * width, width)),
            Rule(f"{qkv}.bias", bias if bias in shapes else None, (3 * width,)),
            *_linear(f"{ours}.attention.out", f"{theirs}.attn.proj", width, width),
        ]
    else:
        rules = [
            Rule(f"{qkv}.weight", f"{theirs}.attn.attn.in_proj_weight", (3 * width, width)),
            Rule(f"{qkv}.bias", f"{theirs}.attn.attn.in_proj_bias", (3 * width,)),
            *_linear(f"{ours}.attention.out", f"{theirs}.attn.attn.out_proj", width, width),
        ]
    return [
        *rules,
        *_norm(f"{ours}.attention_norm", f"{theirs}.norm1", width),
        *_norm(f"{ours}.mlp_norm", f"{theirs}.norm2", width),
        *_linear(f"{ours}.mlp.dense_in", f"{theirs}.mlp.0", width, config.mlp_size),
        *_linear(f"{ours}.mlp.dense_out", f"{theirs}.mlp.3", config.mlp_size, width),
    ]


def query_table(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    fourier, time, rgb = config.query_parts
    ours, theirs, size = "query_builder", "query_builder", config.rgb_size
    frames = shape_of(shapes, SOURCES, 2)[0]
    times = [
        Rule(f"{ours}.{name}.weight", f"{theirs}.{name}_embed.weight", (frames, time), lambda x: x[: config.num_frames])
        for name in TIMES
    ]
    return [
        *_linear(f"{ours}.fourier", f"{theirs}.fourier_embed.proj", 4 * config.num_bands, fourier),
        *times,
        Rule(f"{ours}.rgb.conv.weight", f"{theirs}.patch_embed.conv.0.weight", (64, 3, 3, 3)),
        Rule(f"{ours}.rgb.conv.bias", f"{theirs}.patch_embed.conv.0.bias", (64,)),
        Rule(
            f"{ours}.rgb.dense.weight",
            f"{theirs}.patch_embed.conv.2.weight",
            (rgb, 64, size, size),
            lambda x: x.flatten(1),
        ),
        Rule(f"{ours}.rgb.dense.bias", f"{theirs}.patch_embed.conv.2.bias", (rgb,)),
        *_linear(f"{ours}.projection", f"{theirs}.query_proj", fourier + 3 * time + rgb, config.decoder_size),
    ]


def decoder_table(config: Config) -> list[Rule]:
    width, mlp = config.decoder_size, config.decoder_mlp_size
    rules = _linear("memory_projection", "encoder_proj", config.hidden_size, width) if config.project_memory else []
    for index in range(config.decoder_layers):
        rules += cross_table(f"decoder.blocks.{index}", f"decoder.layers.{index}", width, mlp)
    return [
        *rules,
        *_norm("decoder.norm", "decoder.norm", width),
        *_linear("head", "decoder.output_proj", width, 13),
    ]


def cross_table(ours: str, theirs: str, width: int, mlp: int) -> list[Rule]:
    """One decoder block, whose fused projection becomes three: keys and values are prepared apart from queries."""
    rules = []
    for part, name in enumerate(("query", "key", "value")):
        take = lambda x, part=part: x.chunk(3)[part]
        rules += [
            Rule(f"{ours}.attention.{name}.weight", f"{theirs}.cross_attn.in_proj_weight", (3 * width, width), take),
            Rule(f"{ours}.attention.{name}.bias", f"{theirs}.cross_attn.in_proj_bias", (3 * width,), take),
        ]
    return [
        *rules,
        *_linear(f"{ours}.attention.out", f"{theirs}.cross_attn.out_proj", width, width),
        *_norm(f"{ours}.attention_norm", f"{theirs}.norm1", width),
        *_norm(f"{ours}.mlp_norm", f"{theirs}.norm2", width),
        *_linear(f"{ours}.mlp.dense_in", f"{theirs}.ffn.0", width, mlp),
        *_linear(f"{ours}.mlp.dense_out", f"{theirs}.ffn.3", mlp, width),
    ]


def _linear(ours: str, theirs: str, inputs: int, outputs: int) -> list[Rule]:
    return [
        Rule(f"{ours}.weight", f"{theirs}.weight", (outputs, inputs)),
        Rule(f"{ours}.bias", f"{theirs}.bias", (outputs,)),
    ]


def _norm(ours: str, theirs: str, width: int) -> list[Rule]:
    return [Rule(f"{ours}.{kind}", f"{theirs}.{kind}", (width,)) for kind in ("weight", "bias")]


def infer_config(shapes: Mapping[str, tuple[int, ...]], overrides: Mapping | None = None) -> Config:
    """The config of a state dictionary of the port, from the names and shapes of its tensors.

    No tensor shows the heads (64 channels each where that fits, as in the port's defaults), the height and width of the
    frames (a square), nor the window of local attention (7): `overrides`, fields of Config, replace these. The longest
    clip is what both the port's tables, 50 temporal patches and one embedding per frame, allow.
    """
    width, _, *patch = shape_of(shapes, "encoder.patch_embed.proj.weight", 5)
    side = math.isqrt(shape_of(shapes, SPATIAL, 3)[1])
    frames, time = shape_of(shapes, SOURCES, 2)
    fourier, bands = shape_of(shapes, FOURIER, 2)
    rgb, _, size, _ = shape_of(shapes, "query_builder.patch_embed.conv.2.weight", 4)
    decoder, ffn = shape_of(shapes, "decoder.layers.0.ffn.3.weight", 2)
    local = "encoder.blocks.0.attn.qkv.weight" in shapes
    overrides = dict(overrides or {})
    fields = {
        "hidden_size": width,
        "num_layers": _count(shapes, "encoder.blocks"),
        "num_heads": _heads("num_heads", width, overrides),
        "mlp_size": shape_of(shapes, "encoder.blocks.0.mlp.0.weight", 2)[0],
        "num_frames": min(frames, shape_of(shapes, TEMPORAL, 3)[1] * patch[0]),
        "image_size": (side * patch[1], side * patch[2]),
        "patch_size": patch,
        "local_attention": "window" if local else "none",
        "decoder_size": decoder,
        "decoder_layers": _count(shapes, "decoder.layers"),
        "decoder_heads": _heads("decoder_heads", decoder, overrides),
        "decoder_mlp_size": ffn,
        "num_bands": bands // 4,
        "rgb_size": size,
        "query_parts": (fourier, time, rgb),
        "project_memory": "encoder_proj.weight" in shapes,
    }
    return Config.seed(**{**fields, **overrides})


def _heads(name: str, width: int, overrides: Mapping) -> int | None:
    if name not in overrides and width % 64:
        raise CheckpointError(f"{name}: the file does not say it, and heads of 64 do not fit {width}; pass an override")
    return width // 64


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in shapes)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def load_state(state: Mapping[str, Tensor], overrides: Mapping | None = None, where: str = "state") -> D4RT:
    """A model of ours, in eval mode, from the tensors of the port's; errors as in `load`, with `where` as the file."""
    state = {name: x for name, x in state.items() if name != UNUSED}
    frequencies = state.pop(FREQUENCIES, None)
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    try:
        config = infer_config(shapes, overrides)
        rules = table(config, shapes)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    check_keys(where, {rule.source: rule.shape for rule in rules if rule.source}, shapes)
    if frequencies is not None:
        wanted = linear_range(0.5, config.num_bands, config.num_bands, scale=1.0)
        if frequencies.shape != wanted.shape or not torch.allclose(frequencies.float(), wanted):
            raise CheckpointError(f"{where}: {FREQUENCIES}: expected {wanted.tolist()}, got {frequencies.tolist()}")
    with torch.device("meta"):
        model = D4RT(config)
    model.load_state_dict(converted(rules, state), assign=True)
    return model.eval()


def converted(rules: list[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The port's tensors (parameters, or their gradients) under our names, each a copy of its own."""
    like = next(iter(state.values()))
    return {
        rule.key: rule.make(state[rule.source]).clone() if rule.source else like.new_zeros(rule.shape) for rule in rules
    }


def load(path: str | os.PathLike, overrides: Mapping | None = None) -> D4RT:
    """A model from the port's `.pth` or `.ckpt`, in eval mode; `overrides` as in `infer_config`.

    Raises CheckpointError (a ValueError) that names the file and every key that is missing, unknown or misshapen.
    """
    return load_state(without_prefix(read_state(path), "model."), overrides, str(path))


def convert(path: str | os.PathLike, out_dir: str | os.PathLike, *, overrides: Mapping | None = None) -> Config:
    """Convert the port's `.pth` or `.ckpt` to a directory for `D4RT.from_pretrained`; errors as in `load`."""
    model = load(path, overrides)
    model.save_pretrained(out_dir)
    return model.config


def exported(config: Config, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The port's state dictionary from ours; what the port never reads is zeros, as `export` says."""
    shapes = {TEMPORAL: (1, SLOTS, config.hidden_size), SOURCES: (config.num_frames, config.query_parts[1])}
    for index in range(0, config.num_layers if config.local_attention == "window" else 0, 2):
        present = ("weight", "bias") if ours[f"encoder.layers.{index}.attention.qkv.bias"].any() else ("weight",)
        shapes |= {f"encoder.blocks.{index}.attn.qkv.{kind}": () for kind in present}
    like = ours["encoder.norm.weight"]
    tokens = SLOTS * math.prod(config.grid[1:]) + 1
    state = {
        UNUSED: like.new_zeros(1, tokens, config.hidden_size),
        FREQUENCIES: torch.linspace(0.5, config.num_bands, config.num_bands),
    }
    for rule in table(config, shapes):
        if rule.source:
            theirs = state.setdefault(rule.source, ours[rule.key].new_zeros(rule.shape))
            places = rule.make(torch.arange(theirs.numel()).view(rule.shape))  # where ours came from, by the same rule
            theirs.view(-1)[places.flatten()] = ours[rule.key].flatten()
    return state


def export(directory: str | os.PathLike, path: str | os.PathLike) -> None:
    """The inverse of `convert`, bit for bit: `.pth` or `.safetensors` for `load_state_dict` of the port's model.

    A `.ckpt` has the same tensors as `state_dict` with `model.` before each name, as the port's Lightning module loads
    them. No file says the heads: the port must be built with the config's.

    Zeros stand where the port never looks: `encoder.pos_embed`, and temporal positions beyond the config's frames. The
    frequencies are recomputed. A local attention's bias that is all zeros is left out, as the port's default lacks it.

    Raises CheckpointError (a ValueError) for a model that the port cannot compute, naming the fields of its config, and
    as `D4RT.from_pretrained` does; ValueError for another suffix; OSError where the disk refuses.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    config = Config.from_dict(read_config(directory, MODEL))
    _check_port(directory, config)
    with torch.device("meta"):
        model = D4RT(config)
    load_weights(model, directory)
    state = exported(config, model.state_dict())
    if suffix == ".safetensors":
        write_bytes(path, safetensors.torch.save(state))
        return
    if suffix == ".ckpt":
        state = {
            "state_dict": {f"model.{name}": x for name, x in state.items()},
            "pytorch-lightning_version": LIGHTNING,
        }
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, content.getbuffer())


def _check_port(where: str | os.PathLike, config: Config) -> None:
    """Raise CheckpointError unless a model of the port has this config, heads and sizes apart."""
    seed, (frames, patch, _) = Config.seed(), config.patch_size
    wanted = {
        **{name: getattr(seed, name) for name in FIXED},
        "num_frames": min(config.num_frames, (SLOTS + 1) * frames - 1),
        "image_size": (config.image_size[0],) * 2,
        "patch_size": (frames, patch, patch),
        "local_attention": config.local_attention if config.local_attention == "window" else "none",
        "query_parts": config.query_parts or seed.query_parts,
        "project_memory": config.hidden_size != config.decoder_size,
    }
    problems = [
        f"{name}: expected {value!r}, got {getattr(config, name)!r}"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if problems:
        raise CheckpointError(f"{where}: no model of the port: {'; '.join(problems)}")
