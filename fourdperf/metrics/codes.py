"""How a codebook is used: which codes, how evenly, at which places of the sequence, and which in one picture together.

Codes are int64 `(B, N)`, in 0 .. K - 1, of B pictures.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["code_clusters", "co_occurrence", "perplexity", "position_histogram", "usage"]

MOST_CODES = 512


def position_histogram(codes: Tensor, size: int) -> Tensor:
    """How often each of K = `size` codes stands at each place: `(N, K)`, int64. Their sum over places is the histogram.

    Raises ValueError for codes that are none of 0 .. K - 1, or not `(B, N)`.
    """
    if codes.ndim != 2 or codes.is_floating_point():
        raise ValueError(f"codes: expected integers (B, N), got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes: expected 0 .. {size - 1}, got {int(codes.min())} .. {int(codes.max())}")
    places = codes.shape[1]
    flat = codes + size * torch.arange(places, device=codes.device)
    return torch.bincount(flat.flatten(), minlength=places * size).view(places, size)


def usage(histogram: Tensor) -> Tensor:
    """The share of codes `(..)` that occur at all, of histograms `(.., K)`."""
    return (histogram > 0).double().mean(-1)


def perplexity(histogram: Tensor) -> Tensor:
    """exp of the entropy `(..)` of histograms `(.., K)`: as many codes, equally often, would be as hard to guess. Of an
    empty one NaN."""
    p = histogram.double() / histogram.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def co_occurrence(codes: Tensor, size: int, most: int = MOST_CODES) -> tuple[Tensor, Tensor]:
    """Which codes are in one picture together: the codes `(M,)` that most pictures have, and the correlations `(M, M)`,
    float64, of being in a picture. A code that is in all pictures has none with others.
    """
    there = torch.zeros(len(codes), size, dtype=torch.float64).scatter_(1, codes.cpu(), 1.0)
    pictures = there.sum(0)
    found = pictures.argsort(descending=True, stable=True)[: min(most, int((pictures > 0).sum()))]
    there = there[:, found] - there[:, found].mean(0)
    length = there.norm(dim=0)
    return found, there.T @ there / torch.outer(length, length).clamp(min=1e-12)


def code_clusters(correlation: Tensor, clusters: int) -> Tensor:
    """Clusters of codes that come together: correlations `(M, M)` -> each code's cluster `(M,)`, 0 the largest.

    Complete linkage of 1 - correlation. Raises ImportError without scikit-learn.
    """
    if len(correlation) <= clusters:
        return torch.arange(len(correlation))
    from sklearn.cluster import AgglomerativeClustering

    linkage = AgglomerativeClustering(clusters, metric="precomputed", linkage="complete")
    labels = linkage.fit_predict((1 - correlation).clamp(min=0).numpy())
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    return torch.from_numpy(np.argsort(order)[labels])
