"""Generators of codes under Lightning: to tell masked codes from those that are left, and from the class."""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from fourdperf.models.titok import TiTok
from fourdperf.models.token_generator import TokenGenerator, mask_tokens
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.train.module import ModelTraining, average_into

__all__ = ["TokenGeneratorTraining", "masked_loss"]

TABLES = ("tokens", "positions", "segments")


def masked_loss(
    logits: Tensor, codes: Tensor, masks: Tensor, *, smoothing: float = 0.0, unmasked: float = 0.0
) -> dict[str, Tensor]:
    """The mean cross entropy "loss" at masked places, others counting `unmasked`; "accuracy" at masked ones; and
    "masked", their share.

    logits `(B, N, K)`, codes and masks `(B, N)`; smoothing: the share of a code that goes to all codes alike.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none", label_smoothing=smoothing)
    weights = torch.where(masks, 1.0, unmasked)
    right = (logits.argmax(-1) == codes) & masks
    loss, accuracy = (losses * weights).sum() / weights.sum(), right.sum() / masks.sum()
    return {"loss": loss, "accuracy": accuracy, "masked": masks.float().mean()}


class TokenGeneratorTraining(ModelTraining):
    """One generator and its optimiser; batches are codes `(B, N)`, or images `(B, H, W, 3)` that `tokenizer` reads, and
    classes `(B,)`.

    network: what is trained. `model` is the moving average of its parameters, which validation and pictures use and a
    run leaves behind. tokenizer: frozen, and no part of the checkpoint.
    label_dropout: how often the class is not told. smoothing, unmasked: of `masked_loss`.
    weight_decay: of matrices, but not of the tables of tokens and positions.
    clip: the gradient's largest L2 norm. ema: how much of the average stays in a step, at most (1 + n) / (10 + n) in
    step n. seed: of what is random in a step; step n of process r starts from a seed of its own.
    """

    def __init__(
        self,
        network: TokenGenerator,
        max_steps: int,
        *,
        tokenizer: Tokenizer | TiTok | None = None,
        label_dropout: float = 0.1,
        smoothing: float = 0.1,
        unmasked: float = 0.1,
        lr: float = 2e-4,
        final_lr: float = 1e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.96),
        clip: float = 1.0,
        ema: float = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.model = network, deepcopy(network).requires_grad_(False)
        self.frozen = [] if tokenizer is None else [tokenizer.eval().requires_grad_(False)]
        self.max_steps, self.lr, self.final_lr, self.warmup_steps = max_steps, lr, final_lr, warmup_steps
        self.label_dropout, self.smoothing, self.unmasked = label_dropout, smoothing, unmasked
        self.weight_decay, self.betas, self.clip, self.ema, self.seed = weight_decay, betas, clip, ema, seed
        self.sharded = False

    def configure_model(self) -> None:
        """Under FSDP every block's parameters are sharded over the processes (torch's fully_shard)."""
        mesh = self.device_mesh
        if mesh is None or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        for model in (self.network, self.model):
            for block in (*model.blocks, *model.skip_blocks):
                fully_shard(block, mesh=mesh["data_parallel"])
            # the average must be in parts after a validation
            fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=model is self.model)
        self.sharded = True

    def on_fit_start(self) -> None:
        for tokenizer in self.frozen:
            tokenizer.to(self.device)

    @torch.no_grad()
    def codes(self, items: Tensor) -> Tensor:
        """Codes `(B, N)` of what a batch has."""
        return self.frozen[0].encode(items).indices if items.is_floating_point() else items

    def terms(self, model: TokenGenerator, batch: Sequence[Tensor], uniform: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of `masked_loss` at random masks; the class is dropped in train mode.

        uniform: what that is made of, `(B, 2 + N)` in [0, 1); by default drawn.
        """
        codes, classes = self.codes(batch[0]), batch[1]
        if uniform is None:
            uniform = torch.rand(len(codes), 2 + codes.shape[1], device=codes.device)
        timesteps, dropped, random = uniform[:, 0], uniform[:, 1], uniform[:, 2:]
        masked, masks = mask_tokens(codes, model.config.mask_id, timesteps=timesteps, random=random)
        logits = model(masked, classes, drop=(dropped < self.label_dropout) & model.training)
        return masked_loss(logits, codes, masks, smoothing=self.smoothing, unmasked=self.unmasked)

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.seed_batch(batch_idx)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        terms = self.terms(self.network, batch)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(batch[1]))
        return terms["loss"]

    def optimizer_step(self, *arguments, **options) -> None:
        step = self.global_step  # from 0
        super().optimizer_step(*arguments, **options)
        average_into(self.model, self.network, min(self.ema, (1 + step) / (10 + step)))

    def on_validation_epoch_start(self) -> None:
        self.validated = 0  # items, by this process

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Masks are an item's own, whichever process has it; means are over places of all batches."""
        size, trainer = (len(batch[1]), 2 + self.model.config.num_tokens), self.trainer
        numbers = range(self.validated, self.validated + size[0])
        numbers = [trainer.global_rank + number * trainer.world_size for number in numbers]
        uniform = [torch.rand(size[1], generator=torch.Generator().manual_seed(number)) for number in numbers]
        self.validated += size[0]
        terms = self.terms(self.model, batch, torch.stack(uniform).to(self.device))
        masked = float(terms.pop("masked"))
        self.log_validation({"loss": terms["loss"]}, size[0] * (masked + self.unmasked * (1 - masked)))
        self.log_validation({"accuracy": terms["accuracy"]}, size[0] * masked)

    def configure_optimizers(self) -> dict:
        parameters = dict(self.network.named_parameters())
        decayed = [p for name, p in parameters.items() if p.ndim > 1 and name not in TABLES]
        others = [p for name, p in parameters.items() if p.ndim <= 1 or name in TABLES]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return self.scheduled(torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.log_norm(norm.full_tensor() if self.sharded else norm)
