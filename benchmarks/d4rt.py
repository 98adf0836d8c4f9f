"""D4RT end to end and by its hot spots, at the sizes of the seed's repository and of the paper's small variants.

    fourdperf bench d4rt

Peers: the same maths in the seed's style (Python loops over windows and queries, attention weights kept, keys and
values projected in every call; ours reproduces its numbers, see tests/models/test_d4rt_port.py), and torch.compile of
plain torch code: SDPA, eager ops, projections kept. Floor: FLOPs of the matrix products at the measured matmul rate.
"""

import copy
import functools
from unittest import mock

import torch
import torch.nn.functional as F
from fourdperf.benchmarks._seed_style import SeedDecoder, patches_loop, window_attention_loop
from fourdperf.benchmarks.harness import Case
from torch import Tensor

from fourdperf.cli.reconstruct import SHIPPED_WEIGHTS
from fourdperf.data.queries import Clip, Queries, Targets
from fourdperf.data.scenes import Scene
from fourdperf.data.synthetic import scene_seed
from fourdperf.models import d4rt, layers
from fourdperf.models.d4rt import D4RT, SIZES, Config, EncoderBlock, Prediction, QueryBuilder
from fourdperf.models.layers import CrossDecoder
from fourdperf.ops.backends import use_backend
from fourdperf.reconstruct.dense import dense_tracks
from fourdperf.reconstruct.recipes import EncodedVideo, tracks
from fourdperf.train.d4rt_loss import d4rt_loss

SMALL = {
    "hidden_size": 192,
    "num_layers": 8,
    "num_heads": 3,
    "num_frames": 8,
    "image_size": 64,
    "patch_size": (2, 8, 8),
}


def cases(device: str):
    torch.manual_seed(0)
    for backward in (False, True):
        torch.compiler.reset()
        yield _local_attention(device, backward)
    yield _embedding(device)
    for dtype in (torch.float32, torch.bfloat16):
        torch.compiler.reset()
        yield _decoder(device, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        torch.compiler.reset()
        yield _encode(device, dtype)
    torch.compiler.reset()
    yield _training_step(device)
    for number in (2048, 32768):
        yield _queries(device, number)
    yield _all_pixels(device)


def plain(function):
    """Compiled plain torch: every op of ours on its eager reference, attention by SDPA."""

    def eager(*args):
        with (
            use_backend("eager"),
            mock.patch.object(layers, "attention", _sdpa),
            mock.patch.object(d4rt, "attention", _sdpa),
            mock.patch.object(layers, "cross_attention", _sdpa),
        ):
            return compiled(*args)

    compiled = torch.compile(function)
    return eager


def _sdpa(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: None = None) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _local_attention(device: str, backward: bool) -> Case:
    config = Config.seed(local_attention="window", num_frames=16)
    block = EncoderBlock(config, local=True).to(device)
    tokens = torch.randn(1, 8 * 16 * 16, 768, device=device, requires_grad=backward)
    cotangent = torch.randn_like(tokens)

    def loop(query, key, value):
        grid = [x.unflatten(1, (8, 16, 16)) for x in (query, key, value)]
        return window_attention_loop(*grid, config.window).flatten(1, 3)

    def run(function):
        if not backward:
            return torch.no_grad()(lambda: function(tokens))
        inputs = [tokens, *block.attention.parameters()]
        return lambda: (out := function(tokens), *torch.autograd.grad(out, inputs, cotangent))

    ours = lambda x: block.attention(x, block.attend)
    return Case(
        "d4rt",
        "local attention, 8x16x16 tokens, 768 wide, window 7, with its linear layers",
        "float32",
        {
            "fourdperf": run(ours),
            "eager, compiled": run(plain(ours)),
            "seed style": run(lambda x: block.attention(x, loop)),
        },
        flops=(3 if backward else 1) * 2 * 2048 * 768 * (4 * 768 + 2 * 49),
        direction="forward+backward" if backward else "forward",
    )


@torch.no_grad()
def _embedding(device: str) -> Case:
    builder = QueryBuilder(Config.seed()).to(device)
    frames = torch.rand(1, 16, 256, 256, 3, device=device)
    planar = frames.movedim(-1, 2).contiguous()
    queries = _random_queries(1, 2048, 16, device)

    def loop():
        patches = patches_loop(planar, queries.uv, queries.t_src, 9).movedim(2, -1)
        with mock.patch.object(builder, "patches", lambda *_: patches):
            return builder(queries, frames)

    compiled = plain(builder)
    return Case(
        "d4rt",
        "patches + embedding of 2048 queries, 16x256x256, the seed's network",
        "float32",
        {
            "fourdperf": torch.no_grad()(lambda: builder(queries, frames)),
            "eager, compiled": torch.no_grad()(lambda: compiled(queries, frames)),
            "seed style": torch.no_grad()(loop),
        },
        flops=2 * 2048 * (81 * 27 * 64 + 64 * 81 * 128 + 40 * 128 + 448 * 512),
    )


@torch.no_grad()
def _decoder(device: str, dtype: torch.dtype) -> Case:
    width, tokens, number = 512, 2048, 2048
    decoder = CrossDecoder(width, 6, 8, 2048).to(device, dtype).eval()
    seed = SeedDecoder(decoder)
    features, queries = (torch.randn(1, n, width, device=device, dtype=dtype) for n in (tokens, number))
    memory = decoder.prepare(features)
    compiled = plain(decoder)
    return Case(
        "d4rt",
        "decoder, 2048 queries x 2048 tokens, 6 layers, 512 wide",
        str(dtype).removeprefix("torch."),
        {
            "fourdperf, memory prepared": torch.no_grad()(lambda: decoder(queries, memory)),
            "fourdperf, prepared anew": torch.no_grad()(lambda: decoder(queries, decoder.prepare(features))),
            "SDPA, compiled, prepared": torch.no_grad()(lambda: compiled(queries, memory)),
            "seed style": torch.no_grad()(lambda: seed(queries, features)),
        },
        flops=6 * (2 * number * width * (2 * width + 2 * 2048) + 4 * number * tokens * width),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )


@torch.no_grad()
def _encode(device: str, dtype: torch.dtype) -> Case:
    config = Config.from_variant("S", num_frames=16)
    model = D4RT(config).to(device, dtype).eval()
    video = torch.rand(1, 16, 256, 256, 3, device=device, dtype=dtype)
    ratio = torch.ones(1, device=device, dtype=dtype)
    encoder = torch.no_grad()(lambda video, ratio: model.encoder(video, ratio))
    compiled = plain(encoder)
    tokens, width = 8 * 16 * 16, config.hidden_size
    layer = 2 * tokens * width * (4 * width + 2 * config.mlp_size)
    return Case(
        "d4rt",
        "encode, variant S, 16x256x256",
        str(dtype).removeprefix("torch."),
        {"fourdperf": lambda: encoder(video, ratio), "SDPA, compiled": lambda: compiled(video, ratio)},
        flops=12 * layer + 6 * 4 * tokens * width * (tokens + 256) + 2 * tokens * 2 * 16 * 16 * 3 * width,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )


def _training_step(device: str) -> Case:
    config = Config(**SMALL, rgb_sampling="round")
    model = D4RT(config).to(device)
    seed = copy.deepcopy(model)
    seed_decoder = SeedDecoder(seed.decoder)
    clip = _random_clip(8, 512, config, device)

    def seed_forward(video: Tensor, queries: Queries, ratio: Tensor) -> Prediction:
        patches = patches_loop(video.movedim(-1, 2), queries.uv, queries.t_src, config.rgb_size).movedim(2, -1)
        with mock.patch.object(seed.query_builder, "patches", lambda *_: 2 * patches - 1):
            tokens = seed_decoder(seed.query_builder(queries, video), seed.encoder(video, ratio))
        parts = seed.head(tokens).split(SIZES, -1)
        return Prediction(*(x.squeeze(-1) if size == 1 else x for x, size in zip(parts, SIZES)))

    def step(network: D4RT, forward) -> tuple[Tensor, Tensor]:
        """Forward and backward through all parameters; the loss and one gradient."""
        prediction = forward(clip.video, clip.queries, clip.aspect_ratio)
        loss = d4rt_loss(prediction, clip.targets)["loss"]
        loss.backward()
        gradient = network.head.weight.grad.clone()
        network.zero_grad(set_to_none=True)
        return loss.detach(), gradient

    return Case(
        "d4rt",
        "training step, 8 clips of 8x64x64, 512 queries each, 5.5 M parameters, without the optimiser",
        "float32",
        {
            "fourdperf": functools.partial(step, model, model),
            "SDPA, compiled": functools.partial(step, model, plain(model)),
            "seed style": functools.partial(step, seed, seed_forward),
        },
        tolerance=1e-3,
        direction="forward+backward",
    )


@torch.no_grad()
def _queries(device: str, number: int) -> Case:
    """Peak memory is to stay where it is while the queries become many."""
    config = Config.from_variant("S", num_frames=16)
    model = D4RT(config).to(device).eval()
    encoded = torch.no_grad()(model.encode)(torch.rand(1, 16, 256, 256, 3, device=device))
    queries = _random_queries(1, number, 16, device)
    return Case(
        "d4rt",
        f"decode {number} queries, variant S, 16x256x256",
        "float32",
        {"fourdperf": torch.no_grad()(lambda: model.decode(encoded, queries).xyz)},
    )


def _all_pixels(device: str) -> Case:
    """The occupancy grid saves queries only with a model that knows what moves where: the one in the package."""
    model = D4RT.from_pretrained(SHIPPED_WEIGHTS, device=device)
    frames = Scene(scene_seed("test", 0), model.config.num_frames, model.config.image_size).render().video
    video = EncodedVideo(model, frames)
    t, v, u = torch.meshgrid(*(torch.arange(n) for n in frames.shape[:3]), indexing="ij")
    height, width = frames.shape[1:3]
    every = torch.stack([t, (u + 0.5) / width, (v + 0.5) / height], -1).view(-1, 3)
    return Case(
        "d4rt",
        f"3-D tracks of all {len(every)} pixels of a synthetic clip, the package's model; they differ in their number",
        "float32",
        {
            "fourdperf, occupancy grid": lambda: dense_tracks(video).tracks.xyz,
            "every pixel": lambda: tracks(video, every).xyz,
        },
        tolerance=float("inf"),
    )


def _random_queries(batch: int, number: int, frames: int, device: str) -> Queries:
    times = torch.randint(frames, (3, batch, number), device=device)
    return Queries(torch.rand(batch, number, 2, device=device), *times)


def _random_clip(batch: int, number: int, config: Config, device: str) -> Clip:
    video = torch.rand(batch, config.num_frames, *config.image_size, 3, device=device)
    queries = _random_queries(batch, number, config.num_frames, device)
    known = torch.ones(batch, number, dtype=torch.bool, device=device)
    vector = lambda: torch.randn(batch, number, 3, device=device)
    targets = Targets(
        vector() + torch.tensor([0.0, 0.0, 5.0], device=device),
        torch.rand(batch, number, 2, device=device),
        torch.randint(2, (batch, number), device=device).float(),
        vector(),
        F.normalize(vector(), dim=-1),
        *(known,) * 5,
    )
    return Clip(video, torch.ones(batch, device=device), video, queries, targets)
