"""Which queries to train on (arXiv 2512.08924, section 4): mostly anywhere, often on edges, often at one time.

Of N queries 30 % lie on depth or motion boundaries of their source frame, found with the Sobel operator in every frame;
the rest lies anywhere. The frames are uniform, but t_tgt = t_cam with probability 0.4 (or by chance).
Maps are `(..., H, W)`, places in uv as `fourdperf.data.queries` has them; everything random comes from `generator`.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fourdperf.data.queries import Queries

__all__ = ["BOUNDARY_SHARE", "SAME_TIME_SHARE", "boundaries", "sample_queries", "sample_times", "sobel"]

BOUNDARY_SHARE = 0.3
SAME_TIME_SHARE = 0.4
BOUNDARY_QUANTILE = 0.8


def sobel(maps: Tensor) -> Tensor:
    """The magnitude of the 3x3 Sobel gradient of `(..., H, W)`, H, W >= 2; borders mirrored without the edge pixel."""
    x = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (1, 1, 1, 1), mode="reflect")
    across = x[..., 2:] - x[..., :-2]
    down = x[..., 2:, :] - x[..., :-2, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return torch.hypot(gx, gy).reshape(maps.shape)


def boundaries(depth: Tensor, flow: Tensor | None = None) -> Tensor:
    """Where depth or motion breaks, bool `(T, H, W)`: the gradient of the depth `(T, H, W)`, or that of the length of
    the flow `(T, H, W, 2)` or `(T - 1, H, W, 2)`, is above its frame's 80th percentile.

    The percentile is the seed's rule (the paper names none). Of the last frame, where there is no flow from it, only
    the depth counts. A frame without any gradient has no boundary. Depths that are not finite are taken as the largest
    finite one of their frame.
    """
    depth = depth.double()
    finite = depth.isfinite()
    far = depth.where(finite, -torch.inf).amax((-2, -1), keepdim=True)
    found = _steep(depth.where(finite, far.where(far.isfinite(), 0)))
    if flow is not None and len(flow):  # of one frame there is no flow
        moving = _steep(flow.double().norm(dim=-1))
        found[: len(moving)] |= moving
    return found


def _steep(maps: Tensor) -> Tensor:
    """Where the gradient of `(T, H, W)` is strictly above its 80th percentile, linearly interpolated."""
    gradient = sobel(maps)
    limit = gradient.flatten(-2).quantile(BOUNDARY_QUANTILE, dim=-1)
    return gradient > limit[..., None, None]


def sample_queries(
    num_queries: int,
    boundary: Tensor,
    generator: Generator,
    *,
    boundary_share: float = BOUNDARY_SHARE,
    same_time_share: float = SAME_TIME_SHARE,
    subpixel: bool = True,
) -> Queries:
    """`num_queries` queries about a clip whose boundary pixels are given, bool `(T, H, W)`; the first ones lie on them.

    subpixel: anywhere in a pixel (for answers that are exact anywhere), or at its centre (for stored maps). A frame
    without boundary pixels gets places anywhere in their stead.
    """
    frames, height, width = boundary.shape
    t_src, t_tgt, t_cam = sample_times(num_queries, frames, generator, same_time_share)
    on_edge = round(boundary_share * num_queries)
    pixel = torch.randint(height * width, (num_queries,), generator=generator)

    # The edge pixels of all frames in one list; frame t's begin at first[t].
    edges = boundary.flatten(1)
    count = edges.sum(1)
    first = count.cumsum(0) - count
    place = edges.nonzero()[:, 1]
    if len(place):
        source = t_src[:on_edge]
        chosen = (torch.rand(on_edge, generator=generator) * count[source]).long().clamp(max=count[source] - 1)
        position = (first[source] + chosen).clamp(0, len(place) - 1)
        pixel[:on_edge] = torch.where(count[source] > 0, place[position], pixel[:on_edge])

    corner = torch.stack([pixel % width, pixel // width], -1)
    inside = torch.rand(num_queries, 2, generator=generator) if subpixel else 0.5
    uv = (corner + inside) / torch.tensor([width, height])
    return Queries(uv, t_src, t_tgt, t_cam)


def sample_times(
    num_queries: int, frames: int, generator: Generator, same_time_share: float = SAME_TIME_SHARE
) -> tuple[Tensor, Tensor, Tensor]:
    """t_src, t_tgt and t_cam, `(num_queries,)` each, uniform in [0, frames); t_cam = t_tgt with the given probability,
    and otherwise by chance."""
    t_src, t_tgt, t_cam = torch.randint(frames, (3, num_queries), generator=generator)
    same = torch.rand(num_queries, generator=generator) < same_time_share
    return t_src, t_tgt, torch.where(same, t_tgt, t_cam)
