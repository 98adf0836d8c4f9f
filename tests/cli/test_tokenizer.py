"""Tokenize, detokenize, reconstruct, generate and evaluate with small random tokenizers: what is written, what agrees,
how the commands refuse."""

import json
import re

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.cli.reconstruct_images import reconstructed
from fourdperf.data.token_file import TokenFile
from fourdperf.metrics.codecs import CODECS
from fourdperf.models import titok, token_generator, tokenizer
from fourdperf.models.tokenizers import decode, encode, fingerprint, load_tokenizer
from tests.models.tokenizer_cases import PIXELS, SEED, TITOK, TOKENS
from tests.train.processes import torchrun

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, SIZE = 5, (16, 24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tokenizers, one as a run leaves it, and of generators that fit the first, of which one notes that."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "seed": tokenizer.Tokenizer(tokenizer.Config(**SEED)),
        "other": tokenizer.Tokenizer(tokenizer.Config(**SEED)),
        "vq": titok.TiTok(titok.Config(**TITOK)),
        "vae": titok.TiTok(titok.Config(**TITOK, mode="vae")),
        "stage1": titok.TiTok(titok.Config(**TITOK, target="codes", target_codes=12)),
        "stage2": titok.TiTok(
            titok.Config(**{**TITOK, "patch_size": 2}, target="codes", target_codes=12, pixels=PIXELS)
        ),
    }
    fields = {**TOKENS, "codebook_size": SEED["codebook_size"], "num_tokens": SEED["num_latents"]}
    made["generator"] = token_generator.TokenGenerator(token_generator.Config(**fields))
    fields["tokenizer"] = fingerprint(made["seed"])
    made["noted"] = token_generator.TokenGenerator(token_generator.Config(**fields))
    for name, model in made.items():
        model.save_pretrained(folder / name / "model" if name == "vq" else folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = cv2.resize(generator.integers(0, 256, (5, 7, 3), np.uint8), (40, 30), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / ("more" if number > 2 else "") / f"p{number}.png"), pixels)
    return folder


@pytest.fixture(scope="module")
def codes(models, pictures, tmp_path_factory):
    """A file of tokens of the first tokenizer."""
    path = tmp_path_factory.mktemp("codes") / "codes.tok"
    assert main(["tokenize", str(pictures), f"--model={models / 'seed'}", f"--out={path}"]) == 0
    return path


def read(path):
    return torch.from_numpy(cv2.imread(str(path))[..., ::-1].copy())


@pytest.mark.parametrize("name", ["seed", "vq", "vae", "stage2"])
def test_tokens_and_back(models, pictures, tmp_path, name, capsys):
    out = tmp_path / "codes.tok"
    assert main(["tokenize", str(pictures), f"--model={models / name}", f"--out={out}", "--batch_size=2"]) == 0
    file, model = TokenFile(out), load_tokenizer(models / name)
    assert len(file) == COUNT and file.description.image_size == SIZE
    assert [x.rsplit("/")[-1] for x in file.description.names] == ["p3.png", "p4.png", "p0.png", "p1.png", "p2.png"]
    assert f"{file.description.record_bytes} bytes each" in capsys.readouterr().out

    assert (
        main(["detokenize", str(out), f"--model={models / name}", f"--out={tmp_path / 'png'}", "--batch_size=3"]) == 0
    )
    written = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in written] == [f"{i:06d}_p{n}.png" for i, n in enumerate((3, 4, 0, 1, 2))]
    with torch.no_grad():
        want = (decode(model, file.read(0, COUNT)) * 255).round()
    for path, picture in zip(written, want):
        assert (read(path) - picture).abs().max() <= 1

    assert (
        main(
            ["detokenize", str(out), f"--model={models / name}", f"--out={tmp_path / 'one'}", "--start=2", "--count=1"]
        )
        == 0
    )
    (one,) = (tmp_path / "one").iterdir()
    assert one.name == "000002_p0.png" and (read(one).int() - read(written[2])).abs().max() <= 1


def test_codes_in_the_file_are_the_model_s(models, pictures, tmp_path):
    out, files = tmp_path / "codes.tok", sorted(pictures.glob("*.png"))
    assert main(["tokenize", *map(str, files), f"--model={models / 'seed'}", f"--out={out}"]) == 0
    model = load_tokenizer(models / "seed")
    images = []
    for path in files:  # (30, 40) to 16 x 24: the width fits, the middle of the height is cut out
        resized = cv2.resize(cv2.imread(str(path))[..., ::-1], (24, 18), interpolation=cv2.INTER_AREA)
        images.append(torch.from_numpy(resized[1:17].copy()).float() / 255)
    with torch.no_grad():
        assert torch.equal(TokenFile(out).read(0, 3), encode(model, torch.stack(images)))


def test_a_broken_image_is_named_in_one_line_from_a_worker_too(models, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((pictures / "p0.png").read_bytes()[:-40])
    command = ["tokenize", str(pictures / "p0.png"), str(tmp_path / "broken.png"), f"--model={models / 'seed'}"]
    for workers in (0, 1):
        assert main([*command, f"--out={tmp_path / 'codes.tok'}", f"--workers={workers}"]) == 2
        lines = capsys.readouterr().err.splitlines()
        error = "\n".join(line for line in lines if "os.fork()" not in line)  # JAX, once another test has loaded it
        assert len(error.splitlines()) == 1 and "broken.png: the image is cut off" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_a_split_of_a_set_keeps_its_labels(models, pictures, tmp_path):
    out = tmp_path / "codes.tok"
    assert main(["tokenize", str(pictures), "--split=train", f"--model={models / 'seed'}", f"--out={out}"]) == 0
    file = TokenFile(out)
    assert file.description.classes == ("more",) and len(file.description.labels) == len(file) < COUNT
    assert main(["tokenize", str(pictures), str(pictures), "--split=val", f"--model={models / 'seed'}"]) == 2


def test_fingerprints_tell_models_and_not_copies_apart(models, tmp_path):
    model = load_tokenizer(models / "seed")
    model.save_pretrained(tmp_path / "copy", dtype=torch.bfloat16)
    assert fingerprint(load_tokenizer(tmp_path / "copy")) == fingerprint(model)
    with torch.no_grad():  # and its own codebook, normalised in place, does not count
        model(torch.rand(1, *SIZE, 3))
    assert (
        fingerprint(model)
        == fingerprint(load_tokenizer(models / "seed"))
        != fingerprint(load_tokenizer(models / "other"))
    )


@pytest.mark.parametrize(
    "command, message",
    [
        (["detokenize", "CODES", "--model=MODELS/other"], "tokens of .*seed .* mean nothing to .*other"),
        (["detokenize", "CODES", "--model=MODELS/seed", "--start=5"], "--start: wanted 0 .. 4, got 5"),
        (["detokenize", "CODES"], "--model: wanted the folder of a tokenizer"),
        (["detokenize", "MODELS/seed/config.json", "--model=MODELS/seed"], "wanted a file of tokens"),
        (["detokenize", "CODES", "--model=MODELS/stage1"], "got a TiTok of stage 1"),
        (["tokenize", "PICTURES", "--model=MODELS"], "found no config.json"),
        (
            ["tokenize", "PICTURES", "--model=MODELS/generator"],
            "expected a model of tokenizer or titok, got 'token_gen",
        ),
        (["tokenize", "PICTURES", "--model=MODELS/none"], "no such model"),
        (["tokenize", "--model=MODELS/seed"], "--images: wanted files or folders of images, got none"),
        (["tokenize", "PICTURES/none.png", "--model=MODELS/seed"], "--images: no such file or folder"),
        (["tokenize", "MODELS/seed/config.json", "--model=MODELS/seed"], "config.json: wanted an image"),
        (["tokenize", "PICTURES", "--model=MODELS/seed", "--batch_size=0"], "--batch_size: wanted at least 1"),
        (["reconstruct-images", "PICTURES"], "--models: wanted folders of tokenizers"),
        (["generate", "--generator=MODELS/generator", "--tokenizer=MODELS/vae"], "wanted one with codes, got a VAE"),
        (["generate", "--generator=MODELS/seed", "--tokenizer=MODELS/seed"], "expected a config with model 'token_gen"),
        (
            ["generate", "--generator=MODELS/noted", "--tokenizer=MODELS/other"],
            "wanted the one whose codes were learned",
        ),
        (["generate", "--tokenizer=MODELS/seed"], "--generator: wanted the folder"),
        (["generate", "--generator=MODELS/generator", "--tokenizer=MODELS/seed", "--classes", "7"], r"0 .. 2, got \[7"),
        (["evaluate", "tokenizer", "MODELS/stage1"], "got a TiTok of stage 1"),
        (["evaluate", "tokenizer", "MODELS/seed", "--items=1"], "--items, --views: wanted at least 2"),
    ],
)
def test_refusals_in_one_line_and_nothing_written(
    models, pictures, codes, tmp_path, monkeypatch, capsys, command, message
):
    monkeypatch.chdir(tmp_path)
    names = {"CODES": codes, "MODELS": models, "PICTURES": pictures}
    for name, path in names.items():
        command = [word.replace(name, str(path)) for word in command]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == [] and list(codes.parent.iterdir()) == [codes]


def test_reconstructions_side_by_side_with_bytes_and_codecs(models, pictures, tmp_path, capsys):
    out = tmp_path / "grid.png"
    names = [models / "seed", models / "vae"]
    command = ["reconstruct-images", str(pictures / "p0.png"), str(pictures / "p1.png"), "--models", *map(str, names)]
    assert main([*command, f"--out={out}"]) == 0
    # cells of 16 x 24 enlarged eight times under two lines of text; three rows an image; the image and two models
    assert read(out).shape == (2 * (3 * 172 + 2 * 4) + 16, 3 * 192 + 2 * 4, 3)
    printed = capsys.readouterr().out
    assert all(f"{name}: {what}" in printed for name in names for what in ("5 tokens", *CODECS))
    seed = next(line for line in printed.splitlines() if "seed: 5 tokens" in line)
    assert float(seed.split()[-3]) == 4  # 5 codes of 5 bits
    assert main([*command, f"--out={out}", "--codecs=false"]) == 0
    assert read(out).shape == (2 * 172 + 16, 3 * 192 + 2 * 4, 3)


def test_the_psnr_is_that_of_the_picture_as_it_is_written(models):
    model, image = load_tokenizer(models / "seed"), torch.randint(0, 256, (*SIZE, 3)) / 255
    with torch.no_grad():
        found = reconstructed(model, "seed", image)
    error = np.square(found.image - 255.0 * image.double().numpy()).mean()
    assert found.psnr == pytest.approx(20 * np.log10(255) - 10 * np.log10(error), rel=1e-6)


def test_options_of_the_sampling_reach_the_generator(models, tmp_path, monkeypatch):
    told, generate = {}, token_generator.TokenGenerator.generate

    def noted(self, *arguments, **options):
        told.update(options)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(token_generator.TokenGenerator, "generate", noted)
    command = ["generate", f"--generator={models / 'noted'}", f"--tokenizer={models / 'seed'}", "--count=1"]
    given = {"steps": 2, "guidance": 1.5, "temperature": 0.5}
    given |= {"schedule": "power-cosine", "guidance_power": 2.0, "anneal": True}
    options = [f"--{name}={str(value).lower()}" for name, value in given.items()]
    assert main([*command, *options, f"--out={tmp_path / 'out'}"]) == 0
    assert {name: told[name] for name in given} == given


def test_generated_images_follow_the_seed_and_decode_from_their_codes(models, tmp_path):
    command = ["generate", f"--generator={models / 'generator'}", f"--tokenizer={models / 'seed'}", "--steps=3"]
    runs = {}
    for name, options in {
        "a": ["--classes", "0", "2", "--count=2"],
        "again": ["--classes", "0", "2", "--count=2"],
        "other": ["--classes", "0", "2", "--count=2", "--seed=1"],
        "free": ["--count=3", "--batch_size=2"],
        "half": ["--classes", "0", "2", "--count=2", "--dtype=bfloat16"],
    }.items():
        assert main([*command, *options, f"--out={tmp_path / name}"]) == 0
        runs[name] = TokenFile(tmp_path / name / "codes.tok")
    read_all = lambda file: file.read(0, len(file))
    assert torch.equal(read_all(runs["a"]), read_all(runs["again"]))
    assert not torch.equal(read_all(runs["a"]), read_all(runs["other"]))
    assert len(runs["half"]) == 4 and runs["half"].description.fingerprint == runs["a"].description.fingerprint
    assert runs["a"].description.labels == (0, 0, 2, 2) and len(runs["free"]) == 3
    names = [path.name for path in sorted((tmp_path / "a").glob("0*"))]
    assert names == ["000000_class0.png", "000001_class0.png", "000002_class2.png", "000003_class2.png"]
    assert read(tmp_path / "a" / "grid.png").shape == (150, 4 * 192 + 3 * 4, 3)
    command = ["detokenize", str(tmp_path / "a" / "codes.tok"), f"--model={models / 'seed'}"]
    assert main([*command, f"--out={tmp_path / 'decoded'}"]) == 0
    for made, decoded in zip(sorted((tmp_path / "a").glob("0*")), sorted((tmp_path / "decoded").iterdir())):
        assert (read(made).int() - read(decoded)).abs().max() <= 1


PICTURES = {"reconstructions", "influence", "histogram", "places", "clusters", "patches"}


@pytest.mark.parametrize("name", ["seed", "vae"])
def test_evaluation_writes_numbers_and_pictures(models, pictures, tmp_path, monkeypatch, capsys, name):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    out = tmp_path / "evaluation"
    command = ["evaluate", "tokenizer", str(models / name), f"--data_path={pictures}", "--split=train", f"--out={out}"]
    assert main([*command, "--views=2", "--batch_size=2"]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    captured = capsys.readouterr()
    assert "rFID: no Inception weights" in captured.err and "rFID" not in found
    assert found["Frechet distance on features of a random convolutional net, seed 0"] > 0
    assert found["images"] >= 2 and found["tokens"] == 5 and 0 < found["PSNR"] < 40 and -1 < found["SSIM"] < 1
    assert "L1 of Laplacian pyramids (not LPIPS)" in found
    written = {path.stem for path in out.glob("*.png")}
    if name == "vae":
        assert found["KL"] > 0 and written == {"reconstructions", "influence"}
        return
    assert written == PICTURES
    assert 1 <= found["perplexity"] <= 20 and len(found["usage by place"]) == len(found["perplexity by place"]) == 5
    assert all(read(out / f"{picture}.png").float().std() > 0 for picture in PICTURES)
    assert main([*command, "--views=0"]) == 0


@pytest.mark.parametrize("name", ["seed", pytest.param("vae", marks=pytest.mark.heavy)])
def test_two_processes_measure_what_one_does(models, pictures, tmp_path, name):
    """Of three pictures, of which one process has one and the other two."""
    command = ["evaluate", "tokenizer", str(models / name), f"--data_path={pictures}", "--split=train", "--views=2"]
    assert main([*command, f"--out={tmp_path / 'one'}"]) == 0
    done = torchrun(*command, f"--out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    one, two = (json.loads((tmp_path / number / "evaluation.json").read_text()) for number in ("one", "two"))
    assert one["images"] == 3 and one.keys() == two.keys()
    for measure, value in one.items():
        assert two[measure] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), measure
    written = sorted((tmp_path / "one").glob("*.png"))
    assert len(written) >= 2
    assert all(torch.equal(read(path), read(tmp_path / "two" / path.name)) for path in written)
