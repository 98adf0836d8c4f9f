"""Neural Isometries under Lightning: an objective for each experiment, and the data modules that feed them.

experiment                     batch                                             objective
laplacian                      a, b (B, H, W, C), b = a rolled around the torus   laplacian_objective
hmnist, shrec, pose encode     a, b (B, H, W, C), two views of one thing          encode_objective
hmnist, shrec pred             x (B, H, W, C), label (B,)                         classification_objective
pose pred                      video (B, T, H, W, C), poses (B, T, 4, 4)          pose_objective
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fourdperf.models.niso import Autoencoder, Classifier, Model, PosePredictor
from fourdperf.train.module import ADVICE, ModelTraining
from fourdperf.train.niso_loss import (
    classification_loss,
    encode_loss,
    laplacian_loss,
    parameter_groups,
    pose_loss,
)

__all__ = [
    "NisoTraining",
    "classification_objective",
    "collate_items",
    "encode_objective",
    "laplacian_objective",
    "pose_objective",
]

TINY = 1e-12
Batch = tuple[Tensor, ...]
Objective = Callable[[Model, Batch, dict | None], dict[str, Tensor]]


# Objectives: the parts of the loss by name, of a model and a batch; taps are the model's


def laplacian_objective(beta: float) -> Objective:
    def objective(model: Autoencoder, batch: Batch, taps: dict | None = None) -> dict[str, Tensor]:
        a, b = batch[:2]
        return laplacian_loss(model(a, b, taps), a, b, beta=beta)

    return objective


def encode_objective(alpha: float, beta: float, relative: bool = False, gamma: float = 0.0) -> Objective:
    """relative: equivariance is that of coefficients over a pair's root mean square. The decoder hardly minds how large
    they are, so that otherwise they shrink, a hundredfold in two thousand steps, and the term with them.
    gamma: weight of `contrast_loss`, among a process's own pairs."""

    def objective(model: Autoencoder, batch: Batch, taps: dict | None = None) -> dict[str, Tensor]:
        a, b = batch[:2]
        related = model(a, b, taps)
        if relative:
            of_a, of_b = related.coefficients_a, related.coefficients_b
            size = (of_a.square() + of_b.square()).mean((-2, -1), keepdim=True).div(2).sqrt() + TINY
            related = related._replace(coefficients_a=of_a / size, coefficients_b=of_b / size)
        return encode_loss(related, a, b, alpha=alpha, beta=beta, gamma=gamma)

    return objective


def classification_objective(model: Classifier, batch: Batch, taps: dict | None = None) -> dict[str, Tensor]:
    x, labels = batch
    return classification_loss(model(x, taps), labels)


def pose_objective(model: PosePredictor, batch: Batch, taps: dict | None = None) -> dict[str, Tensor]:
    video, poses = batch[:2]
    return pose_loss(model(video, taps), poses, negative_scale=model.config.negative_scale)


# Training


class NisoTraining(ModelTraining):
    """One model, what it is to learn, and its optimiser: AdamW, a linear warm-up from `final_lr`, a cosine back to it.

    max_steps: where the learning rate reaches `final_lr`. clip: the gradient's largest L2 norm; None leaves it.
    decay_basis: see `fourdperf.train.niso_loss.parameter_groups`. functions_lr, mass_lr, eigenvalues_lr: of these of the
    operator, as multiples of lr.

    A step whose loss or gradient is not finite raises ValueError, with the step and the first tensor that is not
    finite, before anything has moved.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        max_steps: int,
        *,
        lr: float,
        final_lr: float,
        warmup_steps: int = 0,
        weight_decay: float = 1e-4,
        decay_basis: bool = False,
        functions_lr: float = 1.0,
        mass_lr: float = 1.0,
        eigenvalues_lr: float = 1.0,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.max_steps = model, objective, max_steps
        self.lr, self.final_lr, self.warmup_steps = lr, final_lr, warmup_steps
        self.weight_decay, self.decay_basis, self.clip = weight_decay, decay_basis, clip
        self.functions_lr, self.mass_lr, self.eigenvalues_lr = functions_lr, mass_lr, eigenvalues_lr
        self._batch: Batch = ()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._batch = batch
        parts = self._parts(batch)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()}, batch_size=len(batch[0]))
        return parts["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_validation(self._parts(batch), len(batch[0]))

    def _parts(self, batch: Batch) -> dict[str, Tensor]:
        try:
            return self.objective(self.model, batch)
        except ValueError as error:  # the model has looked at its inputs
            raise ValueError(f"step {self.global_step}: {error}. {ADVICE}") from error

    def configure_optimizers(self) -> dict:
        groups = parameter_groups(self.model, self.weight_decay, decay_basis=self.decay_basis)
        operator = self.model.operator
        multiples = {operator.Phi: self.functions_lr, operator.M: self.mass_lr, operator.Lambda: self.eigenvalues_lr}
        for parameter, multiple in multiples.items():
            if multiple != 1:
                groups = _apart(groups, parameter, self.lr * multiple)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        return self.scheduled(optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        moving = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(moving, torch.inf if self.clip is None else self.clip)
        self.log_norm(norm)

    @torch.no_grad()
    def not_finite(self, norm: Tensor) -> str:
        """The first tensor on the way from the batch to the gradients that is not finite, in words."""
        taps: dict[str, Tensor] = {}
        try:
            parts = self.objective(self.model, self._batch, taps)
        except ValueError as error:
            return str(error)
        gradients = {f"gradient of {name}": p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for name, x in {**dict(enumerate(self._batch)), **taps, **parts, **gradients}.items():
            if x.is_floating_point() and not x.isfinite().all():
                where = f"batch's tensor {name}" if isinstance(name, int) else name
                return f"{where} has {int((~x.isfinite()).sum())} of {x.numel()} values that are not finite"
        return "another process's gradient is not finite"


def _apart(groups: list[dict], parameter: Tensor, lr: float) -> list[dict]:
    """The groups with this parameter in one of its own, with its own rate."""
    found = []
    for group in groups:
        inside = [p is parameter for p in group["params"]]
        others = [p for p, own in zip(group["params"], inside) if not own]
        found += [{**group, "params": others}] * bool(others) + [{**group, "params": [parameter], "lr": lr}] * any(
            inside
        )
    return found


# Data


def collate_items(items: Sequence[dict]) -> Batch:
    """Pairs as (x, Tx), what has a label and no pair as (x, label), videos as (video, poses, intrinsics)."""
    first = items[0]
    names = next(n for n in (("x", "Tx"), ("x", "label"), ("video", "poses", "intrinsics")) if n[-1] in first)
    return tuple(torch.stack([torch.as_tensor(item[name]) for item in items]) for name in names)


def collate_frames(items: Sequence[dict]) -> Batch:
    """Videos of two frames as pairs (B, H, W, 3)."""
    return collate_items(items)[0].unbind(1)
