"""Classifiers as Flax trees: files there and back, every key accounted for, refused in one sentence."""

import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.convert.flax_tree import SUFFIXES, nested, read_parameters, write_parameters
from fourdperf.convert.latent_classifier import convert, export, infer_config, load, load_tree
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.latent_classifier import LatentClassifier
from tests.models.latent_classifier_cases import FORWARD, LIVE, Case, build

pytest.importorskip("orbax.checkpoint")
serialization = pytest.importorskip("flax.serialization")

GIVEN = {"normalizing_factor": 0.08}
# What no array shows of the live models.
UNSEEN = ("latent_size", "normalizing_factor", "mlp_size", "num_heads")


def same(a, b):
    return set(a) == set(b) and all(x.dtype == b[name].dtype and torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", FORWARD)
def test_the_seeds_there_and_back_bit_for_bit(tmp_path, name, suffix):
    case = Case(name)
    write_parameters(tmp_path / f"in{suffix}", case.params)
    config = convert(tmp_path / f"in{suffix}", tmp_path / "ours", overrides=GIVEN)
    model = LatentClassifier.from_pretrained(tmp_path / "ours")
    assert model.config == config
    with torch.no_grad():
        case.check("out/logits", model(case.input("x")))
    export(tmp_path / "ours", tmp_path / f"out{suffix}")
    back = read_parameters(tmp_path / f"out{suffix}")
    assert back.keys() == case.params.keys()
    assert all(np.array_equal(x, case.params[key]) and x.dtype == case.params[key].dtype for key, x in back.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", LIVE)
def test_ours_there_and_back_bit_for_bit(tmp_path, name, dtype):
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "tree.msgpack")
    again = load(tmp_path / "tree.msgpack", {key: getattr(model.config, key) for key in UNSEEN})
    assert again.config == model.config and same(again.state_dict(), model.state_dict())


def test_the_config_is_read_from_the_shapes():
    mlp, transformer, fewer = (load_tree(Case(name).params).config for name in FORWARD)
    assert (mlp.kind, mlp.latent_size, mlp.latent_channels, mlp.hidden_size, mlp.num_layers) == ("mlp", 1, 40, 32, 3)
    assert load_tree(Case("classifier_mlp").params, {"latent_size": 2}).config.latent_channels == 10
    sizes = lambda c: (c.kind, c.latent_size, c.latent_channels, c.hidden_size, c.mlp_size, c.num_layers, c.num_heads)
    assert sizes(transformer) == ("transformer", 4, 6, 24, 48, 3, 4) and transformer.num_classes == 10
    assert sizes(fewer) == ("transformer", 5, 5, 16, 40, 2, 2) and fewer.num_classes == 7


def test_the_model_owns_its_tensors():
    params = {name: x.copy() for name, x in Case("classifier_mlp").params.items()}
    model = load_tree(params)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for x in params.values():
        x[:] = 0
    assert same(model.state_dict(), before)


BREAKS = {
    "missing": (lambda p: p.pop("transformer_1/linear_3/bias"), "missing transformer_1/linear_3/bias"),
    "unknown": (
        lambda p: p.update({"transformer_1/linear_4/bias": np.zeros(1, "f4")}),
        "unknown transformer_1/linear_4",
    ),
    "shape": (
        lambda p: p.update({"transformer_0/attn/key/bias": np.zeros((2, 12), "f4")}),
        r"transformer_0/attn/key/bias: expected shape \(4, 6\), got \(2, 12\)",
    ),
    "axes": (lambda p: p.update({"pos_embedding": np.zeros((1, 17, 24), "f4")}), "pos_embedding: expected 2 axes"),
    "no square": (
        lambda p: p.update({"pos_embedding": np.zeros((16, 24), "f4")}),
        r"pos_embedding: expected 1 \+ s s positions, got 16",
    ),
    "no classifier": (lambda p: p.pop("cls_token"), r"missing cls_token \(a transformer's\), Dense_0/kernel"),
    "no block": (
        lambda p: [p.pop(name) for name in list(p) if name.startswith("transformer_0")],
        "missing transformer_0/attn/query/kernel",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_tree_is_refused_by_its_key(tmp_path, name):
    spoil, message = BREAKS[name]
    params = dict(Case("classifier_transformer").params)
    spoil(params)
    write_parameters(tmp_path / "tree.msgpack", params)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "tree.msgpack", tmp_path / "ours")
    assert "tree.msgpack" in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_numbers_that_make_no_map():
    with pytest.raises(CheckpointError, match=r"Dense_0/kernel: expected shape \(36, 32\), got \(40, 32\)"):
        load_tree(Case("classifier_mlp").params, {"latent_size": 3})


@pytest.mark.parametrize(
    "overrides, message",
    [({"width": 3}, "width: no such option"), ({"latent_size": 0}, "latent_size: expected a positive integer, got 0")],
)
def test_wrong_overrides(overrides, message):
    with pytest.raises(CheckpointError, match=message):
        load_tree(Case("classifier_mlp").params, overrides)


def test_what_wraps_the_parameters(tmp_path):
    """A training state of the seed's, with the average beside the parameters."""
    params = Case("classifier_mlp").params
    average = {name: 0 * x for name, x in params.items()}
    state = {"step": 3, "params": nested(params), "ema_params": nested(average), "opt_state": {"0": {"mu": {}}}}
    (tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize({"state": state}))
    assert same(load(tmp_path / "state.msgpack").state_dict(), load_tree(params).state_dict())


def test_a_resnet_is_told_by_its_stem():
    shapes = {"stem/kernel": (3, 3, 5, 16), "head/kernel": (16, 7), "blocks_1/conv_in/kernel": (3, 3, 16, 16)}
    config = infer_config(shapes)
    assert (config.kind, config.latent_channels, config.hidden_size, config.num_layers) == ("resnet", 5, 16, 2)
    assert config.num_classes == 7


def test_the_command_both_ways(tmp_path, capsys):
    case = Case("classifier_transformer")
    write_parameters(tmp_path / "in.msgpack", case.params)
    paths = [str(tmp_path / x) for x in ("in.msgpack", "ours", "back.msgpack")]
    fields = ["--fields.normalizing_factor", "0.08", "--model", "latent_classifier"]
    assert main(["convert", *paths[:2], *fields]) == 0
    shown = capsys.readouterr().out
    assert "transformer, 3 layers, width 24, 10 classes" in shown and "4x4x6, divided by 0.08" in shown
    assert main(["convert", *paths[1:]]) == 0
    back = read_parameters(paths[2])
    assert all(np.array_equal(back[key], x) for key, x in case.params.items()) and back.keys() == case.params.keys()
    assert main(["convert", paths[0], str(tmp_path / "out")]) == 2  # a functa, where the model is not said
    (line,) = capsys.readouterr().err.splitlines()
    assert "in.msgpack: missing kernel_net_0/linear/kernel" in line
