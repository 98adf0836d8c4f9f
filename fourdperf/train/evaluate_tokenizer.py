"""How good a tokenizer of images is: pictures against what it makes of them again, and how its codebook is used.

`measure` goes through a data set once, batch by batch, and shares it among the processes of torch.distributed;
`influence` asks which patches a token is about.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from fourdperf.metrics.codes import perplexity, position_histogram, usage
from fourdperf.metrics.features import Features
from fourdperf.metrics.frechet import Moments, frechet_distance
from fourdperf.metrics.images import psnr, ssim
from fourdperf.models.titok import TiTok
from fourdperf.models.tokenizer import Tokenizer
from fourdperf.models.tokenizers import decode, encode
from fourdperf.train.processes import gather, place

__all__ = ["Measured", "influence", "measure"]

SHOWN = 16


class Measured(NamedTuple):
    """measures: names to numbers, or to lists of a number per place; fit for JSON.
    shown: the first pictures and what became of them, each (S, H, W, 3).
    codes: of all pictures `(M, N)`, and by_place, their histograms `(N, K)`; None of a VAE.
    """

    measures: dict[str, float | int | list[float]]
    shown: tuple[Tensor, Tensor]
    codes: Tensor | None
    by_place: Tensor | None


class Found(NamedTuple):
    """What a process has found in its part of the pictures: moments of features, sums of measures, batches."""

    real: Moments
    made: Moments
    sums: Counter[str]
    shown: list[tuple[Tensor, Tensor]]
    codes: list[Tensor]


@torch.inference_mode()
def measure(
    model: Tokenizer | TiTok,
    items: Dataset,
    features: Features,
    perceptual: Callable[[Tensor, Tensor], Tensor],
    *,
    count: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
) -> Measured:
    """The measures of a tokenizer on pictures `(H, W, 3)` with labels, of which `count` at most are taken.

    Under torch.distributed each process goes through a part of the pictures, and all get the measures of the whole.
    Reconstructions are rounded to 8 bits, as they would be stored. rFID (or what `features.measure` says): Frechet
    distance of the pictures' and the reconstructions' features. PSNR in dB, SSIM, and what `perceptual.name` says:
    means over pictures. Of codes, usage: the share of the codebook that occurs at all; perplexity: of all places
    together; both also by place. Of a VAE, KL: nats a picture.

    Raises ValueError for fewer than two pictures.
    """
    items = items if count is None else Subset(items, range(min(count, len(items))))
    if len(items) < 2:
        raise ValueError(f"items: wanted at least two pictures, got {len(items)}")
    device, (rank, ranks) = model.encoder.positions.device, place()
    mine = Subset(items, range(len(items) * rank // ranks, len(items) * (rank + 1) // ranks))
    found = Found(Moments(features.size), Moments(features.size), Counter(), [], [])
    with tqdm(total=len(mine), desc="reconstructing", unit="image", disable=rank > 0 or None) as bar:
        for images, _ in DataLoader(mine, batch_size, num_workers=workers):
            images = images.to(device)
            encoded = model.encode(images)
            again = decode(model, encoded.latents if encoded.indices is None else encoded.indices)
            again = (again * 255).round() / 255
            found.real.update(features.of(images))
            found.made.update(features.of(again))
            values = {
                "PSNR": psnr(again, images),
                "SSIM": ssim(again, images),
                perceptual.name: perceptual(again, images),
            }
            if encoded.indices is None:
                values["KL"] = encoded.losses["kl"].sum(1)
            else:
                found.codes.append(encoded.indices.cpu())
            found.sums.update({name: x.double().sum().item() for name, x in values.items()})
            if len(found.shown) * batch_size < SHOWN:
                found.shown.append((images.cpu(), again.cpu()))
            bar.update(len(images))
    real, made, sums, shown, codes = _together(gather(found))
    measures = {"images": len(items), features.measure: frechet_distance(real, made)}
    measures |= {name: total / len(items) for name, total in sums.items()}
    pictures = tuple(torch.cat(part)[:SHOWN] for part in zip(*shown))
    if not codes:
        return Measured(measures, pictures, None, None)
    codes = torch.cat(codes)
    by_place = position_histogram(codes, model.config.codebook_size)
    histogram = by_place.sum(0)
    measures |= {"usage": usage(histogram).item(), "perplexity": perplexity(histogram).item()}
    measures |= {"usage by place": usage(by_place).tolist(), "perplexity by place": perplexity(by_place).tolist()}
    return Measured(measures, pictures, codes, by_place)


def _together(parts: list[Found]) -> Found:
    """Of all processes, in their order."""
    whole = parts[0]
    for part in parts[1:]:
        whole.real.merge(part.real)
        whole.made.merge(part.made)
        whole.sums.update(part.sums)
        whole.shown.extend(part.shown)
        whole.codes.extend(part.codes)
    return whole


@torch.inference_mode()
def influence(model: Tokenizer | TiTok, images: Tensor, batch_size: int = 16) -> Tensor:
    """How much each patch changes when a token is replaced by the next picture's token of the same place.

    images `(B, H, W, 3)`, B >= 2 -> mean absolute differences `(N, h, w)` over pictures and colours, h and w of the
    encoder's patches.
    """
    codes = encode(model, images)
    other, before = codes.roll(1, 0), torch.cat([decode(model, part) for part in codes.split(batch_size)])
    found = []
    for token in tqdm(range(codes.shape[1]), desc="replacing tokens", unit="token", disable=None):
        changed = codes.clone()
        changed[:, token] = other[:, token]
        after = torch.cat([decode(model, part) for part in changed.split(batch_size)])
        found.append(F.avg_pool2d((after - before).abs().mean((0, 3))[None], model.config.patch_size)[0])
    return torch.stack(found).cpu()
