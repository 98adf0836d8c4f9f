"""``fourdperf convert``: a checkpoint of another project to a folder of ours, or back."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from safetensors import safe_open

from fourdperf.cli.measure import peak_memory
from fourdperf.cli.report import Table
from fourdperf.convert import d4rt, functa, latent_classifier, niso, scaling4d
from fourdperf.convert import tokenizer as tokenizers
from fourdperf.convert.flax_tree import is_orbax
from fourdperf.models.checkpoint import CONFIG, WEIGHTS, read_config
from fourdperf.models.d4rt import Config as D4RTConfig
from fourdperf.models.functa import Config as FunctaConfig
from fourdperf.models.latent_classifier import Config as LatentClassifierConfig
from fourdperf.models.maskgit_vqgan import Config as MaskGITVQGANConfig
from fourdperf.models.niso import Config as NisoConfig
from fourdperf.models.scaling4d import Config as Scaling4DConfig
from fourdperf.models.titok import Config as TiTokConfig
from fourdperf.models.token_generator import Config as TokenGeneratorConfig
from fourdperf.models.tokenizer import Config as TokenizerConfig

__all__ = ["convert"]

Kinds = Literal[
    "scaling4d", "d4rt", "functa", "latent_classifier", "niso", "titok", "maskgit_vqgan", "token_generator", "tokenizer"
]


def convert(
    source: Path,
    target: Path,
    model: Kinds | None = None,
    fields: dict[str, Any] | None = None,
    arrays: bool = False,
) -> None:
    """Converts a file of another project to a folder with safetensors and config, or such a folder back to a file.

    The files are 4DS's released .npz, the .pth, .ckpt or .safetensors of the port of D4RT called d4rt, and the trees of
    the JAX port spatial_functa and its classifiers and of Neural Isometries: .msgpack, .npz, or a folder of orbax
    (.orbax where it is written); TiTok's tokenizers and generators and MaskGIT's VQGAN, .bin or .safetensors, and the
    .ckpt of the 1-D tokenizer on taming-transformers, with an encoder of its own or a MAE's, DINO's, CLIP's, DINOv2's
    or Depth Anything v2's.

    Args:
        source: The file, or the folder.
        target: The folder, or the file.
        model: The kind of model; by default as the folder says, d4rt for .pth, .ckpt, .safetensors, functa for
            .msgpack and orbax, titok for .bin, else scaling4d.
        fields: What of the model's config no array shows, where the default is wrong: --fields.num_heads 4.
        arrays: List every array with its shape.
    """
    if not source.exists():
        raise FileNotFoundError(f"no such checkpoint: {source}")
    back = source.is_dir() and not is_orbax(source)
    kind = KINDS[model or (_kind(source) if back else _kind_of_file(source))]
    if back and target.suffix not in kind.suffixes:
        wanted = " or ".join(kind.suffixes)
        raise ValueError(f"{source} is a folder: wanted a target that ends in {wanted}, got {target}")
    if back and fields:
        raise ValueError(f"--fields: {source / CONFIG} has all of them, got {', '.join(fields)}")
    if not back and target.exists() and not target.is_dir():
        raise ValueError(f"wanted a folder as the target, got the file {target}")
    start = time.perf_counter()
    if back:
        kind.converter.export(source, target)
    else:
        kind.converter.convert(source, target, overrides=fields)
    seconds = time.perf_counter() - start
    print(_describe(source if back else target, kind, arrays))
    print(f"wrote {target} in {seconds:.1f} s; peak memory of the process {peak_memory() / 2**20:.0f} MiB")


def _kind(folder: Path) -> str:
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("model")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{folder}: wanted a folder with {CONFIG} and {WEIGHTS}") from None
    if kind not in KINDS:
        raise ValueError(f"{folder / CONFIG}: wanted a model out of {', '.join(KINDS)}, got {kind!r}")
    return kind


def _kind_of_file(file: Path) -> str:
    if file.is_dir():
        return "functa"
    return next((name for name, kind in KINDS.items() if file.suffix in kind.suffixes), "scaling4d")


def _describe(folder: Path, kind: "Kind", arrays: bool) -> str:
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        rows = [(name, "x".join(map(str, part.get_shape())), part.get_dtype()) for name, part in slices.items()]
        parameters = sum(math.prod(part.get_shape()) for part in slices.values())
    config = kind.describe(read_config(folder, kind.converter.MODEL))
    lines = {"parameters": f"{parameters:,} in {len(rows)} arrays", **config}
    text = "\n".join(f"{name:<12}{line}" for name, line in lines.items())
    if arrays:
        text += "\n\n" + Table("arrays", ("name", "shape", "dtype"), rows).text()
    return text


def _scaling4d(fields: dict) -> dict[str, str]:
    config = Scaling4DConfig.from_dict(fields)
    readout = config.readout
    lines = {
        "variant": f"{config.variant or 'custom'}" + (" with readout" if readout else ""),
        "encoder": f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads",
        "video": f"{_by(config.video_size)} with {config.channels} channels, patches of {_by(config.patch_size)}",
    }
    if readout:
        lines["readout"] = f"width {readout.num_params}, {readout.num_heads} heads, {readout.num_queries} queries"
        lines["output"] = _by(readout.output_shape or (readout.num_queries, readout.num_classes))
    return lines


def _d4rt(fields: dict) -> dict[str, str]:
    c = D4RTConfig.from_dict(fields)
    kind = {"frame": "every other within a frame", "window": f"every other in windows of {c.window}", "none": "global"}
    return {
        "encoder": f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads, {kind[c.local_attention]}",
        "decoder": f"{c.decoder_layers} layers, width {c.decoder_size}, {c.decoder_heads} heads",
        "video": f"{_by((c.num_frames, *c.image_size))} at most, patches of {_by(c.patch_size)}",
        "queries": f"{c.num_bands} frequencies, RGB patches of {c.rgb_size}x{c.rgb_size}",
    }


def _functa(fields: dict) -> dict[str, str]:
    c = FunctaConfig.from_dict(fields)
    rates = f"{c.inner_rate}" if c.rates == "none" else f"learned, {c.rates}"
    return {
        "field": f"{c.num_layers} layers, width {c.hidden_size}, omega {c.omega_0:g}, {c.channels} channels",
        "latent": f"{_by(c.latent_shape)}, {c.interpolation}, {c.modulate}, layout {c.modulation_layout}",
        "signal": _by(c.image_size),
        "fit": f"{c.inner_steps} steps, rates {rates}, times {c.rate_multiplier:g}",
    }


def _latent_classifier(fields: dict) -> dict[str, str]:
    c = LatentClassifierConfig.from_dict(fields)
    return {
        "classifier": f"{c.kind}, {c.num_layers} layers, width {c.hidden_size}, {c.num_classes} classes",
        "latent": f"{_by((c.latent_size, c.latent_size, c.latent_channels))}, divided by {c.normalizing_factor:g}",
    }


def _niso(fields: dict) -> dict[str, str]:
    c = NisoConfig.from_dict(fields)
    lines = {
        "kind": c.kind,
        "signal": f"{_by(c.image_size)} with {c.channels} channels",
        "operator": f"{c.op_dim} functions on a grid of {_by(c.grid)}, {c.latent_channels} channels",
    }
    if c.encoder_channels:
        lines["encoder"] = f"{len(c.encoder_channels)} levels, widths {', '.join(map(str, c.encoder_channels))}"
    if c.kind != "autoencoder":
        lines["head"] = f"{c.head_layers} layers, width {c.head_features}"
    return lines


def _titok(fields: dict) -> dict[str, str]:
    c = TiTokConfig.from_dict(fields)
    code = f"{c.codebook_size} codes of {c.latent_channels}" if c.mode == "vq" else f"Gaussians of {c.latent_channels}"
    pixels = "pixels" if c.target == "pixels" else f"{c.target_codes} codes of pixels"
    return {
        "encoder": f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads",
        "latents": f"{c.num_latents} out of {code}, layout {c.latent_layout}",
        "decoder": f"{c.decoder_layers} layers, width {c.decoder_size}, {c.decoder_heads} heads, to {pixels}",
        "image": f"{_by(c.image_size)}, patches of {c.patch_size}" + (", pixel decoder" if c.pixels else ""),
    }


def _maskgit_vqgan(fields: dict) -> dict[str, str]:
    c = MaskGITVQGANConfig.from_dict(fields)
    return {
        "levels": f"widths {', '.join(map(str, c.widths))}, {c.res_blocks} blocks each, shortcut of the {c.shortcut}",
        "codes": f"{c.codebook_size} of {c.latent_channels}, one each {c.factor}x{c.factor} pixels",
    }


def _token_generator(fields: dict) -> dict[str, str]:
    c = TokenGeneratorConfig.from_dict(fields)
    return {
        "generator": f"{c.kind}, {c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads",
        "tokens": f"{c.num_tokens} out of {c.codebook_size} codes, {c.num_classes} classes",
        "sampling": f"{c.steps} steps, guidance {c.guidance:g} ({c.schedule}), temperature {c.temperature:g}",
    }


def _tokenizer(fields: dict) -> dict[str, str]:
    c = TokenizerConfig.from_dict(fields)
    return {
        "encoder": f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads, {c.activation}",
        "latents": f"{c.num_latents} out of {c.codebook_size} codes of {c.latent_channels}, layout {c.latent_layout}",
        "decoder": f"grid {_by(c.decoder_grid)}, {len(c.channel_multipliers)} levels of {c.decoder_channels}+ channels",
        "image": f"{_by(c.image_size)}, patches of {c.patch_size}",
    }


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


class Kind(NamedTuple):
    """A model: what converts it, the suffixes of the foreign files, and its config in words."""

    converter: ModuleType | tokenizers.Family
    suffixes: tuple[str, ...]
    describe: Callable[[dict], dict[str, str]]


KINDS = {
    "scaling4d": Kind(scaling4d, (".npz",), _scaling4d),
    "d4rt": Kind(d4rt, d4rt.SUFFIXES, _d4rt),
    "functa": Kind(functa, functa.SUFFIXES, _functa),
    "latent_classifier": Kind(latent_classifier, latent_classifier.SUFFIXES, _latent_classifier),
    "titok": Kind(tokenizers.TITOK, tokenizers.SUFFIXES, _titok),
    "maskgit_vqgan": Kind(tokenizers.MASKGIT_VQGAN, tokenizers.SUFFIXES, _maskgit_vqgan),
    "token_generator": Kind(tokenizers.GENERATOR, tokenizers.SUFFIXES, _token_generator),
    "tokenizer": Kind(tokenizers.TOKENIZER, tokenizers.SUFFIXES, _tokenizer),
    "niso": Kind(niso, niso.SUFFIXES, _niso),
}
