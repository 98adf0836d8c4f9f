"""Masked autoencoders of pictures: what the network sees and is judged by, runs from end to end, going on after a kill,
and a tokenizer that starts from one."""

import csv
import json
import multiprocessing
import os
import signal

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.models.image_mae import Config, ImageMAE
from tests.models.goldens import close

pytest.importorskip("lightning")

from fourdperf.train.callbacks import Checkpoints  # noqa: E402
from fourdperf.train.image_mae import ImageMAEPictures, ImageMAETraining, guesses_picture  # noqa: E402

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "decoder_size": 8, "decoder_layers": 1, "decoder_heads": 2}
TINY = (
    *(f"--model={json.dumps({**SIZES, 'mlp_size': 32})}", "--image_size=16", "--batch_size=4", "--accelerator=cpu"),
    *("--lr=1e-2", "--log_every=1", "--val_every=4", "--save_every=3"),
)


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread):
    """As the processes that are killed."""


def make(**fields) -> ImageMAE:
    torch.manual_seed(0)
    return ImageMAE(Config(**{"image_size": (16, 24), "patch_size": 8, **SIZES, **fields})).double()


def images(count=3):
    return torch.rand(count, 16, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def noise(count=3):
    return torch.rand(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# The network


def test_masks():
    """Of 6 patches a quarter, 2, is shown: those of the lowest noise."""
    model = make()
    assert model.config.kept == 2
    found = model(images(), noise())
    assert (~found.mask).sum(1).tolist() == [2, 2, 2]
    for mask, values in zip(found.mask, noise()):
        assert values[~mask].max() < values[mask].min()
    assert make(mask_ratio=0.99).config.kept == 1 and make(mask_ratio=0.01).config.kept == 5


def test_only_the_patches_left_out_count():
    """The loss is the error of those, of mean 0 and deviation 1; what is not shown changes no guess."""
    model, pictures = make(), images(1)
    found = model(pictures, noise(1))
    cells = pictures.view(2, 8, 3, 8, 3).transpose(1, 2).reshape(6, 192)
    guesses = found.recon.view(2, 8, 3, 8, 3).transpose(1, 2).reshape(6, 192)
    mask = found.mask[0]
    close(guesses[~mask], cells[~mask].float().double(), 1e-6)
    deviation = (cells[mask].var(1, keepdim=True) + 1e-6).sqrt()
    wanted = ((guesses[mask] - cells[mask]) / deviation).square().mean()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    # other pixels, where nothing is shown, of the same mean and deviation
    hidden = mask.nonzero()[0].item()
    row, column = divmod(hidden, 3)
    other = pictures.clone()
    block = np.s_[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    other[block] = other[block].flip(0)
    again = model(other, noise(1))
    close(again.recon, found.recon, 1e-6)
    assert again.loss != found.loss


def test_compiled_as_one_graph():
    torch.compiler.reset()
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = (f(images(), noise()) for f in (compiled, model))
    assert torch.equal(found.mask, wanted.mask) and found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    close(found.recon, wanted.recon, 1e-6)


def test_patches_and_pictures():
    model = make()
    close(model._picture(model._patches(images())), images())
    assert torch.equal(model._patches(images())[1, 4].view(8, 8, 3), images()[1, 8:16, 8:16])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 20}, "image_size: expected multiples of patch_size 8"),
        ({"image_size": 8}, "image_size: expected more than one patch"),
        ({"num_heads": 3}, "num_heads: expected a divisor of hidden_size 16"),
        ({"hidden_size": 18}, "hidden_size: expected a multiple of 4, got 18"),
        ({"mask_ratio": 1.0}, r"mask_ratio: expected a number in \(0, 1\), got 1.0"),
        ({"decoder_layers": 0}, "decoder_layers: expected a positive integer, got 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"images: expected a tensor \(B, 16, 24, 3\)"):
        make()(torch.rand(1, 16, 16, 3), noise(1))
    with pytest.raises(ValueError, match=r"noise: expected a tensor \(1, 6\), got \(3, 6\)"):
        make()(images(1), noise())


def test_it_learns_and_leaves_vectors_undecayed():
    """One batch with one mask: the loss falls to a tenth."""
    module = ImageMAETraining(
        make(hidden_size=32, mlp_size=64, decoder_size=32).float(), 150, lr=5e-3, weight_decay=0.01
    )
    (optimizer,) = (module.configure_optimizers()["optimizer"],)
    assert all(
        (p.ndim > 1) == (group["weight_decay"] == 0.01) for group in optimizer.param_groups for p in group["params"]
    )
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    pictures = (
        torch.stack([torch.sin(x / (k + 2) + y / 5) for k in range(4)])[..., None].expand(-1, -1, -1, 3) / 2 + 0.5
    )
    losses = []
    for _ in range(150):
        found = module.guess(pictures, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
    assert 0.7 < losses[0] < 1.6 and losses[-1] < losses[0] / 10


def test_pictures():
    model = make()
    picture = guesses_picture(images().float(), model(images(), noise()), model.config.grid)
    assert picture.dtype == np.uint8 and picture.shape == (3 * (128 + 22) + 2 * 4, 3 * 192 + 2 * 4, 3)


def test_runs_that_stop_before_there_is_a_curve(tmp_path):
    pictures = ImageMAEPictures(tmp_path, [(torch.rand(16, 24, 3), 0)])
    pictures.finish(None)
    (tmp_path / "train.csv").write_text("step,loss\n")
    pictures.finish(None)
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]
    (tmp_path / "train.csv").write_text("step,loss\n1,0.5\n")
    pictures.finish(None)
    assert (tmp_path / "loss.png").exists()


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures to train on, three for val."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 3)):
        (root / split).mkdir()
        for i in range(count):
            image = np.random.default_rng(i).integers(0, 256, (16, 20, 3), np.uint8)
            cv2.imwrite(str(root / split / f"{i}.png"), cv2.blur(image, (5, 5)))
    return root


def train(folder, out, *options) -> int:
    return main(["train", "image_mae", *TINY, f"--data_path={folder}", f"--out={out}", *map(str, options)])


def curve(out, name="train") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def same_weights(a, b) -> bool:
    a, b = (ImageMAE.from_pretrained(out / "model").state_dict() for out in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """Eight steps that nothing interrupted, two batches each."""
    out = tmp_path_factory.mktemp("plain")
    assert train(folder, out, "--max_steps=8", "--accumulate_grad_batches=2") == 0
    return out


def test_a_run_from_end_to_end(plain):
    assert [int(row["step"]) for row in curve(plain)] == list(range(1, 9))
    assert [int(row["step"]) for row in curve(plain, "val")] == [4, 8]
    assert json.loads((plain / "options.json").read_text())["batch_size"] == 4
    for name in ("guesses.png", "loss.png", "last.ckpt", "model/config.json"):
        assert (plain / name).stat().st_size > 100


def interrupted(folder, out) -> None:
    """A run that is killed right after its second checkpoint, at step 6."""
    torch.set_num_threads(1)
    save = Checkpoints.on_train_batch_end

    def killing(self, trainer, *arguments) -> None:
        save(self, trainer, *arguments)
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.on_train_batch_end = killing
    train(folder, out, "--max_steps=8", "--accumulate_grad_batches=2")


def test_going_on_after_a_kill(folder, plain, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=interrupted, args=(folder, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    options = ("--max_steps=8", "--accumulate_grad_batches=2", f"--ckpt={tmp_path / 'last.ckpt'}")
    assert train(folder, tmp_path, *options) == 0
    assert curve(tmp_path) == curve(plain) and curve(tmp_path, "val") == curve(plain, "val")
    assert same_weights(tmp_path, plain)


def test_a_tokenizer_starts_from_it(folder, plain, tmp_path, capsys):
    from fourdperf.models.tokenizer import Tokenizer

    fields = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 32, "num_latents": 3, "decoder_size": 8}
    options = (
        *("--image_size=16", f"--model={json.dumps(fields)}", "--max_steps=1", "--lr=1e-9", "--discriminator=none"),
        *(f"--data_path={folder}", "--accelerator=cpu", "--batch_size=2", f"--out={tmp_path}"),
        *("--init_encoder=image_mae", f"--init_weights={plain}"),
    )
    assert main(["train", "tokenizer", *options]) == 0
    assert f"encoder from image_mae, {plain}: 1 of 1 blocks" in capsys.readouterr().out
    ours = Tokenizer.from_pretrained(tmp_path / "model").encoder.blocks[0].mlp.dense_in.weight
    close(ours, ImageMAE.from_pretrained(plain / "model").encoder.blocks[0].mlp.dense_in.weight, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch_size=0",), "--batch_size: wanted at least 1, got 0"),
        (("--lr=0",), "--lr: wanted a positive number, got 0.0"),
        (("--ckpt=nowhere.ckpt",), "--ckpt: no such file: nowhere.ckpt"),
        (("--image_size=17",), "image_size: expected multiples of patch_size 8"),
        (("--data_path=nowhere",), "nowhere"),
    ],
)
def test_bad_options(folder, tmp_path, capsys, options, message):
    assert train(folder, tmp_path / "run", "--max_steps=1", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_nan_stops_the_run(folder, plain, tmp_path, capsys):
    """A checkpoint whose weights are not finite: nothing is changed, and one line says why."""
    checkpoint = torch.load(plain / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.mask_token"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    options = ("--max_steps=12", "--accumulate_grad_batches=2", f"--ckpt={tmp_path / 'nan.ckpt'}")
    assert train(folder, tmp_path / "run", *options) == 2
    assert "the gradient's norm is nan; nothing was changed" in capsys.readouterr().err
