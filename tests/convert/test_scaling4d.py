"""Released `.npz` layouts to our checkpoints and back: exact, every key accounted for, nothing left by a failure."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf.convert import npz as npz_module
from fourdperf.convert import scaling4d as converter
from fourdperf.convert.npz import write_npz
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.scaling4d import VARIANTS, Config, ReadoutConfig, Scaling4D
from tests.models.scaling4d_cases import TOLERANCE, case, difference, names

FILES = names("encoder_", "extra_encoder_", "depth_")


def save(path: Path, parameters: dict[str, np.ndarray], root: str = "params/", how=np.savez) -> Path:
    how(path, **{root + key: value for key, value in parameters.items()})
    return path


def hidden_fields(name: str) -> dict:
    """What no array shows."""
    config = case(name).config
    fields = {"n_iter": config.n_iter, "block": config.block, "video_size": config.video_size}
    if config.readout:
        keys = ("depth", "output_shape", "decoding_patch_size")
        fields["readout"] = {key: getattr(config.readout, key) for key in keys}
    return fields


@pytest.mark.parametrize("name", FILES)
def test_round_trip_is_exact(tmp_path, name):
    golden = case(name)
    source = save(tmp_path / "in.npz", golden.parameters)
    config = converter.convert(source, tmp_path / "ours", overrides=hidden_fields(name))
    assert config == golden.config

    model = Scaling4D.from_pretrained(tmp_path / "ours")
    video = torch.from_numpy(golden.inputs["video"])
    if config.readout:
        assert difference(model(video), golden.outputs["prediction"]) <= TOLERANCE
    else:
        assert difference(model(video), golden.outputs[f"features_{config.num_layers}"]) <= TOLERANCE

    converter.export(tmp_path / "ours", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as back:
        assert sorted(back.files) == sorted("params/" + key for key in golden.parameters)
        for key, value in golden.parameters.items():
            assert back["params/" + key].dtype == value.dtype
            np.testing.assert_array_equal(back["params/" + key], value)


@pytest.mark.parametrize("root", ["params/", ""], ids=["with params", "without params"])
@pytest.mark.parametrize("how", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_spellings_of_the_file(tmp_path, root, how):
    golden = case("depth_up_095")
    model = converter.load_npz(
        save(tmp_path / "in.npz", golden.parameters, root, how), overrides=hidden_fields("depth_up_095")
    )
    assert not model.training
    assert difference(model(torch.from_numpy(golden.inputs["video"])), golden.outputs["prediction"]) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("readout", [None, ReadoutConfig.dense()], ids=["encoder", "depth"])
def test_config_is_inferred_from_shapes(variant, readout):
    config = Config.from_variant(variant, readout=readout)
    shapes = {"params/" + name: shape for row in converter.table(config) for name, shape in row.sources}
    inferred = converter.infer_config(shapes)
    assert inferred == config and inferred.variant == variant
    assert len(shapes) == 3 + 16 * config.num_layers + (18 if readout else 0)


@pytest.mark.parametrize(
    "readout",
    [
        ReadoutConfig(7, 64, 4, num_frames=16),
        ReadoutConfig(7, 64, 4, num_frames=16, num_queries=3, match_vjepa_implementation=False),
        ReadoutConfig(7, 64, 4, num_frames=16, add_temporal_posenc=False),
        ReadoutConfig(7, 64, 4, num_frames=9, query_features=12),
        ReadoutConfig(7, 64, 4, num_frames=1, query_features=12, match_vjepa_implementation=False),
    ],
    ids=["plain", "no vjepa", "no posenc", "external queries", "external queries, no vjepa"],
)
def test_readout_options_are_inferred_from_shapes(readout):
    config = Config.from_variant("Ti", readout=readout)
    shapes = {name: shape for row in converter.table(config) for name, shape in row.sources}
    assert converter.infer_config(shapes) == config
    changed = converter.infer_config(shapes, {"readout": {"depth": 0.5, "num_test_clips": 2}})
    assert (changed.readout.depth, changed.readout.num_test_clips) == (0.5, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_dtypes_survive(tmp_path, dtype):
    golden = case("encoder_basic")
    model = golden.model().to(dtype)
    model.save_pretrained(tmp_path / "a")
    converter.export(tmp_path / "a", tmp_path / "a.npz")
    stored = torch.float32 if dtype == torch.bfloat16 else dtype
    back = converter.load_npz(tmp_path / "a.npz")
    for key, tensor in model.state_dict().items():
        assert back.state_dict()[key].dtype == stored
        assert torch.equal(back.state_dict()[key].to(dtype), tensor)
    half = converter.load_npz(tmp_path / "a.npz", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# Files that are not what they should be

KEY = "processor/layers_1/mlp/dense_in/bias"


def without(parameters, key):
    return {k: v for k, v in parameters.items() if k != key}


@pytest.mark.parametrize(
    "change, message",
    {
        "missing": (lambda p: without(p, KEY), f"in.npz: missing {KEY}"),
        "missing first layer": (
            lambda p: {k: v for k, v in p.items() if "layers_0" not in k},
            "missing processor/layers_0/attention/query/kernel",
        ),
        "missing middle layer": (
            lambda p: {k: v for k, v in p.items() if "layers_1" not in k},
            "missing processor/layers_1/",
        ),
        "no layers": (lambda p: {k: v for k, v in p.items() if "layers_" not in k}, "missing processor/layers_0"),
        "empty": (lambda p: {}, "missing encoder/patch_embedding/Conv_0/kernel"),
        "unknown": (lambda p: p | {"ema/decay": np.ones(1, np.float32)}, "unknown ema/decay"),
        "misshapen": (lambda p: p | {KEY: np.ones(7, np.float32)}, rf"{KEY}: expected shape \(192,\), got \(7,\)"),
        "wrong number of axes": (
            lambda p: p | {"encoder/patch_embedding/Conv_0/kernel": np.ones((16, 16, 3, 48), np.float32)},
            "kernel: expected 5 axes, got shape",
        ),
        "integers": (lambda p: p | {KEY: np.ones(192, np.int32)}, "expected float16, float32 or float64, got int32"),
        "text": (lambda p: p | {"config": np.array("{}")}, "config.npy: expected float16, float32 or float64, got <U2"),
        "pickled": (lambda p: p | {KEY: np.array([{}], object)}, f"{KEY}.npy holds pickled objects, which are never"),
    }.values(),
    ids=lambda x: "" if isinstance(x, str) else None,
)
def test_keys_are_all_accounted_for(tmp_path, change, message):
    source = save(tmp_path / "in.npz", change(case("encoder_basic").parameters))
    refused(source, tmp_path, message)


def refused(source: Path, tmp_path: Path, message: str) -> None:
    """Both ways to read a file raise a CheckpointError, and leave nothing."""
    with pytest.raises(CheckpointError, match=message):
        converter.convert(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=message):
        converter.load_npz(source)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def flip(data: bytes, where: float) -> bytes:
    position = int(len(data) * where)
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage, message",
    {
        "nothing": (lambda d: b"", "in.npz: not an .npz file"),
        "text": (lambda d: b"hello", "in.npz: not an .npz file"),
        "single array": (lambda d: b"\x93NUMPY" + d, "in.npz: not an .npz file"),
        "half": (lambda d: d[: len(d) // 2], "in.npz: damaged or truncated .npz: File is not a zip file"),
        "last byte gone": (lambda d: d[:-30], "in.npz: damaged or truncated .npz"),
        "one bit": (lambda d: flip(d, 0.5), "in.npz: damaged or truncated .npz: Bad CRC-32"),
    }.values(),
    ids=lambda x: "" if isinstance(x, str) else None,
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    source = save(tmp_path / "in.npz", case("encoder_basic").parameters)
    source.write_bytes(damage(source.read_bytes()))
    refused(source, tmp_path, message)


def test_foreign_members_are_refused(tmp_path):
    source = save(tmp_path / "in.npz", case("encoder_basic").parameters)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("notes.txt", "hello")
    refused(source, tmp_path, "in.npz: notes.txt is no .npy array")


def test_keys_with_and_without_params_are_refused(tmp_path):
    parameters = case("encoder_basic").parameters
    both = {f"params/{k}": v for k, v in parameters.items()} | {KEY: parameters[KEY]}
    source = save(tmp_path / "in.npz", both, root="")
    refused(source, tmp_path, "some keys are there with params/ and without")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        converter.convert(tmp_path / "nowhere.npz", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="no config.json here"):
        converter.export(tmp_path / "nowhere", tmp_path / "out.npz")


def test_overrides_are_checked(tmp_path):
    source = save(tmp_path / "in.npz", case("encoder_basic").parameters)
    for overrides, message in (
        ({"depth": 1}, "in.npz: depth: no such option"),
        ({"readout": {"depth": 1}}, "in.npz: readout: given, but the checkpoint has no arrays under layers_2/"),
        ({"num_heads": 4}, "in.npz: processor/layers_0/attention/query/kernel: expected shape|expected a multiple"),
    ):
        with pytest.raises(CheckpointError, match=message):
            converter.convert(source, tmp_path / "ours", overrides=overrides)


# Disks and memory


def limited(code: str, limit: int, *arguments) -> subprocess.CompletedProcess:
    """Run Python code in a process that may not write files larger than `limit` bytes."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("direction", ["convert", "export"])
def test_full_disk_leaves_nothing(tmp_path, direction):
    source, ours = save(tmp_path / "in.npz", case("encoder_basic").parameters), tmp_path / "ours"
    target = tmp_path / "target"
    if direction == "export":
        converter.convert(source, ours)
    before = sorted(path.name for path in tmp_path.iterdir())
    code = f"import sys; from fourdperf.convert.scaling4d import {direction}; {direction}(sys.argv[1], sys.argv[2])"
    result = limited(code, 200_000, source if direction == "convert" else ours, target)
    assert result.returncode == 1
    assert "OSError: [Errno 27] cannot write" in result.stderr and "File too large" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_source_that_breaks_halfway_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    source = save(tmp_path / "in.npz", case("encoder_basic").parameters)
    converter.convert(source, tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    source.write_bytes(flip(source.read_bytes(), 0.5))
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        converter.convert(source, tmp_path / "ours")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_one_array_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The writer asks for an array only when the one before is on disk."""
    source = save(tmp_path / "in.npz", case("encoder_basic").parameters)
    events, read = [], npz_module.NpzReader.read

    def watched(self, name):
        (growing,) = (tmp_path / "ours").glob(".model*.safetensors")  # written under another name
        events.append(growing.stat().st_size)
        return read(self, name)

    monkeypatch.setattr(npz_module.NpzReader, "read", watched)
    converter.convert(source, tmp_path / "ours")
    assert len(events) == len(case("encoder_basic").parameters)
    assert max(events) > 300_000  # most was written before the last arrays were read


MEASURE = """
import json, sys
from fourdperf.cli.measure import peak_memory
from fourdperf.convert import scaling4d
before = peak_memory()
getattr(scaling4d, sys.argv[1])(sys.argv[2], sys.argv[3])
print(json.dumps(peak_memory() - before))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("direction", ["convert", "export"])
def test_peak_memory_stays_far_below_the_size_of_the_file(tmp_path, direction):
    config = Config.from_variant("B", num_layers=18)
    source = tmp_path / "in.npz"
    shapes = [part for row in converter.table(config) for part in row.sources]
    write_npz(source, ((f"params/{name}", np.zeros(shape, np.float32)) for name, shape in shapes))
    size = source.stat().st_size
    assert size > 500e6
    if direction == "export":
        converter.convert(source, tmp_path / "ours")
        source = tmp_path / "ours"
    command = [sys.executable, "-c", MEASURE, direction, source, tmp_path / "target"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) < 0.25 * size
