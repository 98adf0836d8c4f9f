"""A model that knows: D4RT's interface, answered from the exact geometry of a synthetic scene."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.models.d4rt import Prediction

SURE, UNSURE = 20.0, -20.0


class Oracle(nn.Module):
    """Answers about ``scene``. It knows which part of the scene a clip shows, since frame t of the videos made by
    `frames` is grey of level t. Each chunk may have a scale of its own, by its first frame, and ``doubt`` is the share
    of answers that are nonsense, and say so by their confidence."""

    def __init__(self, scene: Scene, num_frames: int, scales: dict[int, float] | None = None, doubt: float = 0.0):
        super().__init__()
        self.scene, self.scales, self.doubt = scene, scales or {}, doubt
        self.config = SimpleNamespace(num_frames=num_frames, image_size=scene.size)
        self.encodings, self.asked, self.largest = 0, 0, 0

    def frames(self, size=None) -> torch.Tensor:
        levels = torch.arange(self.scene.num_frames, dtype=torch.uint8)
        return levels[:, None, None, None].expand(-1, *(size or self.scene.size), 3).contiguous()

    def encode(self, video, aspect_ratio=None, patch_video=None):
        assert video.shape[2:] == (*self.scene.size, 3) and video.dtype == torch.float32
        assert video.shape[1] <= self.config.num_frames
        self.encodings += 1
        self.ratio, self.patches = aspect_ratio, patch_video
        return SimpleNamespace(start=round(255 * video[0, 0, 0, 0, 0].item()), length=video.shape[1])

    def decode(self, encoded, queries: Queries) -> Prediction:
        uv, *times = (part[0] for part in queries)
        for time in times:
            assert time.dtype == torch.int64 and ((time >= 0) & (time < encoded.length)).all()
        self.asked, self.largest = self.asked + len(uv), max(self.largest, len(uv))
        answer = self.scene.answer(Queries(uv, *(encoded.start + time for time in times)))
        scale = self.scales.get(encoded.start, 1.0)
        xyz, confidence = scale * answer.xyz, torch.full_like(answer.visibility, SURE)
        if self.doubt:
            generator = torch.Generator().manual_seed(self.asked)
            wrong = torch.rand(len(uv), generator=generator) < self.doubt
            xyz = torch.where(wrong[:, None], 10 * torch.randn(len(uv), 3, generator=generator), xyz)
            confidence = torch.where(wrong, UNSURE, confidence)
        visibility = torch.where(answer.visibility > 0.5, SURE, UNSURE)
        parts = (xyz, answer.uv, visibility, scale * answer.displacement, 3 * answer.normal, confidence)
        return Prediction(*(part[None] for part in parts))


def true_poses(scene: Scene) -> torch.Tensor:
    """world_from_camera with the camera of frame 0 as the world."""
    poses = scene.world_from_camera.double()
    return torch.linalg.inv(poses[0]) @ poses


def angle_degrees(rotation: torch.Tensor) -> torch.Tensor:
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((trace - 1) / 2).clamp(-1, 1).acos() * 180 / math.pi
