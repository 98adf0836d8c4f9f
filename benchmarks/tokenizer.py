"""Tokenizers at real sizes: a picture of 256 x 256 to 64 codes and back with the seed's baseline, and codes from the
generator of TiTok-L-32.

    fourdperf bench tokenizer

Peers: the seed's way (`_seed_tokenizer`; in the same dtype and, for bfloat16, in float32 too), torch.compile of ours.
Every provider gives the latents before the quantizer and the picture of one and the same code, since a rounding can
change which code is the nearest; the quantizer's work is done, too. Floor: FLOPs of matrix products and convolutions as
the seed has them, at the measured matmul rate. Ours makes a tenth less (doubled pixels, pictures one pixel wide).

Generation: 2 pictures of 32 codes in 4 steps, of which the first has no guidance. The plain loop has torch's attention,
and makes two passes with the logits of all places in every step; compiled is each of its blocks. Codes a second: 64 over
the time. In bfloat16 a rounding may change a code, and all that follow: there the logits of one pass are compared, before
anything is timed, and the codes are not.
"""

import copy
import math

import torch
import torch.nn.functional as F
from fourdperf.benchmarks import _seed_tokenizer as seed
from fourdperf.benchmarks.harness import Case, disagreement

from fourdperf.models import token_generator
from fourdperf.models.token_blocks import Block
from fourdperf.models.token_generator import TokenGenerator, guidance_strength, gumbel
from fourdperf.models.tokenizer import Config, Tokenizer

PICTURES, STEPS = 2, 4
BFLOAT16_LOGITS = 0.1  # of the largest


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
    theirs = model
    if images.device.type == "cpu":
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    indices = torch.arange(model.config.num_latents, device=images.device)[None]

    def ours():
        taps = {}
        model.encode(images, taps)
        return taps["latents"], model.decode_indices(indices)

    def seed_style(model, images):
        codes = model.quantizer.lookup(indices).transpose(1, 2).unsqueeze(2)
        z = seed.encode(model, images)[0]
        return z.squeeze(2).transpose(1, 2), seed.decode(model, codes).permute(0, 2, 3, 1)

    providers = {"fourdperf": ours, "seed style": lambda: seed_style(theirs, images)}
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
    compiled = torch.compile(plain_block)
    if dtype != "float32":
        ids = torch.arange(PICTURES * c.num_tokens, device=classes.device).view(PICTURES, -1)
        with torch.inference_mode():
            apart = disagreement(model(ids, classes), plain_logits(model, ids, classes, plain_block))
        if apart > BFLOAT16_LOGITS:
            raise AssertionError(f"{dtype}: logits differ from the plain ones by {apart:.1e}")
    rows = PICTURES + 2 * PICTURES * (STEPS - 1)
    tokens = rows * (1 + c.num_tokens)
    layer = 2 * tokens * c.hidden_size * (4 * c.hidden_size + 2 * c.mlp_size)
    layer += 4 * tokens * (1 + c.num_tokens) * c.hidden_size
    head = 2 * rows * c.num_tokens * c.hidden_size * c.codebook_size
    providers = {
        "fourdperf": lambda: model.generate(classes, steps=STEPS, generator=seeded()),
        "plain loop": lambda: plain_generate(model, classes, seeded(), plain_block),
        "plain loop, compiled": lambda: plain_generate(model, classes, seeded(), compiled),
    }
    return Case(
        *("tokenizer", f"{PICTURES} x {c.num_tokens} codes of TiTok-L-32, {STEPS} steps", dtype),
        {name: torch.inference_mode()(function) for name, function in providers.items()},
        flops=c.num_layers * layer + head,
        tolerance=0.0 if dtype == "float32" else 1.0,
    )


def plain_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """A block of BERT with torch's attention."""
    attention = block.attention
    heads = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    x = block.attention_norm(x + attention.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)))
    return block.mlp_norm(x + block.mlp(x))


def plain_logits(model: TokenGenerator, ids: torch.Tensor, classes: torch.Tensor | None, block) -> torch.Tensor:
    """Logits of all places, fp32."""
    c = model.config
    first = torch.full_like(ids[:, 0], c.no_class_id) if classes is None else classes + c.codebook_size + 1
    x = model.norm(model.tokens[torch.cat([first[:, None], ids], 1)] + model.positions + model.segments[0])
    for part in model.blocks:
        x = block(part, x)
    return model.head(x)[:, 1:].float()


def plain_generate(model: TokenGenerator, classes: torch.Tensor, generator: torch.Generator, block) -> torch.Tensor:
    """`TokenGenerator.generate` with the config's options, a pass with and a pass without class in every step."""
    c, size = model.config, (len(classes), model.config.num_tokens)
    ids = torch.full(size, c.mask_id, device=classes.device)
    for step in range(STEPS):
        done, masked = (step + 1) / STEPS, ids == c.mask_id
        strength, _ = guidance_strength(c.schedule, step / STEPS, c.guidance, c.guidance_power)
        cond, uncond = plain_logits(model, ids, classes, block), plain_logits(model, ids, None, block)
        logits = cond + strength * (cond - uncond)
        if step == STEPS - 1:
            return torch.where(masked, logits.argmax(-1), ids)
        noise = torch.zeros_like(logits)  # of masked places alone, so that all draw the same
        noise[masked] = gumbel(torch.rand(int(masked.sum()), c.codebook_size, generator=generator, device=ids.device))
        jitter = gumbel(torch.rand(size, generator=generator, device=ids.device))
        sampled = (logits + c.temperature * (1 - done) * noise).argmax(-1)
        confidence = logits.gather(-1, sampled[..., None])[..., 0].masked_fill(~masked, torch.inf)
        confidence = confidence + c.temperature * (1 - done) * jitter
        sampled = torch.where(masked, sampled, ids)
        count = math.floor(c.num_tokens * (math.acos(done) / (math.pi / 2)))
        count = max(1, min(int(masked[0].sum()) - 1, count))
        ids = torch.where(confidence <= confidence.sort(1).values[:, count - 1 : count], c.mask_id, sampled)
