"""The losses of tokenizers against the numbers of the seed's code and of TiTok's."""

import pytest
import torch
import torch.nn.functional as F

from fourdperf.models.discriminators import PatchDiscriminator
from fourdperf.train.schedule import learning_rate
from fourdperf.train.tokenizer_loss import (
    Adversary,
    Weights,
    code_loss,
    discriminator_loss,
    entropy_weight,
    feature_loss,
    generator_loss,
    lecam_loss,
    quantizer_loss,
    reconstruction_loss,
)
from tests.models.test_perceptual import golden_lpips
from tests.models.tokenizer_cases import Case, first


def golden_weights(case: Case) -> Weights:
    loss = case.spec["loss"]
    entropy = case.spec["entropy_loss_weight"]
    return Weights(
        l1=loss["l1_loss_weight"],
        l2=loss["l2_loss_weight"],
        perceptual=loss["perceptual_weight"],
        codebook=loss["codebook_weight"],
        entropy=entropy,
        entropy_final=entropy,
        adversarial=loss["disc_weight"],
        adaptive=loss["adaptive_disc_weight"],
        start=loss["disc_start"],
        discriminator_loss=loss.get("disc_loss", "hinge"),
    )


@pytest.mark.parametrize("name", ["hinge_adaptive", "vanilla_fixed", "lpips_recipe"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_seed(name, mode):
    """All parts, before and after the discriminator joins, the total's gradient in the last layer, the discriminator's
    in all of it."""
    case = Case(f"c_losses_{name}")
    weights = golden_weights(case)
    discriminator = PatchDiscriminator(case.spec["loss"]["disc_ndf"], case.spec["loss"]["disc_num_layers"])
    prefix = "discriminator."
    state = {key.removeprefix(prefix): x for key, x in case.params.items() if key.startswith(prefix)}
    discriminator.load_state_dict({key.replace("main.", "layers."): x for key, x in state.items()})
    adversary = Adversary(discriminator, weights).train(mode == "train")
    perceptual = golden_lpips(case, "perceptual_loss.") if weights.perceptual else None

    last_layer = case.inputs["last_layer"].requires_grad_()
    images = (first(case.inputs["inputs"]) + 1) / 2
    recon = (first(F.conv2d(case.inputs["h"], last_layer, padding=1)) + 1) / 2
    parts = reconstruction_loss(recon, images, weights, perceptual)
    losses = {"codebook": case.inputs["codebook_loss"]}
    if mode == "train":
        losses["entropy"] = case.inputs["entropy_loss"]
    check = lambda part, x: [case.check(f"{mode}_{when}/{part}", x) for when in ("before", "after")]
    check("rec_loss", parts["reconstruction"])
    check("p_loss", parts.get("perceptual", torch.tensor(0.0)))
    before = parts["reconstruction"] + quantizer_loss(losses, weights, 0)
    case.check(f"{mode}_before/total_loss", before)
    case.check(f"{mode}_before/grad_last_layer", torch.autograd.grad(before, last_layer, retain_graph=True)[0])

    fooled = adversary.generator_terms(recon, parts["reconstruction"], last_layer)
    check("g_loss", fooled["generator"])
    check("d_weight", fooled["generator_weight"])
    after = before + fooled["adversarial"]
    case.check(f"{mode}_after/total_loss", after)
    told = adversary.discriminator_terms(images, recon)
    check("logits_real", told["real"])
    check("logits_fake", told["fake"])
    case.check(f"{mode}_after/disc_loss", told["discriminator"])
    (after + told["discriminator"]).backward()  # as training does it: neither reaches what the other moves
    case.check(f"{mode}_after/grad_last_layer", last_layer.grad)
    if mode == "train":
        for key, p in discriminator.named_parameters():
            case.check(f"disc_grad/{key.replace('layers.', 'main.')}", p.grad)
    if perceptual is not None:
        a, b = (first(x) / 2 + 0.5 for x in (case.inputs["inputs"], F.conv2d(case.inputs["h"], last_layer, padding=1)))
        case.check("lpips", perceptual(a, b).view(2, 1, 1, 1))


def test_small_losses():
    case = Case("c_small_losses")
    real, fake = case.inputs["real"], case.inputs["fake"]
    case.check("hinge", discriminator_loss("hinge", real, fake))
    case.check("vanilla", discriminator_loss("vanilla", real, fake))
    case.check("dino", feature_loss(case.inputs["dec_dino"].flatten(2).transpose(1, 2), case.inputs["dino"][:, 1:]))


def test_titok():
    case = Case("d_losses")
    logits, codes = case.inputs["logits"].permute(0, 2, 3, 1), case.inputs["codes"].view(2, 3, 3)
    loss = code_loss(logits, codes)
    case.check("stage1_ce", loss)
    weights = Weights(codebook=case.spec["quantizer_weight"])
    case.check("stage1_total", loss + quantizer_loss({"codebook": case.inputs["q"]}, weights, 0))
    real, fake = case.inputs["real"], case.inputs["fake"]
    case.check("hinge", discriminator_loss("hinge", real, fake))
    case.check("lecam", lecam_loss(real, fake, case.inputs["ema_real"], case.inputs["ema_fake"]))


def test_schedules():
    """Upstream's rates are reached by ours: its warm-up starts at 0, and its entropies' steps are as they are told."""
    case = Case("c_schedules")
    entropy, warmup = case.spec["entropy"], case.spec["warmup_steps"]
    weights = Weights(
        entropy=entropy["weight_max"], entropy_final=entropy["weight_min"], entropy_steps=entropy["decay_steps"]
    )
    steps = case.inputs["step"].tolist()
    case.check("entropy_weight", torch.tensor([entropy_weight(step, weights) for step in steps]))
    case.check("lr_multiplier", torch.tensor([learning_rate(s, 10**6, warmup, 1, 1, 0) for s in steps]))
    case.check("lambda_warmup_cosine", torch.tensor([learning_rate(s, 1000, 100, 1, 0.1, 0.01) for s in steps]))


def test_non_saturating():
    """The generator's gradient does not vanish where the discriminator is sure."""
    fake = torch.tensor([-20.0], requires_grad=True)
    generator_loss("non-saturating", fake).backward()
    assert fake.grad.item() == pytest.approx(-1)
    assert discriminator_loss("non-saturating", torch.tensor([20.0]), fake).item() == pytest.approx(0, abs=1e-6)


def test_lecam_means_follow_the_logits():
    torch.manual_seed(0)
    adversary = Adversary(PatchDiscriminator(4, 1), Weights(lecam=0.5))
    images, recon = torch.rand(2, 2, 16, 16, 3)
    terms = adversary.discriminator_terms(images, recon)
    wanted = 0.001 * torch.stack([terms["real"], terms["fake"]])
    torch.testing.assert_close(adversary.means, wanted)
    again = adversary.discriminator_terms(images, recon)
    plain = discriminator_loss("hinge", *(adversary.discriminator(x) for x in (images, recon)))
    beyond = torch.stack([again["real"] - wanted[1], wanted[0] - again["fake"]]).relu().square().sum()
    assert beyond > 0
    torch.testing.assert_close(again["discriminator"], plain + 0.5 * beyond)


def test_features_and_kl():
    images, recon = torch.rand(2, 2, 8, 8, 3)
    features = lambda x: x.flatten(1, 2)
    weights = Weights(l1=0, perceptual=0, features=2.0, kl=0.5)
    terms = reconstruction_loss(recon, images, weights, None, features)
    cosine = F.cosine_similarity(recon, images, dim=-1).mean()
    torch.testing.assert_close(terms["reconstruction"], 2 - 2 * cosine)
    assert quantizer_loss({"kl": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, weights, 0).item() == 2.5
    assert quantizer_loss({}, weights, 0) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"l1": -1}, "l1: expected a number from 0, got -1"),
        ({"entropy_steps": 0}, "entropy_steps: expected at least 1, got 0"),
        ({"discriminator_loss": "wgan"}, "discriminator_loss: expected one of hinge, vanilla, non-saturating"),
        ({"l3": 1}, "l3: no such option; expected l1, l2"),
    ],
)
def test_bad_weights(fields, message):
    with pytest.raises(ValueError, match=message):
        Weights.from_dict(fields)
