"""Tokenizers and generators of pictures: what their parts and options compute, dtypes, compilation, checkpoints."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fourdperf.models import maskgit_vqgan, titok, token_generator, tokenizer
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.convolutions import PixelAttention, ResBlock
from fourdperf.models.maskgit_vqgan import MaskGITVQGAN
from fourdperf.models.titok import TiTok
from fourdperf.models.token_blocks import Block, TokenEncoder, sincos_positions
from fourdperf.models.token_generator import TokenGenerator, guidance_strength, gumbel, mask_tokens
from fourdperf.models.tokenizer import Tokenizer
from tests.models.goldens import close, gradients
from tests.models.tokenizer_cases import PIXELS, SEED, TITOK, TOKENS

CODES = {"target": "codes", "target_codes": 12}
MODELS = {
    "tokenizer": partial(Tokenizer, tokenizer.Config(**SEED)),
    "tokenizer, upstream": partial(Tokenizer, tokenizer.Config.upstream(False, **SEED | {"image_size": 16, "grid": 8})),
    "vqgan": partial(MaskGITVQGAN, maskgit_vqgan.Config(**PIXELS)),
    "titok": partial(TiTok, titok.Config(**TITOK)),
    "titok, vae": partial(TiTok, titok.Config(**TITOK, mode="vae")),
    "titok, codes": partial(TiTok, titok.Config(**TITOK, **CODES, latent_layout="upstream")),
    "titok, pixel decoder": partial(TiTok, titok.Config(**TITOK, **CODES, pixels=PIXELS)),
    "bert": partial(TokenGenerator, token_generator.Config(**TOKENS)),
    "uvit": partial(TokenGenerator, token_generator.Config(**TOKENS, kind="uvit")),
}
GENERATORS = ("bert", "uvit")


def make(name, dtype=torch.float64):
    """A small model in eval mode whose every parameter matters, and its inputs."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            x.normal_() if key.endswith("codebook") else x.add_(torch.randn_like(x), alpha=0.1)
    if name in GENERATORS:
        ids = torch.randint(model.config.codebook_size + 1, (3, model.config.num_tokens))
        return model.to(dtype), (ids, torch.tensor([0, 2, 1]))
    images = torch.rand(2, *getattr(model.config, "image_size", (8, 12)), 3, dtype=torch.float64)
    return model.to(dtype), (images.to(dtype),)


def tensors(out):
    """The tensors of what a model returns: recon or logits first."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [out.recon, out.encoded.latents, *out.encoded.losses.values()]


# ---- configs


@pytest.mark.parametrize(
    "config, overrides, message",
    [
        (tokenizer.Config, {"num_latents": 0}, "num_latents: expected a positive integer, got 0"),
        (tokenizer.Config, {"image_size": 250}, r"image_size: expected multiples of patch_size 16, got \(250, 250\)"),
        (tokenizer.Config, {"image_size": (1, 2, 3)}, "image_size: expected 2 positive integers"),
        (tokenizer.Config, {"activation": "relu"}, "activation: expected one of gelu, quick_gelu, tanh, got 'relu'"),
        (tokenizer.Config, {"num_heads": 7}, "num_heads: expected a divisor of hidden_size 768, got 7"),
        (tokenizer.Config, {"decoder_channels": 48}, "decoder_channels: expected multiples of 32, got 48"),
        (tokenizer.Config, {"beta_on": "both"}, "beta_on: expected one of commitment, codebook"),
        (titok.Config, {"latent_layout": "legacy"}, "latent_layout: expected one of token, upstream"),
        (titok.Config, {"decoder_heads": 5}, "decoder_heads: expected a divisor of decoder_size 768"),
        (titok.Config, {"pixels": PIXELS}, "pixels: expected None unless target is codes and mode is vq"),
        (titok.Config, {"pixels": PIXELS, "target": "codes"}, "pixels: expected 1024 codes, got 12"),
        (maskgit_vqgan.Config, {"shortcut": "none"}, "shortcut: expected one of input, output"),
        (token_generator.Config, {"schedule": "cosine"}, "schedule: expected one of none, constant, linear"),
        (
            token_generator.Config,
            {"kind": "uvit", "num_layers": 3},
            "num_layers: expected an even number for kind uvit",
        ),
        (token_generator.Config, {"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
    ],
)
def test_config_errors(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)
    with pytest.raises(ValueError, match="no_such: no such option"):
        config.from_dict({"no_such": 1})


@pytest.mark.parametrize("module", [tokenizer, titok, token_generator])
def test_variants(module):
    for name in module.VARIANTS:
        config = module.Config.from_variant(name)
        assert module.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="variant: expected one of .*, got 'huge'"):
        module.Config.from_variant("huge")


# ---- parts, from their definitions


def attention_of(x, layer):
    """Multi-head self-attention, head by head."""
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    size = q.shape[-1] // layer.num_heads
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(scores.softmax(-1) @ v[..., part])
    return layer.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "tanh"])
def test_block(activation):
    torch.manual_seed(0)
    x, skip = torch.randn(2, 2, 7, 12, dtype=torch.float64)
    act = {"gelu": F.gelu, "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)), "tanh": torch.tanh}[activation]
    mlp = lambda y, b: b.mlp.dense_out(act(b.mlp.dense_in(y)))

    block = Block(12, 3, 20, head_dim=5, activation=activation).double()
    y = x + attention_of(block.attention_norm(x), block.attention)
    close(block(x), y + mlp(block.mlp_norm(y), block))

    block = Block(12, 3, 20, post_norm=True, qkv_bias=False, activation=activation).double()
    assert block.attention.qkv.bias is None
    y = block.attention_norm(x + attention_of(x, block.attention))
    close(block(x), block.mlp_norm(y + mlp(y, block)))

    block = Block(12, 3, 20, skip=True, activation=activation).double()
    joined = Block(12, 3, 20, activation=activation).double()
    joined.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("skip.")})
    close(block(x, skip), joined(block.skip(torch.cat([x, skip], dim=-1))))


def test_pixel_attention_sees_every_place():
    torch.manual_seed(0)
    layer, x = PixelAttention(32).double(), torch.randn(2, 32, 3, 4, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)
    want = layer.out((q @ k.transpose(1, 2) / math.sqrt(32)).softmax(-1) @ v)
    close(layer(x), x + want.transpose(1, 2).unflatten(2, (3, 4)))


def test_shortcut():
    """Upstream's loses the block's input, right is its sum with the outcome."""
    torch.manual_seed(0)
    x = torch.randn(1, 32, 4, 4, dtype=torch.float64)
    for shortcut in ("input", "output"):
        block = ResBlock(32, 64, shortcut=shortcut).double()
        out = block.conv_out(F.silu(block.norm_out(block.conv_in(F.silu(block.norm_in(x))))))
        close(block(x), out + block.skip(x if shortcut == "input" else out))
    same = ResBlock(32, 32, shortcut="output").double()
    assert same.skip is None


@pytest.mark.parametrize("class_position", [True, False])
def test_encoder(class_position):
    """The order of tokens, where positions go, and both readings of the latents."""
    torch.manual_seed(0)
    sizes = ((8, 12), 4, 5, 3, 8, 1, 2, 16)
    options = {"class_position": class_position, "norm_pre": True}
    right = TokenEncoder(*sizes, **options).double()
    wrong = TokenEncoder(*sizes, **options, latent_layout="upstream").double()
    wrong.load_state_dict(right.state_dict())
    images = torch.rand(2, 8, 12, 3, dtype=torch.float64)
    weight = right.patch_embed.weight
    rows = [
        [
            torch.einsum("ohw,fohw->f", x[r : r + 4, c : c + 4].permute(2, 0, 1), weight)
            for r in (0, 4)
            for c in (0, 4, 8)
        ]
        for x in images
    ]
    patches = torch.stack([torch.stack(row) for row in rows]) + right.patch_embed.bias
    positions = right.positions
    class_token = right.class_token
    if class_position:
        class_token, positions = class_token + positions[0], positions[1:]
    parts = [
        class_token.expand(2, 1, -1),
        patches + positions[:6],
        (right.latent_tokens + positions[6:]).expand(2, -1, -1),
    ]
    tokens = right.norm(right.blocks[0](right.norm_pre(torch.cat(parts, dim=1))))[:, -5:]
    close(right(images), right.out(tokens))
    mixed = tokens.flatten(1).unflatten(1, (8, 5)).transpose(1, 2)
    close(wrong(images), right.out(mixed))


def test_start():
    """Patches' positions are sines and cosines, the rest is normal; the codebook is within 1 / K."""
    model = Tokenizer(tokenizer.Config(**SEED))
    assert torch.equal(model.encoder.positions[1:7], sincos_positions(24, 2, 3))
    assert 0.5 < model.encoder.positions[7:].std() * 24**0.5 < 1.5
    assert 0.9 / 20 < model.quantizer.codebook.abs().max() <= 1 / 20
    weights = torch.cat([m.weight.flatten() for m in model.encoder.modules() if isinstance(m, nn.Linear)])
    assert 0.015 < weights.std() < 0.02 and weights.abs().max() <= 0.04


# ---- models


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_gradients(name):
    """Every trained parameter has a gradient, none of the frozen; fp32 agrees with fp64."""
    model, inputs = make(name)
    outs = tensors(model(*inputs))
    grads = gradients(model, sum(x.square().sum() for x in outs))
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert set(grads) == trained and all(x.isfinite().all() and x.any() for x in grads.values())
    if name not in GENERATORS:
        wanted = {"titok, codes": (2, 2, 3, 12), "titok, pixel decoder": (2, 2 * 2, 3 * 2, 3)}
        assert outs[0].shape == wanted.get(name, inputs[0].shape)
    single, _ = make(name, torch.float32)
    for a, b in zip(tensors(single(*(x.float() if x.is_floating_point() else x for x in inputs))), outs):
        close(a.double(), b, 2e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*GENERATORS, "titok, vae")])
def test_codes_and_latents_decode_alike(name):
    model, (images,) = make(name)
    recon, encoded = model(images)
    assert encoded.indices.dtype == torch.int64 and encoded.indices.shape == encoded.latents.shape[:-1]
    close(model.decode_indices(encoded.indices), recon, 1e-10)
    close(model.decode(encoded.latents), recon)


def test_pictures_are_in_0_1():
    """A decoder that says 0 in [-1, 1] gives 1/2; the encoder sees [-1, 1]."""
    model, (images,) = make("tokenizer")
    with torch.no_grad():
        model.decoder.out.weight.zero_()
        model.decoder.out.bias.zero_()
    assert (model.decode(model.encode(images).latents) == 0.5).all()
    taps = {}
    model.encode(images, taps)
    close(model.encoder(2 * images - 1), taps["encoder/latents"])


def test_grid():
    """The right grid gives pictures of the config's size; upstream's side is named, and gives others."""
    assert tokenizer.Config(image_size=128, patch_size=8).decoder_grid == (8, 8)
    config = tokenizer.Config.upstream(**SEED | {"image_size": 32})
    model = Tokenizer(config)
    assert config.decoder_grid == (8, 8) and model(torch.rand(1, 32, 32, 3)).recon.shape == (1, 16, 16, 3)


def test_vae():
    """Mean, variance within bounds, divergence; a sample in train mode, or of given noise."""
    model, (images,) = make("titok, vae")
    encoded = model.encode(images)
    mean, log_variance = encoded.moments
    assert torch.equal(encoded.latents, mean) and encoded.indices is None
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).sum(-1)
    close(encoded.losses["kl"], divergence, 1e-6)
    noise = torch.randn_like(mean)
    sample = model.encode(images, noise=noise).latents
    close(sample, mean + log_variance.mul(0.5).exp() * noise)
    torch.manual_seed(1)
    drawn = model.train().encode(images).latents
    torch.manual_seed(1)
    close(drawn, model.encode(images, noise=torch.randn_like(mean)).latents)
    assert not torch.equal(drawn, mean)
    with torch.no_grad():
        model.encoder.out.bias[4:] = 1e3
    assert (model.encode(images).moments[1] == 20).all()
    with pytest.raises(ValueError, match="indices: a TiTok of mode vae has no codes"):
        model.decode_indices(torch.zeros(2, 5, dtype=torch.long))


def test_the_pixel_decoder_has_the_expected_code():
    model, (images,) = make("titok, pixel decoder")
    taps = {}
    recon = model.decode(model.encode(images).latents, taps)
    expected = torch.einsum("bhwk,kc->bhwc", taps["decoder/out"].softmax(-1), model.pixel_codes)
    close(recon, model.pixel_decoder(expected))
    stage_one = TiTok(titok.Config(**TITOK, **CODES)).double()
    found = model.load_state_dict(stage_one.state_dict(), strict=False)
    assert {key.partition(".")[0] for key in found.missing_keys} == {"pixel_codes", "pixel_decoder"}


@pytest.mark.parametrize("name", ["tokenizer", "titok", "titok, pixel decoder"])
def test_last_layer(name):
    model, (images,) = make(name)
    assert model.last_layer.shape == (3, model.last_layer.shape[1], 3, 3)
    assert torch.autograd.grad(model(images).recon.sum(), model.last_layer)[0].any()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: m.encode(torch.rand(2, 3, 16, 24)),
            r"images: expected a tensor \(B, 16, 24, 3\), got \(2, 3, 16, 24\)",
        ),
        (lambda m: m.encode(torch.zeros(2, 16, 24, 3, dtype=torch.uint8)), "images: expected a floating point dtype"),
        (lambda m: m.encode([1]), r"images: expected a tensor \(B, 16, 24, 3\), got \(\)"),
        (lambda m: m.decode(torch.rand(2, 4, 5)), r"latents: expected a tensor \(B, 5, 4\), got \(2, 4, 5\)"),
        (lambda m: m.decode(torch.zeros(2, 5, 4, dtype=torch.int32)), "latents: expected a floating point dtype"),
        (lambda m: m.decode_indices(torch.zeros(2, 6, dtype=torch.long)), r"indices: expected a tensor \(B, 5\)"),
        (lambda m: m.decode_indices(torch.zeros(2, 5)), "indices: expected an integer dtype, got torch.float32"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer", "titok"])
def test_errors(name, call, message):
    with pytest.raises(ValueError, match=message):
        call(make(name)[0])


def test_vqgan_errors():
    model, _ = make("vqgan")
    with pytest.raises(ValueError, match="images: expected sides that are multiples of 2"):
        model.encode(torch.rand(1, 8, 9, 3))
    with pytest.raises(ValueError, match=r"images: expected a tensor \(B, H, W, 3\), got \(1, 3, 8, 8\)"):
        model.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="latents: expected a tensor"):
        model.decode(torch.rand(1, 8, 6))


# ---- generators


@pytest.mark.parametrize("name", GENERATORS)
def test_condition(name):
    model, (ids, classes) = make(name)
    with torch.no_grad():
        told, none = model(ids, classes), model(ids)
        drop = torch.tensor([True, False, False])
        mixed = model(ids, classes, drop=drop)
    assert told.shape == (3, 6, 11) and (told - none).abs().amax((1, 2)).min() > 1e-3
    close(mixed, torch.cat([none[:1], told[1:]]))
    places = ids == model.config.mask_id
    close(model(ids, classes, places=places), told[places])
    close(model(ids.to(torch.int8), classes.to(torch.uint8)), told)
    for overrides, message in (
        ({"indices": ids[:, :4]}, r"indices: expected a tensor \(B, 6\)"),
        ({"indices": ids + 12}, r"indices: expected numbers in 0 .. 11, got"),
        ({"classes": classes[:2]}, r"classes: expected integers \(3,\)"),
        ({"drop": classes}, r"drop: expected booleans \(3,\)"),
        ({"places": places.long()}, r"places: expected booleans \(3, .*got torch.int64"),
        ({"places": places[:1]}, r"places: expected booleans \(3, .*got torch.bool \(1, "),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"indices": ids, "classes": classes, **overrides})


@pytest.mark.parametrize("schedule", ["none", "constant", "linear", "power-cosine"])
def test_generation(schedule):
    """Codes that stay once they are there, fewer masks at each step, the same for the same seed."""
    model, (_, classes) = make("bert", torch.float32)
    runs = []
    for seed in (0, 0, 1):
        taps, generator = {}, torch.Generator().manual_seed(seed)
        ids = model.generate(classes, schedule=schedule, generator=generator, taps=taps)
        states = [*taps.values(), ids]
        masked = [(x == model.config.mask_id).sum(1) for x in states]
        assert (masked[0] == 6).all() and (masked[-1] == 0).all() and len(taps) == 4
        for before, after, more, fewer in zip(states, states[1:], masked, masked[1:]):
            known = before != model.config.mask_id
            assert torch.equal(before[known], after[known]) and (fewer < more).all()
        runs.append(ids)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_generation_computes_no_more_than_it_needs(monkeypatch):
    """A row for each class of the first step, where pictures of a class are alike; logits of masked places alone."""
    model, _ = make("bert", torch.float32)
    seen, forward = [], TokenGenerator.forward

    def counted(self, indices, *arguments, **options):
        logits = forward(self, indices, *arguments, **options)
        assert len(logits) == (indices == model.config.mask_id).sum()
        seen.append(len(indices))
        return logits

    monkeypatch.setattr(TokenGenerator, "forward", counted)
    model.generate(torch.tensor([2, 0, 2, 2, 0]), schedule="linear")
    model.generate(batch=3)
    assert seen == [2, 10, 10, 10, 1, 3, 3, 3]


def test_generation_of_no_class():
    model, (_, classes) = make("uvit", torch.float32)
    assert model.generate(batch=2).shape == (2, 6) and model.generate(batch=2, steps=1).max() < 11
    for options, message in (
        ({}, "batch: expected a positive integer, got None"),
        ({"classes": classes, "batch": 2}, "batch: expected 3 like classes, got 2"),
        ({"classes": classes + 1}, r"classes: expected numbers in 0 .. 2, got \[1, 3, 2\]"),
        ({"batch": 2, "steps": 0}, "steps: expected a positive integer, got 0"),
        ({"batch": 2, "schedule": "cosine"}, "schedule: expected one of none, constant"),
        ({"batch": 2, "uniforms": []}, "uniforms: expected 4 pairs, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**options)


def test_guidance():
    """Zero at the start where linear, one at the start and `guidance` at the end where a cosine."""
    assert guidance_strength("linear", 0.0, 4.0, 1.0) == (0.0, True)
    assert guidance_strength("linear", 0.5, 4.0, 1.0) == (2.0, True)
    assert guidance_strength("constant", 0.1, 4.0, 1.0) == (4.0, True)
    assert guidance_strength("none", 0.1, 4.0, 1.0) == (0.0, True)
    assert guidance_strength("power-cosine", 0.0, 4.0, 2.0) == (1.0, False)
    assert guidance_strength("power-cosine", 1.0, 4.0, 2.0)[0] == pytest.approx(4.0)
    assert guidance_strength("power-cosine", 0.5**0.5, 4.0, 2.0)[0] == pytest.approx(2.5)


def test_gumbel():
    noise = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.03
    assert gumbel(torch.tensor([0.0, 1.0])).isfinite().all()


def test_training_mask():
    """The share that t says, at least one, at random places."""
    ids, generator = torch.randint(9, (4, 50)), torch.Generator().manual_seed(0)
    timesteps = torch.tensor([0.0, 0.5, 0.9, 1.0])
    masked, masks = mask_tokens(ids, 9, timesteps=timesteps, random=torch.rand(4, 50, generator=generator))
    assert masks.sum(1).tolist() == [50, 33, 14, 1]
    assert torch.equal(masked == 9, masks) and torch.equal(masked[~masks], ids[~masks])


def test_dropout():
    model, inputs = make("bert", torch.float32)
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


# ---- dtypes, compilation, checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_compile(name):
    """One graph, the same numbers, gradients too; in train mode."""
    torch.compiler.reset()
    model, inputs = make(name)
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    options = {"noise": torch.zeros(2, 5, 4, dtype=torch.float64)} if name == "titok, vae" else {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = (tensors(f(*inputs, **options)) for f in (model, compiled))
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-10)
    theirs, ours = (gradients(model, sum(x.square().sum() for x in outs)) for outs in (want, got))
    assert ours.keys() == theirs.keys()
    largest = max(x.abs().max() for x in theirs.values())
    for key in ours:
        assert (ours[key] - theirs[key]).abs().max() <= 1e-10 * largest, key


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    """bf16 activations: results near those of fp32, the codes looked for in fp32, gradients alike."""
    model, inputs = make(name, torch.float32)
    want = model(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if isinstance(want, torch.Tensor):
            got = model(*inputs)
        else:  # of the same code: near a border codes may differ
            got = model.decode(want.encoded.latents.detach())
            encoded = model.encode(*inputs)
            if encoded.indices is not None:
                assert encoded.latents.dtype == torch.float32
                assert (encoded.indices == want.encoded.indices).float().mean() > 0.8
            want = want.recon
    error = (got.float() - want).abs().max() / want.abs().max()
    assert 1e-5 < error < 0.05
    grads = [gradients(model, x.float().square().sum()) for x in (want, got)]
    shared = [key for key in grads[1] if key.startswith(("decoder", "pixel_decoder", "blocks", "head"))]
    assert len(shared) > 8
    a, b = (torch.cat([x[key].flatten() for key in shared]) for x in grads)
    assert F.cosine_similarity(a, b, 0) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_model(name, dtype):
    model, inputs = make(name, torch.float32)
    with torch.no_grad():
        want = model(*inputs) if name in GENERATORS else model.decode(model.encode(*inputs).latents)
        latents = None if name in GENERATORS else model.encode(*inputs).latents
        model.to(dtype)
        got = model(*inputs) if latents is None else model.decode(latents)
        assert got.dtype == dtype and (got.float() - want).abs().max() < 0.1 * want.abs().max()
        if latents is not None:
            assert model(*inputs).recon.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(tmp_path, name):
    model, inputs = make(name, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    for a, b in zip(tensors(loaded(*inputs)), tensors(model(*inputs))):
        assert torch.equal(a, b)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"no_such": 1}))
    with pytest.raises(CheckpointError, match="no_such: no such option"):
        type(model).from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": "other"}))
    with pytest.raises(CheckpointError, match=f"expected a config with model '{model.MODEL}', got 'other'"):
        type(model).from_pretrained(tmp_path)


def test_a_picture_is_learnt():
    """Two pictures in a few steps of Adam, through the codes."""
    torch.manual_seed(0)
    model = TiTok(titok.Config(**TITOK)).train()
    images = torch.rand(2, 1, 1, 3).expand(2, 16, 24, 3)
    adam, errors = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(60):
        recon, encoded = model(images)
        errors.append((recon - images).square().mean())
        adam.zero_grad()
        (errors[-1] + sum(encoded.losses.values())).backward()
        adam.step()
    assert errors[-1] < 0.05 * errors[0]
