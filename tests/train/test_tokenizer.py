"""Training of tokenizers: what a run learns and leaves behind, going on, parts of a batch, two processes, stages."""

import json
import math

import pytest
import torch

from fourdperf.data import image_sets
from fourdperf.models import titok
from fourdperf.models.maskgit_vqgan import Config as VQGANConfig
from fourdperf.models.maskgit_vqgan import MaskGITVQGAN
from fourdperf.models.titok import TiTok
from fourdperf.models.token_blocks import TokenEncoder
from fourdperf.models.tokenizer import Config as TokenizerConfig
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import load_tokenizer
from fourdperf.train.checkpoint import read_run
from tests.models.tokenizer_cases import PIXELS
from tests.models.tokenizer_cases import SEED as SMALL_TOKENIZER
from tests.models.tokenizer_cases import TITOK as SMALL_TITOK
from tests.train.processes import kill_after_checkpoint
from tests.train.tokenizer_runs import (
    column,
    command,
    curve,
    distance,
    same,
    start,
    train,
    weights,
    write_pictures,
)

pytest.importorskip("lightning")
pytestmark = pytest.mark.usefixtures("one_thread")

from fourdperf.train.module import val_batches  # noqa: E402
from fourdperf.train.tokenizer import PatchFeatures, TokenizerTraining, with_pixel_decoder  # noqa: E402
from fourdperf.train.tokenizer_loss import Weights  # noqa: E402

FULL = ("--loss.start=2", "--loss.lecam=0.01", "--ema=0.5", "--accumulate_grad_batches=2", "--batch_size=2")
ALONE = ("--discriminator=none",)
FIXED = ("--discriminator=titok", "--loss.adaptive=false", "--loss.start=2")  # no part of a batch minds another


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run of six steps with all there is, that nothing interrupted."""
    out = tmp_path_factory.mktemp("plain")
    assert train(data, out, *FULL) == 0
    return out


# Learning


def test_what_a_run_learns_and_leaves_behind(data, tmp_path, capsys):
    sizes = ["--model.num_latents=8", "--model.latent_channels=8", "--model.codebook_size=64", "--model.restart=5"]
    sizes += ["--model.hidden_size=96", "--model.mlp_size=192", "--model.decoder_size=64"]
    more = ("--max_steps=120", "--batch_size=16", "--val_every=60", "--lr=3e-3", "--augment=false", "--loss.start=110")
    assert train(data, tmp_path, *sizes, *more, "--loss.perceptual=0.1", "--loss.entropy_final=0.1") == 0
    printed = capsys.readouterr()
    assert "120 steps done; " in printed.out and "L1 of Laplacian pyramids" in printed.err
    assert column(tmp_path, "step") == list(range(1, 121))  # once for both optimisers
    losses = column(tmp_path, "reconstruction")
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert [row["step"] for row in curve(tmp_path, "val")] == ["60", "120"]
    assert column(tmp_path, "psnr")[-1] > 14  # the same picture for all has 11
    rates = column(tmp_path, "lr")
    assert rates[11] == pytest.approx(3e-3) and rates[-1] == pytest.approx(3e-4)
    generator = column(tmp_path, "generator_weight")
    assert not any(generator[:110]) and all(generator[110:])
    kept = {path.name for path in tmp_path.iterdir()}
    pictures = {"reconstructions.png", "codes.png", "loss.png", "psnr.png", "perplexity.png", "pictures"}
    assert kept >= {"last.ckpt", "model", "options.json", "train.csv", "val.csv"} | pictures
    written = json.loads((tmp_path / "options.json").read_text())
    assert written["perceptual_loss"] == "L1 of Laplacian pyramids (not LPIPS)" and written["loss"]["start"] == 110
    used = column(tmp_path, "usage", "val")[-1]
    half = type(load_tokenizer(tmp_path)).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.quantizer.unused.dtype == torch.int64 and half.quantizer.codebook.dtype == torch.bfloat16
    assert 0.1 < used <= 1 and 4 < column(tmp_path, "perplexity", "val")[-1] <= 64 * used + 1e-3


def test_the_discriminator_learns_from_its_start_on(data, tmp_path):
    assert train(data, tmp_path / "before", "--loss.start=3", "--max_steps=3") == 0
    assert train(data, tmp_path / "after", "--loss.start=2", "--max_steps=3") == 0
    parts = [read_run(tmp_path / name / "last.ckpt") for name in ("before", "after")]
    key = "adversary.discriminator.layers.0.weight"
    assert not torch.equal(parts[0]["state_dict"][key], parts[1]["state_dict"][key])
    assert [part["global_step"] for part in parts] == [3, 3]
    assert [len(part["optimizer_states"][1]["state"]) > 0 for part in parts] == [False, True]
    assert not any(name.startswith(("perceptual", "frozen")) for name in parts[0]["state_dict"])


def test_average_of_the_parameters(data, tmp_path):
    """With a share of almost one it stays where it began, and what is trained does not."""
    assert train(data, tmp_path, *ALONE, "--ema=0.999999") == 0
    state = read_run(tmp_path / "last.ckpt")["state_dict"]
    moved = {name: (state[f"model.{name}"] - state[f"learner.{name}"]).abs().max() for name in weights(tmp_path)}
    assert moved["decoder.out.weight"] > 1e-4 and moved["encoder.latent_tokens"] > 1e-4


# Going on


def test_time_limit_and_going_on(data, plain, tmp_path):
    assert train(data, tmp_path, *FULL, "--minutes=0") == 0
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 1
    assert train(data, tmp_path, *FULL, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


@pytest.mark.heavy
def test_killed_run_goes_on_as_if_nothing_had_happened(data, plain, tmp_path):
    """kill -9 after the first checkpoint, which has the discriminator, both optimisers and LeCam's means."""
    kill_after_checkpoint(command(data, tmp_path, *FULL), tmp_path)
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 3
    assert train(data, tmp_path, *FULL, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


def test_start_from_a_run(data, plain, tmp_path):
    more = ("--lr=1e-12", "--max_steps=1", *ALONE, f"--pretrained={plain}")
    assert train(data, tmp_path, *more) == 0
    assert distance(tmp_path, plain) < 1e-9


# Parts of a batch


def alike(a, b, name="loss") -> bool:
    """To the rounding of sums in another order. A bias before a norm has no gradient but rounding, of which Adam makes
    steps; all else went 50 times as far as it may differ."""
    a_weights, b_weights = ({n: x for n, x in weights(out).items() if not n.endswith(".bias")} for out in (a, b))
    apart = max((a_weights[n] - b_weights[n]).abs().max().item() for n in a_weights)
    assert column(a, name) == pytest.approx(column(b, name), rel=1e-4)
    return apart < 1e-4


@pytest.mark.parametrize("options", [ALONE, FIXED], ids=["alone", "against a discriminator"])
def test_accumulated_batches_equal_one(data, tmp_path, options):
    whole = ("--loss.entropy=0", "--loss.entropy_final=0")  # the entropy of a mean is none of parts
    assert train(data, tmp_path / "one", *options, *whole) == 0
    assert train(data, tmp_path / "four", *options, *whole, "--batch_size=1", "--accumulate_grad_batches=4") == 0
    assert alike(tmp_path / "one", tmp_path / "four")


@pytest.mark.parametrize(
    "options",
    [pytest.param(ALONE, marks=pytest.mark.heavy, id="alone"), pytest.param(FIXED, id="against a discriminator")],
)
def test_two_processes_equal_one(data, tmp_path, options):
    whole = ("--loss.entropy=0", "--loss.entropy_final=0", "--ema=0.5", "--accumulate_grad_batches=2")
    assert train(data, tmp_path / "one", *options, *whole, "--batch_size=2") == 0
    done = start(data, tmp_path / "two", *options, *whole, "--batch_size=1", "--strategy=ddp", "--devices=2")
    assert done.returncode == 0, done.stderr
    assert alike(tmp_path / "one", tmp_path / "two", "grad_norm")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Five pictures to validate on."""
    folder = tmp_path_factory.mktemp("uneven")
    for split, count in (("train", 8), ("val", 5)):
        write_pictures(folder / split, count)
    return folder


VALIDATED = (*ALONE, "--lr=1e-12", "--max_steps=1", "--val_items=5", "--loss.entropy=0", "--loss.entropy_final=0")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.heavy)])
def test_two_processes_validate_as_one(uneven, tmp_path, strategy):
    """On pictures of which one process has three and the other two, in batches of two."""
    assert train(uneven, tmp_path / "one", *VALIDATED) == 0
    done = start(uneven, tmp_path / "two", *VALIDATED, "--batch_size=2", f"--strategy={strategy}", "--devices=2")
    assert done.returncode == 0, done.stderr
    (one,), (two,) = (curve(tmp_path / name, "val") for name in ("one", "two"))
    assert one.keys() == two.keys() >= {"loss", "psnr", "usage", "perplexity"}
    assert all(float(two[name]) == pytest.approx(float(value), rel=1e-5) for name, value in one.items())


@pytest.mark.parametrize(("items", "size", "ranks"), [(9, 4, 2), (5, 1, 2), (7, 1, 3), (10, 4, 1), (3, 8, 3)])
def test_validation_has_as_many_batches_in_all_processes(items, size, ranks):
    found = [val_batches(items, size, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in found}) == 1
    assert all(1 <= len(batch) <= max(size, 2) for batches in found for batch in batches)
    assert sorted(item for batches in found for batch in batches for item in batch) == list(range(items))
    with pytest.raises(ValueError, match="wanted at least one item for each of 3 processes, got 2"):
        val_batches(2, 4, 0, 3)


@pytest.mark.heavy
def test_sharded_processes_equal_one(data, tmp_path):
    """With the adaptive weight, which asks a sharded layer for its gradient, and an average of sharded parameters."""
    options = ("--discriminator=titok", "--loss.start=2", "--loss.entropy=0", "--loss.entropy_final=0", "--ema=0.5")
    more = ("--batch_size=2", "--strategy=fsdp", "--devices=2", "--val_every=3")
    done = start(data, tmp_path / "two", *options, *more)
    assert done.returncode == 0, done.stderr
    assert train(data, tmp_path / "one", *options) == 0
    one, two = (column(tmp_path / name, "grad_norm") for name in ("one", "two"))
    assert one[:2] == pytest.approx(two[:2], rel=1e-4)
    assert one == pytest.approx(two, rel=0.05)  # the adaptive weight is each process's own
    assert all(column(tmp_path / "two", "generator_weight")[2:])
    kept = [weights(tmp_path / name)["decoder.out.weight"] for name in ("one", "two")]
    assert (kept[0] - kept[1]).abs().max() < 1e-3


def test_bfloat16(data, tmp_path):
    assert train(data, tmp_path / "half", *FULL, "--precision=bf16-mixed") == 0
    assert {x.dtype for x in weights(tmp_path / "half").values()} == {torch.float32}
    assert all(map(math.isfinite, column(tmp_path / "half", "loss")))


# Stages


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vqgan")
    MaskGITVQGAN(VQGANConfig(**{**PIXELS, "channel_multipliers": (1, 1, 1, 1)})).save_pretrained(folder)
    return folder


def test_stages_of_titok(data, vqgan, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    more = ("--stage=1", f"--target={vqgan}", "--lr=3e-3", "--max_steps=60", "--val_every=60", "--augment=false")
    assert train(data, first, *more, family="titok") == 0
    entropies = column(first, "cross_entropy")
    assert sum(entropies[-5:]) < 0.8 * sum(entropies[:5])
    assert 0 <= column(first, "accuracy", "val")[-1] <= 1 and (first / "accuracy.png").exists()
    assert (first / "reconstructions.png").exists()  # by the VQGAN's decoder
    more = ("--stage=2", f"--target={vqgan}", f"--pretrained={first}", "--loss.start=2", "--val_every=6")
    assert train(data, second, *more, family="titok") == 0
    before, after = weights(first), weights(second)
    fixed = [name for name in before if name.startswith(("encoder.", "quantizer."))]
    assert fixed and all(torch.equal(before[name], after[name]) for name in fixed)
    source = MaskGITVQGAN.from_pretrained(vqgan)
    moved = (after["pixel_decoder.out.weight"] - source.decoder.out.weight).abs().max().item()
    assert 1e-4 < moved < 1e-2  # it began there
    assert load_tokenizer(second).config.pixels == source.config
    assert "commitment" not in curve(second)[0] and float(curve(second)[-1]["generator_weight"]) > 0


def test_second_stage_decodes_the_first_ones_codes():
    torch.manual_seed(0)
    pixels = VQGANConfig(**{**PIXELS, "channel_multipliers": (1, 1, 1, 1)})
    first = TiTok(titok.Config(**SMALL_TITOK, target="codes", target_codes=pixels.codebook_size)).eval()
    vqgan = MaskGITVQGAN(pixels).eval()
    second = with_pixel_decoder(first, vqgan).eval()
    indices = torch.randint(0, 20, (2, 5))
    expected = first.decode_indices(indices).softmax(-1) @ vqgan.quantizer.codebook
    torch.testing.assert_close(second.decode_indices(indices), vqgan.decode(expected))
    with pytest.raises(ValueError, match="expected a TiTok of target codes without a pixel decoder"):
        with_pixel_decoder(second, vqgan)


def test_variational(data, tmp_path):
    more = ("--model.mode=vae", "--loss.kl=0.01", "--val_every=6", "--loss.start=3")
    assert train(data, tmp_path, *more, family="titok") == 0
    rows = curve(tmp_path)
    assert "commitment" not in rows[0] and all(float(row["kl"]) > 0 for row in rows)
    first = rows[0]
    assert float(first["loss"]) == pytest.approx(float(first["reconstruction"]) + 0.01 * float(first["kl"]), rel=1e-5)
    assert not (tmp_path / "codes.png").exists()


def test_features_of_patches_do_without_latent_tokens():
    """Where attention adds nothing, tokens do not see each other: the patches' are those of the whole sequence."""
    torch.manual_seed(0)
    encoder = TokenEncoder((16, 24), 8, 5, 4, 24, 2, 3, 40, norm_pre=True)
    images, taps = torch.rand(2, 16, 24, 3), {}
    found = PatchFeatures(encoder)(images)
    for block in encoder.blocks:
        block.attention.out.weight.data.zero_()
    assert found.shape == (2, 6, 24) and not torch.allclose(found, PatchFeatures(encoder)(images))
    encoder(2 * images - 1, taps)
    torch.testing.assert_close(PatchFeatures(encoder)(images), encoder.norm(taps["encoder/01"][:, 1:7]))


# Refusing


def fails(capsys, *arguments, family="tokenizer") -> str:
    capsys.readouterr()
    assert train(*arguments, family=family) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fourdperf train: error: ")
    return error


def test_nan_stops_the_run_and_the_last_checkpoint_is_good(data, plain, tmp_path, capsys, monkeypatch):
    asked, visited = [0], image_sets.ImageSet.visited

    def spoiled(self, index, visit):
        image, label = visited(self, index, visit)
        asked[0] += self.augment
        return image * (torch.nan if self.augment and asked[0] == 4 * 4 + 1 else 1), label

    with monkeypatch.context() as patch:
        patch.setattr(image_sets.ImageSet, "visited", spoiled)
        assert "step 4: the gradient's norm is nan; nothing was changed" in fails(capsys, data, tmp_path, *FULL)
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 3
    assert train(data, tmp_path, *FULL, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size=0"], "--batch_size: wanted at least 1, got 0"),
        (["--lr=0"], "--lr: wanted a positive number, got 0"),
        (["--ema=1"], "--ema: wanted a number in [0, 1), got 1"),
        (["--loss.l3=1"], "l3: no such option; expected l1"),
        (["--model.width=1"], "width: no such option"),
        (["--stage=1"], "--target: wanted the folder of MaskGIT's VQGAN for --stage 1, got none"),
        (["--variant=huge"], "variant: expected one of small, base, large, got 'huge'"),
        (["--loss.features=1"], "--features: wanted the name of an encoder for --loss.features, got none"),
        (["--lpips_vgg=/nowhere", "--loss.perceptual=1"], "vgg: no such file: /nowhere"),
        (["--ckpt=/nowhere/last.ckpt"], "--ckpt: no such file"),
        (["--pretrained=/nowhere"], "/nowhere"),
        (["--data_path=/nowhere"], "/nowhere"),
    ],
)
def test_bad_options(data, options, message, tmp_path, capsys):
    assert message in fails(capsys, data, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model(data, plain, tmp_path, capsys):
    other = (f"--ckpt={plain / 'last.ckpt'}", "--model.codebook_size=17", *FULL)
    assert "its model has codebook_size 16; give the options" in fails(capsys, data, tmp_path / "run", *other)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--ema=0", "--ema"),
        ("--discriminator=titok", "the discriminator"),
        ("--loss.lecam=0", "--loss.lecam"),
        ("--optimizer=muon", "--optimizer"),
    ],
)
def test_checkpoint_of_another_run(data, plain, tmp_path, capsys, option, named):
    error = fails(capsys, data, tmp_path / "run", f"--ckpt={plain / 'last.ckpt'}", *FULL, option)
    assert f"--ckpt: it differs in {named}; give the options that its run was started with" in error


def test_checkpoint_of_muon():
    module = TokenizerTraining(TiTok(titok.Config(**SMALL_TITOK)), 1, weights=Weights())
    with pytest.raises(ValueError, match="--ckpt: it differs in --optimizer; give the options"):
        module.on_load_checkpoint({"optimizer_states": [{"parts": []}]})


def test_fields_younger_than_a_run_had_their_usual_values():
    module = TokenizerTraining(TiTok(titok.Config(**SMALL_TITOK)), 1, weights=Weights())
    config = module.model.config.to_dict()
    without = lambda name: {"model_config": {key: value for key, value in config.items() if key != name}}
    module.on_load_checkpoint(without("latent_layout"))
    with pytest.raises(ValueError, match="--ckpt: its model has image_size 256; give the options"):
        module.on_load_checkpoint(without("image_size"))


def test_stages_that_start_from_another_kind_of_model(data, vqgan, tmp_path, capsys):
    codes = {"target": "codes", "target_codes": 12}
    models = {
        "no TiTok": Tokenizer(TokenizerConfig(**SMALL_TOKENIZER)),
        "one that learned pixels at once": TiTok(titok.Config(**SMALL_TITOK)),
        "one of stage 2": TiTok(titok.Config(**SMALL_TITOK, **codes, pixels=PIXELS)),
        "one of 13 codes": TiTok(titok.Config(**SMALL_TITOK, target="codes", target_codes=13)),
    }
    for number, (got, model) in enumerate(models.items()):
        model.save_pretrained(tmp_path / str(number))
        for stage in (1, 2):
            more = (f"--stage={stage}", f"--target={vqgan}", f"--pretrained={tmp_path / str(number)}")
            error = fails(capsys, data, tmp_path / "run", *more, family="titok")
            wanted = f"a TiTok of stage 1 with the 12 codes of --target for --stage {stage}"
            assert f"--pretrained: wanted {wanted}, got {got}: {tmp_path / str(number)}" in error


def test_targets_that_do_not_fit(data, vqgan, tmp_path, capsys):
    more = ("--stage=1", f"--target={vqgan}", "--model.patch_size=4")
    error = fails(capsys, data, tmp_path / "run", *more, family="titok")
    assert "--target: wanted codes 4 pixels wide, the model's patch_size, got one of 8" in error
    stage = TiTok(titok.Config(**SMALL_TITOK, target="codes"))
    with pytest.raises(ValueError, match="target: wanted MaskGIT's VQGAN"):
        TokenizerTraining(stage, 1, weights=Weights())
