"""Tokenizers and generators in Flax: PyTorch against them layer by layer."""

import importlib

import pytest
import torch

from fourdperf.convert.flax_tree import flat
from fourdperf.models import maskgit_vqgan, titok, token_generator, tokenizer
from fourdperf.models.checkpoint import CheckpointError
from tests.models.scaling4d_cases import TOLERANCE, difference
from tests.models.tokenizer_cases import PIXELS, SEED, TITOK, TOKENS

jax = pytest.importorskip("jax")
flax_params = pytest.importorskip("fourdperf.jax.models.pretrained").flax_params

NAMES = {tokenizer: "Tokenizer", maskgit_vqgan: "MaskGITVQGAN", titok: "TiTok", token_generator: "TokenGenerator"}
LIVE = {
    "tokenizer": (tokenizer, tokenizer.Config(**SEED)),
    "tokenizer, quick_gelu, wide heads, norm_pre": (
        tokenizer,
        tokenizer.Config(**SEED, activation="quick_gelu", head_dim=5, norm_pre=True),
    ),
    "tokenizer, layer_scale, no patch_bias": (
        tokenizer,
        tokenizer.Config(**SEED, layer_scale=True, patch_bias=False),
    ),
    "tokenizer, upstream": (tokenizer, tokenizer.Config.upstream(**SEED | {"image_size": 16, "patch_size": 4})),
    "tokenizer, upstream's encoder": (tokenizer, tokenizer.Config.upstream(False, **SEED | {"image_size": 16})),
    "vqgan": (maskgit_vqgan, maskgit_vqgan.Config(**PIXELS)),
    "vqgan, upstream": (maskgit_vqgan, maskgit_vqgan.Config.upstream(**PIXELS)),
    "titok": (titok, titok.Config(**TITOK)),
    "titok, codes of any length": (titok, titok.Config(**TITOK, normalize=False, latent_layout="upstream")),
    "titok, vae": (titok, titok.Config(**TITOK, mode="vae")),
    "titok, codes": (titok, titok.Config(**TITOK, target="codes", target_codes=12)),
    "titok, pixel decoder": (titok, titok.Config(**TITOK, target="codes", target_codes=12, pixels=PIXELS)),
    "bert": (token_generator, token_generator.Config(**TOKENS)),
    "uvit": (token_generator, token_generator.Config(**TOKENS, kind="uvit")),
}


def build(name):
    """A model whose every parameter matters, and its input."""
    module, config = LIVE[name]
    torch.manual_seed(0)
    model = getattr(module, NAMES[module])(config).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            x.add_(torch.randn_like(x), alpha=0.1)
            if key.endswith("codebook"):
                x.normal_()
    if module is token_generator:
        ids = torch.randint(config.codebook_size + 1, (3, config.num_tokens))
        return model, (ids, torch.tensor([0, 2, 1]))
    return model, (torch.rand(2, *getattr(config, "image_size", (8, 12)), 3),)


def mirror(torch_class):
    """The class of the same name in the file of the same name."""
    module = importlib.import_module(torch_class.__module__.replace("fourdperf.models", "fourdperf.jax.models"))
    return getattr(module, torch_class.__name__)


def to_flax(model):
    return mirror(type(model))(model.config), {"params": flax_params(model.state_dict())}


@pytest.mark.parametrize("name", LIVE)
def test_torch_matches_flax_layer_by_layer(name):
    model, inputs = build(name)
    flax_model, variables = to_flax(model)
    ours = {}
    with torch.no_grad():
        out = model(*inputs, ours)

    @jax.jit
    def apply(variables, *inputs):
        taps = {}
        return flax_model.apply(variables, *inputs, taps), taps

    reference, theirs = apply(variables, *(x.numpy() for x in inputs))
    assert sorted(ours) == sorted(theirs) and len(ours) >= 4
    for tap in ours:
        assert difference(ours[tap], theirs[tap]) <= 3 * TOLERANCE, tap
    if isinstance(out, torch.Tensor):
        assert difference(out, reference) <= TOLERANCE
        return
    assert difference(out.recon, reference.recon) <= 3 * TOLERANCE
    assert difference(out.encoded.latents, reference.encoded.latents) <= TOLERANCE
    if out.encoded.indices is None:
        assert reference.encoded.indices is None
        for a, b in zip(out.encoded.moments, reference.encoded.moments, strict=True):
            assert difference(a, b) <= TOLERANCE
        return
    assert (out.encoded.indices.numpy() == reference.encoded.indices).all()


def test_codes_are_decoded():
    model, _ = build("titok")
    flax_model, variables = to_flax(model)
    codes = torch.randint(20, (3, 5))
    decoded = jax.jit(lambda *x: flax_model.apply(*x, method="decode_indices"))(variables, codes.numpy())
    assert difference(model.decode_indices(codes), decoded) <= TOLERANCE


@pytest.mark.parametrize("name", ["bert", "uvit"])
def test_no_class(name):
    model, (ids, _) = build(name)
    flax_model, variables = to_flax(model)
    assert difference(model(ids), jax.jit(flax_model.apply)(variables, ids.numpy())) <= TOLERANCE


@pytest.mark.parametrize("name", LIVE)
def test_flax_has_the_same_parameters(name):
    model, inputs = build(name)
    flax_model, variables = to_flax(model)
    made = jax.eval_shape(flax_model.init, jax.random.key(0), *(x.numpy() for x in inputs))
    assert {key: x.shape for key, x in flat(made["params"]).items()} == {
        key: x.shape for key, x in flat(variables["params"]).items()
    }


def test_flax_reads_what_torch_saves(tmp_path):
    model, (images,) = build("titok, pixel decoder")
    model.save_pretrained(tmp_path)
    flax_model, variables = mirror(titok.TiTok).from_pretrained(tmp_path)
    assert flax_model.config == model.config
    assert difference(model(images).recon, jax.jit(flax_model.apply)(variables, images.numpy()).recon) <= 3 * TOLERANCE
    with pytest.raises(CheckpointError, match="expected a config with model 'tokenizer', got 'titok'"):
        mirror(tokenizer.Tokenizer).from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "titok", "mode": "neither"}')
    with pytest.raises(CheckpointError, match="mode: expected one of vq, vae, got 'neither'"):
        mirror(titok.TiTok).from_pretrained(tmp_path)
