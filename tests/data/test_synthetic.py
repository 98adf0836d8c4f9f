"""Clips by number: what number i is depends on i and the seed alone, and the cache changes nothing."""

import numpy as np
import pytest
import torch

from fourdperf.data.augment import PhotometricConfig, ViewConfig
from fourdperf.data.queries import Clip, Queries
from fourdperf.data.scenes import Scene
from fourdperf.data.synthetic import SPLITS, SyntheticClips, clip_generator, scene_seed
from fourdperf.train.data import BatchNumbers, Shuffled, loader

SMALL = {"num_queries": 24, "num_frames": 3, "size": (16, 24)}


def tensors(clip: Clip):
    return [clip.video, clip.aspect_ratio, *clip.queries, *clip.targets]


def same(a: Clip, b: Clip) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


def test_clip_is_a_function_of_number_and_seed():
    clips = SyntheticClips("train", **SMALL, seed=3, colours=PhotometricConfig())
    assert same(clips[7], SyntheticClips("train", **SMALL, seed=3, colours=PhotometricConfig())[7])
    other = SyntheticClips("train", **SMALL, seed=4, colours=PhotometricConfig())[7]
    assert not torch.equal(clips[7].queries.uv, other.queries.uv)
    assert not torch.equal(clips[7].video, clips[8].video)


def test_answers_are_the_scenes():
    clip = SyntheticClips("val", **SMALL)[2]
    scene = Scene(scene_seed("val", 2), num_frames=3, size=(16, 24))
    assert all(torch.equal(a, b) for a, b in zip(clip.targets, scene.answer(clip.queries)))
    torch.testing.assert_close(clip.video, scene.render().video, atol=0.5 / 255 + 1e-6, rtol=0)
    assert clip.video.shape == (3, 16, 24, 3) and clip.aspect_ratio == 1.5


def test_splits_share_no_scene():
    seeds = [{scene_seed(split, index) for index in range(1000)} for split in SPLITS]
    assert len(set.union(*seeds)) == 3000


def test_every_scene_once_in_a_pass_in_a_new_order():
    clips = SyntheticClips("train", **SMALL, scenes=50)
    first, second = ([clips.index(number) for number in range(start, start + 50)] for start in (0, 50))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert len(clips) == 50
    endless = SyntheticClips("train", **SMALL)
    assert endless.index(10**9) == 10**9
    with pytest.raises(TypeError, match="no end"):
        len(endless)


def test_queries_are_new_at_every_visit():
    clips = SyntheticClips("train", **SMALL, scenes=1)
    assert clips.index(0) == clips.index(1) and not torch.equal(clips[0].queries.uv, clips[1].queries.uv)


def test_cache_changes_nothing(tmp_path):
    plain = SyntheticClips("train", **SMALL, scenes=4)
    cached = SyntheticClips("train", **SMALL, scenes=4, cache=tmp_path)
    assert all(same(plain[i], cached[i]) for i in range(8))
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 4 and np.load(files[0]).shape == (3, 16, 24, 4)
    files[0].write_bytes(files[0].read_bytes()[:-100])  # cut off
    files[1].write_bytes(b"")
    np.save(files[2], np.zeros((2, 2), np.uint8))
    assert all(same(plain[i], cached[i]) for i in range(4))
    assert all(np.load(file).shape == (3, 16, 24, 4) for file in files)
    assert [path.name for path in tmp_path.rglob("*") if "tmp" in path.name] == []


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_patches_finer_than_the_frames(crop, tmp_path):
    options = {"colours": PhotometricConfig(blur=0.0), "view": ViewConfig(crop=crop), "scenes": 2}
    clips = SyntheticClips("train", **SMALL, patch_size=(48, 72), **options, cache=tmp_path)
    clip = clips[0]
    assert clip.video.shape == (3, 16, 24, 3) and clip.patch_video.shape == (3, 48, 72, 3)
    squeezed = clip.patch_video.unflatten(1, (16, 3)).unflatten(3, (24, 3)).mean((2, 4))
    assert (clip.video - squeezed).abs().mean() < 0.03  # the same picture with the same colours
    assert [np.load(file).shape for file in tmp_path.rglob("*.npy")] == [(3, 48, 72, 4)]
    plain = SyntheticClips("train", **SMALL, **options)[0]
    assert torch.equal(plain.video, plain.patch_video)


def test_patches_coarser_than_the_frames_are_refused():
    with pytest.raises(ValueError, match="patch_size: wanted at least the frames'"):
        SyntheticClips("train", **SMALL, patch_size=(16, 12))


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        SyntheticClips("train", **SMALL, cache=tmp_path / "file")


def test_views_of_scenes():
    view = ViewConfig(crop=0.4, zoom=0.5, stride=3)
    clips = SyntheticClips("train", **SMALL, view=view)
    assert clips.rendered_frames == 7
    whole = 0
    for number in range(6):
        clip = clips[number]
        assert clip.video.shape == (3, 16, 24, 3) and clip.queries.t_src.max() < 3
        own = clip.queries.t_src == clip.queries.t_tgt
        assert (clip.targets.visibility[own] == 1).all()
        here = own & (clip.queries.t_src == clip.queries.t_cam)
        torch.testing.assert_close(clip.targets.uv[here], clip.queries.uv[here], atol=1e-4, rtol=0)
        whole += float(clip.aspect_ratio) == 1.5
    assert whole < 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "dev"}, "split: wanted one of train, val, test, got 'dev'"),
        ({"num_queries": 0}, "num_queries: wanted at least 1, got 0"),
        ({"scenes": 0}, "scenes: wanted at least 1, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticClips(**{"split": "train", **SMALL} | options)


def test_generators_differ():
    draws = {torch.rand((), generator=clip_generator(s, n)).item() for s in range(20) for n in range(20)}
    assert len(draws) == 400


# Who gets which number


def first_batches(sampler, count):
    batches = iter(sampler)
    return [next(batches) for _ in range(count)]


def test_processes_share_the_numbers_out():
    numbers = [first_batches(BatchNumbers(3, rank, 2, lambda: 0), 4) for rank in range(2)]
    assert sorted(sum(numbers[0] + numbers[1], [])) == list(range(24))
    assert first_batches(BatchNumbers(6, 0, 1, lambda: 0), 4) == [a + b for a, b in zip(*numbers)]


def test_an_iteration_goes_on_where_it_is_told():
    had = 5
    sampler = BatchNumbers(2, 1, 3, lambda: had)
    assert first_batches(sampler, 2) == [[32, 33], [38, 39]]
    had = 6
    assert first_batches(sampler, 1) == [[38, 39]]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    clips = SyntheticClips("train", **SMALL)
    batches = iter(loader(clips, 2, workers, 0, 1, lambda: 1))
    for start in (2, 4):
        batch = next(batches)
        assert isinstance(batch, Clip) and isinstance(batch.queries, Queries)
        for i in range(2):
            assert torch.equal(batch.video[i], clips[start + i].video)
            assert torch.equal(batch.targets.xyz[i], clips[start + i].targets.xyz)


def test_finite_data_sets_in_passes():
    shuffled = Shuffled(list(range(7)), seed=1)
    passes = [[shuffled[number] for number in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes) and len({tuple(one) for one in passes}) > 1
    with pytest.raises(ValueError, match="at least one clip"):
        Shuffled([], seed=0)
