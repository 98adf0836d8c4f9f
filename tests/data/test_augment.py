"""Views keep questions and answers about the same points; colours change only what they say."""

import math

import pytest
import torch

from fourdperf.data.augment import PhotometricConfig, View, ViewConfig, photometric, sample_view
from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.geometry import project

STILL = PhotometricConfig(brightness=0, contrast=0, saturation=0, hue=0, drop=0, blur=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_queries(count, frames, seed=0):
    g = generator(seed)
    return Queries(torch.rand(count, 2, generator=g), *torch.randint(frames, (3, count), generator=g))


@pytest.fixture(scope="module")
def scene():
    return Scene(5, num_frames=7, size=(48, 64))


# Views


def test_answers_belong_to_the_view(scene):
    """The view's uv is the projection of the view's xyz by the view's intrinsics, and visibility that of the box."""
    view = sample_view(7, 3, ViewConfig(crop=0.3, zoom=1.0, stride=2), generator(3))
    assert view.frames.diff().unique().tolist() in ([1], [2]) and not torch.equal(view.box[0], view.box[-1])
    queries = random_queries(400, 3)
    asked = view.to_video(queries)
    there = scene.answer(Queries(asked.uv, asked.t_src, asked.t_tgt, asked.t_tgt))
    whole = scene.answer(asked)
    targets = view.to_view(queries, whole, there)
    k = view.intrinsics(scene.intrinsics)
    uv = torch.stack([project(x[None], k[t])[0][0] for x, t in zip(targets.xyz, queries.t_cam)])
    torch.testing.assert_close(targets.uv[targets.has_uv], uv[targets.has_uv], atol=1e-4, rtol=1e-4)
    place = torch.stack([project(x[None], k[t])[0][0] for x, t in zip(there.xyz, queries.t_tgt)])
    inside = ((place >= 0) & (place <= 1)).all(-1)
    assert torch.equal(targets.visibility, whole.visibility * inside)
    assert 0 < targets.visibility.sum() < whole.visibility.sum()
    assert targets.has_visibility.all()
    # asked at its own time a point is where the view was asked for it
    own = Queries(queries.uv, *[queries.t_src] * 3)
    found = view.to_view(own, scene.answer(view.to_video(own)))
    torch.testing.assert_close(found.uv, own.uv, atol=1e-5, rtol=0)
    assert found.visibility.all()


def test_without_the_place_at_t_tgt_its_visibility_is_unknown(scene):
    view = View(torch.arange(7), torch.tensor([0.2, 0.3, 0.5, 0.4]).expand(7, 4))
    queries = random_queries(300, 7)
    targets = view.to_view(queries, scene.answer(view.to_video(queries)))
    same = queries.t_tgt == queries.t_cam
    assert targets.has_visibility[same].all()
    assert (targets.visibility[targets.has_visibility & ~same] == 0).all()
    assert not targets.has_visibility[~same].all()


def test_pixels_follow_the_box():
    """A picture that shows its own coordinates still does so in the view's."""
    v, u = torch.meshgrid((torch.arange(60) + 0.5) / 60, (torch.arange(80) + 0.5) / 80, indexing="ij")
    picture = torch.stack([u, v, torch.zeros_like(u)], -1).repeat(5, 1, 1, 1)
    view = sample_view(5, 4, ViewConfig(crop=0.5, zoom=1.0), generator(1))
    seen = view.video(picture, (20, 30))
    assert seen.shape == (4, 20, 30, 3)
    rows, columns = torch.meshgrid((torch.arange(20) + 0.5) / 20, (torch.arange(30) + 0.5) / 30, indexing="ij")
    for t in range(4):
        left, top, width, height = view.box[t].tolist()
        wanted = torch.stack([left + columns * width, top + rows * height], -1)
        torch.testing.assert_close(seen[t, ..., :2], wanted, atol=2e-3, rtol=0)


def test_shrinking_does_not_alias():
    stripes = (torch.arange(64) % 2).float()[None, None, :, None].expand(1, 64, 64, 3)
    seen = View(torch.zeros(1, dtype=torch.int64), torch.tensor([[0.0, 0.0, 1.0, 1.0]])).video(stripes, (16, 16))
    torch.testing.assert_close(seen, torch.full_like(seen, 0.5), atol=0.07, rtol=0)


def test_the_whole_view_changes_nothing(scene):
    view = sample_view(7, 7, ViewConfig(), generator())
    assert view.whole and view.frames.tolist() == list(range(7))
    queries = random_queries(50, 7)
    targets = scene.answer(queries)
    assert all(torch.equal(a, b) for a, b in zip(view.to_video(queries), queries))
    assert all(torch.equal(a, b) for a, b in zip(view.to_view(queries, targets), targets))
    video = torch.rand(7, 6, 8, 3)
    assert torch.equal(view.video(video, (6, 8)), video)
    assert torch.equal(view.intrinsics(scene.intrinsics), scene.intrinsics)
    assert view.aspect_ratio(1.5) == 1.5


def test_boxes_and_strides_stay_inside():
    areas, shapes, strides, zooms = [], [], set(), 0
    for seed in range(400):
        view = sample_view(30, 8, ViewConfig(crop=0.3, zoom=0.05, stride=4), generator(seed))
        low, high = view.box[:, :2], view.box[:, :2] + view.box[:, 2:]
        assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6
        assert 0 <= view.frames.min() and view.frames.max() < 30
        strides.update(view.frames.diff().unique().tolist())
        if (view.box[0] == view.box[-1]).all():
            areas.append((view.box[0, 2] * view.box[0, 3]).item())
            shapes.append((view.box[0, 2] / view.box[0, 3]).item())
        else:
            zooms += 1
    assert strides == {1, 2, 3, 4} and 8 <= zooms <= 36
    assert min(areas) >= 0.25 and max(areas) > 0.9  # a stretched box is cut at the frame's border
    assert 3 / 4 - 1e-6 <= min(shapes) < 0.8 and 1.25 < max(shapes) <= 4 / 3 + 1e-6


def test_aspect_ratio_of_a_crop():
    view = View(torch.arange(3), torch.tensor([0.0, 0.0, 0.5, 0.25]).expand(3, 4))
    assert view.aspect_ratio(1.5) == pytest.approx(3.0)


def test_video_too_short():
    with pytest.raises(ValueError, match="at least 8 frames, got 7"):
        sample_view(7, 8, ViewConfig(), generator())
    assert sample_view(8, 8, ViewConfig(stride=9), generator()).frames.tolist() == list(range(8))
    assert sample_view(3, 1, ViewConfig(stride=2), generator()).frames.shape == (1,)


# Colours


def test_nothing_asked_nothing_changed():
    video = torch.rand(3, 8, 8, 3)
    torch.testing.assert_close(photometric(video, STILL, generator()), video, atol=2e-6, rtol=0)


def changed(video, seed=0, **options):
    return photometric(video, PhotometricConfig(**vars(STILL) | options), generator(seed))


def test_each_change_is_what_it_says():
    video = 0.3 + 0.4 * torch.rand(3, 16, 16, 3)
    luma = lambda x: x @ torch.tensor([0.299, 0.587, 0.114])
    grey = changed(video, drop=1.0)
    torch.testing.assert_close(grey, luma(video)[..., None].expand(-1, -1, -1, 3), atol=1e-4, rtol=0)
    for seed in range(5):
        brighter = changed(video, seed, brightness=0.2)
        factor = (brighter / video).flatten()
        assert factor.std() < 1e-4 and 0.8 <= factor[0] <= 1.2
        contrast = changed(video, seed, contrast=0.2)
        torch.testing.assert_close(luma(contrast).mean(), luma(video).mean(), atol=1e-3, rtol=0)
        ratio = (luma(contrast).std() / luma(video).std()).item()
        assert 0.8 <= ratio <= 1.2 and abs(ratio - 1) > 1e-3
        turned = changed(video, seed, hue=0.1)
        torch.testing.assert_close(luma(turned), luma(video), atol=2e-3, rtol=0)
        assert (turned - video).abs().max() > 1e-3
        gray = torch.full((1, 4, 4, 3), 0.5)
        torch.testing.assert_close(changed(gray, seed, hue=0.1, saturation=0.5), gray, atol=1e-4, rtol=0)


def test_blur():
    video = torch.zeros(2, 65, 65, 3)
    video[:, 32, 32] = 1
    seen = changed(video, blur=1.0, sigma=2.0)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert seen[0, 32, 32, 0] < 1 and torch.equal(seen, seen.flip(1)) and torch.allclose(seen, seen.transpose(1, 2))
    tiny = changed(torch.rand(1, 2, 3, 3), blur=1.0, sigma=9.0)
    assert tiny.isfinite().all()


def test_frames_of_a_clip_change_alike_and_stay_in_range():
    frame = torch.rand(1, 12, 12, 3)
    drops = blurs = 0
    for seed in range(200):
        seen = photometric(frame.expand(4, -1, -1, -1), PhotometricConfig(), generator(seed))
        assert all(torch.equal(seen[0], other) for other in seen[1:])
        assert 0 <= seen.min() and seen.max() <= 1
        drops += (seen.amax(-1) - seen.amin(-1)).max().item() < 1e-3
        draw = torch.rand(7, generator=generator(seed))
        blurs += draw[5].item() < 0.4
    assert 22 <= drops <= 62 and 60 <= blurs <= 100
    assert math.isclose(PhotometricConfig().drop, 0.2)
