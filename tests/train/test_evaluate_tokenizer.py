"""The evaluation of tokenizers on one that is known: each token is the grey level of one patch."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import avg_pool2d

from fourdperf.metrics.features import RandomConvNet
from fourdperf.metrics.images import psnr, ssim
from fourdperf.models.perceptual import PyramidL1
from fourdperf.models.tokenizer import Encoded
from fourdperf.train.evaluate_tokenizer import influence, measure
from fourdperf.train.tokenizer_views import (
    clusters_picture,
    influence_picture,
    patches_picture,
    reconstructions_picture,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS, PATCH, SIDE = 16, 4, 16


class GreyPatches:
    """16 levels of grey of patches of 4 x 4, the level as the patch's code."""

    config = SimpleNamespace(image_size=(SIDE, SIDE), patch_size=PATCH, codebook_size=LEVELS)
    encoder = SimpleNamespace(positions=torch.zeros(1))

    def encode(self, images):
        means = avg_pool2d(images.mean(-1)[:, None], PATCH).flatten(1)
        return Encoded(means[..., None], (means * (LEVELS - 1)).round().long(), {})

    def decode_indices(self, indices):
        grid = indices.view(-1, 1, SIDE // PATCH, SIDE // PATCH, 1) / (LEVELS - 1)
        image = grid[:, 0].repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        return image.expand(-1, -1, -1, 3)


@pytest.fixture(scope="module")
def items():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(SIDE, SIDE, 3, generator=generator) * (i + 1) / 7, 0) for i in range(7)]


def features():
    net = RandomConvNet()
    return SimpleNamespace(measure="distance", size=net.size, of=net)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_measures_are_those_of_all_pictures_whatever_the_batch(items, batch_size):
    model = GreyPatches()
    found = measure(model, items, features(), PyramidL1(), batch_size=batch_size)
    images = torch.stack([x for x, _ in items])
    indices = model.encode(images).indices
    again = (model.decode_indices(indices) * 255).round() / 255
    assert found.measures["images"] == 7
    assert found.measures["PSNR"] == pytest.approx(psnr(again, images).mean().item(), rel=1e-6)
    assert found.measures["SSIM"] == pytest.approx(ssim(again, images).mean().item(), rel=1e-6)
    assert found.measures[PyramidL1.name] == pytest.approx(PyramidL1()(again, images).mean().item(), rel=1e-5)
    assert found.measures["usage"] == len(indices.unique()) / LEVELS
    assert found.measures["usage by place"] == [len(column.unique()) / LEVELS for column in indices.T]
    assert torch.equal(found.codes, indices) and found.by_place.sum() == indices.numel()
    assert found.measures["distance"] > 0
    assert torch.equal(found.shown[0], images) and torch.allclose(found.shown[1], again)


def test_count_limits_the_pictures(items):
    found = measure(GreyPatches(), items, features(), PyramidL1(), count=4)
    assert found.measures["images"] == 4 and len(found.codes) == 4
    with pytest.raises(ValueError, match="wanted at least two pictures, got 1"):
        measure(GreyPatches(), items, features(), PyramidL1(), count=1)


def test_perfect_reconstructions_are_at_distance_zero(items):
    flat = [(torch.full((SIDE, SIDE, 3), level / (LEVELS - 1)), 0) for level in range(0, LEVELS, 5)]
    flat = [((x * 255).round() / 255, 0) for x, _ in flat]
    found = measure(GreyPatches(), flat, features(), PyramidL1()).measures
    assert found["distance"] < 1e-9 and found["SSIM"] == pytest.approx(1)
    assert found["perplexity"] == pytest.approx(4) and found["usage"] == 4 / LEVELS


def test_a_token_of_one_patch_has_its_influence_there_alone(items):
    images = torch.stack([x for x, _ in items])
    changes = influence(GreyPatches(), images, batch_size=2)
    codes = GreyPatches().encode(images).indices
    want = (codes - codes.roll(1, 0)).abs().float().mean(0) / (LEVELS - 1)
    assert torch.allclose(changes.flatten(1), torch.diag(want), atol=1e-6) and (want > 0).all()


def test_pictures(items):
    pytest.importorskip("sklearn")
    images = torch.stack([x for x, _ in items])
    codes = GreyPatches().encode(images).indices
    changes = influence(GreyPatches(), images)
    assert influence_picture(changes).shape == (2 * 150 + 4, 8 * 128 + 7 * 4, 3)
    assert reconstructions_picture(images, images).shape == (2 * 128 + 24, 7 * 128 + 6 * 12, 3)
    histogram = torch.bincount(codes.flatten(), minlength=LEVELS)
    patches = patches_picture(items, codes, histogram, changes)
    blocks = -(-min(16, len(codes.unique())) // 2)  # two rows of patches side by side
    assert patches.shape[0] == blocks * 86 + (blocks - 1) * 16
    assert clusters_picture(items, codes, LEVELS).shape[0] >= 534
