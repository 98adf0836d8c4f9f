"""PSNR and SSIM against torchmetrics'; how codes are counted."""

import math

import pytest
import torch

from fourdperf.metrics.codes import co_occurrence, code_clusters, perplexity, position_histogram, usage
from fourdperf.metrics.images import psnr, ssim
from tests.models.goldens import GOLDENS, Golden


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 24, 31, 3, generator=generator)
    a = torch.nn.functional.avg_pool2d(a.movedim(-1, 1), 5, 1, 2).movedim(1, -1)
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def test_ssim_and_psnr_are_those_of_torchmetrics(pictures):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    first = [x.movedim(-1, 1).double() for x in pictures]
    options = {"sigma": 1.5, "data_range": 1.0, "reduction": "none", "return_full_image": True}
    # torchmetrics averages over places near the border as well, where it reflects the picture
    inside = metrics.structural_similarity_index_measure(*first, **options)[1][..., 5:-5, 5:-5]
    assert torch.allclose(ssim(*pictures), inside.mean((1, 2, 3)), rtol=1e-12)
    want = metrics.peak_signal_noise_ratio(*first, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(*pictures), want, rtol=1e-6)  # its log(10) is a float32


def test_ssim_is_its_definition(pictures):
    """At one place, window by window, in float64."""
    a, b = (x[:1, 3:14, 5:16, :1].double() for x in pictures)
    places = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    window = (window / window.sum())[None, ..., None]
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    variance_a, variance_b = ((window * (x - m) ** 2).sum() for x, m in ((a, mean_a), (b, mean_b)))
    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
    want = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    want /= (mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)
    assert ssim(a, b).item() == pytest.approx(want.item(), rel=1e-10)


def test_equal_pictures(pictures):
    a = pictures[0]
    assert torch.allclose(ssim(a, a), torch.ones(3, dtype=torch.float64), rtol=1e-12)
    assert (psnr(a, a) == math.inf).all()


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 12, 12, 3\), \(2, 12, 12, 3\)"):
        psnr(torch.rand(1, 12, 12, 3), torch.rand(2, 12, 12, 3))
    with pytest.raises(ValueError, match=r"at least 11 x 11, got \(10, 12\)"):
        ssim(torch.rand(1, 10, 12, 3), torch.rand(1, 10, 12, 3))


# Codes


def test_usage_and_perplexity_are_the_golden_s():
    golden = Golden(GOLDENS / "tokenizer" / "c_codebook_usage.npz")
    by_place = position_histogram(golden.inputs["indices"], golden.spec["codebook_size"])
    histogram = by_place.sum(0)
    assert torch.equal(histogram, golden.outputs["histogram"]) and by_place.shape == (16, 64)
    assert 100 * usage(histogram).item() == golden.spec["usage_percent"]
    assert perplexity(histogram).item() == pytest.approx(golden.spec["perplexity_not_upstream"], rel=1e-12)


def test_places_are_counted_each():
    codes = torch.tensor([[0, 3], [0, 2], [1, 3]])
    by_place = position_histogram(codes, 4)
    assert by_place.tolist() == [[2, 1, 0, 0], [0, 0, 1, 2]]
    assert usage(by_place).tolist() == [0.5, 0.5]
    assert perplexity(torch.tensor([[3, 3, 3], [5, 0, 0]])).tolist() == pytest.approx([3, 1])


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="codes: expected 0 .. 3, got 0 .. 4"):
        position_histogram(torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match="codes: expected integers"):
        position_histogram(torch.rand(2, 3), 4)


def test_codes_that_come_together_are_one_cluster():
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randint(3, (60,), generator=generator)
    # of each kind of picture, three codes of its own in any order, and code 9 in all of them
    own = torch.stack([torch.randperm(3, generator=generator) for _ in kinds]) + 3 * kinds[:, None]
    codes = torch.cat([own, torch.full((60, 1), 9)], 1)
    found, correlation = co_occurrence(codes, 12)
    assert sorted(found.tolist()) == list(range(10)) and found[0] == 9
    labels = dict(zip(found.tolist(), code_clusters(correlation, 4).tolist()))
    groups = [{labels[code] for code in range(3 * kind, 3 * kind + 3)} for kind in range(3)] + [{labels[9]}]
    assert [len(group) for group in groups] == [1] * 4 and len(set.union(*groups)) == 4


def test_the_most_frequent_codes_alone_are_compared():
    codes = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 3, 3]])
    found, correlation = co_occurrence(codes, 5, most=2)
    assert found.tolist() == [0, 1] and correlation.shape == (2, 2)
    assert code_clusters(correlation, 4).tolist() == [0, 1]
