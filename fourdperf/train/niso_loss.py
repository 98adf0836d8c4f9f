"""The losses of Neural Isometries (arXiv 2405.19296), and what of a model decays.

    reconstruction   l1(recon_a, a) + l1(recon_b, b)             decoded from tau^T of b's coefficients and tau of a's
    equivariance     l1(tau a, b) + l1(tau^T b, a)               of coefficients
    multiplicity     |L| / k, Frobenius norm of the graph Laplacian L = diag(mask 1) - mask
    contrast         -log of the share of a view's partner among all of the batch, by their Gram matrices; not in the paper
    poses            l1 of rotations + l1 of positions, each sequence's predicted ones brought to the true ones' size

l1 is the mean over all numbers. Losses are computed in fp32 at least. Each `*_loss` of an experiment gives its parts by
name, unweighted, and under "loss" their weighted sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.geometry import relative_pose
from fourdperf.models.layers import wide
from fourdperf.models.niso import IsometricOperator, Related
from fourdperf.ops.checks import no_autocast

__all__ = [
    "classification_loss",
    "contrast_loss",
    "encode_loss",
    "equivariance_loss",
    "l1",
    "laplacian_loss",
    "multiplicity_loss",
    "orientation_loss",
    "parameter_groups",
    "pose_loss",
    "scale_procrustes",
]

NORM_EPS = 1e-8
TINY = 1e-12
TEMPERATURE = 0.1


def l1(a: Tensor, b: Tensor) -> Tensor:
    """The mean of |a - b|; raises ValueError for two shapes."""
    if a.shape != b.shape:
        raise ValueError(f"a and b: expected one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    dtype = wide(torch.promote_types(a.dtype, b.dtype))
    return F.l1_loss(a.to(dtype), b.to(dtype))


def multiplicity_loss(mask: Tensor) -> Tensor:
    """How much eigenvalues cluster, by their mask `(.., k, k)`: sqrt(|L|^2 + 1e-8) / k, the mean over the batch."""
    laplacian = torch.diag_embed(mask.sum(-1)) - mask
    return ((laplacian.square().sum((-2, -1)) + NORM_EPS).sqrt() / mask.shape[-1]).mean()


def equivariance_loss(tau: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """l1 between coefficients `(B, k, D)` and what the rotation tau `(B, k, k)` makes of each other's."""
    with no_autocast(tau.device.type):
        return l1(tau @ a, b) + l1(tau.mT @ b, a)


def contrast_loss(a: Tensor, b: Tensor) -> Tensor:
    """How badly the invariants of coefficients `(B, k, D)` tell a pair's two views from the batch's other ones.

    Invariants are Gram matrices over their trace, less their mean over the batch; their cosines over 0.1 are the logits
    (SimCLR, arXiv 2002.05709). Equivariance alone is best served by one Gram matrix for all things: between fields that
    share it there is always a rotation, and then no invariant tells one thing from another.
    """
    with no_autocast(a.device.type):
        x = torch.cat([a, b])
        gram = (x.mT @ x).flatten(1) / x.square().sum((-2, -1)).clamp(min=TINY)[:, None]
        gram = F.normalize(gram - gram.mean(0), eps=TINY)
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        logits = (gram @ gram.mT / TEMPERATURE).masked_fill(itself, -torch.inf)
        partner = torch.arange(len(x), device=x.device).roll(len(a))
        return F.cross_entropy(logits, partner)


def orientation_loss(a: Tensor, b: Tensor) -> Tensor:
    """l1 between rotation matrices `(.., 3, 3)`."""
    return l1(a, b)


def scale_procrustes(a: Tensor, b: Tensor, *, negative_scale: bool = False) -> tuple[Tensor, Tensor]:
    """l1 between points a and s b, both `(B, T, 3)`, and s b.

    s of each sequence is positive, |a| / |b|; the gradient is across b, so that it never makes b shorter, where it
    would be larger. negative_scale: s = <a, b> / <b, b>, the factor that fits best, which takes a's opposite for a, and
    of b across a makes zero, where nothing is learned; no gradient goes through it.
    """
    size = b.square().sum((-2, -1), keepdim=True).clamp(min=TINY)
    if negative_scale:
        scale = ((a * b).sum((-2, -1), keepdim=True) / size).detach()
    else:
        scale = torch.linalg.vector_norm(a, dim=(-2, -1), keepdim=True) / size.sqrt()
    return l1(a, scale * b), scale * b


def laplacian_loss(related: Related, a: Tensor, b: Tensor, *, beta: float) -> dict[str, Tensor]:
    """recon + beta mult, of fields `(B, H, W, C)` without an encoder."""
    recon = l1(related.recon_a, a) + l1(related.recon_b, b)
    mult = multiplicity_loss(related.basis.mask)
    return {"loss": recon + beta * mult, "recon": recon, "mult": mult}


def encode_loss(
    related: Related, a: Tensor, b: Tensor, *, alpha: float, beta: float, gamma: float = 0.0
) -> dict[str, Tensor]:
    """recon + alpha equiv + beta mult + gamma contrast, of observations `(B, H, W, C)`."""
    parts = laplacian_loss(related, a, b, beta=beta)
    equiv = equivariance_loss(related.tau, related.coefficients_a, related.coefficients_b)
    parts = {"loss": parts["loss"] + alpha * equiv, "recon": parts["recon"], "equiv": equiv, "mult": parts["mult"]}
    if gamma:
        parts["contrast"] = contrast_loss(related.coefficients_a, related.coefficients_b)
        parts["loss"] = parts["loss"] + gamma * parts["contrast"]
    return parts


def classification_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of logits `(B, classes)` and labels `(B,)`; "acc" is the share of right answers."""
    logits = logits.to(wide(logits.dtype))
    acc = (logits.detach().argmax(-1) == labels).to(logits.dtype).mean()
    return {"loss": F.cross_entropy(logits, labels), "acc": acc}


def pose_loss(relative: Tensor, poses: Tensor, *, negative_scale: bool = False) -> dict[str, Tensor]:
    """rotation + position, of predicted poses `(B, T - 1, 4, 4)` of each frame seen from the one before, and of the
    frames' own, `(B, T, 4, 4)`, world from camera. negative_scale: as in `scale_procrustes`."""
    truth = relative_pose(poses[:, :-1], poses[:, 1:])
    rotation = orientation_loss(truth[..., :3, :3], relative[..., :3, :3])
    position, _ = scale_procrustes(truth[..., :3, 3], relative[..., :3, 3], negative_scale=negative_scale)
    return {"loss": rotation + position, "rotation": rotation, "position": position}


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_basis: bool = False) -> list[dict]:
    """Groups for `torch.optim.AdamW`, of parameters that want a gradient.

    All decay but the mass and the eigenvalues, whose size means something: decay would draw the mass to zero and the
    eigenvalues together. decay_basis: these too, as in the original.
    """
    basis = {id(p) for m in model.modules() if isinstance(m, IsometricOperator) for p in (m.M, m.Lambda)}
    wanted = [p for p in model.parameters() if p.requires_grad]
    kept = [] if decay_basis else [p for p in wanted if id(p) in basis]
    decayed = [p for p in wanted if decay_basis or id(p) not in basis]
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
