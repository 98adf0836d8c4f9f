"""Training clips of synthetic scenes: endless, disjoint between splits, the same on every machine.

Clip number i of a split is a function of i and of the run's `seed` alone: i names the scene, and both together what is
asked about it and how its colours change. So nothing depends on workers, processes or interruptions: whoever hands out
the numbers 0, 1, 2, ... once each (`fourdperf.train.data`) has disjoint clips on all of them, and can go on anywhere.

The seeds of scenes are 3 k for training, 3 k + 1 for validation and 3 k + 2 for tests: no scene is in two splits.

A render costs as much as a training step of a small model. With `scenes`, only so many different ones are visited, in
a new order in every pass; with `cache`, a folder, each is rendered once and then read from a uint8 file `(T, H, W, 4)`:
red, green, blue, and 1 where the queries' boundary pixels are. Questions and exact answers are new at every visit.
"""

import functools
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from fourdperf.data.augment import PhotometricConfig, View, ViewConfig, recoloured, sample_view
from fourdperf.data.files import atomic_path
from fourdperf.data.queries import Clip, Queries
from fourdperf.data.query_sampling import boundaries, sample_queries
from fourdperf.data.scenes import Scene
from fourdperf.data.video import resize_frame

__all__ = ["SPLITS", "Split", "SyntheticClips", "clip_generator", "scene_seed"]

Split = Literal["train", "val", "test"]
SPLITS = ("train", "val", "test")


def scene_seed(split: Split, index: int) -> int:
    """The seed of a split's scene number `index`, from 0."""
    return 3 * index + SPLITS.index(split)


def clip_generator(seed: int, number: int) -> Generator:
    """The randomness of clip `number` of a run with `seed`, both below 2**32."""
    state = np.random.SeedSequence((seed, number)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


class SyntheticClips(Dataset[Clip]):
    """Clip `number` of a split, by `dataset[number]` for any number from 0; there is no end.

    Args:
        split: "train", "val" or "test".
        num_queries: N, drawn by `fourdperf.data.query_sampling` and answered exactly.
        num_frames: T of the clips.
        size: (H, W) of the frames.
        patch_size: (H', W') of `patch_video`, for RGB patches finer than the frames: scenes are rendered in this size
            and squeezed; None: the frames themselves.
        seed: of the questions and augmentations, not of the scenes.
        scenes: how many different scenes there are; None for a new one each time.
        cache: a folder for rendered scenes, made if it is missing.
        colours: how colours change; None for not at all.
        view: crop, zoom and stride; a stride above 1 renders so many times more frames.

    Raises:
        OSError: the cache cannot be written.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        split: Split,
        num_queries: int,
        num_frames: int = 8,
        size: tuple[int, int] = (64, 64),
        *,
        patch_size: tuple[int, int] | None = None,
        seed: int = 0,
        scenes: int | None = None,
        cache: str | os.PathLike | None = None,
        colours: PhotometricConfig | None = None,
        view: ViewConfig | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: wanted one of {', '.join(SPLITS)}, got {split!r}")
        for name, value in {"num_queries": num_queries, "num_frames": num_frames, "scenes": scenes}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")
        self.split, self.num_queries, self.num_frames, self.size = split, num_queries, num_frames, size
        if patch_size is not None and not all(fine >= coarse for fine, coarse in zip(patch_size, size, strict=True)):
            raise ValueError(f"patch_size: wanted at least the frames' {size}, got {patch_size}")
        self.rendered_size = patch_size or size
        self.seed, self.scenes, self.colours, self.view = seed, scenes, colours, view or ViewConfig()
        self.rendered_frames = (num_frames - 1) * self.view.stride + 1
        self.folder = None
        if cache is not None:
            self.folder = Path(cache) / "x".join(map(str, (self.rendered_frames, *self.rendered_size)))
            self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """The clips of one pass over all scenes."""
        if self.scenes is None:
            raise TypeError("SyntheticClips without a number of scenes has no end, and so no length")
        return self.scenes

    def scene(self, index: int) -> Scene:
        """The split's scene number `index`."""
        return Scene(scene_seed(self.split, index), num_frames=self.rendered_frames, size=self.rendered_size)

    def index(self, number: int) -> int:
        """Which scene clip `number` shows."""
        if self.scenes is None:
            return number
        visit, position = divmod(number, self.scenes)
        return int(_order(self.scenes, visit, self.seed)[position])

    def __getitem__(self, number: int) -> Clip:
        index, generator = self.index(number), clip_generator(self.seed, number)
        scene = self.scene(index)
        pixels = self._pixels(scene, index)
        view = sample_view(self.rendered_frames, self.num_frames, self.view, generator)
        sizes = dict.fromkeys((self.size, self.rendered_size))
        videos = recoloured([_seen(view, pixels[..., :3], size) for size in sizes], self.colours, generator)
        boundary = view.video(pixels[..., 3:].float(), self.size)[..., 0] > 0.5
        queries = sample_queries(self.num_queries, boundary, generator)
        asked = view.to_video(queries)
        there = None if view.whole else scene.answer(Queries(asked.uv, asked.t_src, asked.t_tgt, asked.t_tgt))
        targets = view.to_view(queries, scene.answer(asked), there)
        ratio = torch.tensor(view.aspect_ratio(float(scene.aspect_ratio)))
        return Clip(videos[0], ratio, videos[-1], queries, targets)

    def _pixels(self, scene: Scene, index: int) -> Tensor:
        """uint8 (F, H, W, 4), from the cache if it is there and complete."""
        if self.folder is None:
            return torch.from_numpy(_render(scene))
        path = self.folder / f"{scene_seed(self.split, index):09d}.npy"
        shape = (self.rendered_frames, *self.rendered_size, 4)
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
            if pixels.shape == shape and pixels.dtype == np.uint8:
                return torch.from_numpy(np.array(pixels))
        except (FileNotFoundError, ValueError, EOFError):  # not there yet, or cut off
            pass
        pixels = _render(scene)
        with atomic_path(path) as temporary:
            np.save(temporary, pixels)
        return torch.from_numpy(pixels)


def _seen(view: View, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """What the view shows of uint8 frames; whole frames are squeezed as for inference (Lanczos)."""
    if view.whole and tuple(frames.shape[1:3]) != size:
        frames = torch.stack([torch.from_numpy(resize_frame(frame.numpy(), size)) for frame in frames])
    return view.video(frames.float() / 255, size)


def _render(scene: Scene) -> np.ndarray:
    rendering = scene.render()
    colours = (rendering.video * 255).round().clamp(0, 255).byte()
    edges = boundaries(rendering.depth, rendering.flow).byte()
    return torch.cat([colours, edges[..., None]], -1).numpy()


@functools.lru_cache(2)
def _order(scenes: int, visit: int, seed: int) -> Tensor:
    """The order of the scenes in a pass over all of them: a permutation of range(scenes)."""
    return torch.randperm(scenes, generator=clip_generator(seed, 2**32 - 1 - visit))
