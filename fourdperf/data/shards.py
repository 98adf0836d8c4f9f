"""WebDataset shards: tar files of generic folders, read from front to back, for data on network or object storage.

A sample is a scene of the generic layout (`fourdperf.data.folder`): SCENE/frames/00000.png is the member
SCENE.frames.00000.png, and the members of a scene follow one another; scenes' names have no dots.
`fourdperf.data.export.pack_shard` writes them, `fourdperf export_scenes --layout shards` makes some.

Shards are shared out among processes (torch.distributed, or RANK and WORLD_SIZE) and DataLoader workers, so that there
must be as many shards as processes times workers. The package webdataset is needed: `pip install 'fourdperf[shards]'`.
"""

import itertools
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from fourdperf.data.folder import Folder
from fourdperf.data.queries import Clip
from fourdperf.data.scene_files import MemoryFiles
from fourdperf.data.synthetic import clip_generator
from fourdperf.data.video_dataset import ClipConfig, clip_of

__all__ = ["ShardDataset", "find_shards"]


def find_shards(path: str | os.PathLike) -> list[str]:
    """The shard ``path``, or those in the folder ``path`` in the order of their names; none if there is none."""
    path = Path(path)
    if path.is_file() and path.suffix == ".tar":
        return [str(path)]
    return sorted(str(file) for file in path.glob("*.tar")) if path.is_dir() else []


class ShardDataset(IterableDataset[Clip]):
    """One clip of every scene per pass, shard by shard in an order that is new in every pass.

    Args:
        shards: paths or URLs, as WebDataset takes them.
        config: what a clip is made of.
        seed: of everything random.
        passes: how many; None for no end, as training wants it.

    Raises:
        ImportError: webdataset is not installed.
        ValueError: there is no shard, or `config` is out of range; while reading: a shard is corrupt or cut off, a
            scene is wrong or shorter than a clip, or this process or worker has no shard.
    """

    def __init__(self, shards: Sequence[str], config: ClipConfig, seed: int = 0, passes: int | None = None):
        _webdataset()
        if not shards:
            raise ValueError("shards: wanted at least one, got none")
        config.check()
        self.shards, self.config, self.seed, self.passes = list(shards), config, seed, passes

    def __iter__(self) -> Iterator[Clip]:
        for visit in itertools.count() if self.passes is None else range(self.passes):
            samples = 0
            for sample in _explained(self._samples(visit)):
                samples += 1
                name = sample["__key__"]
                contents = {_member(key): value for key, value in sample.items() if not key.startswith("__")}
                source = Folder(MemoryFiles(f"{sample['__url__']}: {name}", contents))
                state = zlib.crc32(f"{visit} {name}".encode())
                yield clip_of(source, self.config, clip_generator(self.seed, state))
            if not samples:
                raise ValueError(
                    f"shards: wanted at least one for each process and worker, got {len(self.shards)} in all"
                )

    def _samples(self, visit: int) -> Iterable[dict]:
        """The scenes of this process's and worker's shards: file names and contents."""
        wds = _webdataset()
        order = torch.randperm(len(self.shards), generator=clip_generator(self.seed, visit))
        return wds.WebDataset(
            [self.shards[i] for i in order],
            shardshuffle=False,
            nodesplitter=wds.split_by_node,
            workersplitter=wds.split_by_worker,
            handler=wds.reraise_exception,
            empty_check=False,
        )


def _webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("reading tar shards needs webdataset: pip install 'fourdperf[shards]'") from error
    return webdataset


def _member(key: str) -> str:
    """A file's name in its scene: `frames.00000.png` was `frames/00000.png`; `cameras.npz` has no folder."""
    folder, _, file = key.partition(".")
    return f"{folder}/{file}" if "." in file else key


def _explained(samples: Iterable[dict]) -> Iterator[dict]:
    """Turns what tarfile and WebDataset say of a broken shard into one error."""
    try:
        yield from samples
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"shards: corrupt or cut off: {error}") from error
