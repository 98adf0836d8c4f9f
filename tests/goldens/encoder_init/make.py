"""Makes the .npz files here with timm: `python make.py`, with timm 1.0.31 and this repository on the path."""

import json
from pathlib import Path

import numpy as np
import timm
import torch

from tests.models.tokenizer_cases import recipe_tensor

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 1, "num_classes": 0}
MODELS = {
    "mae": ("vit_base_patch16_224", {"img_size": 32}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32}),
    "dinov2": ("vit_base_patch14_dinov2", {"img_size": 28}),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

for number, (name, (architecture, options)) in enumerate(MODELS.items()):
    model = timm.create_model(architecture, **SMALL, **options).eval().double()
    entries = {}
    for key, x in model.state_dict().items():
        centre = 1.0 if x.ndim == 1 and key.endswith(("weight", "gamma")) else 0.0
        entries[key] = [list(x.shape), centre, 1.5 * x[0].numel() ** -0.5 if x.ndim > 1 else 0.3]
    recipe = {"seed": number, "entries": entries}
    model.load_state_dict({key: recipe_tensor(key, *entry, number).double() for key, entry in entries.items()})
    side = options["img_size"]
    images = torch.from_numpy(np.random.default_rng(number).random((2, side, side, 3), np.float32))
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (CLIP if name == "clip" else IMAGENET))
    with torch.no_grad():
        features = model.forward_features(((images - mean) / std).permute(0, 3, 1, 2))
    config = {"case": name, "architecture": architecture, "timm": timm.__version__, "recipe": recipe}
    np.savez_compressed(
        Path(__file__).with_name(f"{name}.npz"),
        config=json.dumps(config),
        **{"in/images": images.numpy(), "out/features": features.numpy()},
    )
