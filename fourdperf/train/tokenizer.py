"""Tokenizers of pictures under Lightning: the seed's and TiTok's, against a discriminator or not.

model                        learns from
Tokenizer, TiTok             reconstruction, quantizer (or KL), adversarial loss
TiTok of target codes        cross entropy of the codes of MaskGIT's VQGAN, `target`, and its quantizer   (stage 1)
TiTok with a pixel decoder   reconstruction and adversarial loss; encoder and codes are frozen            (stage 2)

What the seed's code does otherwise: it leaves the last norm out of its optimiser, leaves the generator's gradients on
the discriminator, and moves the discriminator after the tokenizer on a second forward pass; here both move at the end
of one.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from fourdperf.metrics.codes import perplexity, usage
from fourdperf.metrics.images import psnr
from fourdperf.models.maskgit_vqgan import MaskGITVQGAN
from fourdperf.models.titok import Config as TiTokConfig
from fourdperf.models.titok import TiTok
from fourdperf.models.token_blocks import TokenEncoder
from fourdperf.models.tokenizer import Encoded, Tokenizer
from fourdperf.train.module import ModelTraining, average_into
from fourdperf.train.muon import MuonAdamW
from fourdperf.train.tokenizer_loss import Adversary, Weights, code_loss, quantizer_loss, reconstruction_loss

__all__ = ["PatchFeatures", "TokenizerTraining", "with_pixel_decoder"]


ADVERSARIAL = ("generator", "generator_weight", "adversarial", "discriminator", "real", "fake")


class TokenizerTraining(ModelTraining):
    """A tokenizer and its discriminator, each with an optimiser of its own; batches are images `(B, H, W, 3)` in [0, 1],
    with labels that nobody looks at.

    A step is one batch, which is cut into `accumulate` parts to save memory; global_step counts them.

    model: what is trained; with `ema` its parameters' moving average, which validation uses and a run leaves behind.
    weights: of the losses. perceptual, features, target: frozen networks, no part of the checkpoint; see
    `fourdperf.train.tokenizer_loss`. discriminator: joins at step weights.start.
    lr, final_lr, warmup_steps: of the tokenizer; the discriminator's rate is `discriminator_lr` times that.
    optimizer: of the tokenizer, "adamw", or "muon" (`fourdperf.train.muon`) for small models and few steps; the
    discriminator's is AdamW.
    clip: the largest L2 norm of each network's gradient. ema: how much of the average stays in a step; 0 for none.
    seed: of what is random in a step: step n of process r starts from a seed of its own.

    A gradient that is not finite raises ValueError before anything has moved.
    """

    PARTS = {"learner.": "--ema", "adversary.discriminator.": "the discriminator", "adversary.means": "--loss.lecam"}

    def __init__(
        self,
        model: Tokenizer | TiTok,
        max_steps: int,
        *,
        weights: Weights,
        perceptual: nn.Module | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        target: MaskGITVQGAN | None = None,
        discriminator: nn.Module | None = None,
        lr: float = 1e-4,
        final_lr: float = 1e-5,
        warmup_steps: int = 0,
        discriminator_lr: float = 1.0,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        optimizer: Literal["adamw", "muon"] = "adamw",
        clip: float = 1.0,
        ema: float = 0.0,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.weights = model, weights
        self.learner = deepcopy(model) if ema else None
        if ema:
            model.requires_grad_(False)
        self.stage_one = isinstance(model, TiTok) and model.config.target == "codes" and model.pixel_decoder is None
        if self.stage_one and target is None:
            raise ValueError("target: wanted MaskGIT's VQGAN, whose codes a TiTok of target codes learns, got None")
        self.adversary = None
        if discriminator is not None and not self.stage_one:
            self.adversary = Adversary(discriminator, weights)
        frozen = {"perceptual": perceptual, "features": features, "target": target}
        self.frozen = {name: part.eval().requires_grad_(False) for name, part in frozen.items() if part is not None}
        self.max_steps, self.lr, self.final_lr, self.warmup_steps = max_steps, lr, final_lr, warmup_steps
        self.discriminator_lr, self.weight_decay, self.betas = discriminator_lr, weight_decay, betas
        self.optimizer, self.clip, self.ema, self.accumulate, self.seed = optimizer, clip, ema, accumulate, seed
        self.counts: Tensor | None = None  # how often each code was chosen in this validation
        self.sharded = False

    @property
    def trained(self) -> Tokenizer | TiTok:
        """The network that the optimiser moves."""
        return self.model if self.learner is None else self.learner

    def configure_model(self) -> None:
        """Under FSDP every block's parameters are sharded over the processes (torch's fully_shard)."""
        mesh = self.device_mesh
        if mesh is None or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        for model in [self.model] if self.learner is None else [self.model, self.learner]:
            for block in model.encoder.blocks:
                fully_shard(block, mesh=mesh["data_parallel"])
            # the average must be in parts after a validation; the last layer, whole after a forward pass
            fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=model is not self.trained)
        if self.adversary is not None:
            fully_shard(self.adversary.discriminator, mesh=mesh["data_parallel"])
        self.sharded = True

    def on_fit_start(self) -> None:
        for part in self.frozen.values():
            part.to(self.device)

    # Losses

    def terms(self, model: Tokenizer | TiTok, images: Tensor) -> tuple[dict[str, Tensor], Encoded, Tensor]:
        """The parts of the loss by name without the adversarial one, "loss" their sum; the code; and what the decoder
        gave."""
        recon, encoded = model(images)
        if self.stage_one:
            with torch.no_grad():
                codes = self.frozen["target"].encode(images).indices
            found = code_loss(recon, codes)
            terms = {"cross_entropy": found, "accuracy": (recon.argmax(-1) == codes).float().mean()}
        else:
            perceptual = self.frozen.get("perceptual")
            terms = reconstruction_loss(recon, images, self.weights, perceptual, self.frozen.get("features"))
            terms["psnr"] = psnr(recon.detach().clamp(0, 1), images).mean()
            found = terms["reconstruction"]
        terms |= {name: loss.sum(1).mean() if name == "kl" else loss for name, loss in encoded.losses.items()}
        terms["loss"] = found + quantizer_loss(encoded.losses, self.weights, self.global_step)
        return terms, encoded, recon

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.seed_batch(self.global_step)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images = batch[0]
        if len(images) % self.accumulate:
            raise ValueError(f"batch: wanted a multiple of {self.accumulate} images, got {len(images)}")
        against = self.adversary is not None and self.global_step >= self.weights.start
        seen: dict[str, list[Tensor]] = {}
        parts, waiting = images.chunk(self.accumulate), getattr(self.trainer.model, "no_sync", nullcontext)
        for number, part in enumerate(parts):
            terms, _, recon = self.terms(self.trained, part)
            loss = terms["loss"]
            if against:
                fooled = self.adversary.generator_terms(recon, terms["reconstruction"], self.trained.last_layer)
                told = self.adversary.discriminator_terms(part, recon)
                terms["loss"] = terms["loss"] + fooled["adversarial"]
                loss = terms["loss"] + told["discriminator"]
                terms |= fooled | told
            elif self.adversary is not None:  # the same columns from the first step on
                terms |= dict.fromkeys(ADVERSARIAL, loss.new_zeros(()))
            with waiting() if number < len(parts) - 1 else nullcontext():
                self.manual_backward(loss / len(parts))
            for name, term in terms.items():
                seen.setdefault(name, []).append(term.detach())
        self.log_dict({f"train/{name}": torch.stack(x).mean() for name, x in seen.items()}, batch_size=len(images))
        self.move(against)

    def move(self, against: bool) -> None:
        """Both optimisers' step, by gradients that are there."""
        optimizers = self.optimizers()
        ours, theirs = optimizers if isinstance(optimizers, list) else (optimizers, None)
        self.log_norm(self.clipped(self.trained))
        if theirs is not None:
            norm = self.clipped(self.adversary) if against else torch.zeros((), device=self.device)
            self.log_norm(norm, "discriminator_grad_norm")
        if against:
            for group in theirs.param_groups:
                group["lr"] = self.discriminator_lr * ours.param_groups[0]["lr"]
            theirs.optimizer.step()  # past Lightning, which would count this step too
            theirs.zero_grad()
        ours.step()
        ours.zero_grad()
        self.lr_schedulers().step()
        if self.learner is not None:
            average_into(self.model, self.learner, self.ema)

    def clipped(self, network: nn.Module) -> Tensor:
        """The norm of a network's gradient, which is at most `clip` afterwards."""
        norm = torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], self.clip)
        return norm.full_tensor() if self.sharded else norm

    def configure_optimizers(self) -> list[dict]:
        options = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}

        def adamw(network: nn.Module) -> torch.optim.AdamW:
            return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], fused=True, **options)

        muon = self.optimizer == "muon"
        found = [self.scheduled(MuonAdamW(self.trained, **options) if muon else adamw(self.trained))]
        if self.adversary is not None:
            found.append({"optimizer": adamw(self.adversary)})
        return found

    # Validation

    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures `(B, H, W, 3)` in [0, 1] from the codes of `images`; in stage 1 by the target's decoder."""
        recon = self.model(images).recon
        if self.stage_one:
            recon = self.frozen["target"].decode_indices(recon.argmax(-1))
        return recon.float().clamp(0, 1)

    def on_validation_epoch_start(self) -> None:
        quantizer = self.model.quantizer
        self.counts = None if quantizer is None else torch.zeros(self.model.config.codebook_size, device=self.device)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images = batch[0]
        terms, encoded, _ = self.terms(self.model, images)
        if self.counts is not None:
            self.counts += torch.bincount(encoded.indices.flatten(), minlength=len(self.counts))
        self.log_validation(terms, len(images))

    def on_validation_epoch_end(self) -> None:
        if self.counts is None:
            return
        self.counts = self.trainer.strategy.reduce(self.counts, reduce_op="sum")
        values = {"usage": usage(self.counts), "perplexity": perplexity(self.counts)}
        # the same in all processes, of which Lightning cannot know
        self.log_dict({f"val/{name}": value.float() for name, value in values.items()}, sync_dist=True)


class PatchFeatures(nn.Module):
    """Tokens `(B, P, D)` of pictures' patches by a ViT, whose latent tokens are left out."""

    def __init__(self, encoder: TokenEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Pictures `(B, H, W, 3)` in [0, 1]."""
        return self.encoder.patch_features(2 * images - 1)


def with_pixel_decoder(model: TiTok, vqgan: MaskGITVQGAN) -> TiTok:
    """A TiTok of stage 1 with the codes and the decoder of the VQGAN that it learned from: the start of stage 2.

    Raises ValueError for a model that is not of stage 1, or a VQGAN with another number of codes.
    """
    c = model.config
    if c.target != "codes" or c.pixels is not None:
        raise ValueError("model: expected a TiTok of target codes without a pixel decoder")
    second = TiTok(TiTokConfig.from_dict({**c.to_dict(), "pixels": vqgan.config}))
    state = dict(model.state_dict())
    state["pixel_codes"] = vqgan.quantizer.codebook.detach()
    state |= {f"pixel_decoder.{name}": x for name, x in vqgan.decoder.state_dict().items()}
    second.load_state_dict(state)
    return second
