"""Tokenizers and generators of pictures of other projects, to a checkpoint directory of ours, and back.

Of the seed's 1d-tokenizer the Lightning checkpoints, with its own encoder or timm's ViTs: MAE's, DINO's, CLIP's (a norm
before the blocks, no bias of patches) and DINOv2's or Depth Anything v2's (LayerScale); of bytedance/1d-tokenizer (TiTok) tokenizers,
MaskGIT's VQGAN and generators, as `.bin` or `.safetensors`. The result computes what the original computes:
`Config.upstream` and the fields of the variants name every choice of the originals that is not ours.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourdperf.convert.state import read_state
from fourdperf.convert.table import Row
from fourdperf.data.files import atomic_path
from fourdperf.models import maskgit_vqgan, titok, token_generator, tokenizer
from fourdperf.models.checkpoint import CheckpointError, PretrainedModel, check_keys, load_weights, read_config
from fourdperf.models.config import BaseConfig

__all__ = ["GENERATOR", "MASKGIT_VQGAN", "SUFFIXES", "TITOK", "TOKENIZER", "Family"]

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pth")
Shapes = Mapping[str, tuple[int, ...]]


# ---- parts


def same(ours: str, theirs: str, *shape: int, source: tuple[int, ...] | None = None) -> Row:
    """One tensor of one; `source`: the shape there, where it has axes of length 1 that ours has not."""
    return Row(ours, shape, ((theirs, source or shape),))


def linear(ours: str, theirs: str, inputs: int, outputs: int, *, bias: bool = True, axes: int = 0) -> list[Row]:
    """A linear layer; there a convolution with `axes` axes of length 1."""
    rows = [same(f"{ours}.weight", f"{theirs}.weight", outputs, inputs, source=(outputs, inputs, *[1] * axes))]
    return rows + [same(f"{ours}.bias", f"{theirs}.bias", outputs)] * bias


def norm(ours: str, theirs: str, width: int) -> list[Row]:
    return [same(f"{ours}.{kind}", f"{theirs}.{kind}", width) for kind in ("weight", "bias")]


def conv(ours: str, theirs: str, inputs: int, outputs: int, size: int, *, bias: bool = True) -> list[Row]:
    rows = [same(f"{ours}.weight", f"{theirs}.weight", outputs, inputs, size, size)]
    return rows + [same(f"{ours}.bias", f"{theirs}.bias", outputs)] * bias


class Names(NamedTuple):
    """What another project calls the parts of a transformer block; qkv and out as (weight, bias) names."""

    attention_norm: str
    qkv: tuple[tuple[str, ...], tuple[str, ...]]
    out: str
    mlp_norm: str
    dense_in: str
    dense_out: str


CLIP = Names(
    "ln_1", (("attn.in_proj_weight",), ("attn.in_proj_bias",)), "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"
)
TIMM = Names("norm1", (("attn.qkv.weight",), ("attn.qkv.bias",)), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
SEED = Names("0.norm", (("0.fn.to_qkv.weight",), ()), "0.fn.to_out", "1.norm", "1.fn.net.0", "1.fn.net.2")
UVIT = TIMM._replace(qkv=(("attn.qkv.weight",), ()))
BERT = Names(
    "attention.output.LayerNorm",
    tuple(tuple(f"attention.self.{part}.{kind}" for part in ("query", "key", "value")) for kind in ("weight", "bias")),
    "attention.output.dense",
    "output.LayerNorm",
    "intermediate.dense",
    "output.dense",
)


SCALES = {"attention_scale": "ls1.gamma", "mlp_scale": "ls2.gamma"}  # timm's


def block(
    ours: str,
    theirs: str,
    names: Names,
    width: int,
    mlp_size: int,
    inner: int | None = None,
    layer_scale: bool = False,
) -> list[Row]:
    """A transformer block; `inner`: width of all heads together."""
    inner = inner or width
    scales = SCALES.items() if layer_scale else ()
    rows = norm(f"{ours}.attention_norm", f"{theirs}.{names.attention_norm}", width)
    for kind, sources, shape in (("weight", names.qkv[0], (width,)), ("bias", names.qkv[1], ())):
        if sources:
            rows_each = 3 * inner // len(sources)
            parts = tuple((f"{theirs}.{source}", (rows_each, *shape)) for source in sources)
            rows.append(Row(f"{ours}.attention.qkv.{kind}", (3 * inner, *shape), parts))
    return [
        *rows,
        *linear(f"{ours}.attention.out", f"{theirs}.{names.out}", inner, width),
        *norm(f"{ours}.mlp_norm", f"{theirs}.{names.mlp_norm}", width),
        *linear(f"{ours}.mlp.dense_in", f"{theirs}.{names.dense_in}", width, mlp_size),
        *linear(f"{ours}.mlp.dense_out", f"{theirs}.{names.dense_out}", mlp_size, width),
        *(same(f"{ours}.{scale}", f"{theirs}.{source}", width) for scale, source in scales),
    ]


def masked_tokens(ours: str, theirs: str, patches: int, latents: int, channels: int, width: int) -> list[Row]:
    positions = (f"{theirs}positional_embedding", (1 + patches, width))
    latent_positions = (f"{theirs}latent_token_positional_embedding", (latents, width))
    return [
        *linear(f"{ours}embed", f"{theirs}decoder_embed", channels, width),
        same(f"{ours}class_token", f"{theirs}class_embedding", width, source=(1, width)),
        same(f"{ours}mask_token", f"{theirs}mask_token", width, source=(1, 1, width)),
        Row(f"{ours}positions", (1 + patches + latents, width), (positions, latent_positions)),
    ]


def res_block(ours: str, theirs: str, inputs: int, width: int, *, bias: bool, shortcut: str = "input") -> list[Row]:
    rows = norm(f"{ours}.norm_in", f"{theirs}.norm1", inputs) + norm(f"{ours}.norm_out", f"{theirs}.norm2", width)
    rows += conv(f"{ours}.conv_in", f"{theirs}.conv1", inputs, width, 3, bias=bias)
    rows += conv(f"{ours}.conv_out", f"{theirs}.conv2", width, width, 3, bias=bias)
    if inputs != width:
        channels = inputs if shortcut == "input" else width
        rows += conv(f"{ours}.skip", f"{theirs}.nin_shortcut", channels, width, 1, bias=bias)
    return rows


def pixel_attention(ours: str, theirs: str, width: int) -> list[Row]:
    rows = norm(f"{ours}.norm", f"{theirs}.norm", width)
    for kind, shape, ones in (("weight", (width,), (1, 1)), ("bias", (), ())):
        sources = tuple((f"{theirs}.{part}.{kind}", (width, *shape, *ones)) for part in "qkv")
        rows.append(Row(f"{ours}.qkv.{kind}", (3 * width, *shape), sources))
    return rows + linear(f"{ours}.out", f"{theirs}.proj_out", width, width, axes=2)


# ---- the seed's tokenizer


def tokenizer_table(config: tokenizer.Config) -> list[Row]:
    c, width = config, config.hidden_size
    patches = c.image_size[0] // c.patch_size * (c.image_size[1] // c.patch_size)
    rows = [same("quantizer.codebook", "quantize.embedding.weight", c.codebook_size, c.latent_channels)]
    if c.class_position:
        rows += [
            same("encoder.class_token", "encoder.cls_token", width, source=(1, 1, width)),
            same(
                "encoder.latent_tokens", "encoder.prompt_tokens", c.num_latents, width, source=(1, c.num_latents, width)
            ),
            same(
                *("encoder.positions", "encoder.pos_embed", 1 + patches + c.num_latents, width),
                source=(1, 1 + patches + c.num_latents, width),
            ),
            *conv("encoder.patch_embed", "encoder.patch_embed.proj", 3, width, c.patch_size, bias=c.patch_bias),
            *norm("encoder.norm", "encoder.norm", width),
            *linear("encoder.out", "ln", width, c.latent_channels),
        ]
        if c.norm_pre:
            rows += norm("encoder.norm_pre", "encoder.norm_pre", width)
        names, prefix = TIMM if c.qkv_bias else UVIT, "encoder.blocks"
    else:
        places = ("encoder.en_pos_embedding", (1, patches, width))
        latent_places = ("encoder.latent_token_positional_embedding", (c.num_latents, width))
        rows += [
            same("encoder.class_token", "encoder.class_embedding", width, source=(1, width)),
            same("encoder.latent_tokens", "encoder.latent_tokens", c.num_latents, width),
            Row("encoder.positions", (patches + c.num_latents, width), (places, latent_places)),
            *conv("encoder.patch_embed", "encoder.to_patch_embedding.0", 3, width, c.patch_size),
            *norm("encoder.norm", "encoder.transformer.norm", width),
            *linear("encoder.out", "encoder.conv_out", width, c.latent_channels, axes=2),
        ]
        names, prefix = SEED, "encoder.transformer.layers"
    inner = c.num_heads * (c.head_dim or width // c.num_heads)
    for index in range(c.num_layers):
        where = f"encoder.blocks.{index}", f"{prefix}.{index}"
        rows += block(*where, names, width, c.mlp_size, inner, c.layer_scale)
    return rows + _tokenizer_decoder(c)


def _tokenizer_decoder(c: tokenizer.Config) -> list[Row]:
    widths = [c.decoder_channels * multiplier for multiplier in reversed(c.channel_multipliers)]
    grid, last = c.decoder_grid, len(widths) - 1
    rows = masked_tokens(
        "decoder.tokens.", "decoder.", grid[0] * grid[1], c.num_latents, c.latent_channels, c.decoder_size
    )
    rows += conv("decoder.stem", "decoder.conv_in", c.decoder_size, widths[0], 3)
    rows += res_block("decoder.mid.0", "decoder.mid.block_1", widths[0], widths[0], bias=True)
    rows += pixel_attention("decoder.mid.1", "decoder.mid.attn_1", widths[0])
    rows += res_block("decoder.mid.2", "decoder.mid.block_2", widths[0], widths[0], bias=True)
    for index, (inputs, width) in enumerate(zip([widths[0], *widths], widths)):
        ours, theirs = f"decoder.levels.{index}", f"decoder.up.{last - index}"
        for part in range(c.res_blocks + 1):
            rows += res_block(f"{ours}.blocks.{part}", f"{theirs}.block.{part}", inputs, width, bias=True)
            inputs = width
            if c.image_size[0] // 2 ** (last - index) in c.attention_sizes:
                rows += pixel_attention(f"{ours}.attention.{part}", f"{theirs}.attn.{part}", width)
        if index < last:
            rows += conv(f"{ours}.upsample", f"{theirs}.upsample.conv", width, width, 3)
    rows += norm("decoder.norm", "decoder.norm_out", widths[-1])
    return rows + conv("decoder.out", "decoder.conv_out", widths[-1], 3, 3)


CLIP_COMPUTES = {"activation": "quick_gelu", "norm_eps": 1e-5}
CLIP_WARNING = (
    "activation: no array tells that of CLIP's encoder; taken is OpenAI's, quick_gelu, which timm's "
    "vit_base_patch16_clip_quickgelu_224 has. One that was made as vit_base_patch16_clip_224 needs gelu (fourdperf convert "
    "--fields.activation gelu)"
)


def infer_tokenizer(shapes: Shapes, overrides: Mapping) -> tokenizer.Config:
    """No array shows num_heads nor head_dim, which is 64 where it is not given; image_size is a square.

    An encoder with a norm before its blocks is CLIP's, whose activation no array shows either: a warning tells which is
    taken.
    """
    pretrained = "encoder.cls_token" in shapes
    prefix = "encoder.blocks.{}." if pretrained else "encoder.transformer.layers.{}."
    names = TIMM if pretrained else SEED
    patch = _shape(
        shapes, "encoder.patch_embed.proj.weight" if pretrained else "encoder.to_patch_embedding.0.weight", 4
    )
    codes, channels = _shape(shapes, "quantize.embedding.weight", 2)
    latents = _shape(shapes, "decoder.latent_token_positional_embedding", 2)[0]
    if pretrained:
        patches = _shape(shapes, "encoder.pos_embed", 3)[1] - 1 - latents
    else:
        patches = _shape(shapes, "encoder.en_pos_embedding", 3)[1]
    grid = _side(_shape(shapes, "decoder.positional_embedding", 2)[0] - 1, "decoder.positional_embedding")
    first = prefix.format(0)
    head_dim = overrides.get("head_dim") or 64
    levels = _count(shapes, "decoder.up.{}.block.0.norm1.weight")
    widths = [_shape(shapes, f"decoder.up.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    size = _side(patches, "encoder's positions") * patch[2]
    attention = [size // 2**level for level in range(levels) if f"decoder.up.{level}.attn.0.norm.weight" in shapes]
    fields = {
        **{"image_size": size, "patch_size": patch[2], "num_latents": latents, "latent_channels": channels},
        **{"hidden_size": patch[0], "num_layers": _count(shapes, prefix + names.attention_norm + ".weight")},
        "num_heads": _shape(shapes, first + names.qkv[0][0], 2)[0] // 3 // head_dim,
        "mlp_size": _shape(shapes, first + names.dense_in + ".weight", 2)[0],
        **{"codebook_size": codes, "decoder_size": _shape(shapes, "decoder.positional_embedding", 2)[1]},
        **{"decoder_channels": widths[0], "channel_multipliers": [width // widths[0] for width in widths]},
        "res_blocks": _count(shapes, "decoder.up.0.block.{}.norm1.weight") - 1,
        **{"attention_sizes": attention[::-1], "grid": grid},
    }
    if pretrained:
        fields["patch_bias"] = "encoder.patch_embed.proj.bias" in shapes
        fields["layer_scale"] = first + SCALES["mlp_scale"] in shapes
        if "encoder.norm_pre.weight" in shapes:
            fields |= {"norm_pre": True, **CLIP_COMPUTES}
            if "activation" not in overrides:
                warnings.warn(CLIP_WARNING, stacklevel=2)
    return tokenizer.Config.upstream(pretrained, **{**fields, **overrides})


# ---- MaskGIT's VQGAN


def pixel_decoder(ours: str, theirs: str, config: maskgit_vqgan.Config) -> list[Row]:
    c, widths = config, config.widths[::-1]
    options, last = {"bias": False, "shortcut": c.shortcut}, len(widths) - 1
    rows = conv(f"{ours}stem", f"{theirs}conv_in", c.latent_channels, widths[0], 3)
    for index in range(c.res_blocks):
        rows += res_block(f"{ours}mid.{index}", f"{theirs}mid.{index}", widths[0], widths[0], **options)
    for index, (inputs, width) in enumerate(zip([widths[0], *widths], widths)):
        for part in range(c.res_blocks):
            names = f"{ours}levels.{index}.{part}", f"{theirs}up.{last - index}.block.{part}"
            rows += res_block(*names, inputs if part == 0 else width, width, **options)
        if index < last:
            rows += conv(f"{ours}upsamples.{index}", f"{theirs}up.{last - index}.upsample_conv", width, width, 3)
    return (
        rows
        + norm(f"{ours}norm", f"{theirs}norm_out", widths[-1])
        + conv(f"{ours}out", f"{theirs}conv_out", widths[-1], 3, 3)
    )


def maskgit_vqgan_table(config: maskgit_vqgan.Config) -> list[Row]:
    c, widths = config, config.widths
    options = {"bias": False, "shortcut": c.shortcut}
    rows = [same("quantizer.codebook", "quantize.embedding.weight", c.codebook_size, c.latent_channels)]
    rows += conv("encoder.stem", "encoder.conv_in", 3, widths[0], 3, bias=False)
    for index, (inputs, width) in enumerate(zip([widths[0], *widths], widths)):
        for part in range(c.res_blocks):
            names = f"encoder.levels.{index}.{part}", f"encoder.down.{index}.block.{part}"
            rows += res_block(*names, inputs if part == 0 else width, width, **options)
    for index in range(c.res_blocks):
        rows += res_block(f"encoder.mid.{index}", f"encoder.mid.{index}", widths[-1], widths[-1], **options)
    rows += norm("encoder.norm", "encoder.norm_out", widths[-1])
    rows += conv("encoder.out", "encoder.conv_out", widths[-1], c.latent_channels, 1)
    return rows + pixel_decoder("decoder.", "decoder.", c)


def infer_maskgit_vqgan(shapes: Shapes, overrides: Mapping) -> maskgit_vqgan.Config:
    return _infer_pixels(shapes, "decoder.", "quantize.", overrides)


def _infer_pixels(shapes: Shapes, decoder: str, quantize: str, overrides: Mapping) -> maskgit_vqgan.Config:
    levels = _count(shapes, decoder + "up.{}.block.0.norm1.weight")
    widths = [_shape(shapes, f"{decoder}up.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    codes, channels = _shape(shapes, f"{quantize}embedding.weight", 2)
    fields = {
        **{"channels": widths[0], "channel_multipliers": [width // widths[0] for width in widths]},
        "res_blocks": _count(shapes, decoder + "up.0.block.{}.norm1.weight"),
        **{"latent_channels": channels, "codebook_size": codes},
    }
    return maskgit_vqgan.Config.upstream(**{**fields, **overrides})


# ---- TiTok


def titok_table(config: titok.Config) -> list[Row]:
    c, width = config, config.hidden_size
    patches = c.grid[0] * c.grid[1]
    channels = c.latent_channels * (2 if c.mode == "vae" else 1)
    places = ("encoder.positional_embedding", (1 + patches, width))
    latent_places = ("encoder.latent_token_positional_embedding", (c.num_latents, width))
    rows = [
        same("encoder.class_token", "encoder.class_embedding", width, source=(1, width)),
        same("encoder.latent_tokens", "latent_tokens", c.num_latents, width),
        Row("encoder.positions", (1 + patches + c.num_latents, width), (places, latent_places)),
        *conv("encoder.patch_embed", "encoder.patch_embed", 3, width, c.patch_size),
        *norm("encoder.norm_pre", "encoder.ln_pre", width),
        *norm("encoder.norm", "encoder.ln_post", width),
        *linear("encoder.out", "encoder.conv_out", width, channels, axes=2),
    ]
    for index in range(c.num_layers):
        rows += block(f"encoder.blocks.{index}", f"encoder.transformer.{index}", CLIP, width, 4 * width)
    if c.mode == "vq":
        rows.append(same("quantizer.codebook", "quantize.embedding.weight", c.codebook_size, c.latent_channels))
    width = c.decoder_size
    rows += masked_tokens("decoder.tokens.", "decoder.", patches, c.num_latents, c.latent_channels, width)
    rows += norm("decoder.norm_pre", "decoder.ln_pre", width) + norm("decoder.norm", "decoder.ln_post", width)
    for index in range(c.decoder_layers):
        rows += block(f"decoder.blocks.{index}", f"decoder.transformer.{index}", CLIP, width, 4 * width)
    if c.target == "codes":
        rows += linear("decoder.dense", "decoder.ffn.0", width, 2 * width, axes=2)
        rows += linear("decoder.out", "decoder.ffn.2", 2 * width, c.target_codes, axes=2)
    else:
        rows += linear("decoder.dense", "decoder.ffn.0", width, 3 * c.patch_size**2, axes=2)
        rows += conv("decoder.out", "decoder.conv_out", 3, 3, 3)
    if c.pixels is not None:
        rows.append(same("pixel_codes", "pixel_quantize.embedding.weight", c.target_codes, c.pixels.latent_channels))
        rows += pixel_decoder("pixel_decoder.", "pixel_decoder.", c.pixels)
    return rows


def infer_titok(shapes: Shapes, overrides: Mapping) -> titok.Config:
    """No array shows the numbers of heads, which are those of SIZES, or else of 64 channels each; images are square.

    Latents are normalised, and reshaped, where the decoder's target is codes, as in all releases.
    """
    overrides = dict(overrides)
    patch = _shape(shapes, "encoder.patch_embed.weight", 4)
    latents, width = _shape(shapes, "latent_tokens", 2)
    grid = _side(_shape(shapes, "encoder.positional_embedding", 2)[0] - 1, "encoder.positional_embedding")
    decoder_size, channels = _shape(shapes, "decoder.decoder_embed.weight", 2)
    heads = {size: count for size, _, count in titok.SIZES.values()}
    fields = {
        **{"image_size": grid * patch[2], "patch_size": patch[2], "num_latents": latents, "latent_channels": channels},
        **{"hidden_size": width, "num_layers": _count(shapes, "encoder.transformer.{}.ln_1.weight")},
        "decoder_size": decoder_size,
        "decoder_layers": _count(shapes, "decoder.transformer.{}.ln_1.weight"),
        "num_heads": heads.get(width, max(1, width // 64)),
        "decoder_heads": heads.get(decoder_size, max(1, decoder_size // 64)),
    }
    if "quantize.embedding.weight" in shapes:
        fields["codebook_size"] = _shape(shapes, "quantize.embedding.weight", 2)[0]
    else:
        fields["mode"] = "vae"
    if "decoder.ffn.2.weight" in shapes:
        fields |= {"target": "codes", "latent_layout": "upstream"}
        fields["target_codes"] = _shape(shapes, "decoder.ffn.2.weight", 4)[0]
    elif "mode" not in fields:
        fields["normalize"] = False
    if any(name.startswith("pixel_decoder.") for name in shapes):
        fields["pixels"] = _infer_pixels(shapes, "pixel_decoder.", "pixel_quantize.", overrides.pop("pixels", {}))
    return titok.Config.from_dict({**fields, **overrides})


# ---- generators


def generator_table(config: token_generator.Config) -> list[Row]:
    c, width, head = config, config.hidden_size, "model.lm_head" if config.kind == "bert" else "lm_head"
    rows = linear("head", head, width, c.codebook_size)
    if c.kind == "bert":
        words, prefix = "model.embeddings.word_embeddings.weight", "model.embeddings."
        rows += [
            same("positions", f"{prefix}position_embeddings.weight", 1 + c.num_tokens, width),
            same("segments", f"{prefix}token_type_embeddings.weight", 2, width),
            *norm("norm", f"{prefix}LayerNorm", width),
        ]
        places = [(f"blocks.{index}", f"model.encoder.layer.{index}") for index in range(c.num_layers)]
    else:
        words, half = "embeddings.weight", c.num_layers // 2
        rows += [
            same("positions", "pos_embed", 1 + c.num_tokens, width, source=(1, 1 + c.num_tokens, width)),
            *norm("norm", "norm", width),
        ]
        places = [(f"blocks.{index}", f"in_blocks.{index}") for index in range(half)]
        places += [(f"blocks.{half}", "mid_block")]
        places += [(f"skip_blocks.{index}", f"out_blocks.{index}") for index in range(half)]
    rows.append(same("tokens", words, c.vocabulary, width))
    for ours, theirs in places:
        rows += block(ours, theirs, BERT if c.kind == "bert" else UVIT, width, c.mlp_size)
        if ours.startswith("skip_"):
            rows += linear(f"{ours}.skip", f"{theirs}.skip_linear", 2 * width, width)
    return rows


def infer_generator(shapes: Shapes, overrides: Mapping) -> token_generator.Config:
    """No array shows num_heads, which is 16 as in all releases, nor the sampling; for a release these are its own."""
    bert = "model.lm_head.weight" in shapes
    prefix = "model." if bert else ""
    codes, width = _shape(shapes, f"{prefix}lm_head.weight", 2)
    if bert:
        words, places = (
            "model.embeddings.word_embeddings.weight",
            _shape(shapes, "model.embeddings.position_embeddings.weight", 2)[0],
        )
        mlp, layers = "model.encoder.layer.0.intermediate.dense.bias", "model.encoder.layer.{}.output.dense.bias"
    else:
        words, places = "embeddings.weight", _shape(shapes, "pos_embed", 3)[1]
        mlp, layers = "mid_block.mlp.fc1.bias", "in_blocks.{}.norm1.weight"
    count = _count(shapes, layers)
    fields = {
        **{"kind": "bert" if bert else "uvit", "codebook_size": codes, "num_tokens": places - 1},
        **{"num_classes": _shape(shapes, words, 2)[0] - codes - 2, "hidden_size": width},
        **{"num_layers": count if bert else 2 * count, "mlp_size": _shape(shapes, mlp, 1)[0]},
    }
    found = token_generator.Config.from_dict({**fields, **overrides})
    for name in token_generator.VARIANTS:
        release = token_generator.Config.from_variant(name)
        if all(getattr(release, field) == getattr(found, field) for field in fields):
            return token_generator.Config.from_dict({**release.to_dict(), **overrides})
    return found


# ---- both ways


class Family(NamedTuple):
    """A kind of model: its classes, its table of rows, its config from shapes, and what of a file is left unread."""

    MODEL: str
    model: type[PretrainedModel]
    table: Callable[[BaseConfig], list[Row]]
    infer: Callable[[Shapes, Mapping], BaseConfig]
    unread: tuple[str, ...] = ()

    def load_state(
        self, state: Mapping[str, Tensor], overrides: Mapping | None = None, where: str = "state"
    ) -> PretrainedModel:
        """A model of ours, in eval mode, from the original's tensors by name; `overrides` replace fields of the config.

        Raises CheckpointError (a ValueError) that names the file and every key that is missing, unknown or misshapen.
        """
        state = {name: x for name, x in state.items() if not self._unread(name, state)}
        shapes = {name: tuple(x.shape) for name, x in state.items()}
        try:
            config = self.infer(shapes, overrides or {})
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        rows = self.table(config)
        check_keys(where, {name: shape for row in rows for name, shape in row.sources}, shapes)
        with torch.device("meta"):
            model = self.model(config)
        model.load_state_dict({row.key: _pack(row, state) for row in rows}, assign=True)
        return model.eval()

    def load(self, path: str | os.PathLike, overrides: Mapping | None = None) -> PretrainedModel:
        """`load_state` of a file as in `read_state`."""
        return self.load_state(read_state(path), overrides, str(path))

    def convert(self, path: str | os.PathLike, out_dir: str | os.PathLike, *, overrides: Mapping | None = None):
        """Convert to a directory for `from_pretrained`; returns the config; errors as in `load_state`."""
        model = self.load(path, overrides)
        model.save_pretrained(out_dir)
        return model.config

    def state(self, model: PretrainedModel) -> dict[str, Tensor]:
        """The inverse of `load_state`, bit for bit, but for what is left unread."""
        ours = model.state_dict()
        return {name: x for row in self.table(model.config) for name, x in _unpack(row, ours[row.key])}

    def export(self, directory: str | os.PathLike, path: str | os.PathLike) -> None:
        """The inverse of `convert`: a `.safetensors`, or else a file of torch.save, for Lightning's `.ckpt` below
        "state_dict".

        Warns where the original's own module has tensors that take no part and are not written. Raises CheckpointError
        as `from_pretrained` does; ValueError for another suffix; OSError where the disk refuses.
        """
        suffix = Path(path).suffix
        if suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
        config = self.model.CONFIG.from_dict(read_config(directory, self.MODEL))
        with torch.device("meta"):
            model = self.model(config)
        load_weights(model, directory)
        state = {name: x.contiguous() for name, x in self.state(model).items()}
        if self.unread:
            warnings.warn(f"{path}: without {', '.join(self.unread)}; there load with strict=False", stacklevel=2)
        with atomic_path(path) as temporary:
            if suffix == ".safetensors":
                save_file(state, temporary)
            else:
                torch.save({"state_dict": state} if suffix == ".ckpt" else state, temporary)

    def _unread(self, name: str, state: Mapping[str, Tensor]) -> bool:
        if self.MODEL == tokenizer.MODEL and name.startswith("ln.") and "encoder.cls_token" in state:
            return False  # the seed's own encoder alone does without
        return any(name == x or (x.endswith(".") and name.startswith(x)) for x in self.unread)


SEED_UNREAD = ("latent_tokens", "post_quant_conv.", "ln.", "encoder.head.", "loss.")
TOKENIZER = Family(tokenizer.MODEL, tokenizer.Tokenizer, tokenizer_table, infer_tokenizer, SEED_UNREAD)
TITOK = Family(titok.MODEL, titok.TiTok, titok_table, infer_titok)
MASKGIT_VQGAN = Family(maskgit_vqgan.MODEL, maskgit_vqgan.MaskGITVQGAN, maskgit_vqgan_table, infer_maskgit_vqgan)
GENERATOR = Family(token_generator.MODEL, token_generator.TokenGenerator, generator_table, infer_generator)


def _pack(row: Row, state: Mapping[str, Tensor]) -> Tensor:
    """`Row.pack` for tensors of any dtype; a copy."""
    parts = [state[name].reshape(-1, *row.shape[1:]) for name, _ in row.sources]
    return torch.cat(parts).reshape(row.shape)


def _unpack(row: Row, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """`Row.unpack` for tensors of any dtype."""
    width = tensor[0].numel()
    parts = tensor.reshape(-1).split([torch.Size(shape).numel() for _, shape in row.sources])
    assert all(len(part) % width == 0 for part in parts)
    return [(name, part.reshape(shape)) for part, (name, shape) in zip(parts, row.sources)]


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"missing {name}")
    if len(shapes[name]) != axes:
        raise CheckpointError(f"{name}: expected {axes} axes, got shape {shapes[name]}")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern`, with 0, 1, .. in it, there are; at least one, or CheckpointError."""
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    if not count:
        raise CheckpointError(f"missing {pattern.format(0)}")
    return count


def _side(number: int, what: str) -> int:
    side = round(max(0, number) ** 0.5)
    if side < 1 or side * side != number:
        raise CheckpointError(f"{what}: expected those of a square of patches, got {number}")
    return side
