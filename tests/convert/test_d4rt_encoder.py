"""An encoder from 4DS and from VideoMAE computes what the source computes; what must be fitted is fitted well."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fourdperf.convert.d4rt_encoder import IMAGENET_MEAN, IMAGENET_STD, init_encoder
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.d4rt import D4RT, Config
from fourdperf.models.scaling4d import Config as Config4DS
from fourdperf.models.scaling4d import Scaling4D
from fourdperf.ops import resize
from tests.models.scaling4d_cases import difference, randomize

SIZES = {"hidden_size": 48, "num_layers": 3, "num_heads": 3, "mlp_size": 96}
SMALL = {**SIZES, "num_frames": 4, "image_size": 32, "patch_size": (2, 8, 8), "decoder_size": 16, "decoder_heads": 1}
LIKE_VIDEOMAE = {"positions": "joint", "local_attention": "none", "gelu": "none", "norm_eps": 1e-12}
GRID = (2, 4, 4)


def encoder_states(model, video):
    """Tokens, then the state after every layer, without the aspect-ratio token, which no source has."""
    with torch.no_grad():
        states = [model.encoder.tokenizer(video, torch.ones(len(video)))[:, :-1]]
        for layer in model.encoder.layers:
            states.append(layer(states[-1]))
    return states


# 4DS


@pytest.fixture
def directory_4ds(tmp_path):
    model = randomize(Scaling4D(Config4DS(**SIZES, video_size=(4, 32, 32), patch_size=(2, 8, 8))))
    model.save_pretrained(tmp_path / "4ds")
    return tmp_path / "4ds", model


@pytest.mark.parametrize("centered", [True, False])
def test_4ds_computes_the_same(directory_4ds, centered):
    path, source = directory_4ds
    model = D4RT(Config(**SMALL, positions="joint", local_attention="none", centered=centered))
    video, taps = torch.rand(2, 4, 32, 32, 3), {}
    source.encode(video, layers=["final"], taps=taps)
    report = init_encoder(model, path)
    for got, want in zip(encoder_states(model, video), taps.values(), strict=True):
        assert difference(got, want) <= 1e-5
    assert report.layout == "4DS" and not report.unused and not report.notes
    assert report.taken["encoder.tokenizer.posenc"] == ("encoder.tokenizer.posenc",)
    aspect = {f"encoder.tokenizer.aspect.projection.{kind}" for kind in ("weight", "bias")}
    assert set(report.kept) == aspect | {"encoder.norm.weight", "encoder.norm.bias"}


def test_half_precision_and_fewer_layers(directory_4ds, tmp_path):
    _, source = directory_4ds
    source.half().save_pretrained(tmp_path / "half")
    model = D4RT(Config(**{**SMALL, "num_layers": 2}, positions="joint"))
    report = init_encoder(model, tmp_path / "half")
    layer = source.encoder.processor.layers[1]
    assert torch.equal(model.encoder.layers[1].mlp.dense_in.weight, layer.mlp.dense_in.weight.float())
    assert len(report.unused) == 12 and all("layers.2." in name for name in report.unused)


def test_factorised_positions_are_the_nearest_sum(directory_4ds):
    path, source = directory_4ds
    model = D4RT(Config(**SMALL))
    report = init_encoder(model, path)
    posenc = source.encoder.tokenizer.posenc.detach()
    rest = posenc - model.encoder.tokenizer.positions(2).detach()
    assert rest.mean(0).abs().max() < 1e-6 and rest.mean((1, 2)).abs().max() < 1e-6  # the normal equations
    share = 1 - rest.square().sum() / (posenc - posenc.mean((0, 1, 2))).square().sum()
    assert f"{share:.1%}" in str(report)


def test_a_sum_of_tables_is_found_again(directory_4ds):
    path, source = directory_4ds
    temporal, spatial = torch.randn(2, 1, 1, 48), torch.randn(4, 4, 48)
    with torch.no_grad():
        source.encoder.tokenizer.posenc.copy_(temporal + spatial)
    source.save_pretrained(path)
    model = D4RT(Config(**SMALL))
    assert "100.0%" in str(init_encoder(model, path))
    assert difference(model.encoder.tokenizer.positions(2), temporal + spatial) <= 1e-6


def test_positions_and_kernel_of_another_grid(directory_4ds):
    """A larger patch: on a clip enlarged as the kernel was, the same patch embedding."""
    path, source = directory_4ds
    fields = {**SMALL, "image_size": (64, 32), "patch_size": (4, 16, 8), "num_frames": 12}
    model = D4RT(Config(**fields, positions="joint"))
    report = init_encoder(model, path)
    posenc = source.encoder.tokenizer.posenc.detach()
    assert difference(model.encoder.tokenizer.posenc, resize(posenc, (3, 4, 4), (0, 1, 2))) <= 1e-6
    patch = torch.rand(1, 2, 8, 8, 3)
    want = source.encoder.tokenizer.patch_embedding(patch)
    larger = resize(patch, (4, 16), (1, 2), method="linear")
    assert difference(model.encoder.tokenizer.patch_embedding(2 * larger - 1), want) <= 1e-5
    assert len(report.notes) == 2 and "(2, 8, 8) made (4, 16, 8)" in str(report)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 24}, "hidden_size: the model has 24, the source 48"),
        ({"num_heads": 4}, "num_heads: the model has 4, the source 3"),
        ({"mlp_size": 48}, "mlp_size: the model has 48, the source 96"),
        ({"num_layers": 4}, "num_layers: the model has 4, the source only 3"),
    ],
)
def test_4ds_that_does_not_fit(directory_4ds, fields, message):
    path, _ = directory_4ds
    model = D4RT(Config(**{**SMALL, **fields}))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        init_encoder(model, path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_4ds_of_another_kind(tmp_path):
    for name, fields in (("post", {"block": "post_norm"}), ("thin", {"qk_features": 96}), ("grey", {"channels": 1})):
        config = Config4DS(**SIZES, video_size=(4, 32, 32), patch_size=(2, 8, 8), **fields)
        Scaling4D(config).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: expected"):
            init_encoder(D4RT(Config(**SMALL)), tmp_path / name)
    D4RT(Config(**SMALL)).save_pretrained(tmp_path / "d4rt")
    with pytest.raises(CheckpointError, match="expected a config with model 'scaling4d', got 'd4rt'"):
        init_encoder(D4RT(Config(**SMALL)), tmp_path / "d4rt")


# VideoMAE


def videomae(layout, biases="parts", prefix="", norm=True):
    """Random weights of a VideoMAE with the names of transformers, or of timm and VideoMAE's own code."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
    width, mlp, state = SIZES["hidden_size"], SIZES["mlp_size"], {}

    def linear(name, inputs, outputs):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(outputs, inputs), draw(outputs)

    def layer_norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)

    hf = layout == "transformers"
    patch = "embeddings.patch_embeddings.projection" if hf else "patch_embed.proj"
    state[f"{patch}.weight"], state[f"{patch}.bias"] = draw(width, 3, 2, 8, 8), draw(width)
    for index in range(SIZES["num_layers"]):
        block = f"encoder.layer.{index}" if hf else f"blocks.{index}"
        attention = f"{block}.attention.attention" if hf else f"{block}.attn"
        if hf:
            state |= {f"{attention}.{part}.weight": draw(width, width) for part in ("query", "key", "value")}
        else:
            state[f"{attention}.qkv.weight"] = draw(3 * width, width)
        if biases == "parts":
            state |= {f"{attention}.{part}_bias": draw(width) for part in "qv"}
        elif biases == "layers":
            state |= {f"{attention}.{part}.bias": draw(width) for part in ("query", "value")}
        elif biases == "joint":
            state[f"{attention}.qkv.bias"] = draw(3 * width)
        linear(f"{block}.attention.output.dense" if hf else f"{block}.attn.proj", width, width)
        linear(f"{block}.intermediate.dense" if hf else f"{block}.mlp.fc1", width, mlp)
        linear(f"{block}.output.dense" if hf else f"{block}.mlp.fc2", mlp, width)
        layer_norm(f"{block}.layernorm_before" if hf else f"{block}.norm1")
        layer_norm(f"{block}.layernorm_after" if hf else f"{block}.norm2")
    if norm:
        layer_norm("layernorm" if hf else "norm")
    return {prefix + name: x for name, x in state.items()}


def reference(state, layout, video, eps):
    """VideoMAE's forward pass, spelled out: the states of `encoder_states`."""
    hf, width, heads = layout == "transformers", SIZES["hidden_size"], SIZES["num_heads"]
    patch = "embeddings.patch_embeddings.projection" if hf else "patch_embed.proj"
    pixels = (video - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    x = F.conv3d(pixels.movedim(-1, 1), state[f"{patch}.weight"], state[f"{patch}.bias"], stride=(2, 8, 8))
    x = x.flatten(2).transpose(1, 2)
    table = torch.empty(x.shape[1], width)
    for place in range(x.shape[1]):
        for channel in range(width):
            angle = torch.tensor(place / 10000 ** (2 * (channel // 2) / width), dtype=torch.float64)
            table[place, channel] = angle.cos() if channel % 2 else angle.sin()
    states = [x + state.get("pos_embed", table[None])[:, -x.shape[1] :]]
    names = ("layernorm_before", "layernorm_after", "intermediate.dense") if hf else ("norm1", "norm2", "mlp.fc1")
    outs = ("attention.output.dense", "output.dense") if hf else ("attn.proj", "mlp.fc2")
    for index in range(SIZES["num_layers"]):
        start = f"encoder.layer.{index}." if hf else f"blocks.{index}."
        block = {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}
        x = _norm(states[-1], block, names[0], eps)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in _qkv(x, block, hf))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = states[-1] + _linear(x, block, outs[0])
        hidden = F.gelu(_linear(_norm(x, block, names[1], eps), block, names[2]))
        states.append(x + _linear(hidden, block, outs[1]))
    return states


def _norm(x, block, name, eps):
    return F.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"], eps)


def _linear(x, block, name):
    return F.linear(x, block[f"{name}.weight"], block[f"{name}.bias"])


def _qkv(x, block, hf):
    zeros = torch.zeros(x.shape[-1])
    if not hf:
        halves = torch.cat([block.get("attn.q_bias", zeros), zeros, block.get("attn.v_bias", zeros)])
        return F.linear(x, block["attn.qkv.weight"], block.get("attn.qkv.bias", halves)).chunk(3, -1)
    parts = []
    for part in ("query", "key", "value"):
        here = f"attention.attention.{part}"
        bias = block.get(f"{here}.bias", block.get(f"attention.attention.{part[0]}_bias", zeros))
        parts.append(F.linear(x, block[f"{here}.weight"], bias))
    return parts


@pytest.mark.parametrize(
    "layout, biases, prefix",
    [
        ("transformers", "parts", ""),
        ("transformers", "layers", "videomae."),
        ("transformers", "none", "videomae."),
        ("timm", "parts", "encoder."),
        ("timm", "joint", ""),
        ("timm", "none", "module."),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_videomae_computes_the_same(tmp_path, layout, biases, prefix, kind):
    state = videomae(layout, biases, prefix, norm=prefix == "")
    others = {"decoder.blocks.0.norm1.weight": torch.ones(4), "mask_token": torch.zeros(1, 1, 48)} if prefix else {}
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file({**state, **others}, path)
    else:
        torch.save({"model": {**state, **others}, "epoch": 7}, path)
    model = D4RT(Config(**SMALL, **LIKE_VIDEOMAE))
    video = torch.rand(2, 4, 32, 32, 3)
    report = init_encoder(model, path, grid=GRID)
    plain = {name.removeprefix(prefix): x for name, x in state.items()}
    for got, want in zip(encoder_states(model, video), reference(plain, layout, video, 1e-12), strict=True):
        assert difference(got, want) <= 1e-5
    assert layout in report.layout and set(report.unused) == set(others)
    assert {name for names in report.taken.values() for name in names} == set(state)
    assert ("encoder.norm.weight" in report.taken) == (prefix == "")


def test_a_directory_of_transformers(tmp_path):
    """Its config says heads, epsilon and grid, its preprocessor the pixels."""
    state = videomae("transformers")
    save_file(state, tmp_path / "model.safetensors")
    about = {"model_type": "videomae", "num_attention_heads": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    about |= {"image_size": 32, "num_frames": 4}
    (tmp_path / "config.json").write_text(json.dumps(about))
    model, video = D4RT(Config(**SMALL, **LIKE_VIDEOMAE)), torch.rand(1, 4, 32, 32, 3)
    assert not init_encoder(model, tmp_path).notes
    want = reference(state, "transformers", video, 1e-12)
    assert difference(encoder_states(model, video)[-1], want[-1]) <= 1e-5

    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    init_encoder(model, tmp_path)
    imagenet = ((video - 0.5) / 0.25) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    want = reference(state, "transformers", imagenet, 1e-12)
    assert difference(encoder_states(model, video)[-1], want[-1]) <= 1e-5

    report = init_encoder(D4RT(Config(**SMALL)), tmp_path)
    assert any("gelu: 'none' in the source, 'tanh' in the model" in note for note in report.notes)
    assert any("norm_eps" in note for note in report.notes)
    with pytest.raises(CheckpointError, match="num_heads: the model has 4, the source 3"):
        init_encoder(D4RT(Config(**{**SMALL, "num_heads": 4})), tmp_path)


@pytest.mark.parametrize("extra", [0, 1], ids=["tokens", "class token"])
def test_a_table_of_positions_in_the_file(tmp_path, extra):
    state = videomae("timm") | {"pos_embed": torch.randn(1, 32 + extra, 48)}
    torch.save(state, tmp_path / "timm.pth")
    model, video = D4RT(Config(**SMALL, **LIKE_VIDEOMAE)), torch.rand(1, 4, 32, 32, 3)
    report = init_encoder(model, tmp_path / "timm.pth", grid=GRID)
    assert report.taken["encoder.tokenizer.posenc"] == ("pos_embed",)
    assert difference(encoder_states(model, video)[-1], reference(state, "timm", video, 1e-6)[-1]) <= 1e-5
    with pytest.raises(CheckpointError, match=r"pos_embed: expected 6272 places of 48 for the grid \(8, 28, 28\)"):
        init_encoder(model, tmp_path / "timm.pth")


SPOILED = {
    "missing": (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"missing blocks\.1\.mlp\.fc2\.bias"),
    "scale": (
        lambda s: s.update({"blocks.0.gamma_1": torch.ones(48)}),
        r"no place in our blocks for blocks\.0\.gamma_1",
    ),
    "shape": (
        lambda s: s.update({"blocks.2.norm1.weight": torch.ones(7)}),
        r"layers\.2\.attention_norm\.weight: expected shape \(48,\), got \(7,\)",
    ),
    "picture": (
        lambda s: s.update({"patch_embed.proj.weight": torch.zeros(48, 3, 8, 8)}),
        r"patch_embed\.proj\.weight: expected \(D, 3, t, h, w\), got \(48, 3, 8, 8\)",
    ),
    "grey": (
        lambda s: s.update({"patch_embed.proj.weight": torch.zeros(48, 1, 2, 8, 8)}),
        r"expected a patch kernel \(D, 3, t, h, w\), got \(48, 1, 2, 8, 8\)",
    ),
    "nothing known": (lambda s: s.pop("patch_embed.proj.weight"), "nor patch_embed.proj.weight is among its"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_videomae_is_refused_and_changes_nothing(tmp_path, name):
    spoil, message = SPOILED[name]
    state = videomae("timm")
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    model = D4RT(Config(**SMALL))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        init_encoder(model, tmp_path / "weights.pth", grid=GRID)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_sources_that_are_not_there(tmp_path):
    model = D4RT(Config(**SMALL))
    with pytest.raises(OSError):
        init_encoder(model, tmp_path / "none.pth")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        init_encoder(model, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        init_encoder(model, tmp_path)
