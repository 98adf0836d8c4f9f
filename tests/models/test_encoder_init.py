"""Encoders that start from trained ViTs: timm's own features come out of them; what does not fit is named."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fourdperf.convert.d4rt_encoder import IMAGENET_MEAN, IMAGENET_STD
from fourdperf.models import image_mae, scaling4d, titok, tokenizer
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.encoder_init import NAMES, encoder_fields, init_encoder
from fourdperf.models.image_mae import ImageMAE
from fourdperf.models.scaling4d import Scaling4D
from fourdperf.models.titok import TiTok
from fourdperf.models.tokenizer import Tokenizer
from tests.models.goldens import GOLDENS, Golden, close
from tests.models.tokenizer_cases import recipe_tensor

SMALL = {
    **{"num_latents": 5, "latent_channels": 4, "hidden_size": 64, "num_layers": 3, "num_heads": 1, "mlp_size": 256},
    **{"codebook_size": 20, "decoder_size": 16, "decoder_channels": 32, "channel_multipliers": (1, 2)},
    **{"res_blocks": 1, "attention_sizes": ()},
}
SIZES = {"mae": (32, 16), "clip": (32, 16), "dinov2": (28, 14)}


def make(name="mae", **fields) -> Tokenizer:
    torch.manual_seed(0)
    image_size, patch_size = SIZES.get(name, (32, 16))
    fields = {"image_size": image_size, "patch_size": patch_size, **encoder_fields(name), **SMALL, **fields}
    return Tokenizer(tokenizer.Config(**fields)).double().eval()


def golden(name) -> tuple[Golden, dict[str, torch.Tensor]]:
    case = Golden(GOLDENS / "encoder_init" / f"{name}.npz")
    recipe = case.spec["recipe"]
    return case, {key: recipe_tensor(key, *entry, recipe["seed"]) for key, entry in recipe["entries"].items()}


def write(path, state, prefix=""):
    """As .safetensors, or in the wrapper that MAE's authors have."""
    state = {prefix + name: x for name, x in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
    return path


def features(model, images) -> torch.Tensor:
    """Of class token and patches, as if there were no latent tokens."""
    encoder = model.encoder
    if isinstance(model, Tokenizer):
        images = 2 * images - 1
    patches = encoder.patch_embed(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    positions = encoder.positions[: -encoder.num_latents]
    if not encoder.class_position:
        positions = F.pad(positions, (0, 0, 1, 0))
    tokens = torch.cat([encoder.class_token.expand(len(images), 1, -1), patches], dim=1) + positions
    if encoder.norm_pre is not None:
        tokens = encoder.norm_pre(tokens)
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


def own(model) -> dict[str, torch.Tensor]:
    """What no ViT has."""
    encoder, latents = model.encoder, model.encoder.num_latents
    mine = {"tokens": encoder.latent_tokens, "positions": encoder.positions[-latents:], "out": encoder.out.weight}
    return {name: x.detach().clone() for name, x in mine.items()}


@pytest.mark.parametrize("fields", [{}, {"class_position": False}], ids=["positions for all", "none for the class"])
@pytest.mark.parametrize(
    ("name", "case", "file", "prefix"),
    [
        ("mae", "mae", "mae.pth", ""),
        ("vit_base_patch16_224.mae", "mae", "model.safetensors", ""),
        ("dino", "mae", "dino.pth", ""),
        ("clip", "clip", "model.safetensors", ""),
        ("dinov2", "dinov2", "model.safetensors", ""),
        ("depth_anything_v2", "dinov2", "depth_anything_v2_vitb.pth", "pretrained."),
    ],
)
def test_features_are_timms(tmp_path, name, case, file, prefix, fields):
    found, state = golden(case)
    state["mask_token" if case == "dinov2" else "head.weight"] = torch.zeros(1, 64)
    model = make(case, **fields)
    before = own(model)
    report = init_encoder(model, name, write(tmp_path / file, state, prefix))
    close(features(model, found.inputs["images"].double()), found.outputs["features"], 1e-6)
    assert all(torch.equal(x, before[key]) for key, x in own(model).items())
    assert f"{tmp_path / file}: 3 of 3 blocks" in report and "as they were: latent_tokens, out" in report
    assert f"not used: {prefix}{'mask_token' if case == 'dinov2' else 'head.weight'}" in report


def test_titok(tmp_path):
    """Pictures in [0, 1], a norm before the blocks of its own, another eps: said, and like the ViT but for these."""
    case, state = golden("mae")
    sizes = {name: SMALL[name] for name in ("num_latents", "latent_channels", "hidden_size", "num_layers", "num_heads")}
    model = TiTok(titok.Config(image_size=32, patch_size=16, **sizes)).double().eval()
    report = init_encoder(model, "mae", write(tmp_path / "mae.pth", state))
    assert "norm_eps 1e-05, where the ViT had 1e-06" in report and "norm_pre.weight" in report
    model.encoder.norm_pre = None
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    close(features(model, case.inputs["images"].double()), case.outputs["features"], 1e-6)
    with pytest.raises(ValueError, match=r"clip: wanted an encoder with activation quick_gelu \(it has gelu\)"):
        init_encoder(model, "clip", write(tmp_path / "clip.pth", golden("clip")[1]))


def test_scales_of_the_encoder_become_one(tmp_path):
    case, state = golden("dinov2")
    model = make("dinov2", layer_scale=True)
    for block in model.encoder.blocks:
        torch.nn.init.normal_(block.attention_scale), torch.nn.init.normal_(block.mlp_scale)
    init_encoder(model, "dinov2", write(tmp_path / "model.safetensors", state))
    close(features(model, case.inputs["images"].double()), case.outputs["features"], 1e-6)
    with pytest.raises(ValueError, match=r"dinov2: wanted an encoder with patch_bias True \(it has False\)"):
        init_encoder(make("dinov2", patch_bias=False), "dinov2", tmp_path / "model.safetensors")


def test_fewer_layers(tmp_path):
    _, state = golden("mae")
    model = make(num_layers=2)
    report = init_encoder(model, "mae", write(tmp_path / "mae.pth", state))
    assert "2 of 3 blocks" in report and "blocks.2" not in report
    assert torch.equal(model.encoder.blocks[1].mlp.dense_in.weight.float(), state["blocks.1.mlp.fc1.weight"])


def test_larger_patches(tmp_path):
    """DINOv2's patches of 14 made 16: a picture enlarged patch by patch gives what the original gave the small one."""
    case, state = golden("dinov2")
    model = make("dinov2", image_size=32, patch_size=16)
    report = init_encoder(model, "dinov2", write(tmp_path / "dinov2.pth", state))
    assert "patch kernel 14x14 made 16x16" in report
    cells = case.inputs["images"].double().unflatten(2, (2, 14)).unflatten(1, (2, 14)).permute(0, 1, 3, 5, 2, 4)
    larger = F.interpolate(cells.reshape(-1, 3, 14, 14), size=(16, 16), mode="bilinear")
    images = larger.view(2, 2, 2, 3, 16, 16).permute(0, 1, 4, 2, 5, 3).reshape(2, 32, 32, 3)
    close(features(model, images), case.outputs["features"], 1e-6)


def test_smaller_patches(tmp_path):
    """Patches of 16 made 8: a small patch has the answer of the large ones of least norm that shrink to it."""
    _, state = golden("mae")
    small, large = make(image_size=16, patch_size=8), make(image_size=32, patch_size=16)
    for model in (small, large):
        init_encoder(model, "mae", write(tmp_path / "mae.pth", state))
    eye = torch.eye(16, dtype=torch.float64)
    shrink = F.interpolate(eye[None, None], size=(8, 16), mode="bilinear", antialias=True)[0, 0]
    enlarge = torch.linalg.pinv(shrink)
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64)  # less their mean, over their deviation
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    embed = lambda model, pixels: model.encoder.patch_embed(2 * (pixels * std + mean) - 1).detach()
    close(embed(small, pixels), embed(large, enlarge @ pixels @ enlarge.T), 1e-6)


@pytest.mark.parametrize("size", [(96, 48), (16, 16)], ids=["larger", "smaller"])
def test_positions_are_resampled(tmp_path, size):
    _, state = golden("mae")
    model = make(image_size=size)
    report = init_encoder(model, "mae", write(tmp_path / "mae.pth", state))
    grid = size[0] // 16, size[1] // 16
    table = state["pos_embed"][:, 1:].double().view(1, 2, 2, 64).permute(0, 3, 1, 2)
    wanted = F.interpolate(table, size=grid, mode="bicubic", antialias=True)[0].flatten(1).T
    assert f"positions 2x2 made {grid[0]}x{grid[1]}" in report
    close(model.encoder.positions[1 : 1 + grid[0] * grid[1]].detach(), wanted, 1e-6)
    close(model.encoder.positions[0].detach(), state["pos_embed"][0, 0].double(), 1e-12)


def test_image_mae(tmp_path):
    """Our own, from a run's folder: the same features, at another size too."""
    torch.manual_seed(1)
    sizes = {name: SMALL[name] for name in ("hidden_size", "num_layers", "num_heads", "mlp_size")}
    mae = ImageMAE(image_mae.Config(image_size=(32, 48), patch_size=16, **sizes, decoder_size=8, decoder_heads=1))
    mae.save_pretrained(tmp_path / "model")
    model, images = make(image_size=(32, 48)), torch.rand(2, 32, 48, 3, dtype=torch.float64)
    for folder in (tmp_path, tmp_path / "model"):
        report = init_encoder(model, "image_mae", folder)
        wanted = mae.double().encoder(2 * images - 1, torch.arange(6).expand(2, -1))
        close(features(model, images), wanted, 1e-6)
    assert "3 of 3 blocks; as they were: latent_tokens, out.weight, out.bias" in report
    assert "patch kernel 16x16 made 8x8; positions 2x3 made 4x4" in init_encoder(
        make(image_size=32, patch_size=8), "image_mae", tmp_path
    )


def test_4ds(tmp_path):
    """Patches of a picture have the features that 4DS has for it, shown over and over, but for positions in time."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 1, "patch_size": (2, 16, 16), "video_size": (4, 32, 32)}
    video_model = Scaling4D(scaling4d.Config(**sizes))
    with torch.no_grad():
        for x in video_model.parameters():
            x.normal_(std=0.2)
    video_model.save_pretrained(tmp_path / "4ds")
    model = make()
    report = init_encoder(model, "4ds", tmp_path / "4ds")
    assert "3 of 3 blocks" in report and "class_token" in report and "norm.weight" in report
    images = torch.rand(2, 32, 32, 3, dtype=torch.float64)
    tokenizer_ = video_model.double().encoder.tokenizer
    wanted = tokenizer_(images[:, None].expand(-1, 4, -1, -1, -1)).unflatten(1, (2, 4)).mean(1)
    patches = model.encoder.patch_embed((2 * images - 1).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    close(patches + model.encoder.positions[1:5], wanted, 1e-6)
    theirs = video_model.encoder.processor.layers[1](wanted)
    close(model.encoder.blocks[1](wanted), theirs, 1e-3)  # the exact GELU


# Where weights are


def test_hub_caches(tmp_path, monkeypatch):
    """Without a file: the Hugging Face hub's folders, then torch.hub's; else what to get is said."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    fields = {"hidden_size": 384, "num_heads": 6, "mlp_size": 64, "num_layers": 1}
    with pytest.raises(FileNotFoundError) as error:
        init_encoder(make("dinov2", **fields), "dinov2")
    for part in ("hub or", "checkpoints", "co/timm/vit_small_patch14_dinov2.lvd142m", "dinov2_vits14_pretrain.pth"):
        assert part in str(error.value)
    _, state = golden("dinov2")
    shapes = {
        name: [384 if n == 64 else 1152 if n == 192 else 64 if n == 256 else n for n in x.shape]
        for name, x in state.items()
    }
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write(checkpoints / "dinov2_vits14_pretrain.pth", state)
    assert "dinov2_vits14_pretrain.pth" in init_encoder(make("dinov2", **fields), "dinov2")
    snapshot = tmp_path / "hub" / "models--timm--vit_small_patch14_dinov2.lvd142m" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    write(snapshot / "model.safetensors", state)
    for name in ("dinov2", "vit_small_patch14_dinov2.lvd142m"):
        assert "0123abc/model.safetensors" in init_encoder(make("dinov2", **fields), name)
    with pytest.raises(
        FileNotFoundError, match=r"no weights in .*timm/vit_small_patch16_224.dino, or dino_deitsmall16"
    ):
        init_encoder(make(**fields), "dino")


@pytest.mark.parametrize("name", [*NAMES, "vit_large_patch16_224.mae"])
def test_no_weights(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="wanted weights|no weights in .*vit_large_patch16_224.mae"):
        init_encoder(make(), name)
    with pytest.raises((FileNotFoundError, CheckpointError), match="nowhere"):
        init_encoder(make(name if name in SIZES else "mae"), name, tmp_path / "nowhere")


# Refusing


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "clip",
            encoder_fields("mae"),
            r"clip: .* activation quick_gelu \(it has gelu\), norm_pre True \(it has False\)",
        ),
        ("mae", {"qkv_bias": False}, r"mae: wanted an encoder with qkv_bias True \(it has False\)"),
        ("mae", {"activation": "tanh"}, r"activation gelu \(it has tanh\)"),
        ("mae", {"num_heads": 4}, r"num_heads 1 \(it has 4\)"),
        ("mae", {"num_layers": 4}, "num_layers: the encoder has 4, the file 3"),
        ("mae", {"hidden_size": 32}, "hidden_size: the encoder has 32, the file 64"),
        ("mae", {"mlp_size": 128}, r"blocks.0.mlp.dense_in.weight: expected shape \(128, 64\), got \(256, 64\)"),
        (
            "vit",
            {},
            "init_encoder: wanted one of mae, clip, dino, dinov2, depth_anything_v2, 4ds, image_mae, or timm's",
        ),
    ],
)
def test_encoders_that_do_not_fit(tmp_path, name, fields, message):
    case = name if name in SIZES else "mae"
    model = make(case, **fields)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        init_encoder(model, name, write(tmp_path / "weights.pth", golden(case)[1]))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def without(state, key):
    return {name: x for name, x in state.items() if name != key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (partial(without, key="blocks.1.attn.proj.bias"), "missing blocks.1.attn.proj.bias"),
        (partial(without, key="pos_embed"), "missing pos_embed"),
        (partial(without, key="cls_token"), "missing cls_token"),
        (partial(without, key="norm.weight"), "missing norm.weight"),
        (lambda state: {**state, "norm.bias": torch.zeros(3)}, r"norm.bias: expected shape \(64,\), got \(3,\)"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 7, 64)}, "expected the places of a square.* got 7"),
        (
            lambda state: {**state, "blocks.0.attn.q_norm.weight": torch.ones(64)},
            "no place in our blocks for blocks.0.attn",
        ),
        (lambda state: {"encoder." + name: x for name, x in state.items()}, "expected a ViT under timm's names"),
        (lambda state: {**state, "patch_embed.proj.weight": torch.zeros(64, 1, 16, 16)}, r"\(D, 3, h, w\), got"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    model = make()
    with pytest.raises(CheckpointError, match=message):
        init_encoder(model, "mae", write(tmp_path / "weights.pth", damage(golden("mae")[1])))
    path = write(tmp_path / "weights.safetensors", golden("mae")[1])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        init_encoder(model, "mae", path)


def test_folders_of_other_kinds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "tokenizer"}))
    for name in ("4ds", "image_mae"):
        with pytest.raises(
            CheckpointError, match=f"expected a config with model '{'scaling4d' if name == '4ds' else name}'"
        ):
            init_encoder(make(), name, tmp_path)
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no pytorch_model.bin"):
        init_encoder(make(), "mae", tmp_path)
