"""A D4RT encoder that starts from 4DS or from VideoMAE, which the paper's ablation finds to matter most.

    report = init_encoder(model, "checkpoints/4ds-B")            a directory of ours (fourdperf convert)
    report = init_encoder(model, "videomae-base")                a directory of transformers: config.json, weights
    report = init_encoder(model, "vit_g_hybrid_pt.pth")          the weights alone, under transformers' or timm's names

Blocks are taken as they are: a frame-wise layer takes the weights of the layer at its place. What differs is fitted:

    patch kernel   of another size: the one that gives a resized patch the answer of the original, as nearly as can be
                   (FlexiViT's pseudo-inverse, arXiv 2212.08013); other pixel ranges are folded into kernel and bias
    positions      cubic resize to the model's grid; then, where the model's are factorised, the sum of a temporal and a
                   spatial table that is nearest to them. VideoMAE's one sinusoid over all tokens is far from any such
                   sum: `Config(positions="joint")` takes it as it is
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fourdperf.convert.state import read_state
from fourdperf.models import scaling4d
from fourdperf.models.checkpoint import CONFIG, WEIGHTS, CheckpointError, check_keys, read_config, read_shapes
from fourdperf.models.d4rt import D4RT, Config
from fourdperf.ops import resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIDEOMAE_SIZE = (16, 224, 224)  # frames, height, width of every released VideoMAE


class Initialised(NamedTuple):
    """What `init_encoder` did.

    layout: "4DS", "VideoMAE (transformers)" or "VideoMAE (timm)".
    taken: our parameter -> the source's tensors that it was made of (none for VideoMAE's fixed positions).
    kept: parameters of the encoder that were left as they were.
    unused: the source's tensors that have no place in the encoder.
    notes: what was fitted, and where the model computes something else than the source did.
    """

    layout: str
    taken: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.layout}: {len(self.taken)} tensors of the encoder taken, {len(self.unused)} of the source unused"
        ]
        if self.kept:
            lines.append(f"left as they were: {', '.join(self.kept)}")
        return "\n".join([*lines, *self.notes])


class Source(NamedTuple):
    """A ViT in our terms.

    tensors: our name within the encoder -> tensor, without patch embedding and positions; names: what they are made of.
    kernel: `(D, 3, t, h, w)`; bias `(D,)`; positions `(t, h, w, D)`; mean, std: pixels enter as (x - mean) / std.
    facts: fields of Config as the source has them.
    """

    layout: str
    tensors: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]
    kernel: Tensor
    bias: Tensor
    positions: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    facts: dict[str, object]


def init_encoder(
    model: D4RT,
    source: str | os.PathLike,
    *,
    grid: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Initialised:
    """Fill the encoder of `model`, in place, from a 4DS checkpoint directory of ours or from VideoMAE weights.

    source: a directory, `.safetensors`, or a file of torch.save; a deeper source gives its first layers.
    grid: (t, h, w) of a VideoMAE's positions; by default what its config.json says, else 16 frames of 224 x 224.
    mean, std: of a VideoMAE's pixels (3 values each); by default what preprocessor_config.json says, else ImageNet's.

    Raises CheckpointError (a ValueError) that names the file and the keys that are missing, unknown or misshapen;
    OSError where a file cannot be read. The model is then as it was.
    """
    path, config = Path(source), model.config
    if _is_ours(path):
        found = read_4ds(path, config.num_layers, _position_keys(config))
    else:
        found = _read_videomae(path, config, grid, mean, std)
    _check_facts(path, found, config)
    encoder = model.encoder
    wanted = {name: tuple(x.shape) for name, x in encoder.state_dict().items() if name in found.tensors}
    check_keys(str(path), wanted, {name: tuple(x.shape) for name, x in found.tensors.items()})
    positions, notes = _fit_positions(found.positions, config)
    kernel, bias = fit_kernel(found.kernel, found.bias, config.patch_size, found.mean, found.std, config.centered)
    kernel = kernel.permute(0, 2, 3, 4, 1).flatten(1)
    tokenizer = "tokenizer.patch_embedding.projection"
    tensors = {**found.tensors, **positions, f"{tokenizer}.weight": kernel, f"{tokenizer}.bias": bias}
    with torch.no_grad():
        for name, x in tensors.items():
            encoder.get_parameter(name).copy_(x)
    notes += [
        f"{name}: {had!r} in the source, {getattr(config, name)!r} in the model"
        for name, had in found.facts.items()
        if name in ("gelu", "norm_eps") and had != getattr(config, name)
    ]
    if tuple(found.kernel.shape[2:]) != config.patch_size:
        notes.append(f"patch kernel: {tuple(found.kernel.shape[2:])} made {config.patch_size}")
    return Initialised(
        found.layout,
        {f"encoder.{name}": found.names.get(name, ()) for name in tensors},
        tuple(f"encoder.{name}" for name, _ in encoder.named_parameters() if name not in tensors),
        found.unused,
        tuple(notes),
    )


def _check_facts(path: Path, found: Source, config: Config) -> None:
    """Sizes that no shape of a block shows wrong in a readable way."""
    if found.kernel.ndim != 5 or found.kernel.shape[1] != 3:
        raise CheckpointError(f"{path}: expected a patch kernel (D, 3, t, h, w), got {tuple(found.kernel.shape)}")
    for name in ("hidden_size", "num_heads", "mlp_size"):
        if name in found.facts and found.facts[name] != getattr(config, name):
            raise CheckpointError(
                f"{path}: {name}: the model has {getattr(config, name)}, the source {found.facts[name]}"
            )
    if found.facts["num_layers"] < config.num_layers:
        raise CheckpointError(
            f"{path}: num_layers: the model has {config.num_layers}, the source only {found.facts['num_layers']}"
        )


# Fitting


def _fit_positions(positions: Tensor, config: Config) -> tuple[dict[str, Tensor], list[str]]:
    """`(t, h, w, D)` of any grid as the model's parameters, and notes."""
    notes, positions = [], positions.double()
    if tuple(positions.shape[:3]) != config.grid:
        notes.append(f"positions: grid {tuple(positions.shape[:3])} resized to {config.grid}")
        positions = resize(positions, config.grid, (0, 1, 2), method="cubic")
    if config.positions == "joint":
        return {"tokenizer.posenc": positions}, notes
    spatial = positions.mean(0)
    temporal = positions.mean((1, 2)) - positions.mean((0, 1, 2))
    rest = (positions - temporal[:, None, None] - spatial).square().sum()
    total = (positions - positions.mean((0, 1, 2))).square().sum()
    share = 1 - (rest / total).item() if total > 0 else 1.0
    notes.append(f"positions: temporal + spatial tables hold {share:.1%} of their variance")
    return {"tokenizer.temporal": temporal, "tokenizer.spatial": spatial}, notes


def fit_kernel(
    kernel: Tensor, bias: Tensor, sizes: Sequence[int], mean: Sequence[float], std: Sequence[float], centered: bool
) -> tuple[Tensor, Tensor]:
    """A patch kernel `(D, 3, ..)` made `(D, 3, *sizes)`, and its bias `(D,)`, in float64, for pixels in [-1, 1] where
    `centered`, else in [0, 1]; the originals are for (x - mean) / std of pixels x in [0, 1]."""
    kernel = kernel.double()
    for axis, size in enumerate(sizes, start=2):
        if kernel.shape[axis] != size:
            larger = resize(torch.eye(kernel.shape[axis], dtype=torch.float64), size, 0, method="linear")
            kernel = (kernel.movedim(axis, -1) @ torch.linalg.pinv(larger)).movedim(-1, axis)
    # theirs = (x - mean) / std of a pixel x, ours = 2 x - 1 or x: theirs = scale * ours + shift
    axes = [1] * len(sizes)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, *axes) for x in (mean, std))
    scale, shift = (0.5 / std, (0.5 - mean) / std) if centered else (1 / std, -mean / std)
    return kernel * scale, bias.double() + (kernel * shift).flatten(1).sum(1)


# 4DS


def _is_ours(path: Path) -> bool:
    try:
        return json.loads((path / CONFIG).read_bytes()).get("model") is not None
    except (OSError, ValueError, AttributeError):
        return False


def read_4ds(path: Path, num_layers: int, positions: Sequence[str]) -> Source:
    """The first layers of a 4DS in a directory of ours; positions: names of the parameters made of its positions."""
    try:
        theirs = scaling4d.Config.from_dict(read_config(path, scaling4d.MODEL))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    usual = (theirs.block, theirs.n_iter, theirs.qk_features, theirs.v_features)
    if usual != ("pre_norm", 1, theirs.hidden_size, theirs.hidden_size):
        raise CheckpointError(f"{path}: expected blocks (pre_norm, n_iter 1, full width), got {usual}")
    if theirs.channels != 3:
        raise CheckpointError(f"{path}: expected 3 channels, got {theirs.channels}")
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in scaling4d.Scaling4D(theirs).state_dict().items()}
    check_keys(str(path / WEIGHTS), wanted, read_shapes(path / WEIGHTS))
    state = read_state(path / WEIGHTS)
    embed = "encoder.tokenizer.patch_embedding.projection"
    names = {f"tokenizer.patch_embedding.projection.{kind}": (f"{embed}.{kind}",) for kind in ("weight", "bias")}
    names |= dict.fromkeys(positions, ("encoder.tokenizer.posenc",))
    for index in range(min(num_layers, theirs.num_layers)):
        prefix = f"encoder.processor.layers.{index}."
        names |= {f"layers.{index}.{key.removeprefix(prefix)}": (key,) for key in state if key.startswith(prefix)}
    used = {key for keys in names.values() for key in keys}
    return Source(
        layout="4DS",
        tensors={name: state[keys[0]] for name, keys in names.items() if name.startswith("layers.")},
        names=names,
        unused=tuple(key for key in state if key not in used),
        kernel=state[f"{embed}.weight"].unflatten(1, (*theirs.patch_size, 3)).permute(0, 4, 1, 2, 3),
        bias=state[f"{embed}.bias"],
        positions=state["encoder.tokenizer.posenc"],
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        facts={
            **{name: getattr(theirs, name) for name in ("hidden_size", "num_heads", "mlp_size", "num_layers")},
            **{"gelu": "tanh", "norm_eps": 1e-6},
        },
    )


def _position_keys(config: Config) -> tuple[str, ...]:
    return ("tokenizer.posenc",) if config.positions == "joint" else ("tokenizer.temporal", "tokenizer.spatial")


# VideoMAE


class Layout(NamedTuple):
    """How a project names a VideoMAE; names start below whatever prefix the patch embedding has.

    names: our name in a block -> theirs below `block`, joined along the first axis. Alternatives for one part stand in
        a tuple of their own; where there is none of them, the part is a bias of zeros.
    """

    name: str
    patch: str
    block: str
    norm: str
    norm_eps: float
    names: dict[str, tuple[str | tuple[str, ...], ...]]


def _pairs(**layers: str) -> dict[str, tuple[str]]:
    return {
        f"{ours.replace('__', '.')}.{kind}": (f"{theirs}.{kind}",)
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }


LAYOUTS = (
    Layout(
        "VideoMAE (transformers)",
        "embeddings.patch_embeddings.projection",
        "encoder.layer.{}.",
        "layernorm",
        1e-12,
        {
            "attention.qkv.weight": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
            "attention.qkv.bias": (
                ("attention.attention.q_bias", "attention.attention.query.bias"),
                ("attention.attention.key.bias",),
                ("attention.attention.v_bias", "attention.attention.value.bias"),
            ),
            **_pairs(
                attention__out="attention.output.dense",
                attention_norm="layernorm_before",
                mlp_norm="layernorm_after",
                mlp__dense_in="intermediate.dense",
                mlp__dense_out="output.dense",
            ),
        },
    ),
    Layout(
        "VideoMAE (timm)",
        "patch_embed.proj",
        "blocks.{}.",
        "norm",
        1e-6,
        {
            "attention.qkv.weight": ("attn.qkv.weight",),
            "attention.qkv.bias": (("attn.q_bias",), (), ("attn.v_bias",)),
            **_pairs(
                attention__out="attn.proj",
                attention_norm="norm1",
                mlp_norm="norm2",
                mlp__dense_in="mlp.fc1",
                mlp__dense_out="mlp.fc2",
            ),
        },
    ),
)
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def _read_videomae(
    path: Path,
    config: Config,
    grid: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Source:
    about, pixels, file = {}, {}, path
    if path.is_dir():
        about, pixels = _read_json(path / CONFIG), _read_json(path / "preprocessor_config.json")
        file = next((path / name for name in (WEIGHTS, "pytorch_model.bin") if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path}: no {WEIGHTS} and no pytorch_model.bin here")
    state = read_state(file)
    layout, prefix = _find_layout(file, state)
    inner = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    missing = [f"{prefix}{layout.patch}.bias"] if f"{layout.patch}.bias" not in inner else []
    kernel = inner[f"{layout.patch}.weight"]

    depth = 0
    while any(name.startswith(layout.block.format(depth)) for name in inner):
        depth += 1
    names, tensors, zeros = {}, {}, torch.zeros(kernel.shape[0])
    for index in range(min(config.num_layers, depth)):
        block = layout.block.format(index)
        for ours, parts in layout.names.items():
            if ours == "attention.qkv.bias" and f"{block}attn.qkv.bias" in inner:  # timm's own ViT has all three in one
                parts = ("attn.qkv.bias",)
            found = [next((block + name for name in _options(part) if block + name in inner), None) for part in parts]
            absent = [prefix + block + part for part, name in zip(parts, found) if isinstance(part, str) and not name]
            if absent:
                missing += absent
                continue
            names[f"layers.{index}.{ours}"] = tuple(filter(None, found))
            tensors[f"layers.{index}.{ours}"] = _joined(file, [inner[name] if name else zeros for name in found], block)
    if missing:
        raise CheckpointError(f"{file}: missing {', '.join(missing[:12])}")
    if f"{layout.norm}.weight" in inner:
        for kind in ("weight", "bias"):
            names[f"norm.{kind}"] = (f"{layout.norm}.{kind}",)
            tensors[f"norm.{kind}"] = inner[f"{layout.norm}.{kind}"]
    for kind in ("weight", "bias"):
        names[f"tokenizer.patch_embedding.projection.{kind}"] = (f"{layout.patch}.{kind}",)
    if "pos_embed" in inner:
        names |= dict.fromkeys(_position_keys(config), ("pos_embed",))
    names = {ours: tuple(prefix + name for name in theirs) for ours, theirs in names.items()}
    used = {name for theirs in names.values() for name in theirs}
    unused = tuple(name for name in state if name not in used)
    blocks = tuple(prefix + layout.block.format(index) for index in range(config.num_layers))
    strange = [name for name in unused if name.startswith(blocks)]
    if strange:
        raise CheckpointError(f"{file}: no place in our blocks for {', '.join(strange[:12])}")
    activation = about.get("hidden_act", "gelu")
    facts = {
        "hidden_size": kernel.shape[0],
        "num_layers": depth,
        "gelu": ACTIVATIONS.get(activation, activation),
        "norm_eps": about.get("layer_norm_eps", layout.norm_eps),
    }
    if "num_attention_heads" in about:
        facts["num_heads"] = about["num_attention_heads"]
    return Source(
        layout=layout.name,
        tensors=tensors,
        names=names,
        unused=unused,
        kernel=kernel,
        bias=inner[f"{layout.patch}.bias"],
        positions=_videomae_positions(file, inner.get("pos_embed"), kernel, about, grid),
        mean=mean or pixels.get("image_mean", IMAGENET_MEAN),
        std=std or pixels.get("image_std", IMAGENET_STD),
        facts=facts,
    )


def _find_layout(file: Path, state: Mapping[str, Tensor]) -> tuple[Layout, str]:
    """The layout, and what stands before its names ("videomae.", "module.encoder.", ..)."""
    for layout in LAYOUTS:
        ends = f"{layout.patch}.weight"
        prefixes = [name.removesuffix(ends) for name in state if name.endswith(ends)]
        if prefixes:
            prefix = min(prefixes, key=len)
            kernel = state[prefix + ends]
            if kernel.ndim != 5:
                raise CheckpointError(f"{file}: {prefix}{ends}: expected (D, 3, t, h, w), got {tuple(kernel.shape)}")
            return layout, prefix
    patches = " nor ".join(f"{layout.patch}.weight" for layout in LAYOUTS)
    raise CheckpointError(f"{file}: neither {patches} is among its {len(state)} tensors, such as {next(iter(state))}")


def _joined(file: Path, parts: list[Tensor], block: str) -> Tensor:
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise CheckpointError(f"{file}: {block}: queries, keys and values do not fit each other: {shapes}") from error


def _options(part: str | tuple[str, ...]) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part


def _videomae_positions(
    file: Path, table: Tensor | None, kernel: Tensor, about: Mapping, grid: Sequence[int] | None
) -> Tensor:
    """`(t, h, w, D)`: the table in the file, or VideoMAE's fixed one, a sinusoid over the tokens in their order."""
    if grid is None:
        side = about.get("image_size", VIDEOMAE_SIZE[1])
        size = (about.get("num_frames", VIDEOMAE_SIZE[0]), *((side, side) if isinstance(side, int) else side))
        grid = tuple(length // patch for length, patch in zip(size, kernel.shape[2:]))
    tokens, width = math.prod(grid), kernel.shape[0]
    if table is not None:
        shape, table = tuple(table.shape), table.flatten(0, -2)
        if table.shape[0] not in (tokens, tokens + 1) or table.shape[1] != width:
            raise CheckpointError(
                f"{file}: pos_embed: expected {tokens} places of {width} for the grid {tuple(grid)}, got {shape}; "
                f"say which grid it has"
            )
        table = table[-tokens:]  # after a class token, where there is one
    else:
        pairs = torch.arange(width, dtype=torch.float64) // 2
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * pairs / width)
        table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
    return table.unflatten(0, tuple(grid))


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: expected a dictionary, got {type(fields).__name__}")
    return fields
