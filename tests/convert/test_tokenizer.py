"""TiTok's, MaskGIT-VQGAN's and the seed's checkpoints: every key of the real ones, and there and back."""

import warnings

import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.convert.d4rt_encoder import IMAGENET_MEAN, IMAGENET_STD
from fourdperf.convert.tokenizer import GENERATOR, MASKGIT_VQGAN, TITOK, TOKENIZER
from fourdperf.models import maskgit_vqgan, titok, token_generator, tokenizer
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.encoder_weights import CLIP_MEAN, CLIP_STD
from fourdperf.models.titok import TiTok
from fourdperf.models.token_generator import TokenGenerator
from fourdperf.models.tokenizer import Tokenizer
from tests.models.goldens import GOLDENS, Golden, close
from tests.models.tokenizer_cases import Case, first, keys, recipe_tensor

# Every real configuration: the key list's name, the family, and the config that it must give.
REAL = {
    **{f"titok_{name}": (TITOK, titok.Config.from_variant(name)) for name in titok.VARIANTS},
    **{
        f"titok_{name}_generator": (GENERATOR, token_generator.Config.from_variant(name))
        for name in token_generator.VARIANTS
    },
    "maskgit_vqgan": (MASKGIT_VQGAN, maskgit_vqgan.Config.upstream()),
    "c_baseline_pretrained_true": (TOKENIZER, tokenizer.Config.upstream()),
    "c_baseline_pretrained_false": (TOKENIZER, tokenizer.Config.upstream(pretrained=False)),
}
HEADS = {"num_heads": 4, "decoder_heads": 4}
# A small checkpoint of every kind: file, family, what no array shows.
SMALL = {
    "c_tokenizer": (TOKENIZER, {"head_dim": 8}),
    "d_titok_vq_legacy": (TITOK, HEADS),
    "d_titok_vq_nonlegacy": (TITOK, HEADS),
    "d_titok_vq_finetuned": (TITOK, HEADS),
    "d_titok_vae": (TITOK, HEADS),
    "d_maskgit_vqgan": (MASKGIT_VQGAN, {}),
    "d_imagebert": (GENERATOR, {"num_heads": 4}),
    "d_uvit": (GENERATOR, {"num_heads": 4}),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", REAL)
def test_every_key_of_the_real_checkpoints(name):
    """From names and shapes alone: the config, all keys of ours filled, none of theirs left but those named unread."""
    family, config = REAL[name]
    shapes = keys(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = family.load_state(state, {}, name)
    expected = config.to_dict()
    if family is TOKENIZER:
        expected["head_dim"] = model.config.head_dim
        assert config.head_dim or config.hidden_size // config.num_heads == 64
    assert model.config.to_dict() == expected
    back = {key: tuple(x.shape) for key, x in family.state(model).items()}
    left = {key for key in shapes if key not in back}
    assert back == {key: shape for key, shape in shapes.items() if key not in left}
    assert all(any(key == x or key.startswith(x) and x.endswith(".") for x in family.unread) for key in left)
    assert bool(left) == (family is TOKENIZER)
    assert ("ln.weight" in left) == (name == "c_baseline_pretrained_false")


@pytest.mark.parametrize("name, suffix", [*zip(SMALL, [".safetensors", ".ckpt", ".bin"] * 3)])
def test_there_and_back(tmp_path, name, suffix):
    family, overrides = SMALL[name]
    params = Case(name).params
    params = {key: params[key] for key in family.state(family.load_state(params, overrides))}
    assert len(params) == len(Case(name).params) or family.unread
    directory, file = tmp_path / "ours", tmp_path / f"theirs{suffix}"
    torch.save({"state_dict": params}, tmp_path / "first.ckpt")
    config = family.convert(tmp_path / "first.ckpt", directory, overrides=overrides)
    model = family.model.from_pretrained(directory)
    assert model.config == config and same(family.state(model), params)
    if family.unread:
        with pytest.warns(UserWarning, match="without latent_tokens, post_quant_conv"):
            family.export(directory, file)
    else:
        family.export(directory, file)
    again = family.load(file, overrides)
    assert same(again.state_dict(), model.state_dict()) and again.config == config


# The seed's tokenizer around other ViTs of timm


def timm_checkpoint(name: str, latents: int = 6) -> tuple[Golden, dict[str, torch.Tensor]]:
    """A small checkpoint of the seed's with the encoder that timm makes of `name`: its names are the golden's."""
    golden = Golden(GOLDENS / "encoder_init" / f"{name}.npz")
    recipe = golden.spec["recipe"]
    vit = {key: recipe_tensor(key, *entry, recipe["seed"]) for key, entry in recipe["entries"].items()}
    torch.manual_seed(0)
    small = {"image_size": 32, "num_latents": latents, "latent_channels": 8, "hidden_size": 8, "num_heads": 1}
    small |= {"num_layers": 1, "mlp_size": 8, "codebook_size": 20, "decoder_size": 16, "decoder_channels": 32}
    small |= {"channel_multipliers": (1, 2), "res_blocks": 1, "attention_sizes": (), "grid": 4}
    rest = TOKENIZER.state(Tokenizer(tokenizer.Config.upstream(**small)))
    kept = {key: x for key, x in rest.items() if not key.startswith(("encoder.", "ln."))}
    kept |= {"latent_tokens": torch.ones(latents, 64), "post_quant_conv.bias": torch.ones(16)}
    more = {"prompt_tokens": torch.randn(1, latents, 64), "head.weight": torch.randn(5, 64), "head.bias": torch.ones(5)}
    more["pos_embed"] = torch.cat([vit["pos_embed"], torch.randn(1, latents, 64)], dim=1)
    kept |= {f"encoder.{key}": x for key, x in {**vit, **more}.items()}
    return golden, {**kept, "ln.weight": torch.randn(8, 64), "ln.bias": torch.randn(8)}


@pytest.mark.parametrize("name", ["mae", "clip", "dinov2"])
def test_every_key_around_timms_vits_there_and_back(tmp_path, name):
    golden, params = timm_checkpoint(name)
    with warnings.catch_warnings(record=name == "clip") as told:
        model = TOKENIZER.load_state(params)
    assert (name == "clip") == bool(told)
    c = model.config
    assert (c.norm_pre, c.patch_bias, c.layer_scale) == (name == "clip", name != "clip", name == "dinov2")
    assert (c.activation, c.norm_eps) == (("quick_gelu", 1e-5) if name == "clip" else ("gelu", 1e-6))
    left = {key for key in params if key.startswith(("encoder.head.", "post_quant_conv.")) or key == "latent_tokens"}
    assert same(TOKENIZER.state(model), {key: x for key, x in params.items() if key not in left})
    with pytest.warns(UserWarning, match="without latent_tokens, post_quant_conv"):
        model.save_pretrained(tmp_path / "ours")
        TOKENIZER.export(tmp_path / "ours", tmp_path / "theirs.ckpt")
    again = TOKENIZER.load(tmp_path / "theirs.ckpt", {"activation": c.activation})
    assert again.config == c and same(again.state_dict(), model.state_dict())

    statistics = {"clip": (CLIP_MEAN, CLIP_STD)}.get(name, (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in statistics)
    features = model.double().encoder.patch_features((golden.inputs["images"].double() - mean) / std)
    close(features, golden.outputs["features"][:, 1:], 1e-6)


def test_the_other_activation_of_clip():
    _, params = timm_checkpoint("clip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TOKENIZER.load_state(params, {"activation": "gelu"}).config.activation == "gelu"
    with pytest.warns(UserWarning, match="activation: no array tells that of CLIP's encoder; taken is OpenAI's"):
        TOKENIZER.load_state(params)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", ("pop", "encoder.norm_pre.bias"), "missing encoder.norm_pre.bias"),
        ("dinov2", ("pop", "encoder.blocks.1.ls1.gamma"), "missing encoder.blocks.1.ls1.gamma"),
        ("mae", ("add", "encoder.blocks.1.ls1.gamma"), "unknown encoder.blocks.1.ls1.gamma"),
        ("mae", ("add", "encoder.norm_pre.bias"), "unknown encoder.norm_pre.bias"),
        ("dinov2", ("add", "encoder.reg_token"), "unknown encoder.reg_token"),
    ],
)
def test_errors_around_timms_vits(name, change, message):
    _, params = timm_checkpoint(name)
    params.pop(change[1]) if change[0] == "pop" else params.update({change[1]: torch.ones(64)})
    with pytest.raises(CheckpointError, match=message):
        TOKENIZER.load_state(params, {"activation": "gelu"})


def test_bf16_stays():
    params = {key: x.bfloat16() for key, x in Case("d_uvit").params.items()}
    model = GENERATOR.load_state(params, {"num_heads": 4})
    assert model.tokens.dtype == torch.bfloat16 and same(GENERATOR.state(model), params)


def test_frozen_parts_stay_frozen():
    model = TITOK.load_state(Case("d_titok_vq_finetuned").params, HEADS)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.pixel_decoder.parameters()) and not model.training


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("encoder.ln_pre.bias"), "theirs: missing encoder.ln_pre.bias"),
        (lambda x: x.update(extra=torch.zeros(1)), "theirs: unknown extra"),
        (
            lambda x: x.update({"encoder.ln_pre.bias": torch.zeros(3)}),
            r"ln_pre.bias: expected shape \(48,\), got \(3,\)",
        ),
        (lambda x: x.pop("latent_tokens"), "theirs: missing latent_tokens"),
        (lambda x: x.update(latent_tokens=torch.zeros(3)), r"latent_tokens: expected 2 axes, got shape \(3,\)"),
        (lambda x: x.update({"encoder.positional_embedding": torch.zeros(12, 48)}), "expected those of a square"),
        (lambda x: [x.pop(k) for k in list(x) if "encoder.transformer.0." in k], "missing encoder.transformer.0.ln_1"),
    ],
)
def test_errors(change, message):
    params = dict(Case("d_titok_vq_nonlegacy").params)
    change(params)
    with pytest.raises(CheckpointError, match=message):
        TITOK.load_state(params, HEADS, "theirs")


def test_errors_of_overrides_and_files(tmp_path):
    params = Case("d_titok_vq_nonlegacy").params
    with pytest.raises(CheckpointError, match="theirs: no_such: no such option"):
        TITOK.load_state(params, {"no_such": 1}, "theirs")
    with pytest.raises(CheckpointError, match="missing latent_tokens|missing encoder.patch_embed"):
        TITOK.load_state(Case("d_uvit").params)
    TITOK.load_state(params, HEADS).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="expected a name that ends in .safetensors, .ckpt"):
        TITOK.export(tmp_path / "ours", tmp_path / "theirs.npz")
    with pytest.raises(CheckpointError, match="expected a config with model 'token_generator', got 'titok'"):
        GENERATOR.export(tmp_path / "ours", tmp_path / "theirs.bin")


def test_the_command(tmp_path, capsys):
    """`fourdperf convert` there and back for all kinds that a file's suffix does not tell apart."""
    case = Case("d_titok_vq_nonlegacy")
    torch.save(case.params, tmp_path / "theirs.bin")
    fields = ["--fields.num_heads", "4", "--fields.decoder_heads", "4"]
    main(["convert", str(tmp_path / "theirs.bin"), str(tmp_path / "ours"), *fields])
    assert "5 out of 64 codes of 10, layout token" in capsys.readouterr().out
    case.check("image", TiTok.from_pretrained(tmp_path / "ours")(first(case.inputs["x"])).recon.permute(0, 3, 1, 2))
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.safetensors")])
    assert same(TITOK.state(TITOK.load(tmp_path / "back.safetensors", HEADS)), case.params)

    torch.save(Case("d_uvit").params, tmp_path / "uvit.bin")
    command = ["convert", str(tmp_path / "uvit.bin"), str(tmp_path / "uvit"), "--model", "token_generator"]
    main([*command, "--fields.num_heads", "4"])
    assert "uvit, 4 layers, width 32, 4 heads" in capsys.readouterr().out
    assert TokenGenerator.from_pretrained(tmp_path / "uvit").config.num_classes == 12
    case = Case("c_tokenizer")
    torch.save({"state_dict": case.params, "global_step": 3}, tmp_path / "seed.ckpt")
    command = ["convert", str(tmp_path / "seed.ckpt"), str(tmp_path / "seed"), "--model", "tokenizer"]
    main([*command, "--fields.head_dim", "8"])
    assert "grid 8x8, 3 levels of 32+ channels" in capsys.readouterr().out
    assert (
        Tokenizer.from_pretrained(tmp_path / "seed").config == TOKENIZER.load_state(case.params, {"head_dim": 8}).config
    )
