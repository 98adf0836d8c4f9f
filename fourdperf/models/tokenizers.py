"""The tokenizers of images behind one door: any family from its folder, its codes, and what it made of which codes."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from fourdperf.models.checkpoint import CONFIG, CheckpointError
from fourdperf.models.titok import TiTok
from fourdperf.models.token_generator import TokenGenerator
from fourdperf.models.tokenizer import Tokenizer

__all__ = ["FAMILIES", "check_pictures", "decode", "encode", "fingerprint", "load_generator", "load_tokenizer"]

FAMILIES = {family.MODEL: family for family in (Tokenizer, TiTok)}


def load_tokenizer(path: Path) -> Tokenizer | TiTok:
    """The tokenizer, in eval mode, of a folder with weights and config, or of a run's folder (its `model`).

    Raises FileNotFoundError where there is nothing, CheckpointError (a ValueError) where it is no tokenizer's.
    """
    folder = _model_folder(path)
    try:
        name = json.loads((folder / CONFIG).read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the folder of a tokenizer or of a run, found no {CONFIG}") from error
    if name not in FAMILIES:
        raise CheckpointError(f"{path}: expected a model of {' or '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name].from_pretrained(folder)


def load_generator(path: Path) -> TokenGenerator:
    """The token generator, in eval mode, of a model's or a run's folder; raises as `load_tokenizer`."""
    return TokenGenerator.from_pretrained(_model_folder(path))


def _model_folder(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no such model: {path}")
    return path / "model" if (path / "model").is_dir() else path


def check_pictures(model: Tokenizer | TiTok) -> None:
    """Raises ValueError for a TiTok before its last stage of training, which decodes to no pictures."""
    if isinstance(model, TiTok) and model.config.target == "codes" and model.pixel_decoder is None:
        raise ValueError("model: expected one that decodes to pictures, got a TiTok of stage 1, whose are logits")


def encode(model: Tokenizer | TiTok, images: Tensor) -> Tensor:
    """What a picture is stored as: int64 codes `(B, N)`, or latents `(B, N, C)` of a VAE; images `(B, H, W, 3)`."""
    encoded = model.encode(images)
    return encoded.latents if encoded.indices is None else encoded.indices


def decode(model: Tokenizer | TiTok, codes: Tensor) -> Tensor:
    """The pictures `(B, H, W, 3)`, fp32 in [0, 1], of what `encode` gives."""
    images = model.decode(codes) if codes.is_floating_point() else model.decode_indices(codes)
    return images.float().clamp(0, 1)


def fingerprint(model: Tokenizer | TiTok) -> str:
    """16 digits that tell whose codes are whose: of the config, where it differs from the default, and of the encoder's
    last weights, rounded to bf16, so that a copy in bf16 has the same."""
    usual = type(model.config)().to_dict()
    fields = {name: value for name, value in model.config.to_dict().items() if value != usual[name]}
    description = json.dumps({"model": model.MODEL, **fields}, sort_keys=True)
    weights = model.encoder.out.weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
    return hashlib.sha256(description.encode() + weights.numpy().tobytes()).hexdigest()[:16]
