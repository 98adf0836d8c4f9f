"""Tokenizers at real sizes: a picture of 256 x 256 to 64 codes and back with the seed's baseline, and codes from the
generator of TiTok-L-32.

    fourdperf bench tokenizer

Peers: the seed's way (`_seed_tokenizer`; in the same dtype and, for bfloat16, in float32 too), torch.compile of ours.
Every provider gives the latents before the quantizer and the picture of one and the same code, since a rounding can
change which code is the nearest; the quantizer's work is done, too. Floor: FLOPs of matrix products and convolutions as
the seed has them, at the measured matmul rate. Ours makes a tenth less (doubled pixels, pictures one pixel wide).

Generation: 8 pictures of 32 codes in 8 steps, of which the first has no guidance. The plain loop makes two passes in
every step, one after the other. Codes a second: 256 over the time.
"""

import copy
import math

import torch
from fourdperf.benchmarks import _seed_tokenizer as seed
from fourdperf.benchmarks.harness import Case

from fourdperf.models import token_generator
from fourdperf.models.token_generator import TokenGenerator, guidance_strength, gumbel
from fourdperf.models.tokenizer import Config, Tokenizer

PICTURES, STEPS = 8, 8


def cases(device: str):
    torch.manual_seed(0)
    model = Tokenizer(Config.upstream(pretrained=False)).eval().requires_grad_(False).to(device)
    images = torch.rand(1, 256, 256, 3, device=device)
    for dtype in ("float32", "bfloat16"):
        yield _round_trip(model, images, dtype)
    generator = TokenGenerator(token_generator.Config.from_variant("l32")).eval().requires_grad_(False).to(device)
    for dtype in ("float32", "bfloat16"):
        yield _generation(generator, dtype)


def _round_trip(model: Tokenizer, images: torch.Tensor, dtype: str) -> Case:
    plain, plain_images = model, images
    model, images = (copy.deepcopy(x).to(getattr(torch, dtype)) for x in (model, images))
    indices = torch.arange(model.config.num_latents, device=images.device)[None]

    def ours():
        taps = {}
        model.encode(images, taps)
        return taps["latents"], model.decode_indices(indices)

    def seed_style(model, images):
        codes = model.quantizer.lookup(indices).transpose(1, 2).unsqueeze(2)
        z = seed.encode(model, images)[0]
        return z.squeeze(2).transpose(1, 2), seed.decode(model, codes).permute(0, 2, 3, 1)

    providers = {"fourdperf": ours, "seed style": lambda: seed_style(model, images)}
    if dtype != "float32":
        providers["seed style, float32"] = lambda: seed_style(plain, plain_images)
    providers["fourdperf, compiled"] = _compiled(ours)
    return Case(
        *("tokenizer", "encode + decode 256x256, 64 codes", dtype),
        {name: torch.inference_mode()(function) for name, function in providers.items()},
        flops=flops(model),
        tolerance=1e-4 if dtype == "float32" else 0.1,
    )


def _compiled(function):
    compiled = torch.compile(function)
    return lambda: tuple(x.clone() for x in compiled())


def flops(model: Tokenizer) -> int:
    """Of the linear layers, convolutions and attentions of one picture there and back, counted by hooks."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, torch.nn.Conv2d):
            total += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            total += 2 * output.numel() * module.in_features
        elif hasattr(module, "qkv"):
            tokens = inputs[0].shape[1] if inputs[0].ndim == 3 else inputs[0][0, 0].numel()
            total += 4 * tokens**2 * module.qkv.out_features // 3

    handles = [part.register_forward_hook(count) for part in model.modules()]
    size = model.config.image_size
    with torch.inference_mode():
        model(torch.rand(1, *size, 3, dtype=model.quantizer.codebook.dtype, device=model.quantizer.codebook.device))
    for handle in handles:
        handle.remove()
    return total


def _generation(model: TokenGenerator, dtype: str) -> Case:
    model, c = copy.deepcopy(model).to(getattr(torch, dtype)), model.config
    classes = torch.arange(PICTURES, device=model.tokens.device)
    seeded = lambda: torch.Generator(classes.device).manual_seed(0)
    passes = 2 * STEPS - 1
    tokens = PICTURES * (1 + c.num_tokens)
    layer = 2 * tokens * c.hidden_size * (4 * c.hidden_size + 2 * c.mlp_size)
    layer += 4 * tokens * (1 + c.num_tokens) * c.hidden_size
    head = 2 * PICTURES * c.num_tokens * c.hidden_size * c.codebook_size
    providers = {"fourdperf": lambda: model.generate(classes, steps=STEPS, generator=seeded())}
    if dtype == "float32":  # with random weights a rounding of bfloat16 changes codes, and nothing could be compared
        providers["plain loop"] = lambda: plain_generate(model, classes, seeded())
    return Case(
        *("tokenizer", f"{PICTURES} x {c.num_tokens} codes of TiTok-L-32, {STEPS} steps", dtype),
        {name: torch.inference_mode()(function) for name, function in providers.items()},
        flops=passes * (c.num_layers * layer + head),
        tolerance=0.0,
    )


def plain_generate(model: TokenGenerator, classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`TokenGenerator.generate` with the config's options, a pass with and a pass without class in every step."""
    c, size = model.config, (len(classes), model.config.num_tokens)
    ids = torch.full(size, c.mask_id, device=classes.device)
    for step in range(STEPS):
        done, masked = (step + 1) / STEPS, ids == c.mask_id
        strength, _ = guidance_strength(c.schedule, step / STEPS, c.guidance, c.guidance_power)
        cond, uncond = model(ids, classes).float(), model(ids).float()
        logits = cond + strength * (cond - uncond)
        noise = gumbel(torch.rand(*size, c.codebook_size, generator=generator, device=ids.device))
        jitter = gumbel(torch.rand(size, generator=generator, device=ids.device))
        sampled = (logits + c.temperature * (1 - done) * noise).argmax(-1)
        confidence = logits.gather(-1, sampled[..., None])[..., 0].masked_fill(~masked, torch.inf)
        confidence = confidence + c.temperature * (1 - done) * jitter
        sampled = torch.where(masked, sampled, ids)
        if step == STEPS - 1:
            return sampled
        count = math.floor(c.num_tokens * (math.acos(done) / (math.pi / 2)))
        count = max(1, min(int(masked[0].sum()) - 1, count))
        ids = torch.where(confidence <= confidence.sort(1).values[:, count - 1 : count], c.mask_id, sampled)
