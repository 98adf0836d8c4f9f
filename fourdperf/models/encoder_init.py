"""Encoders of tokenizers that start from a trained ViT: MAE, CLIP, DINO, DINOv2, Depth Anything v2, 4DS, our own MAE.

    fields = encoder_fields("clip")     of `tokenizer.Config`: what the ViT needs
    print(init_encoder(model, "clip"))  weights from the hubs' caches on this machine
    print(init_encoder(model, "mae", "mae_pretrain_vit_base.pth"))

mae, clip, dino, dinov2 and depth_anything_v2 are read under the names that timm and the authors have in common
(blocks.0.attn.qkv.weight); timm's own name of such a model does, too. 4ds is a folder of `fourdperf convert`, image_mae
one of `fourdperf train image_mae`. Class token, patch embedding, positions, blocks and norms are taken; the latent
tokens, their positions and the map to latents stay as they are. What differs is fitted:

    patch kernel   of another size: the one that gives a resized patch the answer of the original, as nearly as can be
                   (FlexiViT's pseudo-inverse, arXiv 2212.08013); of a video: summed over its frames. The mean and the
                   deviation of the pixels that the ViT was trained with are folded into kernel and bias
    positions      bicubic, to the grid of the tokenizer; of a video: their mean over time
    LayerScale     folded into the linear layers before it (DINOv2); an encoder's own becomes one

Register tokens have no place here and are left out; 4DS' GELU, the approximation by tanh, becomes the exact one.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fourdperf.convert.d4rt_encoder import fit_kernel, read_4ds
from fourdperf.convert.state import read_state
from fourdperf.convert.tokenizer import TIMM, block, norm
from fourdperf.models.checkpoint import CONFIG, CheckpointError, check_keys, read_config
from fourdperf.models.encoder_weights import NAMES, OURS, USUAL, VITS, find_weights, resolve, weights_file
from fourdperf.models.titok import TiTok
from fourdperf.models.token_blocks import ACTIVATIONS, TokenEncoder
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.ops import resize

__all__ = ["NAMES", "encoder_fields", "init_encoder"]

HEAD_DIM = 64  # of the ViTs that are read under timm's names


class Vit(NamedTuple):
    """A ViT in our terms.

    tensors: by our names within the encoder: blocks, norms and class token, where it has these.
    kernel `(D, 3, h, w)`, bias `(D,)`; positions `(h, w, D)`; class_position `(D,)`, None where it has no such.
    mean, std: pixels in [0, 1] enter as (x - mean) / std. num_layers: of the original. unused: names of what is left.
    fields: what the encoder must have alike.
    """

    tensors: dict[str, Tensor]
    kernel: Tensor
    bias: Tensor
    positions: Tensor
    class_position: Tensor | None
    mean: Sequence[float]
    std: Sequence[float]
    num_layers: int
    unused: Sequence[str]
    fields: dict


def encoder_fields(name: str) -> dict:
    """Fields of `tokenizer.Config` as the ViT of this name has them: activation, qkv_bias, norm_eps, norm_pre.

    Raises ValueError for a name that is none of NAMES nor of timm's models.
    """
    kind, _ = resolve(name)
    return dict(VITS[kind].fields if kind in VITS else USUAL)


def init_encoder(model: Tokenizer | TiTok, name: str, weights: str | os.PathLike | None = None) -> str:
    """Fill the encoder of a tokenizer, in place, from a trained ViT; returns what was done, in words.

    name: one of NAMES, or a timm model such as vit_base_patch14_dinov2.lvd142m.
    weights: a file (.safetensors, or of torch.save) or a folder with one; by default what the caches of the Hugging
        Face hub and of torch.hub hold for the encoder's width. 4ds and image_mae need a folder.

    Raises:
        FileNotFoundError: there are no weights; the message says which to get.
        CheckpointError: (a ValueError) the file is corrupt, or has not the names and shapes of the encoder.
        ValueError: the name is unknown, or the encoder computes something else, such as another activation.
        OSError: the file cannot be read.
    The model is as it was in all these cases.
    """
    kind, width = resolve(name)
    encoder, num_layers = model.encoder, len(model.encoder.blocks)
    path = find_weights(kind, width or encoder.latent_tokens.shape[1]) if weights is None else Path(weights)
    read = {"4ds": _read_4ds, "image_mae": _read_image_mae}.get(kind)
    vit = read(path, num_layers) if read else _read_timm(weights_file(path), kind, num_layers)
    notes = _check(kind, path, vit, encoder)
    tensors, fitted = _fit(vit, encoder, isinstance(model, Tokenizer))
    wanted = {name: tuple(x.shape) for name, x in encoder.state_dict().items() if name in tensors}
    check_keys(str(path), wanted, {name: tuple(x.shape) for name, x in tensors.items()})
    with torch.no_grad():
        for key, x in tensors.items():
            encoder.get_parameter(key).copy_(x)
    kept = [key for key, _ in encoder.named_parameters() if key not in tensors]
    parts = [f"encoder from {kind}, {path}: {num_layers} of {vit.num_layers} blocks", *fitted, *notes]
    parts.append(f"as they were: {', '.join(kept)}")
    if vit.unused:
        parts.append(f"not used: {', '.join(vit.unused[:8])}{', ..' if len(vit.unused) > 8 else ''}")
    return "; ".join(parts)


# Reading


def _read_timm(file: Path, kind: str, num_layers: int) -> Vit:
    known = VITS[kind]
    everything = read_state(file)
    state = {name.removeprefix(known.prefix): x for name, x in everything.items() if name.startswith(known.prefix)}
    state = {name: x.float() for name, x in state.items() if x.is_floating_point()}
    for name in ("patch_embed.proj.weight", "pos_embed"):
        if name not in state:
            raise CheckpointError(f"{file}: missing {known.prefix}{name}; expected a ViT under timm's names")
    kernel, table = state["patch_embed.proj.weight"], state["pos_embed"].flatten(0, -2)
    if kernel.ndim != 4 or kernel.shape[1] != 3:
        raise CheckpointError(f"{file}: patch_embed.proj.weight: expected (D, 3, h, w), got {tuple(kernel.shape)}")
    width, depth = len(kernel), _depth(state)
    bias = state.get("patch_embed.proj.bias", torch.zeros(width))
    rows = [row for index in range(min(num_layers, depth)) for row in _block(index, width, state)]
    rows += norm("norm", "norm", width)
    if known.fields["norm_pre"]:
        rows += norm("norm_pre", "norm_pre", width)
    wanted = {key: shape for row in rows for key, shape in row.sources} | {"cls_token": (1, 1, width)}
    check_keys(str(file), wanted, {name: tuple(x.shape) for name, x in state.items() if name in wanted})
    tensors = {row.key: torch.from_numpy(row.pack([state[key].numpy() for key, _ in row.sources])) for row in rows}
    scales = _fold_scales(tensors, state)
    tensors["class_token"] = state["cls_token"].flatten()
    class_position, positions = _grid(file, table)
    used = {*wanted, *scales, "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    unused = [name for name in everything if name.removeprefix(known.prefix) not in used]
    taken = tuple(f"{known.prefix}blocks.{index}." for index in range(min(num_layers, depth)))
    strange = [name for name in unused if name.startswith(taken)]
    if strange:
        raise CheckpointError(f"{file}: no place in our blocks for {', '.join(strange[:12])}")
    unused = [name for name in unused if not name.startswith(f"{known.prefix}blocks.")]  # deeper than the encoder
    fields = {**known.fields, "num_heads": width // HEAD_DIM}
    return Vit(
        *(tensors, kernel, bias, positions, class_position),
        *(known.mean, known.std, depth, unused, fields),
    )


def _depth(state: Mapping[str, Tensor]) -> int:
    depth = 0
    while f"blocks.{depth}.norm1.weight" in state:
        depth += 1
    return depth


def _block(index: int, width: int, state: Mapping[str, Tensor]) -> list:
    hidden = state.get(f"blocks.{index}.mlp.fc1.weight", torch.empty(4 * width, 0)).shape[0]
    return block(f"blocks.{index}", f"blocks.{index}", TIMM, width, hidden)


def _fold_scales(tensors: dict[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """x + gamma * (W h + b) without the gamma; the names of those that there were."""
    used = []
    for name in state:
        layer, _, scale = name.removesuffix(".gamma").rpartition(".")
        target = {"ls1": "attention.out", "ls2": "mlp.dense_out"}.get(scale)
        if target is not None and f"{layer}.{target}.weight" in tensors:
            for kind in ("weight", "bias"):
                x = tensors[f"{layer}.{target}.{kind}"]
                tensors[f"{layer}.{target}.{kind}"] = x * state[name].view(-1, *[1] * (x.ndim - 1))
            used.append(name)
    return used


def _grid(file: Path, table: Tensor) -> tuple[Tensor | None, Tensor]:
    """The class token's position, if any, and the patches' `(side, side, D)`, of rows `(n, D)`."""
    for first in (0, 1):
        side = math.isqrt(len(table) - first)
        if side * side == len(table) - first and side:
            return (table[0] if first else None), table[first:].unflatten(0, (side, side))
    raise CheckpointError(f"{file}: pos_embed: expected the places of a square, and perhaps one more, got {len(table)}")


def _read_4ds(path: Path, num_layers: int) -> Vit:
    from fourdperf.models.scaling4d import MODEL, Config

    found = read_4ds(path, num_layers, ("positions",))
    config = Config.from_dict(read_config(path, MODEL))
    # of a picture that is shown all the time
    return Vit(
        {name.replace("layers.", "blocks."): x for name, x in found.tensors.items()},
        *(found.kernel.double().sum(2), found.bias, found.positions.double().mean(0), None),
        *(found.mean, found.std, config.num_layers, found.unused, {**USUAL, "num_heads": config.num_heads}),
    )


def _read_image_mae(path: Path, num_layers: int) -> Vit:
    from fourdperf.models.image_mae import ImageMAE

    folder = path if (path / CONFIG).is_file() else path / "model"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"image_mae: wanted {OURS['image_mae']}, got {path}")
    mae = ImageMAE.from_pretrained(folder)
    config = mae.config
    state = {name: x.float() for name, x in mae.encoder.state_dict().items()}
    deeper = tuple(f"blocks.{index}." for index in range(num_layers, config.num_layers))
    tensors = {name: x for name, x in state.items() if not name.startswith(("patch_embed.", "positions", *deeper))}
    class_position, positions = state["positions"][0], state["positions"][1:].unflatten(0, config.grid)
    return Vit(
        *(tensors, state["patch_embed.weight"], state["patch_embed.bias"], positions, class_position),
        *((0.5,) * 3, (0.5,) * 3, config.num_layers, (), {**USUAL, "num_heads": config.num_heads}),
    )


# Fitting


def _check(kind: str, path: Path, vit: Vit, encoder: TokenEncoder) -> list[str]:
    """Notes on what differs a little; raises ValueError where the encoder could not compute what the ViT does."""
    if vit.num_layers < len(encoder.blocks):
        raise CheckpointError(f"{path}: num_layers: the encoder has {len(encoder.blocks)}, the file {vit.num_layers}")
    width = encoder.latent_tokens.shape[1]
    if len(vit.kernel) != width:
        raise CheckpointError(f"{path}: hidden_size: the encoder has {width}, the file {len(vit.kernel)}")
    first = encoder.blocks[0]
    has = {
        "activation": next(name for name, function in ACTIVATIONS.items() if function is first.mlp.activation),
        "qkv_bias": first.attention.qkv.bias is not None,
        "norm_pre": encoder.norm_pre is not None,
        "norm_eps": encoder.norm.eps,
        "patch_bias": encoder.patch_embed.bias is not None,
        "num_heads": first.attention.num_heads,
    }
    different = [name for name in ("activation", "qkv_bias", "num_heads") if has[name] != vit.fields[name]]
    wanted = {**vit.fields, "patch_bias": True}  # the mean of the pixels is in it
    different += [name for name in ("norm_pre", "patch_bias") if wanted[name] and not has[name]]
    if different:
        needs = ", ".join(f"{name} {wanted[name]} (it has {has[name]})" for name in different)
        raise ValueError(f"{kind}: wanted an encoder with {needs}")
    if has["norm_eps"] != vit.fields["norm_eps"]:
        return [f"norm_eps {has['norm_eps']:g}, where the ViT had {vit.fields['norm_eps']:g}"]
    return []


def _fit(vit: Vit, encoder: TokenEncoder, centered: bool) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors by names within the encoder, and notes."""
    tensors, notes = dict(vit.tensors), []
    size = tuple(encoder.patch_embed.weight.shape[2:])
    if tuple(vit.kernel.shape[2:]) != size:
        notes.append(f"patch kernel {'x'.join(map(str, vit.kernel.shape[2:]))} made {'x'.join(map(str, size))}")
    kernel, bias = fit_kernel(vit.kernel, vit.bias, size, vit.mean, vit.std, centered)
    tensors["patch_embed.weight"], tensors["patch_embed.bias"] = kernel, bias
    scales = [name for name, _ in encoder.named_parameters() if name.endswith(("attention_scale", "mlp_scale"))]
    tensors |= {name: torch.ones(len(bias)) for name in scales}
    positions, grid = vit.positions.double(), encoder.grid
    if tuple(positions.shape[:2]) != grid:
        notes.append(f"positions {'x'.join(map(str, positions.shape[:2]))} made {'x'.join(map(str, grid))}")
        positions = resize(positions, grid, (0, 1), method="cubic")
    table = encoder.positions.detach().clone().double()
    start, count = int(encoder.class_position), grid[0] * grid[1]
    table[start : start + count] = positions.flatten(0, 1)
    if "class_token" in tensors:
        position = torch.zeros(len(bias)) if vit.class_position is None else vit.class_position
        if encoder.class_position:
            table[0] = position
        else:
            tensors["class_token"] = tensors["class_token"] + position
    tensors["positions"] = table
    return tensors, notes
