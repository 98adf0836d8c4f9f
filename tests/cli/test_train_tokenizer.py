"""`fourdperf train tokenizer` and `token_generator` as commands: YAML, defaults, and models that start from others."""

import json
from types import SimpleNamespace

import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.cli.train_tokenizer import TINY, _lightning, _network
from fourdperf.models.image_mae import Config, ImageMAE
from fourdperf.models.maskgit_vqgan import Config as VQGANConfig
from fourdperf.models.tokenizers import FAMILIES, load_tokenizer
from tests.train.tokenizer_runs import options, train, write_pictures

pytest.importorskip("lightning")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("family", TINY)
def test_default_sizes(family):
    """As many latents as the seed's smaller models have, of pictures of 64 pixels."""
    model = FAMILIES[family](FAMILIES[family].CONFIG(image_size=64, **TINY[family]))
    found = model.eval()(torch.rand(1, 64, 64, 3))
    assert found.recon.shape == (1, 64, 64, 3) and found.encoded.indices.shape == (1, 32)
    assert sum(p.numel() for p in model.parameters()) < 5e6


@pytest.mark.parametrize("stage", [None, "1"])
def test_a_new_model_of_a_release_s_size_is_no_release(stage):
    """Its encoder learns: there is no pixel decoder yet. A field that is given counts."""
    fields = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    fields |= {"decoder_size": 16, "decoder_layers": 1, "decoder_heads": 2}
    options = dict.fromkeys(("pretrained", "image_size", "init_encoder", "strategy"))
    options |= {"family": "titok", "variant": "s128", "stage": stage, "model": fields}
    vqgan = SimpleNamespace(config=VQGANConfig(codebook_size=12))
    network, _ = _network(options, vqgan)
    c = network.config
    assert (c.num_latents, c.pixels, c.latent_layout) == (128, None, "token")
    assert (c.target, c.target_codes) == (("codes", 12) if stage else ("pixels", 1024))
    assert all(p.requires_grad for p in network.parameters())
    network, _ = _network({**options, "model": {**fields, "latent_layout": "upstream"}}, vqgan)
    assert network.config.latent_layout == "upstream"


@pytest.mark.parametrize(
    ("strategy", "devices", "adversary", "wanted"),
    [
        ("auto", 2, True, "ddp_find_unused_parameters_true"),
        ("ddp", 1, True, "ddp_find_unused_parameters_true"),
        ("auto", 1, True, "auto"),
        ("auto", 2, False, "auto"),
        ("fsdp", 2, True, "fsdp"),
    ],
)
def test_strategies_know_that_the_discriminator_may_wait(strategy, devices, adversary, wanted):
    options = {"strategy": strategy, "devices": devices, "num_nodes": 1}
    module = SimpleNamespace(adversary=object() if adversary else None)
    assert _lightning(options, module)["strategy"] == wanted
    if strategy == "auto":
        assert _lightning({**options, "devices": 1, "num_nodes": devices}, module)["strategy"] == wanted


def test_yaml(data, tmp_path):
    config = tmp_path / "run.yaml"
    lines = [f"data_path: {data}", f"out: {tmp_path / 'run'}", "max_steps: 1", "loss:", "  l2: 2.0"]
    config.write_text("\n".join([*lines, "model:", "  codebook_size: 12"]) + "\n")
    mine = ("--max_steps", "--model.codebook_size")
    given = [option for option in options("tokenizer") if not option.startswith(mine)]
    assert main(["train", "tokenizer", f"--config={config}", *given]) == 0
    assert load_tokenizer(tmp_path / "run").config.codebook_size == 12
    written = json.loads((tmp_path / "run" / "options.json").read_text())
    assert written["max_steps"] == 1 and written["loss"]["l2"] == 2.0 and written["perceptual_loss"] is None


def test_encoders_of_an_image_mae(data, tmp_path, capsys):
    """To start from, and as the judge of features; both as --variant tiny has them."""
    torch.manual_seed(0)
    sizes = {name: TINY["tokenizer"][name] for name in ("patch_size", "hidden_size", "num_layers", "num_heads")}
    ImageMAE(Config(image_size=16, mlp_size=768, **sizes)).save_pretrained(tmp_path / "mae")
    more = [
        f"--data_path={data}",
        f"--out={tmp_path / 'run'}",
        "--init_encoder=image_mae",
        "--max_steps=1",
        "--lr=1e-9",
    ]
    more += [f"--init_weights={tmp_path / 'mae'}", "--features=image_mae", f"--features_weights={tmp_path / 'mae'}"]
    more += ["--image_size=16", "--loss.features=0.5", "--loss.perceptual=0", "--discriminator=none", "--batch_size=2"]
    more += ["--model.channel_multipliers=[1,1]", "--model.attention_sizes=[]", "--accelerator=cpu", "--log_every=1"]
    assert main(["train", "tokenizer", *more]) == 0
    assert "encoder from image_mae" in capsys.readouterr().out
    ours, theirs = load_tokenizer(tmp_path / "run").encoder, ImageMAE.from_pretrained(tmp_path / "mae").encoder
    name = "blocks.3.mlp.dense_in.weight"
    torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name), atol=1e-7, rtol=0)
    header, row = (tmp_path / "run" / "train.csv").read_text().splitlines()
    assert 0 < float(row.split(",")[header.split(",").index("features")]) < 2


def test_sharding_wants_a_codebook_that_is_whole(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--strategy=fsdp", "--model.restart=20") == 2
    assert "--strategy: fsdp shards the codebook; wanted --model.ema 0.99" in capsys.readouterr().err


def test_generators_want_codes(data, tmp_path, capsys):
    assert train(data, tmp_path / "vae", "--model.mode=vae", "--max_steps=1", family="titok") == 0
    more = [f"--tokenizer={tmp_path / 'vae'}", f"--out={tmp_path / 'run'}", f"--data_path={data}"]
    assert main(["train", "token_generator", *more]) == 2
    assert "--tokenizer: wanted one with codes, got a VAE" in capsys.readouterr().err
