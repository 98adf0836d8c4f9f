"""What tokenizers of pictures learn from. Every function gives scalars; pictures are `(B, H, W, 3)` in [0, 1].

    reconstruction   l1 |x - y| + l2 (x - y)^2 + perceptual LPIPS(x, y) + features (1 - cos(f(x), f(y)))
    quantizer        codebook (commitment + codebook loss) + entropy(step) * entropy loss;  or kl * KL
    adversarial      w * g(D(x)) once step >= start, w = |d reconstruction / d last layer| / |d g / d last layer|
    discriminator    hinge: (relu(1 - D(y)) + relu(1 + D(x))) / 2;  plus lecam * LeCam
    codes            cross entropy of the codes that MaskGIT's VQGAN has for a picture (TiTok's first stage)

x - y is that of pictures in [-1, 1], for which the seed's weights were chosen; TiTok's, of pictures in [0, 1], are l1
times 1/2 and l2 times 1/4 here. `step` counts steps of the tokenizer's optimiser: the seed's code counts each twice, so
that its `disc_start` and `decay_steps` are half as many steps.

Source: "Taming Transformers" (arXiv 2012.09841) in the seed's form; TiTok (arXiv 2406.07550); "Language Model Beats
Diffusion" (arXiv 2310.05737; the entropy's schedule is the seed's); LeCam (arXiv 2104.03310).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.config import BaseConfig, check_choices

__all__ = [
    "Adversary",
    "Weights",
    "adaptive_weight",
    "code_loss",
    "discriminator_loss",
    "entropy_weight",
    "feature_loss",
    "generator_loss",
    "lecam_loss",
    "quantizer_loss",
    "reconstruction_loss",
]

DISCRIMINATOR_LOSSES = ("hinge", "vanilla", "non-saturating")
GRADIENT_FLOOR, LARGEST_WEIGHT = 1e-4, 1e4
LECAM_DECAY = 0.999

Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Weights(BaseConfig):
    """The weights of the parts, as above; the defaults are the seed's, with steps counted once.

    entropy, entropy_final, entropy_steps: the entropy loss's weight falls linearly from the first to the second.
    adversarial: of the generator's loss; `adaptive` multiplies it by what makes its gradient on the last layer as large
        as the reconstruction's. start: the step at which the discriminator joins. discriminator_loss: hinge, vanilla or
        non-saturating.
    """

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0
    features: float = 0.0
    codebook: float = 1.0
    entropy: float = 0.1
    entropy_final: float = 0.001
    entropy_steps: int = 5000
    kl: float = 1e-6
    adversarial: float = 0.1
    adaptive: bool = True
    start: int = 5000
    discriminator_loss: str = "hinge"
    lecam: float = 0.0

    def __post_init__(self):
        for name in ("l1", "l2", "perceptual", "features", "codebook", "kl", "adversarial", "lecam", "start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number from 0, got {getattr(self, name)!r}")
        if self.entropy_steps < 1:
            raise ValueError(f"entropy_steps: expected at least 1, got {self.entropy_steps!r}")
        check_choices(self, {"discriminator_loss": DISCRIMINATOR_LOSSES})


def reconstruction_loss(
    recon: Tensor, images: Tensor, weights: Weights, perceptual: Measure | None, features: Measure | None = None
) -> dict[str, Tensor]:
    """The parts, unweighted: "l1", "l2", and "perceptual" and "features" where given; and "reconstruction", their
    weighted sum.

    perceptual: `(B,)` of two pictures. features: tokens `(B, P, D)` of pictures, by a network that is frozen.
    """
    difference = 2 * (recon.float() - images.float())
    terms = {"l1": difference.abs().mean(), "l2": difference.square().mean()}
    if perceptual is not None:
        terms["perceptual"] = perceptual(images, recon).mean()
    if features is not None:
        with torch.no_grad():
            wanted = features(images)
        terms["features"] = feature_loss(features(recon), wanted)
    terms["reconstruction"] = sum(getattr(weights, name) * term for name, term in terms.items())
    return terms


def feature_loss(features: Tensor, wanted: Tensor) -> Tensor:
    """One minus the mean cosine of two networks' tokens `(B, P, D)` at the same places."""
    return 1 - F.cosine_similarity(features.float(), wanted.float(), dim=-1).mean()


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """The mean cross entropy of `codes` `(B, h, w)` under logits `(B, h, w, K)`."""
    return F.cross_entropy(logits.float().flatten(0, -2), codes.flatten())


def entropy_weight(step: int, weights: Weights) -> float:
    done = min(1.0, step / weights.entropy_steps)
    return weights.entropy + (weights.entropy_final - weights.entropy) * done


def quantizer_loss(losses: dict[str, Tensor], weights: Weights, step: int) -> Tensor | float:
    """The weighted sum of `fourdperf.models.tokenizer.Encoded.losses`; 0.0 where there are none."""
    total = 0.0
    for name in ("commitment", "codebook"):
        if name in losses:
            total = total + weights.codebook * losses[name]
    if "entropy" in losses:
        total = total + entropy_weight(step, weights) * losses["entropy"]
    if "kl" in losses:
        total = total + weights.kl * losses["kl"].sum(1).mean()
    return total


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """What pictures with logits `fake` lose for not looking real."""
    return F.softplus(-fake).mean() if kind == "non-saturating" else -fake.mean()


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Of logits of pictures and of reconstructions."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    total = F.softplus(-real).mean() + F.softplus(fake).mean()
    return total / 2 if kind == "vanilla" else total


def lecam_loss(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """How far the mean logits of real and fake are beyond the running mean of the other side, squared."""
    return (F.relu(real.mean() - mean_fake).square() + F.relu(mean_real - fake.mean()).square()).mean()


def adaptive_weight(ours: Tensor, theirs: Tensor) -> Tensor:
    """The ratio of the lengths of two losses' gradients on the last layer, between 0 and 1e4."""
    return (ours.norm() / (theirs.norm() + GRADIENT_FLOOR)).clamp(0, LARGEST_WEIGHT)


class Adversary(nn.Module):
    """A discriminator with its losses, and the running means of its logits where LeCam is wanted."""

    def __init__(self, discriminator: nn.Module, weights: Weights):
        super().__init__()
        self.discriminator, self.weights = discriminator, weights
        if weights.lecam:
            self.register_buffer("means", torch.zeros(2))  # of real, of fake

    def generator_terms(self, recon: Tensor, reconstruction: Tensor, last_layer: Tensor) -> dict[str, Tensor]:
        """Of pictures `recon`: their loss "generator", its weight "generator_weight", and the product "adversarial".

        No gradient reaches the discriminator.
        """
        seen = recon.detach().requires_grad_()
        loss = generator_loss(self.weights.discriminator_loss, self.discriminator(seen).float())
        (slope,) = torch.autograd.grad(loss, seen)
        weight, loss = torch.full_like(loss, self.weights.adversarial), loss.detach()
        if self.weights.adaptive:
            (ours,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
            (theirs,) = torch.autograd.grad(recon, last_layer, slope, retain_graph=True)
            weight = weight * adaptive_weight(ours, theirs)
        rise = (recon * slope).sum()  # has the loss's gradient
        return {"generator": loss, "generator_weight": weight, "adversarial": weight * (loss + rise - rise.detach())}

    def discriminator_terms(self, images: Tensor, recon: Tensor) -> dict[str, Tensor]:
        """The loss "discriminator", and the mean logits "real" and "fake". No gradient reaches `recon`."""
        real, fake = (self.discriminator(x.detach()).float() for x in (images, recon))
        loss = discriminator_loss(self.weights.discriminator_loss, real, fake)
        if self.weights.lecam:
            loss = loss + self.weights.lecam * lecam_loss(real, fake, *self.means.clone())
            now = torch.stack([real.detach().mean(), fake.detach().mean()])
            self.means.lerp_(now, 1 - LECAM_DECAY)
        return {"discriminator": loss, "real": real.detach().mean(), "fake": fake.detach().mean()}
