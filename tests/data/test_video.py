"""Videos: what comes out of good files, and one clear error for the others."""

import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fourdperf.data.demo_clip import demo_clip
from fourdperf.data.files import NpyWriter, atomic_path, output_folder
from fourdperf.data.pictures import DepthColours, PcaColours, enlarge, label, side_by_side, stack
from fourdperf.data.video import VideoReader, resize_frame, write_animation, write_png, write_video
from tests.memory import growth


def numbered(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Frames of one grey level each: frame i is 5 i, so that a reader's frames can be told apart."""
    return np.broadcast_to((5 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def write_images(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir()
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{i:04d}.png"), frame[..., ::-1] if frame.ndim == 3 else frame)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def levels(clip) -> list[int]:
    return (clip.frames[:, 0, 0, 0] * 51).round().int().tolist()


@pytest.mark.parametrize(
    ("count", "length", "stride", "wanted"),
    [
        (9, 4, 4, [(0, 4), (4, 4), (8, 1)]),
        (8, 4, 4, [(0, 4), (4, 4)]),
        (9, 4, 2, [(0, 4), (2, 4), (4, 4), (6, 3)]),
        (8, 4, 2, [(0, 4), (2, 4), (4, 4)]),
        (9, 4, 6, [(0, 4), (6, 3)]),
        (6, 4, 6, [(0, 4)]),
        (5, 4, 6, [(0, 4)]),
        (3, 4, 4, [(0, 3)]),
        (1, 16, 16, [(0, 1)]),
    ],
)
def test_clips(tmp_path, count, length, stride, wanted):
    reader = VideoReader(write_images(tmp_path / "v", numbered(count)), length, stride, size=None)
    clips = list(reader)
    assert [(clip.start, clip.valid) for clip in clips] == wanted
    assert len(reader) == len(wanted)
    for clip in clips:
        assert clip.frames.shape == (length, 24, 32, 3) and clip.frames.dtype == torch.float32
        assert levels(clip) == [min(clip.start + i, clip.start + clip.valid - 1) for i in range(length)]


def test_reading_twice_gives_the_same(tmp_path):
    reader = VideoReader(write_images(tmp_path / "v", numbered(7)), 4, size=(8, 8))
    assert [levels(clip) for clip in reader] == [levels(clip) for clip in reader]


def test_mp4_round_trip_keeps_colours_and_pads_odd_sizes(tmp_path):
    frames = demo_clip(5, 65, 97)[0]
    assert write_video(tmp_path / "v.mp4", iter(frames), fps=12) == 5
    reader = VideoReader(tmp_path / "v.mp4", size=None)
    assert (reader.frames, reader.height, reader.width, reader.fps) == (5, 66, 98, 12)
    read = np.stack(list(reader.read()))[:, :65, :97].astype(int)
    assert np.abs(read - frames).mean() < 10 < np.abs(read[..., ::-1] - frames).mean()
    assert names(tmp_path) == ["v.mp4"]


def test_grey_video(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24), False)
    for frame in numbered(4):
        writer.write(np.ascontiguousarray(frame[..., 0]))
    writer.release()
    clip = next(iter(VideoReader(tmp_path / "v.avi", 4, size=None)))
    assert levels(clip) == [0, 1, 2, 3] and bool((clip.frames[..., 0] == clip.frames[..., 2]).all())


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_images(tmp_path, channels):
    rgb = np.random.default_rng(0).integers(0, 256, (3, 13, 17, 3), dtype=np.uint8)
    images = rgb[..., 0] if channels == 1 else np.concatenate([rgb, np.zeros_like(rgb[..., :1])], axis=3)
    folder = tmp_path / "v"
    folder.mkdir()
    for i, image in enumerate(images):
        cv2.imwrite(str(folder / f"{i}.png"), image if channels == 1 else cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA))
    wanted = np.repeat(rgb[..., :1], 3, axis=3) if channels == 1 else rgb
    assert np.array_equal(np.stack(list(VideoReader(folder, size=None).read())), wanted)


def animation_with_alpha(path: Path) -> np.ndarray:
    frames = demo_clip(6, 48, 64)[0]
    animation = cv2.Animation()
    alpha = np.full((48, 64, 1), 255, np.uint8)
    alpha[:20] = 0
    animation.frames = [np.concatenate([frame[..., ::-1], alpha], axis=2) for frame in frames]
    animation.durations = np.full(6, 100, np.int32)
    cv2.imwriteanimation(str(path), animation)
    return frames


def test_video_with_alpha(tmp_path):
    frames = animation_with_alpha(tmp_path / "v.gif")[:, 20:].astype(int)
    reader = VideoReader(tmp_path / "v.gif", size=None)
    assert (reader.frames, reader.fps) == (6, 10)
    read = np.stack(list(reader.read()))[:, 20:].astype(int)
    assert read.shape == frames.shape
    assert np.abs(read - frames).mean() < 0.7 * np.abs(read[..., ::-1] - frames).mean()


def test_an_image_file_with_many_pictures_is_refused(tmp_path):
    animation_with_alpha(tmp_path / "v.webp")
    with pytest.raises(ValueError, match="got 6 pictures in an image file"):
        VideoReader(tmp_path / "v.webp")


def test_a_single_image_is_a_video_of_one_frame(tmp_path):
    write_png(tmp_path / "a.png", demo_clip(1, 30, 40)[0][0])
    clips = list(VideoReader(tmp_path / "a.png", 3, size=(10, 10)))
    assert [(clip.start, clip.valid) for clip in clips] == [(0, 1)]


# What Pillow 11.3's Image.resize(LANCZOS), which the reference's mediapy calls, makes of this image; the first channel.
PILLOW_INPUT = (np.arange(9 * 7 * 3).reshape(7, 9, 3) * 37 % 256).astype(np.uint8)
PILLOW_4x5 = [
    [113, 156, 106, 102, 122],
    [154, 78, 117, 177, 129],
    [105, 117, 148, 129, 100],
    [162, 153, 119, 63, 178],
]


def test_resize_is_pillows():
    assert np.array_equal(resize_frame(PILLOW_INPUT, (4, 5))[..., 0], PILLOW_4x5)


def test_crop_keeps_the_aspect_ratio():
    frame = np.zeros((20, 60, 3), np.uint8)
    frame[:, 20:40] = 200
    assert (resize_frame(frame, (10, 10), "crop") == 200).all()
    assert not (resize_frame(frame, (10, 10), "squash") == 200).all()
    assert resize_frame(frame, (224, 7), "crop").shape == (224, 7, 3)


def broken(tmp_path, case: str) -> Path:
    path = tmp_path / f"{case}.mp4"
    if case == "missing":
        return path
    if case == "empty folder":
        path.mkdir()
        return path
    if case == "folder of two sizes":
        write_images(path, numbered(2))
        write_png(path / "9.png", np.zeros((4, 4, 3), np.uint8))
        return path
    if case == "broken image":
        write_images(path, numbered(2))
        (path / "0001.png").write_bytes(b"no image")
        return path
    if case in ("empty", "text"):
        path.write_bytes(b"" if case == "empty" else b"this is no video" * 100)
        return path
    if case == "zero frames":
        cv2.VideoWriter(str(path.with_suffix(".avi")), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24)).release()
        return path.with_suffix(".avi")
    write_video(path, demo_clip(30, 96, 128)[0])
    content = bytearray(path.read_bytes())
    if case == "cut off":
        content = content[: len(content) // 2]
    else:
        fifth = len(content) // 5
        content[2 * fifth : 3 * fifth] = bytes(fifth)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("missing", FileNotFoundError, "no such video"),
        ("empty folder", ValueError, "holds no image"),
        ("folder of two sizes", ValueError, "frame 2 is 4x4, the first one 24x32"),
        ("broken image", ValueError, "0001.png: wanted an image"),
        ("empty", ValueError, "wanted a video that OpenCV can read, got 0 bytes"),
        ("text", ValueError, "wanted a video that OpenCV can read"),
        ("zero frames", ValueError, "no frame|wanted a video"),
        ("cut off", ValueError, "wanted a video that OpenCV can read"),
        ("corrupt in the middle", ValueError, r"corrupt or cut off: wanted 30 frames, .* but read \d+ "),
    ],
)
def test_bad_videos(tmp_path, capfd, case, error, message):
    with pytest.raises(error, match=message):
        list(VideoReader(broken(tmp_path, case)))
    assert capfd.readouterr().err == ""


def test_what_is_left_of_a_corrupt_video_can_be_read(tmp_path):
    reader = VideoReader(broken(tmp_path, "corrupt in the middle"), 4, allow_partial=True)
    with pytest.warns(UserWarning, match=r"wanted 30 frames, .* but read \d+; going on"):
        clips = list(reader)
    assert 0 < sum(clip.valid for clip in clips) < 30


@pytest.mark.parametrize("arguments", [{"length": 0}, {"stride": 0}, {"fit": "stretch"}])
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        VideoReader(tmp_path, **arguments)


def fails_half_way():
    yield from numbered(3)
    raise RuntimeError("half-way")


@pytest.mark.parametrize("frames", [[], fails_half_way, [numbered(1)[0], numbered(1, 8, 8)[0]], [np.zeros((4, 4, 3))]])
def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path, frames):
    target = tmp_path / "v.mp4"
    target.write_bytes(b"before")
    for write in (write_video, write_animation):
        with pytest.raises((ValueError, RuntimeError)):
            write(target, frames() if callable(frames) else frames)
    assert names(tmp_path) == ["v.mp4"] and target.read_bytes() == b"before"


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    script = textwrap.dedent(
        """
        import resource, sys
        import numpy as np
        from fourdperf.data.files import NpyWriter
        from fourdperf.data.video import write_animation, write_png, write_video

        def npy(path, frames):
            with NpyWriter(path) as writer:
                for frame in frames:
                    writer.append(frame[None])

        frames = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
        def png(path, frames):
            write_png(path, np.concatenate(frames))

        writers = {"mp4": write_video, "webp": write_animation, "npy": npy, "png": png}
        # A limit on the size of a file fails a write as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for suffix, write in writers.items():
            try:
                write(f"{sys.argv[1]}/x.{suffix}", frames)
            except OSError as error:
                print(suffix, error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["mp4", "webp", "npy", "png"], done
    assert all("cannot write" in line for line in done.stdout.splitlines()), done
    assert names(tmp_path) == []


def test_unwritable_targets(tmp_path):
    frames = numbered(2)
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path, tmp_path / "file" / "v.mp4", Path("/proc/no/v.mp4")):
        with pytest.raises(OSError):
            write_video(target, frames)
    assert names(tmp_path) == ["file"]


def test_atomic_path_and_output_folder_clean_up(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "new") as folder, atomic_path(folder / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
    with output_folder(tmp_path / "new") as folder, atomic_path(folder / "a.txt") as path:
        path.write_text("whole")
    assert names(tmp_path / "new") == ["a.txt"]


def test_npy_writer(tmp_path):
    x = np.random.default_rng(0).standard_normal((11, 3, 2)).astype(np.float32)
    with NpyWriter(tmp_path / "x.npy") as writer:
        for block in np.split(x, [1, 1, 4]):
            writer.append(block)
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), x)
    with pytest.raises(ValueError, match="wanted rows"), NpyWriter(tmp_path / "y.npy") as writer:
        writer.append(x)
        writer.append(x[:, :2])
    with pytest.raises(ValueError, match="nothing was written"), NpyWriter(tmp_path / "y.npy"):
        pass
    assert names(tmp_path) == ["x.npy"]


def test_long_videos_are_streamed(tmp_path):
    count, size = 2000, (240, 320)
    write_video(tmp_path / "v.mp4", (np.full((*size, 3), i % 256, np.uint8) for i in range(count)))
    whole = count * size[0] * size[1] * 3

    def read():
        assert sum(clip.valid for clip in VideoReader(tmp_path / "v.mp4", 16, size=None)) == count

    assert growth(lambda: np.ones(whole, np.uint8)) > whole / 2  # it would be seen
    assert growth(read) < whole / 2


def test_demo_clip():
    frames, depth = demo_clip(6, 60, 80)
    assert frames.shape == (6, 60, 80, 3) and frames.dtype == np.uint8
    assert depth.shape == (6, 60, 80) and depth.dtype == np.float32
    assert np.array_equal(frames, demo_clip(6, 60, 80)[0])
    assert frames.std() > 30 and np.abs(np.diff(frames.astype(int), axis=0)).mean() > 5
    flower = depth == 0
    # The flower is orange and the scene behind it is not; it moves.
    assert flower.mean() > 0.02
    assert frames[flower][:, 0].mean() > 1.5 * frames[flower][:, 2].mean()
    columns = [np.nonzero(mask)[1].mean() for mask in flower]
    assert columns[-1] < columns[0] - 20


def test_pca_colours():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 3)) * [9, 4, 1] @ np.linalg.qr(rng.standard_normal((16, 16)))[0][:3] + 7
    colours = PcaColours.fit(x)
    largest = np.take_along_axis(colours.components, np.abs(colours.components).argmax(0)[None], 0)
    assert (largest > 0).all()
    assert np.array_equal(colours(x), colours(x.reshape(5, 10, 10, 16)).reshape(-1, 3))
    correlation = np.corrcoef(colours(x)[:, 0], (x - x.mean(0)) @ colours.components[:, 0])[0, 1]
    assert correlation > 0.99
    assert (PcaColours.fit(np.ones((4, 2)))(np.ones((1, 2))) == 128).all()
    assert PcaColours.fit(x[:, :1])(x[:, :1]).shape == (500, 3)
    with pytest.raises(ValueError, match="wanted features"):
        PcaColours.fit(np.ones((0, 3)))


def test_depth_colours():
    depth = np.linspace(0, 1, 1000).reshape(20, 50)
    colours = DepthColours.fit(depth)
    picture = colours(depth)
    low, high = picture[0, 0].astype(int), picture[-1, -1].astype(int)
    assert high[0] > high[2] and high[0] > low[0]
    assert (colours(np.array([[np.nan, np.inf]])) == 128).all()
    assert colours.legend(100).shape == (44, 100, 3)
    assert DepthColours.fit(np.full((2, 2), np.nan)).low == 0
    assert DepthColours.fit(np.ones((2, 2)))(np.ones((2, 2))).shape == (2, 2, 3)


def test_panels():
    a, b = np.zeros((4, 6, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    assert side_by_side([a, b], gap=2).shape == (4, 11, 3)
    assert stack([a, b], gap=2).shape == (8, 6, 3)
    assert enlarge(b, 10, 12).shape == (10, 12, 3)
    # Even a long label stays inside its strip.
    labelled = label(np.full((4, 60, 3), 255, np.uint8), "a label that is much too long for sixty pixels")
    assert labelled.shape[1] == 60 and (labelled[:, :2] == 255).all() and (labelled[:, -2:] == 255).all()
    assert (labelled < 200).any()
