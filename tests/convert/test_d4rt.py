"""The seed's checkpoints: read as its code writes them, every key accounted for, refused in one sentence, and back."""

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from fourdperf.convert.d4rt import FREQUENCIES, TEMPORAL, UNUSED, convert, export, infer_config, load, load_state
from fourdperf.convert.state import read_state
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.d4rt import D4RT, Config
from tests.models.d4rt_cases import Case
from tests.models.scaling4d_cases import randomize

HEADS = {"num_heads": 4, "decoder_heads": 3}


@pytest.fixture(scope="module")
def case():
    return Case("a_model")


def answers(model, case):
    with torch.no_grad():
        return model(case.video(), case.queries(), case.inputs["aspect_ratio"]).xyz


def lightning(state):
    """What Lightning's trainer saves of the seed's training module."""
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{name}": x for name, x in state.items()},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-4, "lambda_3d": 1.0},
    }


@pytest.mark.parametrize("kind", ["pth", "ckpt", "safetensors", "wrapped"])
def test_every_form_of_the_file(tmp_path, case, kind):
    path = tmp_path / f"d4rt.{'pth' if kind == 'wrapped' else kind}"
    if kind == "safetensors":
        save_file(case.params, path)
    else:
        contents = {"pth": case.params, "ckpt": lightning(case.params), "wrapped": {"model": case.params}}
        torch.save(contents[kind], path)
    config = convert(path, tmp_path / "ours", overrides=HEADS)
    model = D4RT.from_pretrained(tmp_path / "ours")
    assert model.config == config
    case.check("out/coords_3d", answers(model, case))
    case.check("out/coords_3d", answers(load(path, HEADS), case))


def test_the_config_is_read_from_the_shapes(case):
    config = load_state(case.params, HEADS).config
    wanted = {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "mlp_size": 128, "num_frames": 8},
        **{"image_size": (32, 32), "patch_size": (2, 8, 8), "decoder_size": 18, "decoder_layers": 2},
        **{"decoder_mlp_size": 2048, "num_bands": 10, "rgb_size": 9, "query_parts": (24, 8, 8)},
        **{"project_memory": True, "local_attention": "none", "norm_eps": 1e-5, "gelu": "none"},
    }
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert not load_state(
        Case("a_model_same_dim_noar").params, {"num_heads": 3, "decoder_heads": 3}
    ).config.project_memory


def test_heads_of_64_are_assumed_where_they_fit():
    params = {name: x for name, x in Case("a_model_mid_recipe").params.items() if name != UNUSED}
    config = infer_config({name: tuple(x.shape) for name, x in params.items()})
    assert (config.num_heads, config.decoder_heads, config.num_frames) == (6, 8, 100)


def test_the_model_owns_its_tensors(case):
    params = {name: x.clone() for name, x in case.params.items()}
    model = load_state(params, HEADS)
    before = answers(model, case)
    for x in params.values():
        x.zero_()
    assert torch.equal(answers(model, case), before)
    with torch.no_grad():  # keys and values come from one tensor of the port, and must not share it
        model.decoder.blocks[0].attention.key.weight.zero_()
    assert model.decoder.blocks[0].attention.value.weight.any()


BREAKS = {
    "missing": (lambda p: p.pop("decoder.layers.1.ffn.3.bias"), "missing decoder.layers.1.ffn.3.bias"),
    "unknown": (lambda p: p.update(extra=torch.zeros(1)), "unknown extra"),
    "shape": (
        lambda p: p.update({"decoder.norm.bias": torch.zeros(7)}),
        r"decoder\.norm\.bias: expected shape \(18,\), got \(7,\)",
    ),
    "axes": (
        lambda p: p.update({"encoder.spatial_pos_embed": torch.zeros(16, 32)}),
        "spatial_pos_embed: expected 3 axes",
    ),
    "no encoder": (
        lambda p: [p.pop(name) for name in list(p) if name.startswith("encoder.blocks")],
        r"missing encoder\.blocks\.0\.mlp\.0\.weight",
    ),
    "frequencies": (lambda p: p.update({FREQUENCIES: torch.arange(10.0)}), "freq_bands: expected"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_state_is_refused_by_its_key(tmp_path, case, name):
    spoil, message = BREAKS[name]
    params = dict(case.params)
    spoil(params)
    torch.save(params, tmp_path / "d4rt.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path / "d4rt.pth", tmp_path / "ours", overrides=HEADS)
    assert "d4rt.pth" in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_heads_that_no_shape_shows_must_be_given(case):
    with pytest.raises(CheckpointError, match="num_heads: the file does not say it"):
        load_state(case.params)


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_checkpoints(tmp_path, case, capsys):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    torch.save(case.params, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    save_file(case.params, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"a": case.params, "b": 3}, tmp_path / "other.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with open(tmp_path / "code.pth", "wb") as file:
        pickle.dump({"weights": Code()}, file)
    torch.save({"state_dict": {"model.x": Code()}}, tmp_path / "code.ckpt")
    names = ("cut.pth", "cut.safetensors", "empty.pth", "text.pth", "other.pth", "list.pth", "code.pth", "code.ckpt")
    for name in names:
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


# Back

SEED = {
    **{"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_frames": 9, "image_size": 32, "patch_size": (2, 8, 8)},
    **{"decoder_size": 24, "decoder_layers": 2, "decoder_heads": 3, "query_parts": (12, 8, 16), "rgb_size": 5},
}


def same(a, b):
    return set(a) == set(b) and all(x.dtype == b[name].dtype and torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("kind", ["pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("name", ["a_model", "a_model_same_dim_noar"])
def test_there_and_back_bit_for_bit(tmp_path, name, kind):
    params = Case(name).params
    torch.save(params, tmp_path / "in.pth")
    heads = {"num_heads": 4 if name == "a_model" else 3, "decoder_heads": 3}
    convert(tmp_path / "in.pth", tmp_path / "ours", overrides=heads)
    export(tmp_path / "ours", tmp_path / f"out.{kind}")
    prefix = "model." if kind == "ckpt" else ""
    back = {key.removeprefix(prefix): x for key, x in read_state(tmp_path / f"out.{kind}").items()}
    # Its 8 frames have 4 temporal positions out of 50; it reads no others, nor encoder.pos_embed.
    wanted = {**params, UNUSED: torch.zeros_like(params[UNUSED]), TEMPORAL: params[TEMPORAL].clone()}
    wanted[TEMPORAL][:, 4:] = 0
    assert same(back, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["none", "window"])
def test_ours_there_and_back_bit_for_bit(tmp_path, attention, dtype):
    """With a bias that the port's local attention lacks by default, as training one of ours gives."""
    model = randomize(D4RT(Config.seed(**SEED, local_attention=attention))).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "port.safetensors")
    again = load(tmp_path / "port.safetensors", {name: SEED[name] for name in ("num_heads", "decoder_heads")})
    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())


def test_a_local_bias_of_zeros_is_left_out(tmp_path):
    model = randomize(D4RT(Config.seed(**SEED, local_attention="window")))
    torch.nn.init.zeros_(model.encoder.layers[2].attention.qkv.bias)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "port.pth")
    state = read_state(tmp_path / "port.pth")
    assert "encoder.blocks.0.attn.qkv.bias" in state and "encoder.blocks.2.attn.qkv.bias" not in state
    again = load(tmp_path / "port.pth", {name: SEED[name] for name in ("num_heads", "decoder_heads")})
    assert same(again.state_dict(), model.state_dict())


def test_lightning_loads_a_ckpt(tmp_path, case):
    lightning = pytest.importorskip("lightning")

    class Port(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            for name, x in case.params.items():
                *parents, leaf = name.split(".")
                module = self.model
                for parent in parents:
                    if not hasattr(module, parent):
                        module.add_module(parent, torch.nn.Module())
                    module = getattr(module, parent)
                module.register_buffer(leaf, torch.zeros_like(x))

    load_state(case.params, HEADS).save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "port.ckpt")
    state = Port.load_from_checkpoint(tmp_path / "port.ckpt", weights_only=True).model.state_dict()
    assert torch.equal(state["decoder.output_proj.weight"], case.params["decoder.output_proj.weight"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"centered": True}, "centered: expected False, got True"),
        ({"positions": "joint"}, "positions: expected 'factorised', got 'joint'"),
        ({"local_attention": "frame"}, "local_attention: expected 'none', got 'frame'"),
        ({"query_parts": None}, r"query_parts: expected \(128, 64, 128\), got None"),
        ({"project_memory": False}, "project_memory: expected True, got False"),
        ({"num_frames": 102}, "num_frames: expected 101, got 102"),
        ({"image_size": (32, 16)}, r"image_size: expected \(32, 32\), got \(32, 16\)"),
        ({"patch_size": (2, 8, 4)}, r"patch_size: expected \(2, 8, 8\), got \(2, 8, 4\)"),
    ],
)
def test_a_model_that_the_port_cannot_compute(tmp_path, fields, message):
    D4RT(Config.seed(**{**SEED, **fields})).save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "ours", tmp_path / "port.pth")
    assert os.listdir(tmp_path) == ["ours"]


def test_export_of_what_is_no_model(tmp_path, case):
    with pytest.raises(ValueError, match="port.bin: expected a name that ends in .pth, .ckpt, .safetensors"):
        export(tmp_path, tmp_path / "port.bin")
    with pytest.raises(CheckpointError, match="no config.json here"):
        export(tmp_path, tmp_path / "port.pth")
    load_state(case.params, HEADS).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        export(tmp_path, tmp_path / "port.pth")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, case):
    load_state(case.params, HEADS).save_pretrained(tmp_path / "ours")
    (tmp_path / "port.pth").write_text("old")
    script = textwrap.dedent(
        """
        import resource, sys
        from fourdperf.convert.d4rt import export

        # A limit on the size of a file fails a write as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        for suffix in (".pth", ".safetensors"):
            try:
                export(f"{sys.argv[1]}/ours", f"{sys.argv[1]}/port{suffix}")
            except OSError as error:
                print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("cannot write" in line for line in lines), done
    assert sorted(os.listdir(tmp_path)) == ["ours", "port.pth"] and (tmp_path / "port.pth").read_text() == "old"
