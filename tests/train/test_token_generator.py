"""Training of generators of codes: the loss, from pictures and from files of tokens, going on, two processes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fourdperf.cli.main import main
from fourdperf.cli.train_token_generator import _items
from fourdperf.data.token_file import Description, TokenWriter
from fourdperf.models.tokenizer import Config as TokenizerConfig
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import fingerprint, load_generator
from fourdperf.train.checkpoint import read_run
from tests.data.test_image_sets import picture, png, write_tar
from tests.models.tokenizer_cases import SEED, TOKENS
from tests.train.processes import ENVIRONMENT
from tests.train.tokenizer_runs import write_pictures

pytest.importorskip("lightning")
pytestmark = pytest.mark.usefixtures("one_thread")

from fourdperf.models.token_generator import Config, TokenGenerator  # noqa: E402
from fourdperf.train.token_generator import TokenGeneratorTraining, masked_loss  # noqa: E402

MODEL = ["--model.hidden_size=24", "--model.num_layers=2", "--model.num_heads=3", "--model.mlp_size=32"]
RUN = ["--accelerator=cpu", "--batch_size=4", "--log_every=1", "--val_every=100", "--val_items=4", "--max_steps=6"]
TINY = [*MODEL, *RUN, "--save_every=3", "--lr=3e-3", "--model.dropout=0.1"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(TokenizerConfig(**SEED)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("day", "night"):
        write_pictures(folder / name, 10, 24)
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory):
    """A file of codes that their class tells: all places of a picture have the number of its class."""
    model = Tokenizer.from_pretrained(tokenizer)
    labels = tuple(number % 3 for number in range(60))
    path = tmp_path_factory.mktemp("tokens") / "codes.tok"
    sizes = {"image_size": (16, 24), "num_tokens": 5, "count": 60, "codebook_size": 20}
    with TokenWriter(path, Description("tokenizer", fingerprint(model), **sizes, labels=labels)) as writer:
        writer.append(torch.tensor(labels)[:, None].expand(-1, 5))
    return path


def arguments(tokenizer: Path, out: Path, *more) -> list[str]:
    return ["train", "token_generator", *TINY, f"--tokenizer={tokenizer}", f"--out={out}", *map(str, more)]


def curve(out: Path, name: str = "train") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_generator(out).state_dict()


def same(a: Path, b: Path) -> bool:
    return curve(a) == curve(b) and all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


@pytest.fixture(scope="module")
def plain(tokenizer, data, tmp_path_factory):
    """A run of six steps, two batches each, that nothing interrupted."""
    out = tmp_path_factory.mktemp("plain")
    assert main(arguments(tokenizer, out, f"--data_path={data}", "--accumulate_grad_batches=2")) == 0
    return out


def test_masked_loss():
    """Against the sum written out."""
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    masks = torch.tensor([[True, False, True], [False, False, True]])
    logs = logits.log_softmax(-1)
    losses = -0.8 * logs.gather(-1, codes[..., None])[..., 0] - 0.2 * logs.mean(-1)
    found = masked_loss(logits, codes, masks, smoothing=0.2, unmasked=0.1)
    torch.testing.assert_close(found["loss"], (losses[masks].sum() + 0.1 * losses[~masks].sum()) / 3.3)
    alone = masked_loss(logits, codes, masks)
    torch.testing.assert_close(alone["loss"], F.cross_entropy(logits[masks], codes[masks]))
    assert alone["accuracy"] == (logits.argmax(-1) == codes)[masks].float().mean()
    assert alone["masked"] == 0.5


def test_the_class_is_dropped_in_train_mode_alone(monkeypatch):
    torch.manual_seed(0)
    model = TokenGenerator(Config(**TOKENS))
    module, dropped = TokenGeneratorTraining(model, 1, label_dropout=0.5), []
    forward = TokenGenerator.forward
    monkeypatch.setattr(TokenGenerator, "forward", lambda *a, drop: dropped.append(drop) or forward(*a, drop=drop))
    batch = torch.randint(0, 11, (200, 6)), torch.zeros(200, dtype=torch.int64)
    module.terms(model.train(), batch)
    module.terms(model.eval(), batch)
    assert 60 < dropped[0].sum() < 140 and not dropped[1].any()


def test_it_learns_what_the_class_tells(tokenizer, tokens, tmp_path, capsys):
    """Codes from a file; and what it generates then."""
    more = (f"--tokens={tokens}", "--max_steps=150", "--batch_size=16", "--val_every=75", "--lr=1e-2", "--ema=0.9")
    assert main(arguments(tokenizer, tmp_path, *more)) == 0
    assert "3 classes: 54 pictures" in capsys.readouterr().out
    assert [row["step"] for row in curve(tmp_path, "val")] == ["75", "150"]
    assert float(curve(tmp_path, "val")[-1]["accuracy"]) > 0.95
    classes = torch.tensor([0, 1, 2])
    made = load_generator(tmp_path).generate(classes, temperature=0.0, generator=torch.Generator().manual_seed(0))
    assert (made == classes[:, None]).float().mean() > 0.9
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept >= {"samples.png", "loss.png", "accuracy.png", "last.ckpt", "model", "options.json"}


def test_what_a_run_leaves_behind(tokenizer, plain):
    model = load_generator(plain)
    assert (model.config.num_classes, model.config.num_tokens, model.config.codebook_size) == (2, 5, 20)
    assert model.config.tokenizer == fingerprint(Tokenizer.from_pretrained(tokenizer))
    state = read_run(plain / "last.ckpt")["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"model", "network"}  # and no tokenizer
    assert not torch.equal(state["model.head.weight"], state["network.head.weight"])
    assert json.loads((plain / "options.json").read_text())["tokenizer"] == str(tokenizer)
    assert len(curve(plain)) == 6


def test_time_limit_and_going_on(tokenizer, data, plain, tmp_path):
    more = (f"--data_path={data}", "--accumulate_grad_batches=2")
    assert main(arguments(tokenizer, tmp_path, *more, "--minutes=0")) == 0
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 1
    assert main(arguments(tokenizer, tmp_path, *more, f"--ckpt={tmp_path / 'last.ckpt'}")) == 0
    assert same(tmp_path, plain)


def as_two(tokenizer, out, *more) -> None:
    command = arguments(tokenizer, out, *more, "--devices=2")
    command = [sys.executable, "-m", "fourdperf", *command]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp --model.kind=uvit"])
def test_two_processes(tokenizer, data, tmp_path, strategy):
    """And one goes on from what two have written."""
    more = (f"--data_path={data}", "--val_every=3", *f"--strategy={strategy}".split())
    as_two(tokenizer, tmp_path, *more)
    rows = curve(tmp_path)
    assert len(rows) == 6 and len(curve(tmp_path, "val")) == 2
    alone = [option for option in more if not option.startswith("--strategy")]
    assert main(arguments(tokenizer, tmp_path, *alone, f"--ckpt={tmp_path / 'last.ckpt'}", "--max_steps=8")) == 0
    assert curve(tmp_path)[:6] == rows and len(curve(tmp_path)) == 8


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["bert", "uvit"])
def test_parameters_in_parts_move_as_whole_ones(tokenizer, data, tmp_path, kind):
    """FSDP's against DDP's, whose two processes draw the same masks."""
    more = (f"--data_path={data}", "--model.dropout=0", "--val_every=3", f"--model.kind={kind}")
    for strategy in ("ddp", "fsdp"):
        as_two(tokenizer, tmp_path / strategy, *more, f"--strategy={strategy}")
    for name in ("train", "val"):
        rows = zip(curve(tmp_path / "ddp", name), curve(tmp_path / "fsdp", name), strict=True)
        for a, b in rows:
            assert all(float(b[key]) == pytest.approx(float(value), rel=1e-4) for key, value in a.items())
    parts, wholes = weights(tmp_path / "fsdp"), weights(tmp_path / "ddp")
    assert max((parts[name] - x).abs().max().item() for name, x in wholes.items()) < 1e-4


def test_two_processes_validate_as_one(tokenizer, tmp_path):
    """On pictures of which one process has three and the other two, in batches of two, with masks of their own; and one
    goes on from what two have written."""
    for split, count in (("train", 8), ("val", 5)):
        write_pictures(tmp_path / "data" / split / "day", count, 24)
    more = (f"--data_path={tmp_path / 'data'}", "--lr=1e-12", "--val_every=1", "--val_items=5", "--model.dropout=0")
    assert main(arguments(tokenizer, tmp_path / "one", *more, "--max_steps=2")) == 0
    as_two(tokenizer, tmp_path / "two", *more, "--max_steps=2", "--batch_size=2", "--strategy=ddp")
    for one, two in zip(*(curve(tmp_path / name, "val") for name in ("one", "two")), strict=True):
        assert one.keys() == two.keys() == {"step", "loss", "accuracy"}
        assert all(float(two[name]) == pytest.approx(float(value), rel=1e-5) for name, value in one.items())
    rows, ckpt = curve(tmp_path / "two"), f"--ckpt={tmp_path / 'two' / 'last.ckpt'}"
    assert main(arguments(tokenizer, tmp_path / "two", *more, "--max_steps=4", ckpt)) == 0
    assert len(rows) == 2 and curve(tmp_path / "two")[:2] == rows and len(curve(tmp_path / "two")) == 4


def fails(capsys, *options) -> str:
    capsys.readouterr()
    assert main(arguments(*options)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr=0"], "--lr: wanted a positive number, got 0"),
        (["--label_dropout=1"], "--label_dropout: wanted a number in [0, 1), got 1"),
        (["--model.num_tokens=6"], "--model.num_tokens: wanted 5, as the tokenizer has it, got 6"),
        (["--tokens=a.tok", "--data_path=b"], "--tokens, --data_path: wanted one of the two, got both"),
        (["--tokenizer=/nowhere"], "no such model: /nowhere"),
        (["--ckpt=/nowhere/last.ckpt"], "--ckpt: no such file"),
    ],
)
def test_bad_options(tokenizer, options, message, tmp_path, capsys):
    assert message in fails(capsys, tokenizer, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_tokens_of_another_tokenizer(tokens, tmp_path, capsys):
    torch.manual_seed(1)
    Tokenizer(TokenizerConfig(**SEED)).save_pretrained(tmp_path / "other")
    assert "and mean nothing to" in fails(capsys, tmp_path / "other", tmp_path / "run", f"--tokens={tokens}")


def test_classes_of_both_splits(tokenizer, tokens, tmp_path, capsys):
    for split, labels in (("train", (0, 1)), ("val", (0, 3))):
        pictures = {f"{label}.png": png(picture(label)) for label in labels}
        write_tar(tmp_path / f"{split}.tar", {**pictures, **{f"{label}.cls": b"%d" % label for label in labels}})
    options = {"tokens": None, "data_path": str(tmp_path), "augment": False, "seed": 0}
    assert _items(options, Tokenizer.from_pretrained(tokenizer))[2] == ("0", "1", "2", "3")
    error = fails(capsys, tokenizer, tmp_path / "run", f"--tokens={tokens}", "--model.num_classes=2")
    assert "--model.num_classes: wanted at least 3, as the pictures have, got 2" in error


def test_nan_stops_the_run(tokenizer, data, tmp_path, capsys, monkeypatch):
    """Before anything has moved."""
    terms = TokenGeneratorTraining.terms

    def spoiled(self, *arguments):
        return {name: x * torch.nan if self.global_step == 4 else x for name, x in terms(self, *arguments).items()}

    monkeypatch.setattr(TokenGeneratorTraining, "terms", spoiled)
    error = fails(capsys, tokenizer, tmp_path, f"--data_path={data}")
    assert "step 4: the gradient's norm is nan; nothing was changed" in error
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 3
