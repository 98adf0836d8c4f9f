"""gather_patches: the 9 x 9 patches of D4RT's queries.

Floor: the patches written once and read once (the frames need not be read as a whole). Peers: advanced indexing (round) and
F.grid_sample (bilinear), torch.compile of the indexing, and, for the record, the loop over queries of the public ports.
"""

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case

from fourdperf.ops.gather_patches import gather_patches, gather_patches_eager

# name: video, points of each clip
SHAPES = {
    "D4RT training (1, 16, 256, 256, 3), 2048 queries": ((1, 16, 256, 256, 3), 2048),
    "D4RT full resolution (2, 48, 480, 854, 3), 2048 queries": ((2, 48, 480, 854, 3), 2048),
}
SIZE = 9


def cases(device: str):
    for name, (shape, n) in SHAPES.items():
        for dtype in (torch.float32, torch.uint8):
            for mode in ("round", "bilinear"):
                torch.compiler.reset()
                yield _case(name, shape, n, dtype, mode, device)
    yield _backward_case(device)


def _inputs(shape, n, dtype, device):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    video = video.to(dtype) / 255 if dtype.is_floating_point else video
    t = torch.randint(0, shape[1], (shape[0], n), generator=generator).to(device)
    return video, t, torch.rand(shape[0], n, 2, generator=generator).to(device)


def _case(name, shape, n, dtype, mode, device):
    video, t, points = _inputs(shape, n, dtype, device)
    options = {"mode": mode, "coordinates": "corners", "border": "replicate"} if mode == "bilinear" else {"mode": mode}
    providers = {"fourdperf": lambda: gather_patches(video, t, points, SIZE, **options)}
    if device == "cuda":
        providers["fourdperf triton"] = lambda: gather_patches(video, t, points, SIZE, **options, backend="triton")
    providers["advanced indexing"] = lambda: gather_patches_eager(video, t, points, SIZE, **options)
    compiled = torch.compile(gather_patches_eager)
    providers["indexing, compiled"] = lambda: compiled(video, t, points, SIZE, **options)
    if mode == "round":
        providers["loop over queries (ports)"] = lambda: _loop(video, t, points)
    elif shape[1] * shape[2] * shape[3] < 2**21:
        providers["copied frames, grid_sample"] = lambda: _grid_sample(video, t, points)
    out = providers["fourdperf"]()
    return Case(
        "gather_patches",
        f"{name}, {mode}",
        str(dtype).removeprefix("torch."),
        providers,
        bytes=out.nbytes + out.numel() * video.element_size(),
        tolerance=5e-5,
    )  # grid_sample rounds positions in [-1, 1]


def _backward_case(device):
    name = "D4RT training (1, 16, 256, 256, 3), 2048 queries"
    video, t, points = _inputs(*SHAPES[name], torch.float32, device)
    video.requires_grad_(), points.requires_grad_()
    d_out = torch.randn(1, 2048, SIZE, SIZE, 3, device=device)

    def provider(function):
        def both():
            out = function(video, t, points, SIZE, mode="bilinear", border="replicate")
            return out, *torch.autograd.grad(out, (video, points), d_out)

        return both

    providers = {"fourdperf": provider(gather_patches), "advanced indexing": provider(gather_patches_eager)}
    return Case(
        "gather_patches",
        f"{name}, bilinear",
        "float32",
        providers,
        bytes=2 * d_out.nbytes * 2 + video.nbytes,
        tolerance=1e-4,
        direction="forward+backward",
    )


def _loop(video, t, points):
    """As the ports do it: a Python loop over queries (upstream runs it twice)."""
    batch, _, height, width, _ = video.shape
    patches = []
    for b in range(batch):
        for n in range(t.shape[1]):
            u, v = points[b, n].tolist()
            x, y = round(u * width), round(v * height)
            x, y = min(max(x, SIZE // 2), width - 1 - SIZE // 2), min(max(y, SIZE // 2), height - 1 - SIZE // 2)
            patches.append(video[b, t[b, n], y - SIZE // 2 : y + SIZE // 2 + 1, x - SIZE // 2 : x + SIZE // 2 + 1])
    return torch.stack(patches).unflatten(0, (batch, -1))


def _grid_sample(video, t, points):
    """As kathirgounder's fast class does it: the source frame copied once for every query."""
    batch, _, height, width, channels = video.shape
    frames = video.float().permute(0, 1, 4, 2, 3)[torch.arange(batch)[:, None], t].flatten(0, 1)
    offsets = torch.arange(SIZE, device=video.device) - SIZE // 2
    grid = torch.stack(torch.meshgrid(offsets * 2 / (width - 1), offsets * 2 / (height - 1), indexing="xy"), -1)
    grid = points.flatten(0, 1)[:, None, None] * 2 - 1 + grid
    sampled = F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled.permute(0, 2, 3, 1).unflatten(0, (batch, -1))
