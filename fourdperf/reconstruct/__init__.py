"""From a video and a D4RT model to depth, cameras, points and tracks, and from those to files and pictures."""

from fourdperf.reconstruct.long_video import reconstruct
from fourdperf.reconstruct.result import Reconstruction

__all__ = ["Reconstruction", "reconstruct"]
