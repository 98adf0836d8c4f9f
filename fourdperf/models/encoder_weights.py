"""ViTs that encoders of tokenizers can start from, by name: what they compute, and where their weights are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fourdperf.convert.d4rt_encoder import IMAGENET_MEAN, IMAGENET_STD
from fourdperf.convert.state import hub_folder
from fourdperf.models.checkpoint import WEIGHTS

__all__ = ["NAMES", "OURS", "USUAL", "VITS", "Known", "find_weights", "resolve", "weights_file"]


class Known(NamedTuple):
    """A kind of ViT.

    places: by width, its repository on the Hugging Face hub, and its authors' file, as torch.hub keeps it.
    fields: of `tokenizer.Config`, as the ViT has them. prefix: before the names in the file.
    """

    places: dict[int, tuple[str, str | None]]
    fields: dict
    prefix: str = ""
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


USUAL = {"activation": "gelu", "qkv_bias": True, "norm_eps": 1e-6, "norm_pre": False}
MAE = {
    768: ("timm/vit_base_patch16_224.mae", "mae_pretrain_vit_base.pth"),
    1024: ("timm/vit_large_patch16_224.mae", "mae_pretrain_vit_large.pth"),
}
CLIP = {768: ("timm/vit_base_patch16_clip_224.openai", None), 1024: ("timm/vit_large_patch14_clip_224.openai", None)}
CLIP_FIELDS = {"activation": "quick_gelu", "qkv_bias": True, "norm_eps": 1e-5, "norm_pre": True}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO = {
    384: ("timm/vit_small_patch16_224.dino", "dino_deitsmall16_pretrain.pth"),
    768: ("timm/vit_base_patch16_224.dino", "dino_vitbase16_pretrain.pth"),
}
DINOV2 = {
    384: ("timm/vit_small_patch14_dinov2.lvd142m", "dinov2_vits14_pretrain.pth"),
    768: ("timm/vit_base_patch14_dinov2.lvd142m", "dinov2_vitb14_pretrain.pth"),
    1024: ("timm/vit_large_patch14_dinov2.lvd142m", "dinov2_vitl14_pretrain.pth"),
}
DEPTH_ANYTHING_V2 = {
    384: ("depth-anything/Depth-Anything-V2-Small", "depth_anything_v2_vits.pth"),
    768: ("depth-anything/Depth-Anything-V2-Base", "depth_anything_v2_vitb.pth"),
    1024: ("depth-anything/Depth-Anything-V2-Large", "depth_anything_v2_vitl.pth"),
}
VITS = {
    "mae": Known(MAE, USUAL),
    "clip": Known(CLIP, CLIP_FIELDS, mean=CLIP_MEAN, std=CLIP_STD),
    "dino": Known(DINO, USUAL),
    "dinov2": Known(DINOV2, USUAL),
    "depth_anything_v2": Known(DEPTH_ANYTHING_V2, USUAL, "pretrained."),
}
OURS = {"4ds": "a folder of fourdperf convert", "image_mae": "the folder of a run of fourdperf train image_mae"}
NAMES = (*VITS, *OURS)


def resolve(name: str) -> tuple[str, int | None]:
    """The kind, and the width where `name` tells that, too; raises ValueError for other names."""
    if name in NAMES:
        return name, None
    for kind, known in VITS.items():
        for width, (repository, _) in known.places.items():
            if repository == f"timm/{name}":
                return kind, width
    raise ValueError(f"init_encoder: wanted one of {', '.join(NAMES)}, or timm's name of such a model, got {name!r}")


def find_weights(kind: str, width: int) -> Path:
    """The file of a ViT of this width in the hubs' caches; raises FileNotFoundError that says what to get."""
    if kind in OURS:
        raise FileNotFoundError(f"{kind}: wanted weights, {OURS[kind]}, got none")
    places = VITS[kind].places
    if width not in places:
        widths = ", ".join(map(str, places))
        raise FileNotFoundError(f"{kind}: wanted weights, since there are none of width {width} (but of {widths})")
    repository, file = places[width]
    hub, checkpoints = _hub_cache(), hub_folder()
    snapshots = sorted((hub / f"models--{repository.replace('/', '--')}" / "snapshots").glob("*"))
    candidates = [snapshot / name for snapshot in snapshots for name in (WEIGHTS, "pytorch_model.bin", file) if name]
    candidates += [checkpoints / file] * (file is not None)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    theirs = f", or {file} of its authors" if file else ""
    raise FileNotFoundError(
        f"{kind}: no weights in {hub} or {checkpoints}; get those of https://huggingface.co/{repository}{theirs}, and "
        f"give the path of the file"
    )


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it loads, by its own rules."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface") / "hub"


def weights_file(path: Path) -> Path:
    """The file `path`, or the weights in the folder `path`; raises FileNotFoundError where there are none."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"weights: no such file: {path}")
        return path
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"weights: no {WEIGHTS} and no pytorch_model.bin in {path}")
