"""JPEG and WebP within a budget of bytes."""

import cv2
import numpy as np
import pytest

from fourdperf.data.scenes import Scene
from fourdperf.metrics.codecs import CODECS, best_within, payload


@pytest.fixture(scope="module")
def image():
    return (Scene(seed=3, num_frames=1, size=(64, 96)).render().video[0] * 255).round().byte().numpy()


@pytest.mark.parametrize("codec", CODECS)
def test_more_bytes_are_better_and_none_go_over(image, codec):
    found = [best_within(image, budget, codec) for budget in (40, 160, 640, 2560)]
    assert all(0 < x.bytes <= budget for x, budget in zip(found, (40, 160, 640, 2560)))
    scores = [x.psnr for x in found]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 6
    for x in found:
        error = np.square(x.image.astype(float) - image).mean() / 255**2
        assert x.image.shape == image.shape and x.psnr == pytest.approx(-10 * np.log10(error))


@pytest.mark.parametrize("codec", CODECS)
def test_at_full_size_it_is_the_best_quality_that_fits(image, codec):
    """Of a budget so large that making the picture smaller cannot help."""
    suffix, flag = {"JPEG": (".jpg", cv2.IMWRITE_JPEG_QUALITY), "WebP": (".webp", cv2.IMWRITE_WEBP_QUALITY)}[codec]
    files = [cv2.imencode(suffix, image[..., ::-1], [flag, quality])[1].tobytes() for quality in range(1, 101)]
    budget = payload(files[89], codec)
    fitting = [
        cv2.imdecode(np.frombuffer(file, np.uint8), 1)[..., ::-1] for file in files if payload(file, codec) <= budget
    ]
    best = min(np.square(x.astype(float) - image).mean() for x in fitting)
    assert best_within(image, budget, codec).psnr == pytest.approx(-10 * np.log10(best / 255**2), abs=0.02)


def test_nothing_fits_in_no_bytes(image):
    assert best_within(image, 1, "WebP") is None


def test_only_what_depends_on_the_picture_counts(image):
    content = cv2.imencode(".jpg", image)[1].tobytes()
    grey = cv2.imencode(".jpg", np.full_like(image, 128))[1].tobytes()
    assert payload(content, "JPEG") - payload(grey, "JPEG") == len(content) - len(grey)
    assert len(content) - payload(content, "JPEG") > 500
    content = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 50])[1].tobytes()
    assert len(content) - 22 <= payload(content, "WebP") + 1 and content[12:16] == b"VP8 "
