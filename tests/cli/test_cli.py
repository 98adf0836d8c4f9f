"""The command line: what each command writes, its exit codes, and one clear line for what the user got wrong."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fourdperf.benchmarks import harness, resize
from safetensors.numpy import load_file

from fourdperf.cli import compare_scaling4d, comparison, demo_weights
from fourdperf.cli.features import parse_layers
from fourdperf.cli.main import COMMANDS, main
from fourdperf.cli.measure import Job, measure
from fourdperf.cli.report import Table, Text, page
from fourdperf.convert import d4rt as d4rt_converter
from fourdperf.convert import scaling4d as converter
from fourdperf.data.demo_clip import demo_clip
from fourdperf.data.video import VideoReader, write_video
from fourdperf.models.d4rt import D4RT
from fourdperf.models.d4rt import Config as D4RTConfig
from fourdperf.models.scaling4d import Config, ReadoutConfig, Scaling4D

READOUT = ReadoutConfig.dense((4, 32, 32, 1), (2, 8, 8), num_params=32, num_heads=2)
TINY = Config(32, 3, 2, patch_size=(2, 8, 8), video_size=(4, 32, 32), readout=READOUT)
ENCODER = Config(32, 3, 2, patch_size=(2, 8, 8), video_size=(4, 32, 32))
PORT = D4RTConfig.seed(
    **{"hidden_size": 24, "num_layers": 2, "num_heads": 3, "num_frames": 4, "image_size": 16, "patch_size": (2, 8, 8)},
    **{"decoder_size": 16, "decoder_layers": 1, "decoder_heads": 2, "query_parts": (8, 8, 8), "rgb_size": 3},
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with depth/, depth.npz, encoder/, port.pth (D4RT, by export) and a clip of 10 odd-sized frames."""
    folder = tmp_path_factory.mktemp("files")
    for name, config in (("depth", TINY), ("encoder", ENCODER)):
        torch.manual_seed(0)
        Scaling4D(config).save_pretrained(folder / name)
    converter.export(folder / "depth", folder / "depth.npz")
    D4RT(PORT).save_pretrained(folder / "d4rt")
    d4rt_converter.export(folder / "d4rt", folder / "port.pth")
    write_video(folder / "clip.mp4", demo_clip(10, 51, 77)[0])
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def only_line(capsys) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_help_names_every_command_and_imports_none(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    script = "import sys; from fourdperf.cli.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


COMMAND_LINES = ["convert", "compare scaling4d", "compare d4rt", "features", "depth", "demo d4rt", "demo scaling4d"]


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_the_help_of_each_command_explains_its_options(capsys, command):
    with pytest.raises(SystemExit) as exit:
        run(*command.split(), "--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "--config" in shown and "(type:" in shown and "folder" in shown


def test_python_m_in_a_process_of_its_own(files):
    def fourdperf(*arguments):
        return subprocess.run([sys.executable, "-m", "fourdperf", *arguments], capture_output=True, text=True)

    done = fourdperf("features", "no.mp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fourdperf features: error: no such video: no.mp4\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), ""),
        (("dance",), "no command 'dance'; there are info, convert"),
        (("features",), "video"),
        (("features", "no.mp4"), "no such video: no.mp4"),
        (("features", "no.mp4", "--stride", "x"), "stride"),
        (("features", "no.mp4", "--wat"), "wat"),
        (("features", "{clip}", "--variant", "Q"), "variant: expected one of mu, Ti"),
        (("features", "{clip}", "--checkpoint", "no.npz"), "no such checkpoint: no.npz"),
        (("features", "{clip}", "--checkpoint", "{clip}"), "not an .npz file"),
        (("features", "{clip}", "--checkpoint", "{encoder}", "--layers", "9"), "--layers: wanted all"),
        (("features", "{clip}", "--checkpoint", "{encoder}", "--stride", "0"), "stride must be at least 1"),
        (("features", "{clip}", "--checkpoint", "{encoder}", "--out", "{clip}"), "File exists"),
        (("depth", "{clip}"), "wanted --checkpoint"),
        (("depth", "{clip}", "--checkpoint", "{encoder}"), "wanted a checkpoint with a depth readout, got an encoder"),
        (("depth", "{clip}", "--checkpoint", "{depth}", "--stride", "5"), "--stride: wanted at most"),
        (("compare", "scaling4d"), "wanted --video"),
        (("compare", "resnet", "--video", "{clip}"), "resnet"),
        (("convert", "no.npz", "out"), "no such checkpoint: no.npz"),
        (("convert", "{clip}", "out"), "not an .npz file"),
        (("convert", "{depth}", "out"), "wanted a target that ends in .npz"),
        (("convert", "{npz}", "{clip}"), "wanted a folder as the target"),
        (("convert", "{files}", "x.npz"), "wanted a folder with config.json"),
        (("convert", "{files}/d4rt", "x.npz"), "wanted a target that ends in .pth or .ckpt or .safetensors"),
        (("convert", "{files}/d4rt", "x.pth", "--fields.num_heads", "3"), "--fields: "),
        (("convert", "{files}/port.pth", "out"), "num_heads: the file does not say it"),
        (("convert", "{files}/port.pth", "out", "--fields.heads", "3"), "heads"),
        (("convert", "{files}/port.pth", "out", "--model", "scaling4d"), "port.pth: "),
        (("convert", "{npz}", "out", "--model", "d4rt"), "depth.npz: "),
        (("features", "{clip}", "--device", "cuda"), "no GPU"),
        (("bench", "resize", "--device", "cuda", "--json", "new/rows.json"), "no GPU"),
        (("bench", "resize", "--rounds", "0"), "--rounds: wanted at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(files, tmp_path, monkeypatch, capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    places = {name: files / name for name in ("encoder", "depth")}
    places |= {"clip": files / "clip.mp4", "npz": files / "depth.npz", "files": files}
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    if arguments:
        assert message in only_line(capsys)
    assert names(tmp_path) == []


def test_bench_takes_names(capsys):
    assert run("bench", "dance", "resize", "--rounds", "1") == 2
    assert "got dance" in only_line(capsys)


def test_bench_waits_for_every_call_and_keeps_what_it_has(tmp_path, monkeypatch):
    """Also of a call that is not timed: its work would go on into the next one. A peer that fails is a note."""

    class Pending:
        """What a device is still at work on, as an array of JAX."""

        made = waited = 0

        def __init__(self):
            Pending.made += 1
            time.sleep(3e-3)  # long enough for one call a round

        def block_until_ready(self):
            Pending.waited += 1

        def __array__(self, dtype=None, copy=None):
            return np.ones(1)

    def fails():
        raise ValueError("not on this device")

    def cases():
        yield harness.Case("an_op", "small", "float32", {"ours": Pending, "peer": Pending, "another": fails})
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert [row["p50_ms"] is None for row in rows] == [False, False, True]
        assert rows[2]["note"] == "FAILED: ValueError('not on this device')"
        yield harness.Case("an_op", "nothing runs", "float32", {"ours": fails})

    monkeypatch.setattr(harness, "machine", lambda device: {})
    monkeypatch.setattr(harness, "roofs", lambda device: {"copy": 1.0})
    harness.report(cases(), "cpu", rounds=2, json_file=tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4
    assert Pending.waited == Pending.made > 0


def test_bench_writes_into_new_folders_and_refuses_other_columns(tmp_path, monkeypatch, capsys):
    case = harness.Case("resize", "tiny", "float32", {"fourdperf": lambda: torch.ones(2)})
    monkeypatch.setattr(resize, "cases", lambda device: [case])
    monkeypatch.setattr(harness, "roofs", lambda device: {"copy": 1.0, "float32": 1.0, "bfloat16": 1.0})
    monkeypatch.setattr(harness, "with_malloc_settings", lambda: None)
    rows, table = tmp_path / "a" / "rows.json", tmp_path / "b" / "rows.csv"
    bench = lambda: run("bench", "resize", "--rounds", "1", "--device", "cpu", "--json", rows, "--csv", table)
    assert bench() == bench() == 0
    assert len(json.loads(rows.read_text())["rows"]) == 1
    assert [row["case"] for row in csv.DictReader(table.read_text().splitlines())] == ["tiny", "tiny"]
    table.write_text("op,case\n")
    capsys.readouterr()
    assert bench() == 2
    assert "rows.csv: wanted the columns op,case,direction" in only_line(capsys)
    assert table.read_text() == "op,case\n"


def test_bench_tells_what_ran(tmp_path, monkeypatch):
    whole = harness.machine("cpu")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(harness, "__file__", __file__)
        assert harness.machine("cpu")["commit"] == "unknown"  # the repository around it is not its own
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but what is timed is on the CPU
    bare = harness.machine("cpu")
    assert list(bare) == list(whole)
    assert (bare["device"], bare["jax"], bare["commit"]) == ("cpu", "none", "unknown")
    harness.peak_megabytes(lambda: torch.ones(2), "cpu")


def test_bench_compares_with_jax_on_the_same_device(monkeypatch):
    jax = pytest.importorskip("jax")
    on = lambda backend: monkeypatch.setattr(jax, "default_backend", lambda: backend)
    on("cpu")
    assert harness.jax_why_not("cpu") is None and harness.jax_why_not("cuda") == "JAX sees no GPU"
    assert harness.jax_why_not("cpu", "no_such_package") == "no_such_package is not installed"
    on("gpu")
    assert harness.jax_why_not("cuda") is None and "JAX_PLATFORMS=cpu" in harness.jax_why_not("cpu")
    assert resize._jax(torch.ones(1, 4), (2,), (1,)) == harness.jax_why_not("cpu")
    files = [file.read_text() for file in Path(harness.__file__).parent.glob("*.py")]
    assert all("jax_why_not(" in text for text in files if '"JAX jit"' in text)


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(FileNotFoundError):
        run("features", "no.mp4", "--debug")
    monkeypatch.setenv("FOURDPERF_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("features", "no.mp4")


def test_convert_and_back(files, tmp_path, capsys):
    assert run("convert", files / "depth.npz", tmp_path / "out", "--arrays", "true") == 0
    shown = capsys.readouterr().out
    parameters = sum(p.numel() for p in Scaling4D(TINY).parameters())
    assert f"{parameters:,}" in shown and "peak memory" in shown and "readout.query" in shown
    assert run("convert", tmp_path / "out", tmp_path / "back.npz") == 0
    with np.load(files / "depth.npz") as before, np.load(tmp_path / "back.npz") as after:
        assert set(before) == set(after)
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert names(tmp_path) == ["back.npz", "out"]


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_convert_d4rt_and_back(files, tmp_path, capsys, suffix):
    heads = ("--fields.num_heads", "3", "--fields.decoder_heads", "2")
    assert run("convert", files / "d4rt", tmp_path / f"port{suffix}") == 0
    assert "2 layers, width 24, 3 heads, global" in capsys.readouterr().out
    assert run("convert", tmp_path / f"port{suffix}", tmp_path / "out", *heads, "--arrays", "true") == 0
    shown = capsys.readouterr().out
    assert f"{sum(p.numel() for p in D4RT(PORT).parameters()):,}" in shown and "query_builder.rgb.dense.weight" in shown
    before, after = D4RT.from_pretrained(files / "d4rt"), D4RT.from_pretrained(tmp_path / "out")
    assert after.config == before.config == PORT
    assert all(torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))
    assert names(tmp_path) == ["out", f"port{suffix}"]


def test_features_as_npy_are_the_models(files, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--checkpoint", files / "depth", "--layers", "0,2,final", "--out", out)
    assert run("features", files / "clip.mp4", *arguments) == 0
    wanted = ["features.mp4", "features.png", "features.webp", "index.json"]
    assert names(out) == [*wanted, "layer_00.npy", "layer_02.npy", "layer_final.npy"]
    index = json.loads((out / "index.json").read_text())
    assert index["grid"] == [2, 4, 4] and [clip["valid"] for clip in index["clips"]] == [4, 4, 2]

    model = Scaling4D.from_pretrained(files / "depth")
    clips = torch.stack([clip.frames for clip in VideoReader(files / "clip.mp4", 4, size=(32, 32))])
    with torch.no_grad():
        features = model.encode(clips, layers=[0, 2, "final"])
    for name, feature in zip(("00", "02", "final"), features):
        stored = np.load(out / f"layer_{name}.npy")
        assert stored.shape == (3, 2, 4, 4, 32)
        error = np.abs(stored - feature.reshape(stored.shape).numpy()).max()
        assert error <= 1e-5 * feature.abs().max()
    assert VideoReader(out / "features.mp4").frames == 10


def test_features_as_safetensors_with_overlap_equal_npy(files, tmp_path):
    common = ("--checkpoint", files / "depth.npz", "--stride", "3", "--layers", "0.95")
    assert run("features", files / "clip.mp4", *common, "--format", "safetensors", "--out", tmp_path / "a") == 0
    assert run("features", files / "clip.mp4", *common, "--out", tmp_path / "b") == 0
    stored = np.load(tmp_path / "b" / "layer_02.npy")
    assert len(stored) == 3
    for k, clip in enumerate(stored):
        assert np.array_equal(load_file(tmp_path / "a" / f"clip_{k:05d}.safetensors")["layer_02"], clip)
    for picture in ("features.png", "features.mp4"):
        assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()


def test_features_of_a_video_shorter_than_a_clip_in_bfloat16(files, tmp_path):
    write_video(tmp_path / "v.mp4", demo_clip(1, 20, 30)[0])
    arguments = ("--checkpoint", files / "encoder", "--dtype", "bfloat16", "--layers", "all", "--fit", "crop")
    assert run("features", tmp_path / "v.mp4", *arguments, "--out", tmp_path / "out") == 0
    stored = np.load(tmp_path / "out" / "layer_03.npy")
    assert stored.dtype == np.float32 and np.isfinite(stored).all()
    assert VideoReader(tmp_path / "out" / "features.mp4").frames == 1


def test_options_from_yaml(files, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"checkpoint: {files / 'encoder'}\nlayers: '1'\nout: {tmp_path / 'out'}\n")
    assert run("features", "--config", config, files / "clip.mp4") == 0
    assert (tmp_path / "out" / "layer_01.npy").exists()


def test_a_video_that_breaks_off_leaves_nothing(files, tmp_path, capsys):
    write_video(tmp_path / "v.mp4", demo_clip(30, 96, 128)[0])
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    fifth = len(content) // 5
    content[2 * fifth : 3 * fifth] = bytes(fifth)
    (tmp_path / "v.mp4").write_bytes(content)
    arguments = (tmp_path / "v.mp4", "--checkpoint", files / "depth", "--out", tmp_path / "out")
    assert run("features", *arguments, "--format", "safetensors") == 2
    assert "corrupt or cut off" in capsys.readouterr().err and names(tmp_path) == ["v.mp4"]
    for command in ("features", "depth"):
        assert run(command, *arguments) == 2
        assert "corrupt or cut off: wanted 30 frames" in capsys.readouterr().err
        assert names(tmp_path) == ["v.mp4"]
        assert run(command, *arguments, "--allow_partial", "true") == 0
        assert "going on with those" in capsys.readouterr().err
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


def test_layers():
    assert parse_layers("all", TINY) == [0, 1, 2, 3]
    assert parse_layers("0.95", TINY) == [TINY.feature_index] == [2]
    assert parse_layers("3,1,final", TINY) == [3, 1, "final"]
    for bad in ("", "4", "-1", "1,1", "0.0", "1.5", "nan.", "x", "1,,2"):
        with pytest.raises(ValueError, match="--layers"):
            parse_layers(bad, TINY)


@pytest.mark.parametrize("stride", [4, 3, 1])
def test_depth_is_the_mean_of_the_clips_predictions(files, tmp_path, stride):
    arguments = ("--checkpoint", files / "depth.npz", "--stride", stride, "--out", tmp_path / "out")
    assert run("depth", files / "clip.mp4", *arguments) == 0
    assert names(tmp_path / "out") == ["depth.mp4", "depth.npy", "depth.png", "depth.webp"]
    model = Scaling4D.from_pretrained(files / "depth")
    predictions: list[list[np.ndarray]] = [[] for _ in range(10)]
    for clip in VideoReader(files / "clip.mp4", 4, stride, size=(32, 32)):
        with torch.no_grad():
            maps = model(clip.frames[None])[0, ..., 0].numpy()
        for i in range(clip.valid):
            predictions[clip.start + i].append(maps[i])
    wanted = np.stack([np.mean(maps, axis=0) for maps in predictions])
    stored = np.load(tmp_path / "out" / "depth.npy")
    assert stored.shape == (10, 32, 32) and stored.dtype == np.float32
    np.testing.assert_allclose(stored, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_compare_passes_and_writes_its_numbers(files, tmp_path, capsys):
    arguments = ("--checkpoint", files / "depth.npz", "--json", tmp_path / "c.json", "--html", tmp_path / "c.html")
    assert run("compare", "scaling4d", "--video", files / "clip.mp4", *arguments, "--rounds", "0") == 0
    shown = capsys.readouterr()
    assert "bound: twice JAX's own" in shown.out and shown.err == ""
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["passed"]
    layers = ["tokens", "encoder/00", "encoder/01", "encoder/02", "readout/features", "readout/prediction"]
    for dtype in ("float32", "bfloat16"):
        errors = [error for error in found["errors"] if error["dtype"] == dtype]
        assert [error["layer"] for error in errors] == layers
        assert all(error["relative"] <= error["bound"] for error in errors)
    assert max(error["relative"] for error in found["errors"] if error["dtype"] == "float32") < 1e-5
    assert found["measured"] == []
    assert "<table>" in (tmp_path / "c.html").read_text()


def test_compare_times_both_sides(files, tmp_path, capsys):
    arguments = (
        "--checkpoint",
        files / "encoder",
        "--json",
        tmp_path / "c.json",
        "--dtype",
        "float32",
        "--rounds",
        "2",
    )
    assert run("compare", "scaling4d", "--video", files / "clip.mp4", *arguments) == 0
    assert "JAX jit float32" in capsys.readouterr().out
    measured = json.loads((tmp_path / "c.json").read_text())["measured"]
    assert [m["name"] for m in measured] == ["PyTorch float32", "JAX jit float32"]
    assert all(len(m["seconds"]) == 2 and min(m["seconds"]) > 0 and m["peak_bytes"] > 2**18 for m in measured)


def test_a_measured_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="name: its process ended early"):
        measure([Job("name", "json", os._exit, (3,))], rounds=1)


def test_compare_names_the_first_layer_that_differs(files, monkeypatch, capsys):
    load = Scaling4D.from_pretrained

    def perturbed(*arguments, **options):
        model = load(*arguments, **options)
        with torch.no_grad():
            model.encoder.processor.layers[1].mlp.dense_in.bias.add_(0.01)
        return model

    monkeypatch.setattr(compare_scaling4d.Scaling4D, "from_pretrained", perturbed)
    arguments = ("compare", "scaling4d", "--video", files / "clip.mp4", "--checkpoint", files / "depth")
    arguments += ("--rounds", "0", "--dtype", "float32")
    assert run(*arguments) == 1
    assert "encoder/01 in float32 is the first layer out of tolerance" in only_line(capsys)
    assert run(*arguments, "--tolerance", "1") == 0


def test_compare_random_weights_of_a_variant(files, capsys):
    arguments = ("--variant", "mu", "--rounds", "0", "--dtype", "float32", "--seed", "3")
    assert run("compare", "scaling4d", "--video", files / "clip.mp4", *arguments) == 0
    assert "4DS-mu, float32" in capsys.readouterr().out


def test_differences():
    reference = {"a": np.array([1.0, -2.0]), "b": np.zeros(2)}
    ours = {"a": np.array([1.0, -1.0]), "b": np.zeros(2)}
    a, b = comparison.differences(reference, ours, "float32", lambda layer: 0.4)
    assert (a.max_abs, a.relative, a.passed) == (1, 0.5, False)
    assert (b.max_abs, b.relative, b.cosine, b.passed) == (0, 0, 0, True)
    (nan,) = comparison.differences({"a": np.ones(2)}, {"a": np.array([1, np.nan])}, "float32", lambda layer: 1e9)
    assert not nan.passed
    with pytest.raises(ValueError, match=r"differ in their layers: \['b'\]"):
        comparison.differences(reference, {"a": np.ones(2)})
    with pytest.raises(ValueError, match="a: PyTorch gives"):
        comparison.differences({"a": np.ones(2)}, {"a": np.ones(3)})


def test_tables_and_pages():
    table = Table("caption", ("name", "x"), [("long name", "1"), ("n", "22")])
    assert table.text().splitlines() == ["caption", "-------------", "name        x", "long name   1", "n          22"]
    text = page("a < b", [table, Text("x & y")])
    assert "a &lt; b" in text and "x &amp; y" in text and "http:" not in text


def test_the_demo_of_4ds_end_to_end(tmp_path, monkeypatch, capsys):
    # The same demo with a model of the released layout that is smaller still.
    readout = ReadoutConfig.dense((4, 32, 32, 1), (2, 8, 8), num_params=128, num_heads=4)
    config = Config(64, 2, 2, patch_size=(2, 4, 4), video_size=(4, 32, 32), readout=readout)
    monkeypatch.setattr(demo_weights, "CONFIG", config)
    out = tmp_path / "out"
    assert run("demo", "scaling4d", "--out", out, "--rounds", "0") == 0
    shown = capsys.readouterr().out
    assert "weights are random" in " ".join(shown.split()) and str(out / "index.html") in shown
    html = (out / "index.html").read_text()
    assert html.count("data:image/") == 4 and "encoder/01" in html and "http:" not in html
    assert json.loads((out / "compare.json").read_text())["passed"]
    depth, wanted = np.load(out / "depth" / "depth.npy"), demo_clip(48, 32, 32)[1]
    assert depth.shape == wanted.shape and np.corrcoef(depth.ravel(), wanted.ravel())[0, 1] > 0.3


@pytest.mark.heavy
def test_the_demo_of_4ds_in_full(tmp_path):
    environment = os.environ | {"FOURDPERF_DEBUG": "1"}
    command = [sys.executable, "-m", "fourdperf", "demo", "scaling4d", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").stat().st_size > 100_000
    depth, wanted = np.load(tmp_path / "depth" / "depth.npy"), demo_clip(48, 224, 224)[1]
    assert np.corrcoef(depth.ravel(), wanted.ravel())[0, 1] > 0.85
