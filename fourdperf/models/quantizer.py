"""The quantizer of tokenizers: z `(.., C)` to the nearest of K codes, its losses, and the upkeep of the codebook.

Source: "Neural Discrete Representation Learning" (arXiv 1711.00937; VQ-VAE, moving averages in its appendix),
"Vector-quantized Image Modeling with Improved VQGAN" (arXiv 2110.04627; codes of length 1), "Language Model Beats
Diffusion" (arXiv 2310.05737; the entropy loss), "Jukebox" (arXiv 2005.00341; restarts of codes without use).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourdperf.models.layers import wide
from fourdperf.models.token_blocks import check_codes
from fourdperf.ops import code_sums, vector_quantize
from fourdperf.ops.checks import no_autocast

BETA_ON = ("commitment", "codebook")
ENTROPY_TEMPERATURE = 0.01
ENTROPY_CHOICES = 2**22  # at a time
PROBABILITY_FLOOR = 1e-5
GOLDEN_RATIO = (5**0.5 - 1) / 2


class Quantized(NamedTuple):
    """What a quantizer found.

    quantized: the codes `(.., C)`, with the straight-through gradient.
    indices: `(..)`, int64.
    losses: "commitment" and "codebook", weighted, and "entropy" in train mode where the quantizer has that.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """The nearest of K codes of C numbers, by the Euclidean distance (`fourdperf.ops.vector_quantize`).

    commitment = mean |z - sg(code)|^2 and codebook = mean |code - sg(z)|^2; `beta` multiplies the first.
    normalize: codes are of length 1; z is expected to be, too. The stored codebook is any, and gradients go through the
        normalisation.
    entropy_gamma: in train mode, the loss mean entropy - gamma * entropy of the mean, of softmax(-100 |z - code|^2),
        drives towards sure choices and even use; None for no such loss.
    ema: in train mode, codes are moving averages of the z that they were chosen for, with this decay; the codebook is
        then a buffer without gradient, and there is no codebook loss. None for codes that are trained.
    restart: in train mode, a code that nothing was nearest to in so many forward passes becomes a row of z; None for
        never. Without `ema` an optimiser's moments of that code stay, and FSDP must leave the codebook whole.

    State beside the codebook, in buffers: `counts` (K), the moving average of use, with ema; `unused` (K) and `steps`, with
    restart. Both count the z of all processes of torch.distributed, and change all alike.

    Of the seed's code:
    beta_on: "codebook" multiplies the second term by `beta` instead of the first.
    in_place: the stored codebook is overwritten by its normalised version at every forward pass, in eval mode too, and
        gradients do not see the normalisation.
    """

    def __init__(
        self,
        codes: int,
        channels: int,
        *,
        normalize: bool = True,
        beta: float = 0.25,
        entropy_gamma: float | None = None,
        ema: float | None = None,
        restart: int | None = None,
        beta_on: str = "commitment",
        in_place: bool = False,
    ):
        super().__init__()
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {ema}")
        if restart is not None and restart < 1:
            raise ValueError(f"restart: expected at least 1 forward pass, got {restart}")
        self.normalize, self.beta, self.entropy_gamma = normalize, beta, entropy_gamma
        self.ema, self.restart = ema, restart
        self.beta_on, self.in_place = beta_on, in_place
        codebook = torch.empty(codes, channels)
        if ema is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.empty(codes))
        if restart is not None:
            self.register_buffer("unused", torch.empty(codes, dtype=torch.int64))
            self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codebook, -1 / len(self.codebook), 1 / len(self.codebook))
        if self.ema is not None:
            nn.init.ones_(self.counts)
        if self.restart is not None:
            nn.init.zeros_(self.unused)
            nn.init.zeros_(self.steps)

    def codes(self) -> Tensor:
        """The codes in force `(K, C)`."""
        if self.normalize and self.in_place:
            with torch.no_grad():
                self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        # what a forward pass changes is copied, so that the next one leaves it alone before the backward pass of this one
        changes = self.in_place or self.training and (self.ema is not None or self.restart is not None)
        codebook = self.codebook.clone() if changes else self.codebook
        return F.normalize(codebook, dim=-1) if self.normalize and not self.in_place else codebook

    def forward(self, z: Tensor) -> Quantized:
        """z `(.., C)`, floating; the search is in fp32 or wider, under autocast too."""
        with no_autocast(z.device.type):
            z = z.to(wide(z.dtype))
            rows = z.detach().flatten(0, -2)
            if self.training and self.restart is not None:
                self._restart(rows)
            codes = self.codes().to(z.dtype)
            found = vector_quantize(z, codes)
            if self.training and (self.ema is not None or self.restart is not None):
                self._keep(rows, found.indices.flatten(), found.usage)
            commitment, codebook = found.commitment, found.codebook
            if self.beta_on == "codebook":
                codebook = self.beta * codebook
            else:
                commitment = self.beta * commitment
            losses = {"commitment": commitment}
            if self.ema is None:
                losses["codebook"] = codebook
            if self.training and self.entropy_gamma is not None:
                losses["entropy"] = entropy_loss(z.flatten(0, -2), codes, self.entropy_gamma)
            return Quantized(found.quantized, found.indices, losses)

    @torch.no_grad()
    def _restart(self, rows: Tensor) -> None:
        """Codes without use for `restart` passes become rows, spread over all rows from another start in every pass."""
        dead = self.unused >= self.restart
        place = torch.arange(len(dead), dtype=torch.float64, device=rows.device) * GOLDEN_RATIO
        places = ((place + self.steps.double() * 2**0.5) % 1 * len(rows)).long().clamp(max=len(rows) - 1)
        fresh = rows[places].to(self.codebook.dtype)
        if _distributed():
            dist.broadcast(fresh, 0)
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        self.unused.masked_fill_(dead, 0)
        if self.ema is not None:
            self.counts.masked_fill_(dead, 1)
        self.steps += 1

    @torch.no_grad()
    def _keep(self, rows: Tensor, indices: Tensor, usage: Tensor) -> None:
        """Counts the use of codes, and moves them towards the mean of the rows that they were chosen for."""
        if _distributed():
            dist.all_reduce(usage)
        if self.restart is not None:
            self.unused.copy_(torch.where(usage > 0, 0, self.unused + 1))
        if self.ema is None:
            return
        sums = code_sums(rows, indices, len(usage))
        if _distributed():
            dist.all_reduce(sums)
        # the average of sums is counts * codebook, so that only counts are kept beside the codebook
        usage = usage.to(sums.dtype)
        self.counts.lerp_(usage.to(self.counts.dtype), 1 - self.ema)
        rate = (1 - self.ema) / self.counts.clamp(min=torch.finfo(sums.dtype).tiny)
        self.codebook += (rate[:, None] * (sums - usage[:, None] * self.codebook)).to(self.codebook.dtype)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes `(.., C)` of `indices` `(..)`; raises ValueError where these are no integers or, on a CPU, of none."""
        return self.codes()[check_codes(indices, len(self.codebook))]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def soft_choices(z: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """softmax(-|z - code|^2 / temperature): z `(M, C)`, codes `(K, C)` -> `(M, K)`."""
    distances = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T
    return F.softmax(-distances / temperature, dim=1)


def entropy_loss(z: Tensor, codes: Tensor, gamma: float) -> Tensor:
    """Mean entropy of the rows' soft choices of a code, minus gamma times the entropy of their mean.

    Some rows at a time, computed anew for the gradient: memory does not grow with rows times codes.
    """

    def sums(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        choices = soft_choices(rows, codes, ENTROPY_TEMPERATURE)
        return entropy(choices).sum(), choices.sum(0)

    parts = [
        checkpoint(sums, rows, codes, use_reentrant=False, preserve_rng_state=False)
        for rows in z.split(max(1, ENTROPY_CHOICES // len(codes)))
    ]
    entropies, choices = (torch.stack(x).sum(0) / len(z) for x in zip(*parts))
    return entropies - gamma * entropy(choices)


def entropy(probabilities: Tensor) -> Tensor:
    """Of the last axis, in nats; the logarithm is that of at least 1e-5."""
    return -(probabilities * probabilities.clamp(min=PROBABILITY_FLOOR).log()).sum(-1)
