"""Data sets as users write them, for the tests of `fourdperf train`: tiny, and with accidents where the environment
says so."""

import os
import signal

import torch

from fourdperf.data.synthetic import SyntheticClips

COUNT = 64
KEYS = ("video", "depth_maps", "coords_uv", "t_src", "t_tgt", "t_cam", "gt_3d", "intrinsics", "aspect_ratio")


class Clips:
    """Clips of synthetic scenes. ACCIDENT=kill:9 kills the process at the 9th item asked for, interrupt:9 is Ctrl-C
    there, nan:9 spoils item 9."""

    def __init__(self):
        self.clips = SyntheticClips("train", 32, 4, (16, 16), scenes=COUNT)
        self.asked = 0

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        kind, _, number = os.environ.get("ACCIDENT", ":-1").partition(":")
        self.asked += 1
        if kind == "kill" and self.asked == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "interrupt" and self.asked == int(number):
            raise KeyboardInterrupt
        clip = self.clips[index]
        if kind == "nan" and self.asked >= int(number):
            clip.video[0, 0, 0, 0] = torch.nan
        return clip


class Dictionaries:
    """The seed's dictionaries."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        values = (
            torch.rand(4, 3, 16, 16, generator=g),
            1 + torch.rand(4, 16, 16, generator=g),
            torch.rand(20, 2, generator=g),
            *torch.randint(4, (3, 20), generator=g),
            torch.rand(20, 3, generator=g) + torch.tensor([0.0, 0.0, 1.0]),
            torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]),
            1.5,
        )
        return dict(zip(KEYS, values))


def small():
    """Clips of another size than the tests train on."""
    return SyntheticClips("train", 8, 2, (8, 8), scenes=2)


def empty():
    return []


not_callable = 3
