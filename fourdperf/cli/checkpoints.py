"""What several commands share: finding a model, and the devices and number types they offer."""

from pathlib import Path
from typing import Literal

import torch

from fourdperf.convert import scaling4d as converter
from fourdperf.models.scaling4d import Config, Scaling4D
from fourdperf.models.titok import TiTok
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import check_pictures, load_tokenizer

__all__ = ["Device", "Dtype", "load_scaling4d", "open_tokenizer", "pick_device"]

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


def pick_device(device: Device) -> torch.device:
    """The device of that name; "auto" is a GPU where PyTorch sees one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    return torch.device(device)


def load_scaling4d(
    checkpoint: Path | None, variant: str, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Scaling4D, str]:
    """A 4DS model in eval mode, and a phrase that says where its weights come from.

    ``checkpoint`` is a folder of ours or a released .npz; without one, an encoder of the size ``variant`` gets random
    weights from ``seed``.

    Raises:
        FileNotFoundError: there is nothing at ``checkpoint``.
        ValueError: the checkpoint cannot be read, or there is no such variant.
    """
    if checkpoint is None:
        torch.manual_seed(seed)
        model = Scaling4D(Config.from_variant(variant)).to(device=device, dtype=dtype).eval()
        return model, f"random weights (4DS-{variant}, seed {seed}; --checkpoint takes real ones)"
    if not checkpoint.exists():
        raise FileNotFoundError(f"no such checkpoint: {checkpoint}")
    load = Scaling4D.from_pretrained if checkpoint.is_dir() else converter.load_npz
    model = load(checkpoint, dtype=dtype, device=device)
    return model, f"{checkpoint} (4DS-{model.config.variant or 'custom'})"


def open_tokenizer(path: Path | None, device: Device, option: str = "--model") -> Tokenizer | TiTok:
    """The tokenizer of a model's or a run's folder that decodes to pictures, in eval mode, without gradients.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: no path was given, or it is no tokenizer's that decodes to pictures.
    """
    if path is None:
        raise ValueError(
            f"{option}: wanted the folder of a tokenizer, or of a run of fourdperf train tokenizer, got none"
        )
    model = load_tokenizer(path)
    check_pictures(model)
    model = model.to(pick_device(device)).requires_grad_(False)
    if model.encoder.positions.device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # of kernels, which convolutions there would copy every time
    return model
