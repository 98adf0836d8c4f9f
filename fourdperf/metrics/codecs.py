"""What JPEG and WebP make of so few bytes as tokens take: the best picture within a budget.

Only the bytes that depend on the picture count: of JPEG its entropy-coded scan, of WebP the VP8 chunk. Tables, headers
and quality could be agreed on beforehand, like a tokenizer's weights. For small budgets the picture is made smaller
first, by the factor and at the quality that give the best PSNR of all that fit.
"""

from typing import Literal, NamedTuple

import cv2
import numpy as np

__all__ = ["CODECS", "Coded", "best_within"]

Codec = Literal["JPEG", "WebP"]
CODECS: tuple[Codec, ...] = ("JPEG", "WebP")
FACTORS = (1, 4 / 3, 2, 8 / 3, 4, 16 / 3, 8, 32 / 3, 16, 32, 64)
START_OF_SCAN = b"\xff\xda"


class Coded(NamedTuple):
    """image: uint8 (H, W, 3), as decoded. bytes: that depend on it. psnr: in dB."""

    image: np.ndarray
    bytes: int
    psnr: float


def best_within(image: np.ndarray, budget: int, codec: Codec) -> Coded | None:
    """The best of an image uint8 (H, W, 3), RGB, in at most `budget` bytes; None where nothing fits."""
    best = None
    for factor in FACTORS:
        size = [max(1, round(n / factor)) for n in image.shape[:2]]
        small = image if factor == 1 else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        low, high = 1, 100
        while low <= high:
            quality = (low + high) // 2
            found = _code(small, quality, codec, image)
            if found.bytes > budget:
                high = quality - 1
                continue
            low = quality + 1
            if best is None or found.psnr > best.psnr:
                best = found
    return best


def _code(small: np.ndarray, quality: int, codec: Codec, image: np.ndarray) -> Coded:
    flag = cv2.IMWRITE_JPEG_QUALITY if codec == "JPEG" else cv2.IMWRITE_WEBP_QUALITY
    suffix = ".jpg" if codec == "JPEG" else ".webp"
    content = cv2.imencode(suffix, cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [flag, quality])[1]
    decoded = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    if decoded.shape != image.shape:
        decoded = cv2.resize(decoded, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    error = np.square(decoded.astype(np.float64) - image).mean() / 255**2
    return Coded(decoded, payload(content.tobytes(), codec), float(-10 * np.log10(max(error, 1e-10))))


def payload(content: bytes, codec: Codec) -> int:
    """How many bytes of a file depend on its picture."""
    if codec == "WebP":
        return int.from_bytes(content[16:20], "little")  # RIFF, size, WEBP, "VP8 ", size of the chunk
    scan = content.index(START_OF_SCAN)
    header = 2 + int.from_bytes(content[scan + 2 : scan + 4], "big")
    return len(content) - scan - header - 2  # the end-of-image marker
