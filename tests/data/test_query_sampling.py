"""Which queries are drawn: the seed's boundaries, and the shares and bounds that make a draw what it says."""

import pytest
import torch

from fourdperf.data.query_sampling import boundaries, sample_queries, sample_times, sobel
from tests.models.d4rt_cases import Case


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_boundaries_of_the_seed():
    case = Case("a_boundaries")
    depth, flow = case.inputs["depth"][None], case.inputs["flow"][None]
    assert torch.equal(boundaries(depth)[0].float(), case.outputs["boundary_depth"])
    assert torch.equal(boundaries(depth, flow)[0].float(), case.outputs["boundary_depth_flow"])
    constant = boundaries(torch.full_like(depth, 3.7))
    assert torch.equal(constant[0].float(), case.outputs["boundary_constant_depth"]) and not constant.any()


def test_seed_samples_on_our_boundaries():
    """30 % of the seed's image-based queries lie on boundary pixels of the middle frame: by our map, too."""
    case = Case("a_sampling")
    depth, uv = case.inputs["depth"], case.outputs["image/coords_uv"]
    on_edge = int(case.config["num_queries"] * case.config["boundary_ratio"])
    column, row = (uv[:on_edge] * torch.tensor([case.config["W"], case.config["H"]])).round().long().unbind(-1)
    assert boundaries(depth)[len(depth) // 2][row, column].all()


def test_frames_are_judged_one_by_one():
    depth = torch.rand(4, 12, 16, generator=generator()) * torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None]
    together = boundaries(depth)
    for t in range(4):
        assert torch.equal(together[t], boundaries(depth[t : t + 1])[0])
        assert together[t].float().mean() == pytest.approx(0.2, abs=0.01)


def test_flow_of_all_frames_but_the_last():
    depth = torch.ones(3, 10, 10)
    flow = torch.zeros(2, 10, 10, 2)
    flow[0, :, 5:, 0] = 0.1
    found = boundaries(depth, flow)
    assert found[0, :, 4:6].all() and found[0].sum() == 20 and not found[1:].any()


def test_depth_that_is_not_finite():
    depth = torch.ones(2, 16, 16)
    depth[0, 7:] = 2.0
    depth[0, 0, 0] = torch.inf
    depth[1] = torch.nan
    found = boundaries(depth)
    assert found[0].any() and not found[1].any()


def test_sobel_of_a_ramp():
    v, u = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    gradient = sobel(3 * u + 4 * v)
    torch.testing.assert_close(gradient[1:-1, 1:-1], torch.full((4, 5), 40.0))  # 8 * hypot(3, 4)
    torch.testing.assert_close(gradient[1:-1, 0], torch.full((4,), 32.0))  # mirrored: no slope across the border


def test_shares():
    boundary = torch.zeros(6, 20, 30, dtype=torch.bool)
    boundary[torch.arange(6), torch.arange(6), torch.arange(6) + 3] = True
    queries = sample_queries(20_000, boundary, generator())
    pixel = (queries.uv * torch.tensor([30, 20])).long()
    on = boundary[queries.t_src, pixel[:, 1], pixel[:, 0]]
    assert on[:6000].all() and on[6000:].float().mean() < 0.01
    assert queries.uv.min() >= 0 and queries.uv.max() <= 1
    same = (queries.t_tgt == queries.t_cam).float().mean().item()
    assert same == pytest.approx(0.4 + 0.6 / 6, abs=0.015)
    for times in queries[1:]:
        assert times.dtype == torch.int64
        share = torch.bincount(times, minlength=6) / 20_000
        torch.testing.assert_close(share, torch.full((6,), 1 / 6), atol=0.015, rtol=0)
    assert queries.t_src[:6000].unique().tolist() == list(range(6))  # boundaries of every frame, not of one


def test_pixel_centres():
    queries = sample_queries(500, torch.ones(2, 4, 8, dtype=torch.bool), generator(), subpixel=False)
    assert torch.equal((queries.uv * torch.tensor([8, 4])) % 1, torch.full((500, 2), 0.5))


def test_frames_without_boundary():
    boundary = torch.zeros(3, 8, 8, dtype=torch.bool)
    boundary[1, 2, 5] = True
    queries = sample_queries(4000, boundary, generator())
    pixel = (queries.uv * 8).long()
    edge, here = torch.arange(4000) < 1200, queries.t_src == 1
    assert (pixel[edge & here] == torch.tensor([5, 2])).all()
    elsewhere = pixel[edge & ~here]
    assert elsewhere.float().mean() == pytest.approx(3.5, abs=0.2)
    nothing = sample_queries(100, torch.zeros(3, 8, 8, dtype=torch.bool), generator())
    assert len(nothing.uv.unique(dim=0)) == 100


def test_extremes_and_repetition():
    boundary = torch.rand(3, 8, 8, generator=generator()) < 0.2
    pixels = boundary.float()
    for share in (0.0, 1.0):
        queries = sample_queries(300, boundary, generator(1), boundary_share=share, same_time_share=share)
        pixel = (queries.uv * 8).long()
        on = pixels[queries.t_src, pixel[:, 1], pixel[:, 0]].mean().item()
        assert on == 1 if share else on == pytest.approx(pixels.mean().item(), abs=0.1)
        assert (queries.t_tgt == queries.t_cam).all() == bool(share)
    one, again = (sample_queries(50, boundary, generator(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not torch.equal(one.uv, sample_queries(50, boundary, generator(5)).uv)
    assert all(len(times) == 0 for times in sample_times(0, 3, generator()))
