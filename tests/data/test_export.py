"""Writing scenes, recognising layouts, and clips of recorded videos: shares, crops, workers, ranks, shards."""

import io
import os
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fourdperf.cli.main import main
from fourdperf.data.augment import PhotometricConfig, ViewConfig
from fourdperf.data.export import export_scene, pack_shard, record
from fourdperf.data.folder import Folder
from fourdperf.data.movi import Movi
from fourdperf.data.open_dataset import describe, find_scenes, layout_of, open_dataset
from fourdperf.data.pointodyssey import PointOdyssey
from fourdperf.data.queries import Clip, Queries, stack_clips
from fourdperf.data.query_sampling import boundaries
from fourdperf.data.scenes import Scene
from fourdperf.data.shards import ShardDataset, find_shards
from fourdperf.data.video_dataset import ClipConfig, OnDisk, VideoDataset, clip_of
from tests.data.conftest import FRAMES, HEIGHT, SEED, WIDTH, errors, the_scene

CONFIG = ClipConfig(num_queries=64, num_frames=4, image_size=32)


def assert_equal(a: Clip, b: Clip) -> None:
    for one, two in zip((*a[:3], *a.queries, *a.targets), (*b[:3], *b.queries, *b.targets)):
        assert torch.equal(one, two)


# Writing


def test_records_are_the_scene():
    recording = record(the_scene(), 50, scale=2.0)
    rendering = the_scene().render()
    np.testing.assert_allclose(recording.depth, 2 * rendering.depth.numpy())
    known = np.isfinite(recording.world_from_body).all((0, 2, 3))
    assert known[0] and 0 < known[1:].sum() < len(known) - 1, "wanted a scene with rigid and deforming objects"
    np.testing.assert_allclose(
        recording.world_from_body[:, 0], recording.world_from_body[:1, 0].repeat(FRAMES, 0), atol=1e-5
    )
    assert np.isfinite(recording.xyz).all() and 0.3 < recording.visible.mean() < 1
    source = np.arange(50) % FRAMES
    assert recording.visible[source, np.arange(50)].all()
    assert np.abs(recording.xyz[1:] - recording.xyz[:-1]).max() > 0.01
    with pytest.raises(ValueError, match="wanted num_tracks from 0 and scale above 0, got 4 and 0"):
        record(the_scene(), 4, scale=0)


def test_the_same_scene_gives_the_same_files(stored, tmp_path):
    export_scene(the_scene(), tmp_path / "again", "folder", num_tracks=200)
    for path in sorted(stored("folder").rglob("*")):
        other = tmp_path / "again" / path.relative_to(stored("folder"))
        assert path.is_dir() or path.suffix == ".npz" or path.read_bytes() == other.read_bytes(), path


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="layout: wanted one of folder, pointodyssey, movi, got 'kitti'"):
        export_scene(the_scene(), tmp_path / "a", "kitti")
    with pytest.raises(ValueError, match="layout 'movi': wanted square pixels"):
        export_scene(Scene(SEED, num_frames=2, size=(16, 16), aspect_ratio=2.0), tmp_path / "a", "movi", 4)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there: wanted a new folder"):
        export_scene(the_scene(), tmp_path / "there")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*file/a"):
        export_scene(Scene(SEED, num_frames=2, size=(16, 16)), tmp_path / "file" / "a", num_tracks=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    script = textwrap.dedent(
        """
        import resource, sys
        from fourdperf.data.export import export_scene
        from fourdperf.data.scenes import Scene

        scene = Scene(0, num_frames=2, size=(64, 64))
        # A limit on the size of a file fails a write as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        for layout in ("folder", "pointodyssey", "movi"):
            try:
                export_scene(scene, f"{sys.argv[1]}/{layout}", layout)
            except OSError as error:
                print(layout, error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["folder", "pointodyssey", "movi"], done
    assert all("cannot write" in line for line in lines) and list(tmp_path.iterdir()) == [], done


def test_command(tmp_path, capsys):
    options = ["--count", "3", "--frames", "3", "--height", "24", "--width", "32", "--tracks", "20"]
    assert main(["export_scenes", str(tmp_path / "a"), "--layout", "pointodyssey", *options]) == 0
    assert "pointodyssey: 3 scenes, 9 frames; depth, normals, 3-D tracks" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_dir())[0] == "train_000000"
    assert (tmp_path / "a/overview.png").stat().st_size > 1000 and len(find_scenes(tmp_path / "a")) == 3
    assert main(["export_scenes", str(tmp_path / "b"), "--layout", "shards", "--per_shard", "2", *options]) == 0
    assert [path.rsplit("/", 1)[1] for path in find_shards(tmp_path / "b")] == ["000000.tar", "000001.tar"]
    assert main(["export_scenes", str(tmp_path / "a"), *options]) == 2
    assert main(["export_scenes", str(tmp_path / "c"), "--count", "0"]) == 2
    assert "wanted a new or empty folder" in capsys.readouterr().err and not (tmp_path / "c").exists()


# Recognising


def several(stored, tmp_path) -> str:
    """Two scenes of each layout (the same one), on several levels."""
    for layout, place in {"folder": "", "pointodyssey": "po/train", "movi": "kubric"}.items():
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (tmp_path / place / f"{layout}{i}").symlink_to(stored(layout))
    return tmp_path


def test_layouts_are_recognised(stored, tmp_path):
    root = several(stored, tmp_path)
    scenes = find_scenes(root)
    assert [scene.reader.__name__ for scene in scenes] == ["Folder"] * 2 + ["Movi"] * 2 + ["PointOdyssey"] * 2
    assert [scene.path for scene in find_scenes(root / "kubric/movi0")] == [str(root / "kubric/movi0")]
    assert describe(root).splitlines() == [
        "folder: 2 scenes, 12 frames; depth, normals, moving bodies, 3-D tracks, poses, intrinsics",
        "movi: 2 scenes, 12 frames; depth, normals, flow, moving bodies, poses, intrinsics",
        "pointodyssey: 2 scenes, 12 frames; depth, normals, 3-D tracks, poses, intrinsics",
    ]
    dataset = open_dataset(root, CONFIG)
    assert len(dataset) == 6
    batch = stack_clips([dataset[i] for i in range(6)])
    assert batch.video.shape == (6, 4, 32, 32, 3) and batch.targets.xyz.shape == (6, 64, 3)


def test_what_is_not_recognised(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: wanted a folder of scenes"):
        find_scenes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found no scene in it .* there is nothing"):
        open_dataset(tmp_path, CONFIG)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"Wanted rgbs/ and anno.npz .* there is notes.txt"):
        open_dataset(tmp_path, CONFIG)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("anno.npz", "scene.json"):
        (mixed / name).touch()
    with pytest.raises(
        ValueError, match="mixed: wanted the files of one layout, found those of pointodyssey and folder"
    ):
        open_dataset(tmp_path, CONFIG)
    (mixed / "scene.json").unlink()
    assert layout_of(mixed) == "pointodyssey"
    with pytest.raises(ValueError, match="anno.npz: no .npz"):
        open_dataset(tmp_path, CONFIG)
    assert len(open_dataset(tmp_path, CONFIG, check=False)) == 1
    with pytest.raises(ValueError, match="wanted at least 7 frames, got 6"):
        open_dataset(stored("movi"), CONFIG._replace(num_frames=7))


# Clips


@pytest.mark.parametrize("layout", ["folder", "pointodyssey", "movi"])
def test_a_clip(stored, layout):
    config = ClipConfig(num_queries=1000, num_frames=FRAMES, image_size=32)
    clip = open_dataset(stored(layout), config)[0]
    queries, targets = clip.queries, clip.targets
    assert clip.video.shape == (FRAMES, 32, 32, 3) and clip.video.dtype == torch.float32
    assert clip.patch_video is clip.video and clip.aspect_ratio.item() == WIDTH / HEIGHT
    assert queries.uv.dtype == torch.float32 and ((queries.uv >= 0) & (queries.uv <= 1)).all()
    for t in queries[1:]:
        assert t.dtype == torch.int64 and set(t.tolist()) == set(range(FRAMES))
    assert all(part.isfinite().all() for part in targets) and all(part.dtype == torch.bool for part in targets[5:])
    same = (queries.t_tgt == queries.t_cam).float().mean()
    assert abs(same - (0.4 + 0.6 / FRAMES)) < 0.06
    rendering = the_scene().render()
    small = torch.nn.functional.interpolate(rendering.video.movedim(-1, 1), (32, 32), mode="area").movedim(1, -1)
    assert (clip.video - small).abs().mean() < 0.03
    # those about pixels come last; 30 % of all lie on edges of depth or motion, which are at most a fifth of each frame
    pixel = slice(500 if layout != "movi" else 0, None)
    rows, columns = (((torch.arange(32) + 0.5) / 32 * n).long() for n in (HEIGHT, WIDTH))
    edges = boundaries(rendering.depth[:, rows][:, :, columns])
    edges = edges | boundaries(rendering.depth[:, rows][:, :, columns], rendering.flow[:, rows][:, :, columns])
    row = (queries.uv[pixel, 1] * 32).long().clamp(max=31)
    column = (queries.uv[pixel, 0] * 32).long().clamp(max=31)
    on_edge = edges[queries.t_src[pixel], row, column].float().sum() / 1000
    assert 0.29 < on_edge < 0.55
    whole = the_scene().answer(queries)
    assert errors(targets, whole, "uv").max() < (1e-3 if layout == "pointodyssey" else 1e-5)


def test_numbers_make_clips(stored, tmp_path):
    dataset = open_dataset(several(stored, tmp_path), CONFIG, seed=3)
    assert_equal(dataset[4], dataset[4])
    assert not torch.equal(dataset[4].queries.uv, dataset[10].queries.uv)
    other = open_dataset(tmp_path, CONFIG, seed=4)
    assert not torch.equal(dataset[4].queries.uv, other[4].queries.uv)
    visited = [set(), set()]
    dataset.source = lambda index: visited[len(visited[0]) == 6].add(index) or VideoDataset.source(dataset, index)
    for number in range(12):
        dataset[number]
    assert visited == [set(range(6))] * 2, "each once in a pass"


def test_crops_and_strides_change_everything_consistently(stored):
    """Answers about a crop are the scene's about the whole frame, moved."""
    view = ViewConfig(crop=0.3, zoom=0.5, stride=2)
    config = ClipConfig(num_queries=300, num_frames=3, image_size=32, view=view, patch_size=(24, 48))
    dataset = VideoDataset([OnDisk(Movi, str(stored("movi")))], config)
    rendering, strides, crops = the_scene().render(), set(), 0
    for number in range(6):
        clip = dataset[number]
        assert clip.video.shape == (3, 32, 32, 3) and clip.patch_video.shape == (3, 24, 48, 3)
        found = find_view(clip, number, config)
        queries = found.to_video(clip.queries)
        exact = the_scene().answer(queries)
        there = the_scene().answer(queries._replace(t_cam=queries.t_tgt))
        exact = found.to_view(clip.queries, exact, there)
        for field, limit in {"xyz": 2e-5, "uv": 5e-5, "displacement": 1e-5, "normal": 1e-4}.items():
            assert errors(clip.targets, exact, field).median() < limit, field
        assert (errors(clip.targets, exact, "visibility") == 0).float().mean() > 0.99
        assert clip.aspect_ratio.item() == pytest.approx(found.aspect_ratio(WIDTH / HEIGHT))
        picture = found.video(rendering.video, (32, 32))
        assert (picture - clip.video).abs().mean() < 0.01
        strides.add(int(found.frames[1] - found.frames[0]))
        crops += not found.whole
    assert strides == {1, 2} and crops >= 5


def find_view(clip: Clip, number: int, config: ClipConfig):
    """The view that the data set draws first of all."""
    from fourdperf.data.augment import sample_view
    from fourdperf.data.synthetic import clip_generator

    return sample_view(FRAMES, config.num_frames, config.view, clip_generator(0, number))


def test_colours_are_the_same_for_both_videos(stored):
    config = CONFIG._replace(colours=PhotometricConfig(drop=1.0, blur=0.0), patch_size=(32, 32))
    clip = open_dataset(stored("movi"), config)[0]
    plain = open_dataset(stored("movi"), CONFIG)[0]
    assert torch.equal(clip.video, clip.patch_video) and not torch.allclose(clip.video, plain.video, atol=0.05)
    assert torch.equal(clip.queries.uv, plain.queries.uv)
    assert (clip.video.amax(-1) - clip.video.amin(-1)).mean() < 0.02  # grey


@pytest.mark.parametrize("changes", [{"num_queries": 0}, {"num_frames": 0}, {"image_size": 0}, {"patch_size": (0, 4)}])
def test_bad_configs(stored, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: wanted"):
        open_dataset(stored("movi"), CONFIG._replace(**changes))


def test_bad_arguments(stored):
    with pytest.raises(ValueError, match="scenes: wanted at least one"):
        VideoDataset([], CONFIG)
    dataset = open_dataset(stored("movi"), CONFIG)
    with pytest.raises(ValueError, match="ranks: wanted at most 1, the number of sequences, got 2"):
        dataset.split(0, 2)
    with pytest.raises(ValueError, match="rank: wanted 0 to 1, got 2"):
        dataset.split(2, 2)
    with pytest.raises(ValueError, match="wanted at least 9 frames, got 6"):
        clip_of(PointOdyssey(stored("pointodyssey")), CONFIG._replace(num_frames=9), torch.Generator())


def test_sequences_are_split_by_rank(stored, tmp_path):
    dataset = open_dataset(several(stored, tmp_path), CONFIG)
    parts = [dataset.split(rank, 4) for rank in range(4)]
    assert sorted(scene.path for part in parts for scene in part.scenes) == [scene.path for scene in dataset.scenes]
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    assert not torch.equal(parts[0][0].queries.uv, parts[1][0].queries.uv)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(stored, tmp_path, method):
    dataset = open_dataset(several(stored, tmp_path), CONFIG._replace(num_queries=16), seed=1)
    here = [dataset[i] for i in range(6)]
    options = {"collate_fn": stack_clips, "num_workers": 1 + (method == "fork"), "multiprocessing_context": method}
    for i, batch in enumerate(DataLoader(dataset, batch_size=2, sampler=range(6), **options)):
        assert_equal(batch, stack_clips(here[2 * i : 2 * i + 2]))


def test_one_bad_clip_is_one_error_through_a_loader(copied):
    folder = copied("movi")
    (folder / "depth_00003.tiff").write_bytes(b"II*")
    dataset = open_dataset(folder, CONFIG._replace(num_frames=FRAMES))
    with pytest.raises(ValueError, match="depth_00003.tiff: wanted an image"):
        next(iter(DataLoader(dataset, collate_fn=stack_clips, num_workers=1)))


# Shards


SMALL = ClipConfig(num_queries=8, num_frames=4, image_size=16)
SCENES = 4


def small_scene(i: int) -> Scene:
    return Scene(i, num_frames=4, size=(16, 24))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of two scenes, and the mean colours of the scenes."""
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    colours = []
    for i in range(SCENES):
        export_scene(small_scene(i), root / "scenes" / f"scene{i}", num_tracks=16)
        colours.append(
            torch.from_numpy(np.stack(Folder(root / f"scenes/scene{i}").frames(range(4)))).float().mean((0, 1, 2))
        )
    for i in range(2):
        pack_shard(root / f"{i}.tar", [root / "scenes" / f"scene{k}" for k in (2 * i, 2 * i + 1)])
    return root, torch.stack(colours) / 255


def shown(clips, shards) -> list[int]:
    """Which scenes the clips show."""
    return [int((shards[1] - clip.video.mean((0, 1, 2))).norm(dim=1).argmin()) for clip in clips]


def test_shards_hold_the_scenes(shards):
    root, _ = shards
    dataset = open_dataset(root, SMALL)
    assert isinstance(dataset, ShardDataset) and len(dataset.shards) == 2
    clips = list(ShardDataset(dataset.shards, SMALL, passes=4))
    scenes = shown(clips, shards)
    passes = [scenes[i : i + SCENES] for i in range(0, 4 * SCENES, SCENES)]
    assert all(sorted(part) == list(range(SCENES)) for part in passes) and len(set(map(tuple, passes))) > 1
    for clip, i in list(zip(clips, scenes))[:2]:
        exact = small_scene(i).answer(clip.queries)
        assert errors(clip.targets, exact, "xyz").median() < 1e-5 and clip.targets.has_xyz.any()
    again = list(ShardDataset(dataset.shards, SMALL, passes=2))
    assert_equal(again[5], clips[5])
    endless = iter(open_dataset(root / "1.tar", SMALL))
    assert sorted(shown([next(endless), next(endless)], shards)) == [2, 3]
    assert len([next(endless) for _ in range(5)]) == 5


def test_shards_are_shared_among_workers_and_processes(shards, monkeypatch):
    dataset = ShardDataset(find_shards(shards[0]), SMALL, passes=1)
    clips = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert sorted(shown(clips, shards)) == list(range(SCENES))
    parts = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(shown(list(dataset), shards))
    assert [len(part) for part in parts] == [2, 2] and sorted(parts[0] + parts[1]) == list(range(SCENES))
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ValueError, match="shards: wanted at least one for each process and worker, got 2 in all"):
        next(iter(dataset))


def test_bad_shards(shards, tmp_path):
    with pytest.raises(ValueError, match="shards: wanted at least one"):
        ShardDataset([], SMALL)
    with pytest.raises(ValueError, match="wanted scenes with different names without dots"):
        pack_shard(tmp_path / "a.tar", [tmp_path / "a.b"])
    content = (shards[0] / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 3])
    with pytest.raises((ValueError, OSError), match="cut off|missing"):
        list(ShardDataset([str(tmp_path / "cut.tar")], SMALL, passes=1))
    with tarfile.open(tmp_path / "half.tar", "w") as shard:
        for name in ("scene0.scene.json", "scene0.frames.00000.png"):
            info = tarfile.TarInfo(name)
            info.size = 2
            shard.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(ValueError, match=r"half.tar: scene0/frames/00000.png: wanted an image"):
        list(ShardDataset([str(tmp_path / "half.tar")], SMALL, passes=1))
    assert os.listdir(tmp_path).count("a.tar") == 0


def test_own_sources_need_little(stored):
    """A data set of one's own: a class with two methods and a few attributes."""
    from fourdperf.data.sources import Source, Tracks

    class Mine(Source):
        name, num_frames, size = "mine", 5, (8, 12)

        def frames(self, numbers):
            return [np.full((8, 12, 3), 10 * n, np.uint8) for n in numbers]

        def tracks(self, numbers):
            return Tracks(np.full((len(numbers), 3, 2), 0.25, np.float32), None, np.ones((len(numbers), 3), bool))

        def contents(self):
            return ["2-D tracks"]

    clip = VideoDataset([Mine()], SMALL)[0]
    assert (clip.targets.uv == 0.25).all() and clip.targets.has_uv.all() and not clip.targets.has_xyz.any()
    assert isinstance(clip.queries, Queries)
