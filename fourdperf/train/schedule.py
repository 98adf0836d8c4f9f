"""How D4RT's weights move: AdamW, a linear warm-up, a cosine down to the final rate (arXiv 2512.08924, section 4)."""

import math
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["WARMUP_STEPS", "adamw", "learning_rate", "warmup_within"]

WARMUP_STEPS = 2500


def learning_rate(
    step: int,
    max_steps: int,
    warmup_steps: int = WARMUP_STEPS,
    peak: float = 1e-4,
    final: float = 1e-6,
    start: float | None = None,
) -> float:
    """The rate of optimiser step `step`, from 0: linear from `start` to `peak` at `warmup_steps`, then a cosine that
    reaches `final` at `max_steps` and stays.

    The paper does not say where the warm-up starts: `start` is `final` by default, as in the seed (port B starts at 0).
    """
    start = final if start is None else start
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_within(max_steps: int) -> int:
    """The paper's 2500 warm-up steps, but at most a tenth of a shorter run."""
    return min(WARMUP_STEPS, max_steps // 10)


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.03) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.999, every parameter decayed: the paper exempts none, and Optax does not by itself."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)
