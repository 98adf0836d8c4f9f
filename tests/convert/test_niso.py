"""The original's Neural Isometries: every key accounted for, refused in one sentence, and back."""

import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.convert.flax_tree import SUFFIXES, nested, read_parameters, write_parameters
from fourdperf.convert.niso import convert, export, infer_config, load, load_tree, table
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.niso import MODELS, Config
from tests.models.niso_cases import LIVE, Case, build, inputs

# What no array of these cases shows.
OVERRIDES = {
    "laplacian_loss_full_rank": {"image_size": (4, 5), "channels": 30},
    "hmnist_encode_loss": {"image_size": (12, 12)},
    "cshrec11_encode_loss": {"image_size": (8, 16)},
    "pose_encode_loss": {"image_size": (16, 16)},
    "hmnist_pred_loss": {"image_size": (12, 12)},
    "cshrec11_pred_loss": {"image_size": (8, 12)},
    "pose_pred_loss": {"image_size": (12, 12)},
}
NAME = "hmnist_pred_loss"


@pytest.fixture(scope="module")
def case():
    return Case(NAME)


def same(a, b):
    return set(a) == set(b) and all(x.dtype == b[name].dtype and torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_config_is_read_from_the_shapes(name):
    case = Case(name)
    model, sizes = load_tree(case.tree(), OVERRIDES[name]), case.model
    c = model.config
    assert c.kind == ("autoencoder" if "pred" not in name else "pose" if "pose" in name else "classifier")
    assert c.op_dim == sizes["op"] and c.channels == sizes["C"] and c.clustered == case.spec["clustered_init"]
    given = lambda key: tuple(sizes.get(key, ()))
    assert (c.encoder_channels, c.encoder_depth) == (given("enc_channels"), given("enc_depth"))
    if c.kind == "autoencoder":
        assert (c.decoder_channels, c.decoder_depth) == (given("dec_channels"), given("dec_depth"))
    else:
        assert (c.head_features, c.head_layers) == (sizes["features"], sizes["layers"])
    if c.kind == "classifier":
        assert (c.num_classes, c.gram_features) == (sizes["classes"], sizes["inter"])
    assert c.latent_channels == sizes.get("latent", sizes["C"]) and c.biases and not model.training
    assert c.procrustes_gradient == "regularized" and c.upstream_modules and c.train_basis


@pytest.mark.parametrize("name", LIVE)
def test_the_table_is_complete(name):
    """Each of our tensors, in our shapes, from keys of the original that are all different."""
    model = build(name)
    rows = table(model.config)
    assert {row.key: row.shape for row in rows} == {key: tuple(x.shape) for key, x in model.state_dict().items()}
    sources = [key for row in rows for key, _ in row.sources]
    assert len(sources) == len(set(sources))


@pytest.mark.parametrize(
    "name, suffix", [(name, suffix) for name in OVERRIDES for suffix in SUFFIXES if name == NAME or suffix != ".orbax"]
)
def test_there_and_back_bit_for_bit(tmp_path, name, suffix):
    if suffix == ".orbax":
        pytest.importorskip("orbax.checkpoint")
    params = Case(name).tree()
    write_parameters(tmp_path / f"in{suffix}", params)
    config = convert(tmp_path / f"in{suffix}", tmp_path / "ours", overrides=OVERRIDES[name])
    model = MODELS[config.kind].from_pretrained(tmp_path / "ours")
    assert model.config == config and same(
        load(tmp_path / f"in{suffix}", OVERRIDES[name]).state_dict(), model.state_dict()
    )
    export(tmp_path / "ours", tmp_path / f"out{suffix}")
    back = read_parameters(tmp_path / f"out{suffix}")
    assert back.keys() == params.keys()
    assert all(np.array_equal(x, params[key]) and x.dtype == params[key].dtype for key, x in back.items())


def test_a_training_state_of_the_original(tmp_path, case):
    """As flax.serialization writes it, optimiser and all; clu's checkpoints are these bytes."""
    serialization = pytest.importorskip("flax.serialization")
    state = {"step": 5, "params": nested(case.tree()), "opt_state": {"0": {"mu": nested(case.tree())}}}
    (tmp_path / "ckpt-5.flax").write_bytes(serialization.to_bytes(state))
    found = load(tmp_path / "ckpt-5.flax", OVERRIDES[NAME]).state_dict()
    assert same(found, load_tree(case.tree(), OVERRIDES[NAME]).state_dict())


@pytest.mark.filterwarnings("ignore:.*the original has other modules")
@pytest.mark.parametrize("name", LIVE)
def test_ours_there_and_back(tmp_path, name):
    """Through the mirror's form, whose options the file does not say."""
    model = build(name)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "mirror.npz")
    told = ("image_size", "channels", "clustered", "upstream_modules", "train_basis", "procrustes_gradient")
    given = {key: getattr(model.config, key) for key in told}
    again = load(tmp_path / "mirror.npz", given)
    assert same(again.state_dict(), model.state_dict())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    found, want = again(*inputs(model)), model(*inputs(model))
    assert torch.equal(found.tau, want.tau) if model.config.kind == "autoencoder" else torch.equal(found, want)


@pytest.mark.parametrize(
    "name, message",
    [
        ("autoencoder", "no biases in residual blocks"),
        ("classifier", "no biases in residual blocks; all modules of the equivariant layers"),
        ("classifier, upstream", None),
        ("operator alone", None),
        ("pose, motion", "no biases in residual blocks; a head on motion"),
    ],
)
def test_a_warning_where_the_original_has_other_modules(tmp_path, recwarn, name, message):
    build(name).save_pretrained(tmp_path / "ours")
    if message is None:
        export(tmp_path / "ours", tmp_path / "port.npz")
        assert not [x for x in recwarn if "other modules" in str(x.message)]
        return
    with pytest.warns(UserWarning, match=message):
        export(tmp_path / "ours", tmp_path / "port.npz")


BREAKS = {
    "missing": (lambda p: p.pop("encoder/module_list_2/Conv_1/bias"), "missing encoder/module_list_2/Conv_1/bias"),
    "no operator": (lambda p: p.pop("kernel/Lambda"), "missing kernel/Lambda"),
    "no head": (lambda p: p.pop("model/orth_out_0/Dense_1/kernel"), "missing model/orth_out_0/Dense_1/kernel"),
    "unknown": (lambda p: p.update({"extra/kernel": np.zeros(1, "f4")}), "unknown extra/kernel"),
    "shape": (
        lambda p: p.update({"kernel/M": np.zeros(35, "f4")}),
        r"kernel/M: expected shape \(36,\), got \(35,\)",
    ),
    "axes": (
        lambda p: p.update({"encoder/module_list_2/Conv_0/kernel": np.zeros((3, 3), "f4")}),
        r"encoder/module_list_2/Conv_0/kernel: expected 4 axes, got shape \(3, 3\)",
    ),
    "more functions than points": (
        lambda p: p.update({"kernel/Lambda": np.zeros(37, "f4")}),
        "op_dim: expected at most 36",
    ),
    "integers": (lambda p: p.update({"kernel/M": np.zeros(36, "i4")}), "kernel/M: expected a floating array"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_tree_is_refused_by_its_key(tmp_path, case, name):
    pytest.importorskip("flax.serialization")
    spoil, message = BREAKS[name]
    params = case.tree()
    spoil(params)
    write_parameters(tmp_path / "port.msgpack", params)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "port.msgpack", tmp_path / "ours", overrides=OVERRIDES[NAME])
    assert "port.msgpack" in str(error.value) and not (tmp_path / "ours").exists()


def test_what_no_array_shows_must_be_given(case):
    with pytest.raises(CheckpointError, match="tree: image_size: no array shows it"):
        load_tree(case.tree())
    with pytest.raises(CheckpointError, match="image_size and channels: no array shows it"):
        load_tree(Case("laplacian_loss_full_rank").tree())
    with pytest.raises(CheckpointError, match=r"kernel/M: expected shape \(49,\), got \(36,\)"):
        load_tree(case.tree(), {"image_size": 14})
    with pytest.raises(CheckpointError, match="tree: layers: no such option"):
        load_tree(case.tree(), {"image_size": 12, "layers": 3})
    shapes = {key: x.shape for key, x in case.tree().items()}
    assert isinstance(infer_config(shapes, {"image_size": 12}), Config)


def test_export_of_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="port.bin: expected a name that ends in .msgpack, .npz, .orbax"):
        export(tmp_path, tmp_path / "port.bin")
    with pytest.raises(CheckpointError, match="no config.json here"):
        export(tmp_path, tmp_path / "port.npz")


def test_the_command_both_ways(tmp_path, case, capsys):
    pytest.importorskip("flax.serialization")
    write_parameters(tmp_path / "port.msgpack", case.tree())
    paths = [str(tmp_path / x) for x in ("port.msgpack", "ours", "back.msgpack")]
    assert main(["convert", *paths[:2], "--model", "niso", "--fields.image_size", "[12, 12]"]) == 0
    shown = capsys.readouterr().out
    assert "8 functions on a grid of 6x6" in shown and "classifier" in shown
    assert main(["convert", *paths[1:]]) == 0
    back = read_parameters(tmp_path / "back.msgpack")
    assert all(np.array_equal(x, case.tree()[key]) for key, x in back.items())
