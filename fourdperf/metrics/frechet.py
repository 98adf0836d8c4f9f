"""The Frechet distance of two sets of features, from means and covariances gathered batch by batch.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

The last trace is the sum of the singular values of C_b^(1/2) C_a^(1/2), which unlike a square root of the product is
real and exact to rounding for singular covariances too.

Source: "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500); covariances with n - 1 as in pytorch-fid,
whose figures these are.
"""

import torch
from torch import Tensor

__all__ = ["Moments", "frechet_distance"]


class Moments:
    """Mean and covariance of features, float64: `update` with batches, `merge` with what another process has seen.

    count: rows so far. mean: `(D,)`. scatter: `(D, D)`, the sum of outer products of deviations from the mean.
    """

    def __init__(self, features: int):
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.scatter = torch.zeros(features, features, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds rows `(B, D)`; raises ValueError for other shapes and for values that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: expected (B, {len(self.mean)}), got {tuple(features.shape)}")
        features = features.detach().double().cpu()
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        if len(features) == 0:
            return
        batch = Moments(len(self.mean))
        batch.count, batch.mean = len(features), features.mean(0)
        batch.scatter = (features - batch.mean).T @ (features - batch.mean)
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Adds what `other` has seen (Chan, Golub and LeVeque's formula)."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"other: expected {len(self.mean)} features, got {len(other.mean)}")
        if other.count == 0:
            return
        total, apart = self.count + other.count, other.mean - self.mean
        self.scatter += other.scatter + torch.outer(apart, apart) * (self.count * other.count / total)
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """`(D, D)`, with n - 1; raises ValueError of fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"features: expected at least two rows for a covariance, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance between Gaussians of these moments; raises ValueError where features differ in number."""
    if len(a.mean) != len(b.mean):
        raise ValueError(f"b: expected {len(a.mean)} features, got {len(b.mean)}")
    means = (a.mean - b.mean).square().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    together = torch.linalg.svdvals(_root(b.covariance) @ _root(a.covariance)).sum()
    return max(0.0, (means + traces - 2 * together).item())


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
