"""Pictures of a run: what the model sees, the depth it tells, and the true one."""

from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor

from fourdperf.data.pictures import DepthColours, enlarge, label, side_by_side, stack
from fourdperf.data.queries import Clip, Queries
from fourdperf.data.synthetic import SyntheticClips
from fourdperf.metrics.depth import align_depth
from fourdperf.reconstruct.recipes import pixel_centres
from fourdperf.train.callbacks import RunPictures

__all__ = ["Pictures", "depth_queries"]

CLIPS, FRAMES, PANEL = 2, 4, 128


class Pictures(RunPictures):
    """At every validation, of the first clips: frames, predicted depth, and of synthetic scenes the truth, with its
    scale."""

    def __init__(self, out: Path, clips) -> None:
        super().__init__(out)
        self.clips = clips

    def pictures(self, module: LightningModule) -> dict[str, np.ndarray]:
        return {"depth": stack([self._rows(module, number) for number in range(min(CLIPS, len(self.clips)))], gap=12)}

    def _rows(self, module: LightningModule, number: int) -> np.ndarray:
        clip = self.clips[number]
        size = tuple(n // 2 for n in clip.video.shape[1:3])
        queries = depth_queries(len(clip.video), size)
        depth = _ask(module, clip, queries).reshape(len(clip.video), *size)
        true = None
        if isinstance(self.clips, SyntheticClips):
            true = self.clips.scene(self.clips.index(number)).answer(queries).xyz[:, 2].reshape(depth.shape)
            scale, _ = align_depth(depth.flatten().double(), true.flatten().double(), "scale")
            depth = depth * scale.float()
        colours = DepthColours.fit((depth if true is None else true).numpy())
        shown = range(0, len(depth), max(1, len(depth) // FRAMES))
        frames = (clip.video * 255).round().byte().numpy()
        rows = [label(_row([frames[t] for t in shown]), "frames")]
        rows.append(label(_row([colours(depth[t].numpy()) for t in shown]), "predicted depth"))
        if true is not None:
            rows.append(label(_row([colours(true[t].numpy()) for t in shown]), "true depth"))
        return stack(rows)


def depth_queries(frames: int, size: tuple[int, int]) -> Queries:
    """The pixels of (h, w) = `size` of every frame at its own time and in its own camera, `(frames * h * w,)`."""
    uv = pixel_centres(size)
    t = torch.arange(frames).repeat_interleave(len(uv))
    return Queries(uv.repeat(frames, 1), t, t, t)


@torch.inference_mode()
def _ask(module: LightningModule, clip: Clip, queries: Queries) -> Tensor:
    move = lambda x: x[None].to(module.device)
    inputs = Clip(move(clip.video), move(clip.aspect_ratio), move(clip.patch_video), Queries(*map(move, queries)), None)
    training = module.training
    depth = module.eval()(inputs).xyz[0, :, 2].float().cpu()
    module.train(training)
    return depth


def _row(images: list[np.ndarray]) -> np.ndarray:
    return side_by_side([enlarge(image, PANEL, PANEL) for image in images])
