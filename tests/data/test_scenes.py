"""Synthetic scenes: everything that a scene says about itself fits together, by other routes where there are any."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene, shapes
from fourdperf.data.scenes.layout import REACH, Layout
from fourdperf.data.scenes.textures import LEVELS, TEXELS, Atlas, load_photographs, random_texture

T = 6
SEEDS = range(8)


def _uv_grid(height, width):
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x / width, y / height], -1).view(-1, 2)


def _random_queries(seed, n=2000, frames=T):
    generator = torch.Generator().manual_seed(seed)
    return Queries(torch.rand(n, 2, generator=generator), *torch.randint(frames, (3, n), generator=generator).unbind(0))


def _to_world(scene, frame, xyz):
    pose = scene.world_from_camera[frame]
    return (pose[:, :3, :3] @ xyz[..., None])[..., 0] + pose[:, :3, 3]


def _to_camera(scene, frame, world):
    pose = scene.world_from_camera[frame]
    return (pose[:, :3, :3].mT @ (world - pose[:, :3, 3])[..., None])[..., 0]


def _project(scene, frame, xyz):
    projected = (scene.intrinsics[frame] @ xyz[..., None])[..., 0]
    return projected[:, :2] / projected[:, 2:]


def _flat(depth, size=5, ratio=0.98):
    """Pixels (T, H, W) around which depth is smooth: no edge within size // 2 pixels."""
    high = F.max_pool2d(depth[:, None], size, 1, size // 2)[:, 0]
    low = -F.max_pool2d(-depth[:, None], size, 1, size // 2)[:, 0]
    return low > ratio * high


@pytest.fixture(scope="module")
def clips():
    scenes = [Scene(seed, num_frames=T, size=(64, 64)) for seed in SEEDS]
    return [(scene, scene.render()) for scene in scenes]


def test_rendering_has_the_promised_shapes_and_ranges(clips):
    for scene, clip in clips:
        assert clip.video.shape == (T, 64, 64, 3) and clip.video.dtype == torch.float32
        assert clip.depth.shape == (T, 64, 64) and clip.depth.dtype == torch.float32
        assert clip.normal.shape == (T, 64, 64, 3) and clip.normal.dtype == torch.float32
        assert clip.instance.shape == (T, 64, 64) and clip.instance.dtype == torch.int64
        assert clip.flow.shape == (T - 1, 64, 64, 2) and clip.flow.dtype == torch.float32
        assert scene.intrinsics.shape == (T, 3, 3) and scene.world_from_camera.shape == (T, 4, 4)
        assert clip.video.min() >= 0 and clip.video.max() <= 1
        assert 0.3 < clip.depth.min() and clip.depth.max() < 14
        assert clip.instance.min() >= 0 and clip.instance.max() <= scene.num_objects
        assert torch.allclose(clip.normal.norm(dim=-1), torch.ones(()), atol=1e-5)
        assert all(value.isfinite().all() for value in clip)


def test_scenes_show_objects_and_have_texture(clips):
    shown = [(clip.instance > 0).float().mean() for _, clip in clips]
    assert min(shown) > 0.01 and 0.1 < np.mean(shown) < 0.7
    assert all(clip.video.std() > 0.08 for _, clip in clips)


def test_cameras_are_rigid_move_and_zoom(clips):
    zooms = []
    for scene, _ in clips:
        rotation = scene.world_from_camera[:, :3, :3]
        assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(T, 3, 3), atol=1e-5)
        assert torch.allclose(torch.linalg.det(rotation), torch.ones(T), atol=1e-5)
        assert (scene.world_from_camera[-1, :3, 3] - scene.world_from_camera[0, :3, 3]).norm() > 0.05
        assert torch.equal(scene.intrinsics[:, :2, 2], torch.full((T, 2), 0.5))
        zooms.append(scene.intrinsics[:, 0, 0])
    assert torch.stack(zooms)[:, 0].unique().numel() == len(clips)
    assert max((zoom.max() / zoom.min()).item() for zoom in zooms) > 1.02


def test_a_point_asked_about_itself_is_where_the_frame_shows_it(clips):
    for scene, clip in clips:
        for t in (0, T - 1):
            uv = _uv_grid(64, 64)
            frame = torch.full((len(uv),), t)
            answer = scene.answer(Queries(uv, frame, frame, frame))
            assert (answer.uv - uv).abs().max() < 1e-5
            assert torch.equal(answer.displacement, torch.zeros(len(uv), 3))
            # Rays along a silhouette may go either way in float32 and float64.
            depth, normal = clip.depth[t].flatten(), clip.normal[t].view(-1, 3)
            same = (answer.xyz[:, 2] - depth).abs() < 1e-4 * depth
            assert same.float().mean() > 0.999
            assert ((answer.normal - normal).abs().amax(1) < 1e-3)[same].float().mean() > 0.999
            assert answer.visibility.mean() > 0.999
            assert answer.has_uv.all() and answer.has_xyz.all()


def test_answers_project_to_their_uv(clips):
    for scene, _ in clips:
        queries = _random_queries(1)
        answer = scene.answer(queries)
        uv = _project(scene, queries.t_cam, answer.xyz)
        known = answer.has_uv
        assert torch.allclose(answer.uv[known], uv[known], rtol=1e-5, atol=1e-5)
        assert (answer.xyz[~known, 2] <= 0.1).all()
        assert known.float().mean() > 0.9


def test_another_camera_is_a_rigid_transform(clips):
    for scene, _ in clips:
        queries = _random_queries(2)
        answer = scene.answer(queries)
        other = scene.answer(queries._replace(t_cam=(queries.t_cam + 1) % T))
        moved = _to_camera(scene, (queries.t_cam + 1) % T, _to_world(scene, queries.t_cam, answer.xyz))
        assert torch.allclose(moved, other.xyz, atol=2e-5)
        assert torch.equal(answer.visibility, other.visibility)
        for a, b in ((answer.displacement, other.displacement), (answer.normal, other.normal)):
            first, second = scene.world_from_camera[queries.t_cam], scene.world_from_camera[(queries.t_cam + 1) % T]
            turned = (second[:, :3, :3].mT @ first[:, :3, :3] @ a[..., None])[..., 0]
            assert torch.allclose(turned, b, atol=2e-5)


def test_displacement_is_the_motion_of_the_surface_alone(clips):
    moving = 0
    for scene, clip in clips:
        queries = _random_queries(3)
        answer = scene.answer(queries)
        before = scene.answer(queries._replace(t_tgt=queries.t_src))
        assert torch.allclose(answer.xyz - before.xyz, answer.displacement, atol=2e-5)
        x, y = (queries.uv * 64).long().unbind(1)
        room = clip.instance[queries.t_src, y, x] == 0
        inner = _flat(clip.depth, 3)[queries.t_src, y, x]
        assert torch.equal(answer.displacement[room & inner], torch.zeros(int((room & inner).sum()), 3))
        moving += (answer.displacement[~room].norm(dim=1) > 0.02).sum()
    assert moving > 500


def test_there_and_back_again(clips):
    """A visible answer, asked about in turn, leads back to the query: matches are exact, also on what deforms."""
    returned = 0
    for scene, _ in clips:
        queries = _random_queries(4)
        there = scene.answer(queries._replace(t_cam=queries.t_tgt))
        seen = there.visibility > 0
        back = scene.answer(Queries(there.uv[seen], queries.t_tgt[seen], queries.t_src[seen], queries.t_src[seen]))
        error = (back.uv - queries.uv[seen]).abs().amax(1)
        # A point up to a thousandth behind an occluder counts as visible, but a ray at it meets the occluder; and at
        # grazing incidence the rounding of uv moves the point.
        assert (error < 1e-3).float().mean() > 0.995
        assert error.median() < 1e-6
        assert torch.allclose(
            back.displacement[error < 1e-5], _turned_back(scene, queries, there, seen, error), atol=1e-3
        )
        returned += seen.sum()
    assert returned > 5000


def _turned_back(scene, queries, there, seen, error):
    """The displacements of `there`, in the cameras of t_src and reversed."""
    source, target = (scene.world_from_camera[t[seen], :3, :3] for t in (queries.t_src, queries.t_tgt))
    return -(source.mT @ target @ there.displacement[seen][..., None])[..., 0][error < 1e-5]


def test_flow_is_the_answer_of_the_next_frame(clips):
    for scene, clip in clips:
        uv = _uv_grid(64, 64)
        frame = torch.full((len(uv),), 2)
        answer = scene.answer(Queries(uv, frame, frame + 1, frame + 1))
        difference = (answer.uv - uv - clip.flow[2].view(-1, 2)).abs().amax(1)
        assert (difference < 1e-4).float().mean() > 0.999


def test_flow_carries_the_picture_to_the_next_frame(clips):
    """Photo-consistency: visible points look the same two frames later, but for the light on what turns."""
    still, warped = [], []
    for seed in SEEDS:
        scene = Scene(seed, num_frames=T, size=(128, 128))
        clip = scene.render()
        uv = _uv_grid(128, 128)
        frame = torch.full((len(uv),), 1)
        answer = scene.answer(Queries(uv, frame, frame + 2, frame + 2))
        smooth = F.grid_sample(
            _flat(clip.depth)[3][None, None].float(), 2 * answer.uv[None, None] - 1, align_corners=False
        )[0, 0, 0]
        use = (answer.visibility > 0) & (smooth > 0.99) & _flat(clip.depth)[1].flatten()
        moved = F.grid_sample(
            clip.video[3].movedim(2, 0)[None], 2 * answer.uv[None, None] - 1, padding_mode="border", align_corners=False
        )[0, :, 0].T
        warped.append((moved - clip.video[1].view(-1, 3))[use].abs().mean())
        still.append((clip.video[3] - clip.video[1]).view(-1, 3)[use].abs().mean())
    assert np.mean(warped) < 0.02
    assert np.mean(warped) < 0.2 * np.mean(still)


def test_normals_are_those_of_the_depth(clips):
    for seed in SEEDS:
        scene = Scene(seed, num_frames=2, size=(256, 256))
        clip = scene.render()
        uv = _uv_grid(256, 256).view(256, 256, 2)
        focal = scene.intrinsics[0].diagonal()[:2]
        points = torch.cat([(uv - 0.5) / focal * clip.depth[0, ..., None], clip.depth[0, ..., None]], -1).double()
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        normal = F.normalize(torch.linalg.cross(down, across), dim=-1)
        cosine = (normal * clip.normal[0, 1:-1, 1:-1]).sum(-1)
        around = clip.normal[0].movedim(2, 0)[None]
        bend = (F.max_pool2d(around, 3, 1) + F.max_pool2d(-around, 3, 1))[0].amax(0)  # how much the normal changes
        smooth = _flat(clip.depth, 3, 0.9)[0, 1:-1, 1:-1] & (bend < 0.1)
        assert smooth.float().mean() > 0.8
        assert cosine[smooth].min() > 0.98
        assert cosine[smooth].mean() > 0.9999


def test_normals_face_the_camera_that_asks(clips):
    for scene, _ in clips:
        queries = _random_queries(5)
        queries = queries._replace(t_tgt=queries.t_src, t_cam=queries.t_src)
        answer = scene.answer(queries)
        assert ((answer.normal * answer.xyz).sum(1) < 1e-6).all()
        assert torch.allclose(answer.normal.norm(dim=1), torch.ones(()), atol=1e-5)


def test_visibility_agrees_with_the_depth_map():
    """Visible points are at the depth that the frame shows there, hidden ones behind it."""
    hidden_seen = 0
    for seed in SEEDS:
        scene = Scene(seed, num_frames=T, size=(128, 128))
        depth = scene.render().depth
        queries = _random_queries(6, 4000)
        queries = queries._replace(t_cam=queries.t_tgt)
        answer = scene.answer(queries)
        inside = answer.has_uv & (answer.uv > 0).all(1) & (answer.uv < 1).all(1)
        assert not (answer.visibility.bool() & ~inside).any()
        x, y = (answer.uv.nan_to_num().clamp(0, 0.9999) * 128).long().unbind(1)
        farthest = F.max_pool2d(depth[:, None], 3, 1, 1)[queries.t_tgt, 0, y, x]
        nearest = -F.max_pool2d(-depth[:, None], 3, 1, 1)[queries.t_tgt, 0, y, x]
        z, visible = answer.xyz[:, 2], answer.visibility > 0
        shown = (z < 1.005 * farthest) & (z > 0.995 * nearest)
        # What is thinner than a pixel is in no depth map.
        assert shown[inside & visible].float().mean() > 0.998
        hidden = (z > nearest) | ((answer.normal * answer.xyz).sum(1) > 0)  # behind something, or a sheet's other side
        assert hidden[inside & ~visible].float().mean() > 0.995
        hidden_seen += (inside & ~visible).sum()
    assert hidden_seen > 1000


def test_the_same_seed_is_the_same_scene_whatever_came_before(clips):
    again = Scene(3, num_frames=T, size=(64, 64))
    Scene(4).render()
    again.answer(_random_queries(7))
    for first, second in zip(clips[3][1], again.render()):
        assert torch.equal(first, second)
    for first, second in zip(clips[3][0].answer(_random_queries(8)), again.answer(_random_queries(8))):
        assert torch.equal(first, second)
    assert not torch.equal(clips[3][1].video, clips[4][1].video)


def test_a_longer_clip_begins_like_a_shorter_one(clips):
    longer = Scene(2, num_frames=T + 3, size=(64, 64)).render()
    for first, second in zip(clips[2][1], longer):
        assert torch.allclose(first.float(), second[: len(first)].float(), atol=1e-5)


def test_time_step_is_the_time_between_frames(clips):
    faster = Scene(2, num_frames=3, size=(64, 64), time_step=0.25).render()
    assert torch.allclose(faster.depth, clips[2][1].depth[::2], atol=1e-4)
    frozen = Scene(2, num_frames=3, size=(64, 64), time_step=0)
    assert torch.equal(frozen.render().depth[0], frozen.render().depth[2])
    assert frozen.render().flow.abs().max() < 1e-5


@pytest.mark.parametrize("size", [(48, 80), (90, 40), (33, 17), (1, 1), (1, 9)])
def test_other_sizes_show_the_same_scene(size):
    scene = Scene(5, num_frames=3, size=size)
    clip = scene.render()
    assert clip.video.shape == (3, *size, 3) and clip.flow.shape == (2, *size, 2)
    assert scene.aspect_ratio == size[1] / size[0]
    assert torch.allclose(scene.intrinsics[:, 0, 0] * size[1], scene.intrinsics[:, 1, 1] * size[0])  # square pixels
    uv = _uv_grid(*size)
    frame = torch.ones(len(uv), dtype=torch.int64)
    answer = scene.answer(Queries(uv, frame, frame, frame))
    assert (answer.uv - uv).abs().max() < 1e-5
    different = (answer.xyz[:, 2] - clip.depth[1].flatten()).abs() > 1e-3
    assert different.float().mean() < 0.001


def test_a_squeezed_frame_shows_what_the_wide_one_does():
    wide = Scene(6, num_frames=2, size=(48, 96))
    squeezed = Scene(6, num_frames=2, size=(48, 48), aspect_ratio=2)
    assert squeezed.aspect_ratio == 2
    assert torch.allclose(wide.intrinsics, squeezed.intrinsics)
    queries = _random_queries(9, frames=2)
    for first, second in zip(wide.answer(queries), squeezed.answer(queries)):
        assert torch.equal(first, second)
    halved = F.avg_pool2d(wide.render().depth[:, None], (1, 2))[:, 0]
    assert (halved - squeezed.render().depth).abs().median() < 0.02


def test_large_renderings_and_many_queries_come_in_parts(monkeypatch, clips):
    from fourdperf.data.scenes import scene as module

    monkeypatch.setattr(module, "RAYS", 64 * 64)
    monkeypatch.setattr(module, "QUERIES", 300)
    scene, clip = clips[1]
    for first, second in zip(clip, scene.render()):
        assert first.shape == second.shape
        assert ((first - second).abs() < 1e-4).float().mean() > 0.9999
    queries = _random_queries(10)
    many = scene.answer(queries)
    monkeypatch.undo()
    for first, second in zip(many, scene.answer(queries)):
        assert torch.allclose(first.float(), second.float(), atol=1e-6)


def test_queries_may_have_leading_axes_and_may_be_none(clips):
    scene, _ = clips[0]
    queries = _random_queries(11, 24)
    flat = scene.answer(queries)
    shaped = scene.answer(Queries(*(value.unflatten(0, (2, 3, 4)) for value in queries)))
    for first, second in zip(flat, shaped):
        assert second.shape[:3] == (2, 3, 4) and torch.equal(first, second.flatten(0, 2))
    none = scene.answer(Queries(*(value[:0] for value in queries)))
    assert none.xyz.shape == (0, 3) and none.visibility.shape == (0,) and none.has_uv.dtype == torch.bool


def test_one_frame_has_no_flow():
    clip = Scene(0, num_frames=1, size=(16, 16)).render()
    assert clip.flow.shape == (0, 16, 16, 2) and clip.video.shape == (1, 16, 16, 3)


def test_places_outside_the_frame_are_answered_and_not_visible(clips):
    scene, _ = clips[0]
    zero = torch.zeros(3, dtype=torch.int64)
    uv = torch.tensor([[-0.2, 0.5], [1.3, 0.5], [0.5, 1.1]])
    answer = scene.answer(Queries(uv, zero, zero, zero))
    assert torch.allclose(answer.uv, uv, atol=1e-5)
    assert torch.equal(answer.visibility, torch.zeros(3))


@pytest.mark.parametrize("seed", range(200, 260))
def test_cameras_keep_clear_of_walls_and_objects_for_ever(seed):
    layout = Layout.random(seed)
    times = np.linspace(0, 200, 4001)
    pose, focal = layout.cameras(times)
    position = pose[:, :3, 3]
    assert (np.abs(position) < layout.bodies[0].size - 0.39).all()
    radius = np.hypot(position[:, 0], position[:, 2])
    assert (radius > REACH + 0.39).all()
    assert (focal > 0.6).all() and (focal < 1.7).all()
    corners = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1)
    for body in layout.bodies[1:]:
        maps = body.world_from_body(times)
        # Spheres reach less far than the corners of their boxes, so take points of each shape.
        unit = {"sphere": _sphere_points(), "cylinder": _cylinder_points()}.get(body.kind, corners)
        if body.kind == "sheet":
            unit = unit * [[1], [1], [body.wave_at(times)[:, 0].max()]]
        points = maps[:, :3, :3] @ unit + maps[:, :3, 3:]
        assert np.hypot(points[:, 0], points[:, 2]).max() < REACH + 1e-9
        assert np.abs(points[:, 1]).max() < layout.bodies[0].size[1] + 1e-9


def _sphere_points():
    points = np.random.default_rng(0).normal(size=(3, 200))
    return points / np.linalg.norm(points, axis=0)


def _cylinder_points():
    angle = np.linspace(0, 2 * np.pi, 64)
    return np.concatenate([[np.cos(angle), np.sin(angle), np.full(64, side)] for side in (-1, 1)], axis=1)


def test_layouts_cover_shapes_stillness_breathing_and_counts():
    layouts = [Layout.random(seed) for seed in range(200)]
    bodies = [body for layout in layouts for body in layout.bodies[1:]]
    assert {len(layout.bodies) - 1 for layout in layouts} == {2, 3, 4, 5, 6}
    assert {body.kind for body in bodies} == {"box", "sphere", "cylinder", "sheet"}
    times = np.linspace(0, 1, 5)
    moving = [np.ptp(body.world_from_body(times), axis=0).max() > 0.05 for body in bodies]
    assert 0.05 < 1 - np.mean(moving) < 0.4
    breathing = [np.ptp(body.stretch(times), axis=0).max() > 0.01 for body in bodies]
    assert 0.1 < np.mean(breathing) < 0.5


# ---- shapes


def _rays(generator, n=4000):
    """Rays from a ball of radius 3 towards the neighbourhood of the middle, float64: origins (n, 3, 1), directions."""
    origin = 3 * F.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64), dim=1)
    aim = torch.rand(n, 3, generator=generator, dtype=torch.float64) * 2.4 - 1.2
    return origin[..., None], (aim - origin)[..., None]


def _inside(kind, place, wave):
    """Negative inside of a solid, zero on its surface, in the shape's coordinates (..., 3)."""
    if kind == "box":
        return place.abs().amax(-1) - 1
    if kind == "sphere":
        return place.norm(dim=-1) - 1
    return torch.maximum(place[..., :2].norm(dim=-1), place[..., 2].abs()) - 1


@pytest.mark.parametrize("kind", ["box", "sphere", "cylinder"])
def test_solids_are_hit_where_marching_along_the_ray_enters_them(kind):
    origin, direction = _rays(torch.Generator().manual_seed(0))
    s = shapes.hit(kind, origin, direction, None)[:, 0]
    marks = torch.linspace(0, 2, 2001, dtype=torch.float64)
    inside = _inside(kind, (origin + direction * marks).mT, None) < 0
    marched = marks[inside.to(torch.uint8).argmax(1)]
    found = inside.any(1)
    assert 0.3 < found.double().mean() < 0.95
    assert torch.all((s - marched)[found] <= 1e-12) and torch.all((marched - s)[found] < 1.1e-3)
    # A ray that marching sees nothing of may touch a corner between two marks.
    assert s[~found].isfinite().double().mean() < 0.02
    hits = s.isfinite()
    place = (origin + direction * s[:, None, None])[hits, :, 0]
    assert _inside(kind, place, None).abs().max() < 1e-12


def test_sheets_are_hit_at_the_first_of_their_crossings():
    generator = torch.Generator().manual_seed(1)
    origin, direction = _rays(generator, 3000)
    a = torch.rand(3000, generator=generator, dtype=torch.float64) * 0.35 + 0.02
    w = torch.rand(3000, generator=generator, dtype=torch.float64) * shapes.MAX_WAVE_NUMBER
    p = torch.rand(3000, generator=generator, dtype=torch.float64) * 100 - 50
    wave = torch.stack([a, w, p], 1)
    s = shapes.hit("sheet", origin, direction, wave)[:, 0]
    marks = torch.linspace(0, 2.5, 5001, dtype=torch.float64)
    place = (origin + direction * marks).mT
    above = place[..., 2] > a[:, None] * torch.sin(w[:, None] * place[..., 0] + p[:, None])
    within = (place[..., :2].abs() < 1).all(-1)
    crossing = (above[:, 1:] != above[:, :-1]) & within[:, 1:] & within[:, :-1]
    found = crossing.any(1)
    marched = marks[crossing.to(torch.uint8).argmax(1)]
    assert 0.3 < found.double().mean() < 0.95
    assert (s - marched)[found].min() > -6e-3 and (s - marched)[
        found
    ].max() < 1e-3  # before: between two marks, grazing
    assert ((s - marched)[found].abs() < 6e-4).double().mean() > 0.995
    hits = s.isfinite()
    assert hits[~found].double().mean() < 0.02
    x, y, z = (origin + direction * s[:, None, None])[hits, :, 0].unbind(1)
    assert (z - a[hits] * torch.sin(w[hits] * x + p[hits])).abs().max() < 1e-7
    assert max(x.abs().max(), y.abs().max()) < 1 + 1e-9


@pytest.mark.parametrize("kind", shapes.KINDS)
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rays_along_an_axis_are_no_special_case(kind, axis, dtype):
    origin, direction = torch.zeros(1, 3, 1, dtype=dtype), torch.zeros(1, 3, 2, dtype=dtype)
    origin[0, axis] = 0 if kind == "room" else -3
    origin[0, (axis + 1) % 3] = 0.25
    direction[0, axis, 0], direction[0, axis, 1] = 1, -1
    wave = torch.tensor([[0.2, 2.0, 0.3]], dtype=dtype)
    s = shapes.hit(kind, origin, direction, wave)
    assert not s.isnan().any()
    if kind == "room":
        assert torch.allclose(s, torch.ones(1, 2, dtype=dtype))
    else:
        assert s[0, 1] == math.inf
        assert kind == "sheet" or s[0, 0].isfinite()


# ---- textures


def test_photographs_of_a_folder_become_textures(tmp_path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 2] = 200  # BGR
    cv2.imwrite(str(tmp_path / "a.png"), red)
    cv2.imwrite(str(tmp_path / "b.jpg"), np.full((700, 900, 3), 90, np.uint8))
    (tmp_path / "notes.txt").write_text("not a picture")
    first, second = load_photographs(str(tmp_path))
    assert first.shape == (40, 60, 3) and np.allclose(first[0, 0], [200 / 255, 0, 0])
    assert min(second.shape[:2]) == 512
    with_pictures = Scene(0, num_frames=2, size=(32, 32), photographs=tmp_path)
    without = Scene(0, num_frames=2, size=(32, 32))
    assert torch.equal(with_pictures.render().depth, without.render().depth)
    assert not torch.equal(with_pictures.render().video, without.render().video)


def test_geometry_does_not_depend_on_scikit_learn(monkeypatch):
    pytest.importorskip("sklearn")
    with_it = Scene(1, num_frames=2, size=(32, 32)).render()
    monkeypatch.setattr("fourdperf.data.scenes.textures.find_spec", lambda name: None)
    load_photographs.cache_clear()
    try:
        without = Scene(1, num_frames=2, size=(32, 32)).render()
    finally:
        load_photographs.cache_clear()
    assert torch.equal(with_it.depth, without.depth) and not torch.equal(with_it.video, without.video)


@pytest.mark.parametrize(
    "content, message", [({}, "no picture"), ({"a.png": b"junk"}, "cannot read"), ({"a.jpg": b""}, "cannot read")]
)
def test_bad_folders_of_photographs(tmp_path, content, message):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        Scene(0, photographs=tmp_path)


def test_a_missing_folder_and_a_tiny_picture(tmp_path):
    with pytest.raises(ValueError, match="photographs must be a folder"):
        Scene(0, photographs=tmp_path / "none")
    cv2.imwrite(str(tmp_path / "tiny.png"), np.zeros((4, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="at least 16 x 16"):
        Scene(0, photographs=tmp_path)


def test_textures_are_in_range_and_have_contrast():
    pictures = load_photographs(None)
    textures = [random_texture(np.random.default_rng(seed), pictures) for seed in range(60)]
    for texture in textures:
        assert texture.shape == (TEXELS, TEXELS, 3) and texture.dtype == np.float32
        assert texture.min() >= 0 and texture.max() <= 1
    assert np.median([texture.std() for texture in textures]) > 0.1


def test_the_atlas_keeps_textures_apart_mirrors_and_blurs():
    textures = torch.rand(3, TEXELS, TEXELS, 3)
    atlas = Atlas(textures)
    texture = torch.randint(3, (500,))
    x, y = torch.randint(TEXELS, (2, 500))
    place = torch.stack([x + 0.5, y + 0.5], 1) / TEXELS
    sharp = atlas.read(texture, place, torch.full((500,), 0.5))
    assert torch.allclose(sharp, textures[texture, y, x], atol=2e-3)  # float32 places in a tall map
    for mirrored in (-place, 2 - place, place + 2, torch.stack([place[:, 0], -place[:, 1]], 1)):
        assert torch.allclose(atlas.read(texture, mirrored, torch.full((500,), 0.5)), sharp, atol=2e-3)
    for level in range(LEVELS):
        blurred = F.avg_pool2d(textures.movedim(3, 1), 2**level).movedim(1, 3)
        side = TEXELS >> level
        x, y = torch.randint(side, (2, 500))
        place = torch.stack([x + 0.5, y + 0.5], 1) / side
        read = atlas.read(texture, place, torch.full((500,), 2.0**level))
        assert torch.allclose(read, blurred[texture, y, x], atol=2e-3)
    plain = Atlas(torch.arange(3.0).view(3, 1, 1, 1).expand(3, TEXELS, TEXELS, 3))
    places = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    for texels in (0.1, 3.3, 100.0):
        assert torch.equal(plain.read(torch.arange(3), places, torch.full((3,), texels))[:, 0], torch.arange(3.0))


# ---- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"size": (0, 4)}, "size must be a height and a width"),
        ({"size": (4,)}, "size must be a height and a width"),
        ({"aspect_ratio": 0}, "aspect_ratio must be positive, got 0"),
        ({"aspect_ratio": math.nan}, "aspect_ratio must be positive, got nan"),
        ({"time_step": -1}, "time_step must not be negative"),
        ({"time_step": math.inf}, "time_step must not be negative"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scene(**{"seed": 0, **arguments})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t_src": torch.tensor([0, T])}, rf"t_src must be in \[0, {T}\), got 0 to {T}"),
        ({"t_tgt": torch.tensor([-1, 0])}, r"t_tgt must be in .* got -1 to 0"),
        ({"t_cam": torch.tensor([0.0, 1.0])}, "t_cam must be of an integer dtype"),
        ({"t_cam": torch.tensor([0])}, r"t_cam must have shape \(2,\), got \(1,\)"),
        ({"uv": torch.tensor([[0.5, math.nan], [0.5, 0.5]])}, "uv must be finite"),
        ({"uv": torch.tensor([[0, 1], [1, 0]])}, "uv must be of a floating dtype"),
        ({"uv": torch.rand(2, 3)}, r"uv must have shape \(..., N, 2\), got \(2, 3\)"),
    ],
)
def test_bad_queries(clips, change, message):
    queries = Queries(torch.rand(2, 2), *torch.zeros(3, 2, dtype=torch.int64).unbind(0))
    with pytest.raises(ValueError, match=message):
        clips[0][0].answer(queries._replace(**change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_renders_and_answers_the_same(clips):
    scene, clip = clips[2]
    other = Scene(2, num_frames=T, size=(64, 64), device="cuda")
    for first, second in zip(clip, other.render()):
        assert second.is_cuda
        assert ((first - second.cpu()).abs() < 1e-3).float().mean() > 0.998
    queries = _random_queries(12)
    for first, second in zip(scene.answer(queries), other.answer(queries)):
        assert second.is_cuda
        close = torch.isclose(first.float(), second.cpu().float(), rtol=1e-4, atol=1e-4)
        assert close.float().mean() > 0.999
