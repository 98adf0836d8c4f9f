"""MaskGIT on the codes of a picture: a bidirectional transformer that fills in masked codes, a few steps to a picture.

    indices (B, N) in 0 .. K - 1, or K where masked;  classes (B,)
      | condition token and codes embedded, with positions; blocks       TokenGenerator.forward
    logits (B, N, K)
      | guided by those without the class; sampled; the surest kept      TokenGenerator.generate
    indices (B, N)

Ids of the table of tokens: K codes, K for the mask, then the classes, last the token for "no class".

Source: "MaskGIT" (arXiv 2202.04200), "All are Worth Words" (U-ViT, arXiv 2209.12152), BERT (arXiv 1810.04805), and
bytedance/1d-tokenizer (arXiv 2406.07550; sampling, released checkpoints, whose names VARIANTS has).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int
from fourdperf.models.layers import tap
from fourdperf.models.token_blocks import Block, check_codes, check_indices, reset_transformer

MODEL = "token_generator"
CHOICES = {"kind": ("bert", "uvit"), "schedule": ("none", "constant", "linear", "power-cosine")}
BERT_EPS = 1e-12
LOG_FLOOR = 1e-20
RATIO_FLOOR = 1e-6


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes of a generator, and how it samples unless told otherwise.

    kind: "bert" (norms after each sum) or "uvit" (norms before, each late block joined to an early one).
    codebook_size, num_tokens: K and N, of the tokenizer. num_classes: of the condition, at least one.
    hidden_size, num_layers, num_heads, mlp_size: of the transformer.
    dropout: of the embeddings and of what each branch of a block adds, in train mode.
    steps: of `generate`. temperature: of its Gumbel noise at the start. guidance, schedule, guidance_power: as there.
    anneal: also cools the logits, from 1.3 to 0.5.
    tokenizer: whose codes it learned (`fourdperf.models.tokenizers.fingerprint`); None where nobody has noted it.
    """

    kind: str = "bert"
    codebook_size: int = 4096
    num_tokens: int = 64
    num_classes: int = 1000
    hidden_size: int = 768
    num_layers: int = 24
    num_heads: int = 16
    mlp_size: int = 3072
    dropout: float = 0.1
    steps: int = 8
    temperature: float = 11.0
    guidance: float = 3.0
    schedule: str = "linear"
    guidance_power: float = 2.5
    anneal: bool = False
    tokenizer: str | None = None

    def __post_init__(self):
        for name in ("codebook_size", "num_tokens", "num_classes", "hidden_size", "num_layers", "num_heads"):
            check_int(name, getattr(self, name))
        for name in ("mlp_size", "steps"):
            check_int(name, getattr(self, name))
        check_choices(self, CHOICES)
        if self.kind == "uvit" and self.num_layers % 2:
            raise ValueError(f"num_layers: expected an even number for kind uvit, got {self.num_layers}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {self.hidden_size}, got {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout!r}")

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "Config":
        """One of VARIANTS, the released models."""
        if name not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
        return cls.from_dict({**VARIANTS[name], **overrides})

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    @property
    def no_class_id(self) -> int:
        """Id of the token that stands for no class."""
        return self.codebook_size + self.num_classes + 1

    @property
    def vocabulary(self) -> int:
        return self.codebook_size + self.num_classes + 2


VARIANTS = {
    "s128": {
        **{"kind": "uvit", "num_tokens": 128, "hidden_size": 1024, "num_layers": 20, "mlp_size": 4096},
        **{"steps": 64, "temperature": 2.8, "guidance": 6.9, "schedule": "power-cosine"},
    },
    "b64": {"num_tokens": 64, "temperature": 11.0, "guidance": 3.0},
    "l32": {"num_tokens": 32, "temperature": 9.5, "guidance": 4.5},
}


class TokenGenerator(PretrainedModel):
    """A picture's codes from a class, or from none; `kind` as in `Config`."""

    MODEL, CONFIG = MODEL, Config

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        bert = c.kind == "bert"
        self.tokens = nn.Parameter(torch.empty(c.vocabulary, c.hidden_size))
        self.positions = nn.Parameter(torch.empty(1 + c.num_tokens, c.hidden_size))
        # BERT adds a row for the first of two segments, which is all that there is here; kept for checkpoints
        self.segments = nn.Parameter(torch.empty(2, c.hidden_size)) if bert else None
        self.norm = nn.LayerNorm(c.hidden_size, eps=BERT_EPS if bert else 1e-5)
        sizes, options = (c.hidden_size, c.num_heads, c.mlp_size), {"dropout": c.dropout, "qkv_bias": bert}
        if bert:
            options |= {"post_norm": True, "eps": BERT_EPS}
        early = c.num_layers if bert else c.num_layers // 2 + 1
        late = 0 if bert else c.num_layers // 2
        self.blocks = nn.ModuleList(Block(*sizes, **options) for _ in range(early))
        self.skip_blocks = nn.ModuleList(Block(*sizes, **options, skip=True) for _ in range(late))
        self.head = nn.Linear(c.hidden_size, c.codebook_size)
        self.dropout = nn.Dropout(c.dropout)
        reset_transformer(self)
        for parameter in (self.tokens, self.positions, self.segments):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(
        self,
        indices: Tensor,
        classes: Tensor | None = None,
        taps: dict[str, Tensor] | None = None,
        *,
        drop: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, N, K)` of the codes at all places of `indices` `(B, N)`, whose masked ones are `config.mask_id`.

        classes: `(B,)` in 0 .. num_classes - 1; None for no class. drop: `(B,)`, True where the class is not told.
        places: `(B, N)`, True where logits are wanted; then they are `(M, K)`, row by row.
        taps: "embed", then "block/00", .. and "norm". Raises ValueError for shapes that do not fit, and on a CPU for
        indices that are no codes.
        """
        indices = check_codes(check_indices(indices, self.config.num_tokens), self.config.codebook_size + 1)
        if places is not None and (places.shape != indices.shape or places.dtype != torch.bool):
            got = f"{places.dtype} {tuple(places.shape)}"
            raise ValueError(f"places: expected booleans {tuple(indices.shape)}, got {got}")
        condition = self._condition(indices, classes, drop)
        x = self.tokens[torch.cat([condition[:, None], indices], dim=1)] + self.positions
        if self.segments is not None:
            x = self.norm(x + self.segments[0])
        x = self.dropout(x)
        tap(taps, "embed", x)
        early = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            early.append(x)
            tap(taps, f"block/{index:02d}", x)
        for index, block in enumerate(self.skip_blocks, start=len(self.blocks)):
            x = block(x, early[len(self.blocks) + len(self.skip_blocks) - 1 - index])
            tap(taps, f"block/{index:02d}", x)
        if self.segments is None:
            x = self.norm(x)
            tap(taps, "norm", x)
        # rows that follow one another: a linear layer of others multiplies many small matrices
        return self.head(x[:, 1:].contiguous() if places is None else x[:, 1:][places])

    def _condition(self, indices: Tensor, classes: Tensor | None, drop: Tensor | None) -> Tensor:
        """Ids of the tokens that stand for the classes, `(B,)`."""
        c, batch = self.config, (len(indices),)
        if classes is None:
            return indices.new_full(batch, c.no_class_id)
        if classes.shape != batch or classes.is_floating_point():
            raise ValueError(f"classes: expected integers {batch}, got {classes.dtype} {tuple(classes.shape)}")
        ids = classes.long() + c.codebook_size + 1
        if drop is None:
            return ids
        if drop.shape != batch or drop.dtype != torch.bool:
            raise ValueError(f"drop: expected booleans {batch}, got {drop.dtype} {tuple(drop.shape)}")
        return torch.where(drop, c.no_class_id, ids)

    @torch.no_grad()
    def generate(
        self,
        classes: Tensor | None = None,
        *,
        batch: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        anneal: bool | None = None,
        generator: torch.Generator | None = None,
        uniforms: Sequence[tuple[Tensor, Tensor]] | None = None,
        taps: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Codes `(B, N)` of new pictures, in eval mode; options are the config's unless given.

        All places are masked at first. Each step samples every masked place from the logits plus Gumbel noise times a
        temperature, which falls linearly to zero, and masks again those whose logit (plus such noise) is lowest: the
        share arccos(t) / (pi / 2) at t = step / steps.

        classes: `(B,)`, or None for no class; then `batch` says how many, and there is no guidance.
        schedule: of the strength s of guidance away from the logits without class. "linear": s = guidance * t, added as
            s (cond - uncond) to cond; "constant": s = guidance, added so; "power-cosine": from 1 to guidance with (1 -
            cos(pi t^guidance_power)) / 2, added to uncond; "none": none.
        uniforms: per step, what the noise is made of instead of `generator`, in [0, 1): `(B, N, K)` and `(B, N)`.
        taps: "ids/00", ..: what each step begins with.
        """
        c = self.config
        steps = c.steps if steps is None else steps
        check_int("steps", steps)
        schedule = c.schedule if schedule is None else schedule
        if schedule not in CHOICES["schedule"]:
            raise ValueError(f"schedule: expected one of {', '.join(CHOICES['schedule'])}, got {schedule!r}")
        if classes is None:
            check_int("batch", batch)
        elif batch not in (None, len(classes)):
            raise ValueError(f"batch: expected {len(classes)} like classes, got {batch}")
        elif not 0 <= int(classes.min()) <= int(classes.max()) < c.num_classes:
            raise ValueError(f"classes: expected numbers in 0 .. {c.num_classes - 1}, got {classes.tolist()}")
        if uniforms is not None and len(uniforms) != steps:
            raise ValueError(f"uniforms: expected {steps} pairs, got {len(uniforms)}")
        guidance = c.guidance if guidance is None else guidance
        power = c.guidance_power if guidance_power is None else guidance_power
        temperature = c.temperature if temperature is None else temperature
        anneal = c.anneal if anneal is None else anneal

        device = self.tokens.device
        size = (batch if classes is None else len(classes), c.num_tokens)
        ids = torch.full(size, c.mask_id, device=device)
        for step in range(steps):
            tap(taps, f"ids/{step:02d}", ids)
            done = (step + 1) / steps
            masked = ids == c.mask_id
            guide = guidance_strength(schedule, step / steps, guidance, power)
            if step == 0:  # pictures differ by their class alone
                known, row = (None, 0 * ids[:, 0]) if classes is None else classes.unique(return_inverse=True)
                first = slice(1 if known is None else len(known))
                logits = self._guided(ids[first], known, masked[first], *guide)
                logits = logits.unflatten(0, (-1, c.num_tokens))[row].flatten(0, 1).float()
            else:
                logits = self._guided(ids, classes, masked, *guide).float()
            if anneal:
                logits = logits / (0.5 + 0.8 * (1 - done))
            if step == steps - 1:
                return ids.masked_scatter(masked, logits.argmax(-1))
            if uniforms is None:
                draws = [torch.rand(x, generator=generator, device=device) for x in (logits.shape, size)]
            else:
                draws = uniforms[step][0][masked], uniforms[step][1]
            noise, jitter = (gumbel(x).mul_(temperature * (1 - done)) for x in draws)
            sampled = noise.add_(logits).argmax(-1)
            confidence = logits.new_full(size, torch.inf)
            confidence[masked] = logits.gather(-1, sampled[:, None])[:, 0]
            confidence += jitter
            count = math.floor(c.num_tokens * (math.acos(done) / (math.pi / 2)))
            count = max(1, min(int(masked[0].sum()) - 1, count))
            cut = confidence.sort(dim=1).values[:, count - 1 : count]
            ids = ids.masked_scatter(masked, sampled).masked_fill(confidence <= cut, c.mask_id)

    def _guided(self, ids: Tensor, classes: Tensor | None, masked: Tensor, strength: float, onto_cond: bool) -> Tensor:
        """Logits `(M, K)` at masked places."""
        if classes is None or (onto_cond and strength == 0):
            return self(ids, classes, places=masked)
        drop = torch.arange(2 * len(ids), device=ids.device) >= len(ids)
        cond, uncond = self(ids.repeat(2, 1), classes.repeat(2), drop=drop, places=masked.repeat(2, 1)).chunk(2)
        return (cond if onto_cond else uncond) + strength * (cond - uncond)


def guidance_strength(schedule: str, t: float, guidance: float, power: float) -> tuple[float, bool]:
    """The strength of guidance at the share t of the steps, and whether it is added to the logits with class."""
    if schedule == "power-cosine":
        return 1 + (guidance - 1) * (1 - math.cos(math.pi * t**power)) / 2, False
    return {"none": 0.0, "constant": guidance, "linear": guidance * t}[schedule], True


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of uniform numbers."""
    return uniform.clamp(min=LOG_FLOOR).log_().neg_().clamp_(min=LOG_FLOOR).log_().neg_()


def mask_tokens(indices: Tensor, mask_id: int, *, timesteps: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Mask codes as for training: `indices` `(B, N)` -> the same with `mask_id` in places, and where that is.

    The share arccos(t) / (pi / 2) of each row is masked, rounded to a number of tokens, at least one.

    timesteps: t `(B,)`, uniform in [0, 1). random: `(B, N)`, whose order says which tokens go.
    """
    number = indices.shape[1]
    ratio = (timesteps.acos() / (math.pi / 2)).clamp(min=RATIO_FLOOR)
    count = (number * ratio).round().clamp(min=1)
    # the place of each number in the order, or the number at each place: either is a random permutation
    masks = random.argsort(dim=-1) < count[:, None]
    return torch.where(masks, mask_id, indices), masks
