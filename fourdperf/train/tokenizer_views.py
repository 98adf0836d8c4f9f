"""Pictures of what a tokenizer does: reconstructions, how codes are used, which come together, what tokens are about.

Images are uint8 (H, W, 3), RGB.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.chart import line_chart
from fourdperf.data.pictures import enlarge, label, side_by_side, stack, to_pixels
from fourdperf.metrics.codes import co_occurrence, code_clusters, perplexity, usage
from fourdperf.metrics.images import psnr

__all__ = ["evaluation_pictures", "panel"]

PANEL, MATRIX, COLUMNS = 128, 512, 8
CLUSTERS, EXAMPLES = 8, 8
CODES, PATCHES, CELL = 16, 12, 64


def panel(pixels: np.ndarray) -> np.ndarray:
    """An image, small ones enlarged by a whole number to at least PANEL pixels."""
    factor = -(-PANEL // pixels.shape[0])
    return enlarge(pixels, factor * pixels.shape[0], factor * pixels.shape[1])


def evaluation_pictures(
    items: Dataset, shown: tuple[Tensor, Tensor], codes: Tensor | None, by_place: Tensor | None, changes: Tensor | None
) -> dict[str, np.ndarray]:
    """All pictures by name, of what `fourdperf.train.evaluate_tokenizer` gives; without codes, those of a VAE."""
    found = {"reconstructions": reconstructions_picture(*shown)}
    if changes is not None:
        found["influence"] = influence_picture(changes)
    if codes is None:
        return found
    found |= {"histogram": histogram_picture(by_place.sum(0)), "places": places_picture(by_place)}
    found["clusters"] = clusters_picture(items, codes, by_place.shape[1])
    if changes is not None:
        found["patches"] = patches_picture(items, codes, by_place.sum(0), changes)
    return found


def reconstructions_picture(images: Tensor, again: Tensor) -> np.ndarray:
    """Pictures above what became of them, with the PSNR."""
    scores = psnr(images, again)
    columns = [
        stack([panel(to_pixels(image)), label(panel(to_pixels(other)), f"{score:.1f} dB")], gap=2)
        for image, other, score in zip(images, again, scores.tolist())
    ]
    return _wrap(columns, COLUMNS, gap=12)


def histogram_picture(histogram: Tensor) -> np.ndarray:
    """Shares of codes, most frequent first, beside even ones."""
    share = 100 * histogram.double().sort(descending=True).values / histogram.sum()
    ranks, size = list(range(1, len(share) + 1)), len(share)
    title = f"{100 * usage(histogram).item():.1f} % of {size} codes used, perplexity {perplexity(histogram).item():.1f}"
    curves = {"codes": (ranks, share.tolist()), "if even": (ranks, [100 / size] * size)}
    return line_chart(curves, title=title, x_label="code, by how often it is used", y_label="% of tokens")


def places_picture(by_place: Tensor) -> np.ndarray:
    """Codes used at each place of the sequence, and their perplexity."""
    places = list(range(len(by_place)))
    curves = {
        "codes used": (places, (by_place > 0).sum(1).tolist()),
        "perplexity": (places, perplexity(by_place).tolist()),
    }
    return line_chart(curves, title="how each token is used", x_label="place in the sequence", y_label="codes")


def clusters_picture(items: Dataset, codes: Tensor, size: int) -> np.ndarray:
    """Correlations of codes by cluster, blue -1 to red 1, and pictures that have most of a cluster's codes."""
    found, correlation = co_occurrence(codes, size)
    labels = code_clusters(correlation, CLUSTERS)
    order = labels.argsort(stable=True)
    matrix = enlarge(_signed(correlation[order][:, order].numpy()), MATRIX, MATRIX)
    rows = []
    for cluster in range(int(labels.max()) + 1):
        mine = found[labels == cluster]
        share = torch.isin(codes, mine).double().mean(1)
        best = share.argsort(descending=True, stable=True)[:EXAMPLES].tolist()
        pictures = [enlarge(to_pixels(items[index][0]), CELL, CELL) for index in best]
        rows.append(label(side_by_side(pictures, gap=2), f"cluster {cluster}: {len(mine)} codes"))
    return side_by_side([label(matrix, f"the {len(found)} codes that most pictures have, by cluster"), stack(rows)], 16)


def influence_picture(changes: Tensor) -> np.ndarray:
    """Of each token, where pictures change when it is replaced, black to yellow, each on a scale of its own; its
    largest change, of 255."""
    panels = []
    for place, change in enumerate(changes.numpy()):
        heat = np.rint(255 * change / max(change.max(), 1e-12)).astype(np.uint8)
        colours = cv2.cvtColor(cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
        height = max(1, round(PANEL * change.shape[0] / change.shape[1]))
        panels.append(label(enlarge(colours, height, PANEL), f"token {place}: {255 * change.max():.1f}"))
    return _wrap(panels, COLUMNS)


def patches_picture(items: Dataset, codes: Tensor, histogram: Tensor, changes: Tensor) -> np.ndarray:
    """Rows of patches where a frequent code is used: in pictures that have it, the places that its token is about."""
    rows = []
    for code in histogram.argsort(descending=True, stable=True)[:CODES].tolist():
        there = codes == code
        pictures = there.any(1).nonzero()[:, 0]
        if len(pictures):
            pictures = pictures[torch.linspace(0, len(pictures) - 1, min(PATCHES, len(pictures))).round().long()]
            places = there[pictures].int().argmax(1).tolist()
            patches = [_patch(items[index][0], changes[place]) for index, place in zip(pictures.tolist(), places)]
            rows.append(label(side_by_side(patches, gap=2), f"code {code}: {int(histogram[code])} uses"))
    return _wrap(rows, 2, gap=16)


def _patch(image: Tensor, change: Tensor) -> np.ndarray:
    """The patch that changes most, and half a patch around it."""
    height, width = image.shape[0] // change.shape[0], image.shape[1] // change.shape[1]
    row, column = divmod(int(change.argmax()), change.shape[1])
    top = min(max(0, row * height - height // 2), max(0, image.shape[0] - 2 * height))
    left = min(max(0, column * width - width // 2), max(0, image.shape[1] - 2 * width))
    return enlarge(to_pixels(image[top : top + 2 * height, left : left + 2 * width]), CELL, CELL)


def _signed(values: np.ndarray) -> np.ndarray:
    """Blue for -1, white for 0, red for 1."""
    strength = np.clip(np.abs(values), 0, 1)[..., None]
    colour = np.where(values[..., None] > 0, (178.0, 24.0, 43.0), (33.0, 102.0, 172.0))
    return np.rint(255 + strength * (colour - 255)).astype(np.uint8)


def _wrap(panels: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    return stack([side_by_side(panels[i : i + columns], gap) for i in range(0, len(panels), columns)], gap)
