"""Training clips of recorded videos, whatever their format: sources in, :class:`fourdperf.data.queries.Clip` out.

Clip number i is a function of i and the data set's seed alone: which sequence (each once in a pass, in a new order in
every pass), which frames, what is asked. So numbers handed out once each to processes and workers
(`fourdperf.train.data`) give disjoint clips, and a run can go on anywhere. No file is kept open, so that data sets can
be forked and pickled at any time.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from fourdperf.data.augment import PhotometricConfig, View, ViewConfig, recoloured, sample_view
from fourdperf.data.queries import Clip, Queries
from fourdperf.data.query_sampling import BOUNDARY_SHARE, SAME_TIME_SHARE
from fourdperf.data.recorded_queries import answer, ask
from fourdperf.data.sources import Source, load_window
from fourdperf.data.synthetic import clip_generator
from fourdperf.data.video import resize_frame

__all__ = ["ClipConfig", "OnDisk", "VideoDataset", "clip_of"]


class ClipConfig(NamedTuple):
    """What a clip is made of.

    num_queries   N
    num_frames    T
    image_size    height and width of the video, squeezed to a square
    view          crop, zoom and temporal stride; the whole frame and every frame by default
    colours       how colours change; None for not at all
    patch_size    (height, width) of `patch_video`, for RGB patches finer than the video; None: the video itself
    boundary_share, same_time_share    as in `fourdperf.data.query_sampling`
    """

    num_queries: int = 2048
    num_frames: int = 48
    image_size: int = 256
    view: ViewConfig = ViewConfig()
    colours: PhotometricConfig | None = None
    patch_size: tuple[int, int] | None = None
    boundary_share: float = BOUNDARY_SHARE
    same_time_share: float = SAME_TIME_SHARE

    def check(self) -> None:
        """Raises ValueError where a number is out of range."""
        for name in ("num_queries", "num_frames", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if self.patch_size is not None and min(self.patch_size) < 1:
            raise ValueError(f"patch_size: wanted a height and a width of at least 1, got {self.patch_size}")


def clip_of(source: Source, config: ClipConfig, generator: Generator) -> Clip:
    """A random clip of a video, with queries and their answers.

    Raises:
        ValueError, OSError: the video is shorter than a clip, or a file is missing or corrupt.
    """
    if source.num_frames < config.num_frames:
        raise ValueError(f"{source.name}: wanted at least {config.num_frames} frames, got {source.num_frames}")
    view = sample_view(source.num_frames, config.num_frames, config.view, generator)
    window = load_window(source, view.frames.tolist())
    view = view._replace(frames=torch.arange(config.num_frames))
    shares = {"boundary_share": config.boundary_share, "same_time_share": config.same_time_share}
    asked = ask(window, view, config.num_queries, config.image_size, generator, **shares)
    box = view.box[asked.queries.t_src]
    place = ((asked.queries.uv - box[:, :2]) / box[:, 2:]).clamp(0, 1)  # inside but for rounding
    queries = Queries(place, *asked.queries[1:])
    own_camera = asked._replace(queries=asked.queries._replace(t_cam=asked.queries.t_tgt))
    there = None if view.whole else answer(window, own_camera)
    targets = view.to_view(queries, answer(window, asked), there)
    sizes = [(config.image_size, config.image_size)] + [config.patch_size] * (config.patch_size is not None)
    videos = [_video(window.frames, view, size) for size in sizes]
    videos = recoloured(videos, config.colours, generator)
    ratio = torch.tensor(view.aspect_ratio(source.size[1] / source.size[0]), dtype=torch.float32)
    return Clip(videos[0], ratio, videos[-1], queries, targets)


def _video(frames: list, view: View, size: tuple[int, int]) -> Tensor:
    """What the view shows, float32 (T, *size, 3), made frame by frame; whole frames as for inference (Lanczos)."""
    if view.whole:
        return torch.stack([torch.from_numpy(resize_frame(frame, size)) for frame in frames]).float() / 255
    pictures = []
    for frame, box in zip(frames, view.box):
        single = View(torch.zeros(1, dtype=torch.int64), box[None])
        pictures.append(single.video(torch.from_numpy(frame)[None].float() / 255, size)[0])
    return torch.stack(pictures)


class OnDisk(NamedTuple):
    """A sequence on disk that is opened when it is needed: a class of sources and the path it takes."""

    reader: type[Source]
    path: str

    def open(self) -> Source:
        """Raises as the reader does."""
        return self.reader(self.path)


@functools.lru_cache(8)
def _opened(scene: OnDisk) -> Source:
    return scene.open()


class VideoDataset(Dataset[Clip]):
    """Clips of recorded videos, ``dataset[number]`` for any number from 0; a pass of ``len`` has one per sequence.

    Args:
        scenes: what to read: :class:`OnDisk` to be opened when needed, or open sources of any kind, one's own included.
        config: what a clip is made of.
        seed: of everything random.

    Raises:
        ValueError: there is no scene, or `config` is out of range. Items raise as :func:`clip_of`.
    """

    def __init__(self, scenes: Sequence[OnDisk | Source], config: ClipConfig, seed: int = 0):
        if not scenes:
            raise ValueError("scenes: wanted at least one, got none")
        config.check()
        self.scenes, self.config, self.seed = list(scenes), config, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, number: int) -> Clip:
        visit, position = divmod(number, len(self.scenes))
        order = torch.randperm(len(self.scenes), generator=clip_generator(self.seed, 2**32 - 1 - visit))
        return clip_of(self.source(int(order[position])), self.config, clip_generator(self.seed, number))

    def source(self, index: int) -> Source:
        """The source of scene ``index``; the last few are kept open."""
        scene = self.scenes[index]
        return _opened(scene) if isinstance(scene, OnDisk) else scene

    def split(self, rank: int, ranks: int) -> "VideoDataset":
        """The share of one of several processes, every ``ranks``-th sequence, for processes that hold or cache only
        their own files; each then counts its own numbers.

        Raises:
            ValueError: there are fewer sequences than processes.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: wanted 0 to {ranks - 1}, got {rank}")
        if len(self.scenes) < ranks:
            raise ValueError(f"ranks: wanted at most {len(self.scenes)}, the number of sequences, got {ranks}")
        return VideoDataset(self.scenes[rank::ranks], self.config, self.seed + rank)
