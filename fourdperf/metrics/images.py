"""How near a picture is to another: PSNR and SSIM, of each of a batch, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["psnr", "ssim"]

WINDOW, DEVIATION = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """-10 log10 of the mean square difference, in dB: pictures `(B, H, W, C)` in [0, 1] -> `(B,)`; equal ones inf.

    Raises ValueError for shapes that differ or are none of pictures.
    """
    a, b = _checked(a, b)
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """The structural similarity of Wang et al. (IEEE TIP 13(4), 2004): pictures `(B, H, W, C)` in [0, 1] -> `(B,)`.

    The mean over channels and all places where the 11 x 11 Gaussian of deviation 1.5 lies inside the picture, as in the
    authors' code and scikit-image; torchmetrics' mean has the reflected border in it.

    Raises ValueError for shapes that differ, or pictures smaller than 11 x 11.
    """
    a, b = _checked(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"a: expected pictures of at least {WINDOW} x {WINDOW}, got {tuple(a.shape[1:3])}")
    channels = a.shape[-1]
    a, b = (x.movedim(-1, 1).flatten(0, 1)[:, None] for x in (a, b))
    mean_a, mean_b, aa, bb, ab = _blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * structure).mean((1, 2, 3)).unflatten(0, (-1, channels)).mean(1)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"a, b: expected pictures (B, H, W, C) of one shape, got {tuple(a.shape)}, {tuple(b.shape)}")
    return a.double(), b.double()


def _blur(x: Tensor) -> Tensor:
    """Of `(N, 1, H, W)`, without a border."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = (-places.square() / (2 * DEVIATION**2)).exp()
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
