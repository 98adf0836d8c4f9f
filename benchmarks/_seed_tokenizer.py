"""How the seed's repository computes its tokenizer, written anew from its description, on our weights: attention by two
products with all heads' weights kept, distances of all latents to all codes and a one-hot product, everything channels
first, swish as a product, every upsampling written out. Same numbers as ours; not a fast baseline, and labelled "seed
style" wherever it is shown."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.convolutions import PixelAttention, ResBlock
from fourdperf.models.tokenizer import Decoder, Tokenizer


def encode(model: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents before the quantizer `(B, C, 1, N)`, codes `(B, C, 1, N)`, indices `(B N,)`."""
    encoder = model.encoder
    x = encoder.patch_embed((2 * images - 1).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    batch = len(x)
    latents = encoder.latent_tokens.expand(batch, -1, -1)
    class_token = encoder.class_token.expand(batch, 1, -1)
    if encoder.class_position:
        x = torch.cat([class_token, x, latents], 1) + encoder.positions
    else:
        x = torch.cat([class_token, torch.cat([x, latents], 1) + encoder.positions], 1)
    for block in encoder.blocks:
        x = x + _attention(block.attention, block.attention_norm(x))
        x = x + block.mlp(block.mlp_norm(x))
    x = encoder.norm(x)[:, -encoder.num_latents :]
    if encoder.latent_layout == "upstream":
        x = x.reshape(batch, -1, encoder.num_latents).transpose(1, 2)
    z = F.normalize(encoder.out(x), dim=-1).transpose(1, 2).unsqueeze(2)
    return z, *_quantize(z, model.quantizer.codebook)


def _attention(attention: nn.Module, x: Tensor) -> Tensor:
    heads = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    query, key, value = heads
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return attention.out((weights @ value).transpose(1, 2).flatten(2))


def _quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    codebook = F.normalize(codebook, dim=-1)
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    distances = rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
    indices = distances.argmin(1)
    one_hot = torch.zeros(len(rows), len(codebook), dtype=z.dtype, device=z.device)
    found = (one_hot.scatter_(1, indices[:, None], 1) @ codebook).view(len(z), 1, -1, z.shape[1]).permute(0, 3, 1, 2)
    return z + (found - z), indices


def decode(model: Tokenizer, latents: Tensor) -> Tensor:
    """Pictures `(B, 3, H, W)` of `latents` `(B, C, 1, N)`."""
    decoder: Decoder = model.decoder
    tokens = decoder.tokens
    x = tokens.embed(latents.squeeze(2).transpose(1, 2))
    first = [tokens.class_token.expand(len(x), 1, -1), tokens.mask_token.expand(len(x), tokens.patches, -1)]
    x = torch.cat([*first, x], 1) + tokens.positions
    x = _convolved(decoder.stem, x.transpose(1, 2).unsqueeze(-1))
    for part in decoder.mid:
        x = _part(part, x)
    x = x[:, :, 1 : 1 + tokens.patches, 0].reshape(len(x), -1, *decoder.grid)
    for level in decoder.levels:
        for index, block in enumerate(level.blocks):
            x = _part(block, x)
            if level.attention is not None:
                x = _part(level.attention[index], x)
        if level.upsample is not None:
            x = _convolved(level.upsample, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return (_convolved(decoder.out, _swish(decoder.norm(x))) + 1) / 2


def _part(part: ResBlock | PixelAttention, x: Tensor) -> Tensor:
    if isinstance(part, ResBlock):
        out = _convolved(part.conv_in, _swish(part.norm_in(x)))
        out = _convolved(part.conv_out, _swish(part.norm_out(out)))
        return (x if part.skip is None else part.skip(x)) + out
    tokens = part.norm(x)
    weights = part.qkv.weight[..., None, None].chunk(3)
    query, key, value = (F.conv2d(tokens, w, b).flatten(2) for w, b in zip(weights, part.qkv.bias.chunk(3)))
    scores = torch.bmm(query.transpose(1, 2), key) * x.shape[1] ** -0.5
    out = torch.bmm(value, scores.softmax(2).transpose(1, 2)).view_as(x)
    return x + F.conv2d(out, part.out.weight[..., None, None], part.out.bias)


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """As nn.Conv2d does it."""
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
