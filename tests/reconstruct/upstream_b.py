"""The second port's model, as small as its golden files need it, to be asked through D4RT's interface."""

import json
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fourdperf.models.d4rt import Prediction


class UpstreamB(torch.nn.Module):
    def __init__(self, file):
        super().__init__()
        self.settings = json.loads(str(file["config"]))
        self.config = SimpleNamespace(num_frames=4, image_size=(16, 16))
        self.p = {k.removeprefix("params/"): torch.from_numpy(file[k]) for k in file.files if k.startswith("params/")}

    def linear(self, name, x):
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def mlp(self, name, x, names=("fc1", "fc2")):
        return self.linear(f"{name}.{names[1]}", F.gelu(self.linear(f"{name}.{names[0]}", x)))

    def attend(self, *qkv):
        heads = self.settings["num_heads"]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)

    def encode(self, video, aspect_ratio=None, patch_video=None):
        weight, bias = (self.p[f"encoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
        x = F.conv3d(video.movedim(-1, 1), weight, bias, stride=weight.shape[2:])
        slots = x.shape[2]
        x = x.flatten(2).mT + self.p["encoder.pos_embed"]
        for i in range(self.settings["encoder"]["depth"]):
            name, local = f"encoder.blocks.{i}", i % 2 == 0
            attention = f"{name}.attn.attention" if local else f"{name}.attn"
            y = self.norm(f"{name}.norm1", x)
            y = y.unflatten(1, (slots, -1)) if local else y
            y = self.attend(*self.linear(f"{attention}.qkv", y).chunk(3, -1))
            x = x + self.linear(f"{attention}.proj", y.flatten(1, -2))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))
        return self.norm("encoder.norm", x), video

    def patches(self, video, uv, t_src):
        size, batch = video.shape[2:4], torch.arange(len(video))[:, None]
        place = uv * torch.tensor([size[1] - 1, size[0] - 1])
        place = place[..., None, None, :] + self.p["decoder.patch_embed.offsets"]
        x, y = (place[..., i].clamp(0, n - 1) for i, n in ((0, size[1]), (1, size[0])))
        result = 0
        for dx in (0, 1):
            for dy in (0, 1):
                column, row = (p.floor().long().add(d) for p, d in ((x, dx), (y, dy)))
                weight = (1 - (x - x.floor() - dx).abs()) * (1 - (y - y.floor() - dy).abs())
                row, column = row.clamp_max(size[0] - 1), column.clamp_max(size[1] - 1)
                pixel = video[batch[..., None, None], t_src[..., None, None], row, column]
                result = result + weight[..., None] * pixel
        return result.flatten(2)

    def decode(self, encoded, queries):
        features, video = encoded
        uv, t_src, t_tgt, t_cam = queries
        angle = 2 * math.pi * uv[..., None] * self.p["decoder.fourier_embed.freqs"]
        x = self.p["decoder.query_token"] + self.linear(
            "decoder.fourier_embed.proj", torch.cat([angle.sin(), angle.cos()], -1).flatten(2)
        )
        for name, t in (("src", t_src), ("tgt", t_tgt), ("cam", t_cam)):
            x = x + self.p[f"decoder.timestep_embed.{name}_embedding.weight"][t]
        x = x + self.mlp("decoder.patch_embed.mlp", self.patches(video, uv, t_src), ("0", "2"))
        for i in range(self.settings["decoder_depth"]):
            name = f"decoder.blocks.{i}"
            y, memory = self.norm(f"{name}.norm1", x), self.norm(f"{name}.norm_kv", features)
            q = self.linear(f"{name}.cross_attn.q_proj", y)
            k, v = (self.linear(f"{name}.cross_attn.{part}_proj", memory) for part in "kv")
            x = x + self.linear(f"{name}.cross_attn.proj", self.attend(q, k, v))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))
        x = self.norm("decoder.norm", x)
        heads = (self.linear(f"decoder.head_{name}", x) for name in ("3d", "2d", "vis", "disp", "normal", "conf"))
        return Prediction(*(head.squeeze(-1) if head.shape[-1] == 1 else head for head in heads))
