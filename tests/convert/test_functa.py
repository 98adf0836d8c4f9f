"""The JAX port's functas: every form of the file, every key accounted for, refused in one sentence, and back."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.convert.flax_tree import SUFFIXES, is_orbax, nested, read_parameters, write_parameters
from fourdperf.convert.functa import convert, export, infer_config, load, load_tree
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.functa import Config, Functa
from tests.models.functa_cases import Case

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
ocp = pytest.importorskip("orbax.checkpoint")
serialization = pytest.importorskip("flax.serialization")
train_state = pytest.importorskip("flax.training.train_state")

# What no array of these cases shows.
OVERRIDES = {
    "siren_nn_both_s8_28": {"image_size": (28, 28)},
    "siren_linear_shift_s4_32": {"image_size": (32, 32)},
    "siren_linear_both_s4_nonsquare": {"latent_size": 4, "image_size": (12, 20)},
    "siren_nn_both_s4_nonsquare": {"latent_size": 4, "image_size": (12, 20)},
    "siren_nn_scale_s4_32": {"modulate": "scale"},
    "siren_single_both_s1_32": {"latent_size": 1},
    "inner_fit_nn_shift_lrs_s4_16": {"image_size": (16, 16), "rate_multiplier": 32.0},
}
NAME = "siren_nn_both_s8_28"
SMALL = {"hidden_size": 8, "num_layers": 3, "image_size": (6, 10), "latent_size": 3, "latent_channels": 4}


@pytest.fixture(scope="module")
def case():
    return Case(NAME)


def arrays(case):
    return {name: x.numpy() for name, x in case.params.items()}


def state(params):
    """A training state as the port's trainer keeps one: step, parameters, Adam's moments."""
    return train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3)).replace(step=7)


def write(kind, tree, path):
    """The tree as flax, orbax or numpy write it, bare or within a training state."""
    if kind == "npz, bare":
        np.savez(path.with_suffix(".npz"), **{name: x for name, x in flat(tree).items()})
        return path.with_suffix(".npz")
    if kind.startswith("msgpack"):
        contents = {
            "msgpack": {"params": tree},
            "msgpack, bare": tree,
            "msgpack, state": state(tree),
            "msgpack, state/params": {"state": {"params": tree, "step": 3}, "config": {"seed": 0}},
            "msgpack, variables of a state": {"params": {"params": tree}},
        }[kind]
        path = path.with_suffix(".msgpack")
        path.write_bytes(serialization.to_bytes(contents))
        return path
    if kind == "orbax, manager":
        with ocp.CheckpointManager(path) as manager:
            for step in (9, 10):
                scaled = jax.tree.map(lambda x, step=step: x * (step == 10), tree)
                manager.save(step, args=ocp.args.StandardSave({"state": {"params": scaled, "step": step}}))
            manager.wait_until_finished()
        return path
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"orbax": {"params": tree}, "orbax, state": state(tree)}[kind])
    return path


def flat(tree):
    return {"/".join(x.key for x in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


KINDS = [
    *("msgpack", "msgpack, bare", "msgpack, state", "msgpack, state/params", "msgpack, variables of a state"),
    *("orbax", "orbax, state", "orbax, manager", "npz, bare"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_the_file(tmp_path, case, kind):
    path = write(kind, jax.tree.map(jax.numpy.asarray, nested(arrays(case))), tmp_path / "port")
    assert is_orbax(path) == kind.startswith("orbax")
    config = convert(path, tmp_path / "ours", overrides=OVERRIDES[NAME])
    model = Functa.from_pretrained(tmp_path / "ours")
    assert model.config == config == case.config
    with torch.no_grad():
        case.check("out/recon", model(case.inputs["latent"][None], case.inputs["coords"])[0])
    assert same(load(path, OVERRIDES[NAME]).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_config_is_read_from_the_shapes(name):
    case = Case(name)
    config = load_tree(arrays(case), OVERRIDES[name]).config
    assert config == case.config


@pytest.mark.parametrize("rates", ["one", "pixel", "channel", "full"])
def test_rates_are_read_from_their_shape(rates):
    shapes = {"lrs/lrs": (3 if rates in ("pixel", "full") else 1,) * 2 + (4 if rates in ("channel", "full") else 1,)}
    shapes |= {"kernel_net_0/linear/kernel": (2, 8), "kernel_net_1/kernel": (8, 3)}
    shapes |= {"latent_to_modulation/network/kernel": (1, 1, 4, 8)}
    given = {} if rates in ("pixel", "full") else {"latent_size": 3}
    config = infer_config(shapes, given)
    assert (config.rates, config.latent_size, config.latent_channels) == (rates, 3, 4)
    if given:
        with pytest.raises(CheckpointError, match="latent_size: no array shows it"):
            infer_config(shapes)


def test_the_model_owns_its_tensors(case):
    params = {name: x.copy() for name, x in arrays(case).items()}
    model = load_tree(params, OVERRIDES[NAME])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for x in params.values():
        x[:] = 0
    assert same(model.state_dict(), before)


BREAKS = {
    "missing": (lambda p: p.pop("kernel_net_2/linear/bias"), "missing kernel_net_2/linear/bias"),
    "no first layer": (lambda p: p.pop("kernel_net_0/linear/kernel"), "missing kernel_net_0/linear/kernel"),
    "no modulation": (lambda p: p.pop("latent_to_modulation/network/kernel"), "missing latent_to_modulation/network"),
    "unknown": (lambda p: p.update({"extra/kernel": np.zeros(1, "f4")}), "unknown extra/kernel"),
    "shape": (
        lambda p: p.update({"kernel_net_1/linear/bias": np.zeros(7, "f4")}),
        r"kernel_net_1/linear/bias: expected shape \(16,\), got \(7,\)",
    ),
    "axes": (
        lambda p: p.update({"latent_to_modulation/network/kernel": np.zeros((6, 96), "f4")}),
        r"latent_to_modulation/network/kernel: expected 4 axes, got shape \(6, 96\)",
    ),
    "integers": (
        lambda p: p.update({"kernel_net_0/linear/bias": np.zeros(16, "i4")}),
        "kernel_net_0/linear/bias: expected a floating array, got int32",
    ),
    "rates of no square": (
        lambda p: p.update({"lrs/lrs": np.zeros((8, 4, 1), "f4")}),
        r"lrs/lrs: expected shape \(8, 8, 1\), got \(8, 4, 1\)",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_tree_is_refused_by_its_key(tmp_path, case, name):
    spoil, message = BREAKS[name]
    params = arrays(case)
    spoil(params)
    write("msgpack", nested(params), tmp_path / "port")
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "port.msgpack", tmp_path / "ours", overrides=OVERRIDES[NAME])
    assert "port.msgpack" in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_what_no_array_shows_must_be_given(case):
    with pytest.raises(CheckpointError, match="tree: latent_size: no array shows it"):
        load_tree(arrays(Case("siren_nn_both_s4_nonsquare")))
    with pytest.raises(CheckpointError, match="latent_size and image_size: no array shows it"):
        load_tree(arrays(Case("siren_linear_both_s4_nonsquare")))
    with pytest.raises(CheckpointError, match=r"kernel_net_0/linear/kernel: expected shape \(12, 16\), got \(10, 16\)"):
        load_tree(arrays(Case("siren_linear_shift_s4_32")), {"image_size": 64})
    with pytest.raises(CheckpointError, match="tree: layers: no such option"):
        load_tree(arrays(case), {"latent_size": 8, "layers": 3})


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_checkpoints(tmp_path, case, capsys):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.msgpack")
    write("msgpack", nested(arrays(case)), tmp_path / "whole")
    data = (tmp_path / "whole.msgpack").read_bytes()
    (tmp_path / "cut.msgpack").write_bytes(data[: len(data) // 2])
    (tmp_path / "more.msgpack").write_bytes(data + b"\0")
    (tmp_path / "empty.msgpack").write_bytes(b"")
    (tmp_path / "text.msgpack").write_text("not weights")
    (tmp_path / "number.msgpack").write_bytes(serialization.msgpack_serialize(3))
    (tmp_path / "list.msgpack").write_bytes(serialization.msgpack_serialize({"params": [np.zeros(3)]}))
    (tmp_path / "nothing.msgpack").write_bytes(serialization.msgpack_serialize({"params": {}}))
    (tmp_path / "code.msgpack").write_bytes(pickle.dumps({"params": Code()}))
    np.savez(tmp_path / "code.npz", **{"params/kernel_net_0/linear/kernel": np.array([Code()])})
    np.savez(tmp_path / "whole.npz", **arrays(case))
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "both.npz", **{"a": np.zeros(1), "a/b": np.zeros(1)})
    (tmp_path / "folder").mkdir()
    names = [f"{x}.msgpack" for x in ("cut", "more", "empty", "text", "number", "list", "nothing", "code")]
    for name in (*names, "code.npz", "cut.npz", "both.npz", "folder"):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name, OVERRIDES[NAME])
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads
@pytest.mark.parametrize("part", ["_METADATA", "manifest.ocdbt", "data", "half of the data"])
def test_a_damaged_orbax_folder_is_one_error(tmp_path, case, part):
    write("orbax", nested(arrays(case)), tmp_path / "port")
    if part.endswith("data"):
        for file in (tmp_path / "port").rglob("d/*"):
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2]) if part.startswith("half") else file.unlink()
    else:
        (tmp_path / "port" / part).unlink()
    with pytest.raises(CheckpointError, match="port: ") as error:
        load(tmp_path / "port", OVERRIDES[NAME])
    assert len(str(error.value).splitlines()) == 1


# Back


def same(a, b):
    return set(a) == set(b) and all(x.dtype == b[name].dtype and torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", OVERRIDES)
def test_there_and_back_bit_for_bit(tmp_path, name, suffix):
    params = arrays(Case(name))
    write_parameters(tmp_path / f"in{suffix}", params)
    convert(tmp_path / f"in{suffix}", tmp_path / "ours", overrides=OVERRIDES[name])
    export(tmp_path / "ours", tmp_path / f"out{suffix}")
    back = read_parameters(tmp_path / f"out{suffix}")
    assert back.keys() == params.keys()
    assert all(np.array_equal(x, params[key]) and x.dtype == params[key].dtype for key, x in back.items())
    assert is_orbax(tmp_path / f"out{suffix}") == (suffix == ".orbax")


OURS = {
    "spatial": {"rates": "full", "interpolation": "linear", "modulate": "both"},
    "series": {"latent_size": 1, "image_size": (12,), "rates": "channel"},
    "voxels": {"latent_size": 1, "image_size": (2, 3, 4), "modulate": "scale"},
}


@pytest.mark.filterwarnings("ignore:.*the port computes otherwise")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", OURS)
def test_ours_there_and_back_bit_for_bit(tmp_path, name, dtype):
    """Through the mirror's form, whose options the file does not say."""
    model = Functa(Config(**{**SMALL, **OURS[name]})).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "mirror.msgpack")
    given = {key: getattr(model.config, key) for key in ("image_size", "modulation_layout", "rate_range", "modulate")}
    again = load(tmp_path / "mirror.msgpack", {**given, "transposed_grid": False})
    assert again.config == model.config and same(again.state_dict(), model.state_dict())


def test_bfloat16_becomes_float32_and_is_read(tmp_path):
    model = Functa(Config.upstream(**SMALL)).bfloat16()
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "port.msgpack")
    given = {"latent_size": 3, "image_size": (6, 10)}
    assert same(load(tmp_path / "port.msgpack", given).state_dict(), model.float().state_dict())
    tree = jax.tree.map(lambda x: jax.numpy.asarray(x, "bfloat16"), nested(read_parameters(tmp_path / "port.msgpack")))
    for kind in ("msgpack", "orbax"):
        path = write(kind, tree, tmp_path / kind)
        assert same(load(path, given).state_dict(), model.bfloat16().state_dict()), kind


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "modulation_layout is pixel, there upstream"),
        ({"latent_size": 1, "image_size": (9,)}, r"signals of size \(9,\), there images"),
        ({"modulation_layout": "upstream", "rates": "one", "rate_range": (0.2, 0.3)}, r"clipped to \(0.2, 0.3\)"),
        ({"modulation_layout": "upstream", "rates": "one"}, None),
        ({"latent_size": 1}, None),
    ],
)
def test_a_warning_where_the_port_computes_otherwise(tmp_path, recwarn, fields, message):
    Functa(Config(**{**SMALL, **fields})).save_pretrained(tmp_path / "ours")
    if message is None:
        export(tmp_path / "ours", tmp_path / "port.npz")
        assert not [x for x in recwarn if "port computes" in str(x.message)]
        return
    with pytest.warns(UserWarning, match=message):
        export(tmp_path / "ours", tmp_path / "port.npz")


def test_export_of_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="port.bin: expected a name that ends in .msgpack, .npz, .orbax"):
        export(tmp_path, tmp_path / "port.bin")
    with pytest.raises(CheckpointError, match="no config.json here"):
        export(tmp_path, tmp_path / "port.npz")
    Functa(Config.upstream(**SMALL)).save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "port.orbax")
    with pytest.raises(FileExistsError, match="expected no such folder yet"):
        export(tmp_path / "ours", tmp_path / "port.orbax")
    weights = tmp_path / "ours" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        export(tmp_path / "ours", tmp_path / "port.npz")
    assert not (tmp_path / "port.npz").exists()


# The command


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_command_both_ways(tmp_path, case, capsys, suffix):
    write_parameters(tmp_path / f"port{suffix}", arrays(case))
    paths = [str(tmp_path / x) for x in (f"port{suffix}", "ours", f"back{suffix}")]
    fields = ["--fields.latent_size", "8", "--fields.image_size", "[28, 28]"]
    model = ["--model", "functa"] if suffix == ".npz" else []
    assert main(["convert", *paths[:2], *fields, *model, "--arrays", "true"]) == 0
    shown = capsys.readouterr().out
    assert "8x8x6, nearest, both, layout upstream" in shown and "28x28" in shown and "modulation.weight" in shown
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model"] == "functa"
    assert main(["convert", *paths[1:]]) == 0
    back = read_parameters(paths[2])
    assert back.keys() == case.params.keys()
    assert all(np.array_equal(back[key], x) for key, x in arrays(case).items())


def test_what_the_command_says(tmp_path, capsys):
    write_parameters(tmp_path / "port.orbax", arrays(Case("siren_nn_both_s4_nonsquare")))
    shutil.copytree(tmp_path / "port.orbax", tmp_path / "any name")
    assert main(["convert", str(tmp_path / "any name"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "any name: latent_size: no array shows it" in line
    (tmp_path / "any name" / "_METADATA").write_text("{")
    assert main(["convert", str(tmp_path / "any name"), str(tmp_path / "out"), "--fields.latent_size", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "any name: damaged orbax checkpoint" in line
    assert not (tmp_path / "out").exists()
