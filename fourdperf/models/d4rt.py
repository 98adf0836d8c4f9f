"""D4RT: a video is encoded once, then any number of independent queries ask where its points are.

    video (B, T, H, W, 3), aspect ratio (B,)
      | patches, learned spatial and temporal positions; an aspect-ratio token comes last     Tokenizer
    tokens (B, t h w + 1, D)
      | attention within a frame and over all tokens in turn, then a norm                     Encoder
    features (B, t h w + 1, D)
      | keys and values of every decoder layer, once per clip                                 D4RT.encode
    queries (B, N): (u, v), t_src, t_tgt, t_cam
      | Fourier features of (u, v), three time embeddings, the RGB patch in frame t_src       QueryBuilder
    query tokens (B, N, E)
      | cross-attention to the features; queries never see each other                         CrossDecoder
      | one linear layer to 13 numbers, in fp32                                               D4RT.decode
    Prediction

A "frame" of the encoder is one temporal slot of its patches, so `patch_size[0]` frames of the video.

Source: "Efficiently Reconstructing Dynamic Scenes One D4RT at a Time" (arXiv 2512.08924). Where it is silent, we chose:
    decoder       heads of 64; for ViT-g a width of 1216, whose eight layers have the paper's 144 M parameters
    Fourier       octaves pi 2^k, k = 0..9: one-to-one on the whole frame, the shortest wave is 1/256 of it
    query         the sum of its embeddings, each as wide as the decoder
    RGB patch     sampled bilinearly around (u, v) itself, the border repeated; two linear layers with a GELU between
    aspect token  a linear layer of log(width / height). In frame-wise layers it takes no part in the attention and goes
                  through the MLP alone; global layers are where the tokens of the frames read it
    pixels        enter as 2 x - 1
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.data.queries import Queries
from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, int_tuple, set_field
from fourdperf.models.layers import (
    LAYER_NORM_EPS,
    CrossDecoder,
    Memory,
    PatchEmbedding,
    PreNormBlock,
    attention,
    in_chunks,
    like,
    linear_gelu,
    may_look,
    tap,
    wide,
)
from fourdperf.ops import fourier_linear, gather_patches, linear_range, octaves, window_attention
from fourdperf.ops.checks import no_autocast

MODEL = "d4rt"


class Variant(NamedTuple):
    """The sizes that a variant's name stands for."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    decoder_size: int
    decoder_layers: int
    decoder_heads: int


VARIANTS = {
    "tiny": Variant(192, 12, 3, 768, 192, 6, 3),
    "S": Variant(384, 12, 6, 1536, 384, 6, 6),
    "B": Variant(768, 12, 12, 3072, 768, 6, 12),
    "L": Variant(1024, 24, 16, 4096, 1024, 6, 16),
    "H": Variant(1280, 32, 16, 5120, 1024, 8, 16),
    "g": Variant(1408, 40, 16, 6144, 1216, 8, 19),
}

CHOICES = {
    "positions": ("factorised", "joint"),
    "local_attention": ("frame", "window", "none"),
    "window_border": ("mask", "shift", "zero"),
    "aspect_token": ("linear", "scaled"),
    "fourier": ("octaves", "linear"),
    "rgb_sampling": ("bilinear", "round"),
    "rgb_embedding": ("mlp", "conv"),
    "gelu": ("tanh", "none"),
}


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes and options of a D4RT; the defaults are the paper's (with `from_variant("g")`), or ours where it is silent.

    hidden_size, num_layers, num_heads, mlp_size: the encoder; the MLP has four times the width by default.
    num_frames: the longest clip, in frames, and the number of time embeddings.
    image_size: (height, width) that clips are squeezed to; one number stands for a square.
    patch_size: (frames, height, width) of an encoder's patch.
    decoder_size, decoder_layers, decoder_heads, decoder_mlp_size: the decoder; by default as wide as the encoder.
    num_bands: Fourier frequencies.
    rgb_size: side of the RGB patch.
    positions: "factorised" (temporal + spatial) or "joint" (one table, which takes 4DS's or VideoMAE's as it is).
    local_attention: of layers 0, 2, 4, ..: "frame" (all tokens of the frame), "window" or "none" (all layers global).
    window, window_border: keys per axis, and the border, of `fourdperf.ops.window_attention`.
    centered: pixels enter as 2 x - 1, else as they are.
    norm_eps, gelu: of all LayerNorms, and F.gelu's `approximate`.

    Of the seed's port (`Config.seed`):
    patch_norm: a LayerNorm between patch embedding and positions.
    aspect_token: "scaled" is token * (1 + 0.1 ratio), the bare token where no ratio is given.
    drop_last_frames: frames that do not fill a patch are dropped; else the last one is repeated to fill it.
    fourier: "linear" has frequencies 2 pi linspace(0.5, num_bands, num_bands).
    rgb_sampling: "round" cuts whole pixels around (u W, v H) rounded half to even, moved inside the frame.
    rgb_embedding: "conv" is a 3 x 3 convolution, a ReLU and a linear layer.
    query_parts: widths of the (Fourier, time, RGB) embeddings, which are then joined and projected; None adds them.
    project_memory: a linear layer from the features to the decoder's width, before keys and values.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int | None = None
    num_frames: int = 48
    image_size: int | tuple[int, int] = (256, 256)
    patch_size: tuple[int, int, int] = (2, 16, 16)
    decoder_size: int | None = None
    decoder_layers: int = 8
    decoder_heads: int | None = None
    decoder_mlp_size: int | None = None
    num_bands: int = 10
    rgb_size: int = 9
    positions: str = "factorised"
    local_attention: str = "frame"
    window: int = 7
    window_border: str = "mask"
    centered: bool = True
    norm_eps: float = LAYER_NORM_EPS
    gelu: str = "tanh"
    patch_norm: bool = False
    aspect_token: str = "linear"
    drop_last_frames: bool = False
    fourier: str = "octaves"
    rgb_sampling: str = "bilinear"
    rgb_embedding: str = "mlp"
    query_parts: tuple[int, int, int] | None = None
    project_memory: bool = False

    def __post_init__(self):
        check_int("hidden_size", self.hidden_size)
        for name, default in (("mlp_size", 4 * self.hidden_size), ("decoder_size", self.hidden_size)):
            set_field(self, name, default if getattr(self, name) is None else getattr(self, name))
        check_int("decoder_size", self.decoder_size)
        for name, default in (("decoder_heads", self.num_heads), ("decoder_mlp_size", 4 * self.decoder_size)):
            set_field(self, name, default if getattr(self, name) is None else getattr(self, name))
        for field in dataclasses.fields(self):
            if field.type in (int, int | None):
                check_int(field.name, getattr(self, field.name))
        for size, heads in (("hidden_size", "num_heads"), ("decoder_size", "decoder_heads")):
            width, number = getattr(self, size), getattr(self, heads)
            if width % number:
                raise ValueError(f"{size}: expected a multiple of {heads} {number}, got {width}")
        image = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        set_field(self, "image_size", int_tuple("image_size", image, 2))
        set_field(self, "patch_size", int_tuple("patch_size", self.patch_size, 3))
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size[1:])):
            raise ValueError(f"image_size: expected multiples of the patch {self.patch_size}, got {self.image_size}")
        if 0 in self.grid:
            raise ValueError(f"num_frames: expected at least one patch of {self.patch_size}, got {self.num_frames}")
        if self.query_parts is not None:
            set_field(self, "query_parts", int_tuple("query_parts", self.query_parts, 3))
        check_choices(self, CHOICES)
        if not (isinstance(self.norm_eps, float) and self.norm_eps > 0):
            raise ValueError(f"norm_eps: expected a positive number, got {self.norm_eps!r}")

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "Config":
        """The config of a size: `Config.from_variant("B", num_frames=16)`. Raises ValueError for unknown names."""
        if name not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
        return cls.from_dict({**VARIANTS[name]._asdict(), **overrides})

    @classmethod
    def seed(cls, **overrides) -> "Config":
        """The port "d4rt" that this project grew from, as its full model runs: its sizes and every choice it made."""
        fields = {
            **{"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_frames": 100, "local_attention": "none"},
            **{"decoder_size": 512, "decoder_layers": 6, "decoder_heads": 8, "decoder_mlp_size": 2048},
            **{"window_border": "zero", "centered": False, "norm_eps": 1e-5, "gelu": "none", "patch_norm": True},
            **{"aspect_token": "scaled", "drop_last_frames": True, "fourier": "linear", "rgb_sampling": "round"},
            **{"rgb_embedding": "conv", "query_parts": (128, 64, 128), "project_memory": True},
        }
        return cls.from_dict({**fields, **overrides})

    @property
    def grid(self) -> tuple[int, int, int]:
        """The most patches along time, and the patches along height and width."""
        frames = self.num_frames if self.drop_last_frames else self.num_frames + self.patch_size[0] - 1
        return (frames // self.patch_size[0], *(size // p for size, p in zip(self.image_size, self.patch_size[1:])))


class Prediction(NamedTuple):
    """The answers to N queries, in fp32 (fp64 for an fp64 model); `Targets` says what each means.

    xyz           (B, N, 3) the point at time t_tgt in the camera of t_cam
    uv            (B, N, 2) its projection into the frame of t_cam
    visibility    (B, N)    logit: does the frame of t_tgt show it
    displacement  (B, N, 3) its motion from t_src to t_tgt, in the camera of t_cam
    normal        (B, N, 3) surface normal at time t_tgt in the camera of t_cam, of any length
    confidence    (B, N)    logit of the confidence in xyz
    """

    xyz: Tensor
    uv: Tensor
    visibility: Tensor
    displacement: Tensor
    normal: Tensor
    confidence: Tensor


SIZES = (3, 2, 1, 3, 3, 1)
CONV_CHANNELS = 64  # of the seed's PatchConv


class Encoded(NamedTuple):
    """A clip, ready for queries.

    features     (B, t h w + 1, D) of the encoder, the aspect-ratio token last
    memory       keys and values of every decoder layer
    patch_video  (B, T, H', W', 3) the frames that RGB patches are cut from
    """

    features: Tensor
    memory: Memory
    patch_video: Tensor


class AspectToken(nn.Module):
    """The ratio width / height before the squeeze, `(B,)` -> a token `(B, 1, D)`; see Config.aspect_token."""

    def __init__(self, features: int, kind: str):
        super().__init__()
        self.projection = nn.Linear(1, features) if kind == "linear" else None
        self.token = nn.Parameter(torch.empty(features)) if kind == "scaled" else None

    def forward(self, ratio: Tensor) -> Tensor:
        ratio = ratio[:, None, None]
        return self.projection(ratio.log()) if self.token is None else self.token * (1 + 0.1 * ratio)


class Tokenizer(nn.Module):
    """Video `(B, T, H, W, 3)` and ratio `(B,)` -> tokens `(B, t h w + 1, D)`; T may be less than the config's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, (frames, *space) = config.hidden_size, config.grid
        joint = config.positions == "joint"
        self.patch_embedding = PatchEmbedding(config.patch_size, 3, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.patch_norm else nn.Identity()
        self.posenc = nn.Parameter(torch.empty(frames, *space, width)) if joint else None
        self.temporal = None if joint else nn.Parameter(torch.empty(frames, width))
        self.spatial = None if joint else nn.Parameter(torch.empty(*space, width))
        self.aspect = AspectToken(width, config.aspect_token)

    def forward(self, video: Tensor, ratio: Tensor) -> Tensor:
        missing = -video.shape[1] % self.config.patch_size[0]
        if missing and not self.config.drop_last_frames:
            video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        if self.config.centered:
            video = 2 * video - 1
        frames = video.shape[1] // self.config.patch_size[0]
        tokens = self.norm(self.patch_embedding(video)) + self.positions(frames).flatten(0, 2)
        return torch.cat([tokens, self.aspect(ratio).to(tokens.dtype)], dim=1)

    def positions(self, frames: int) -> Tensor:
        """`(t, h, w, D)` of the first frames."""
        return self.temporal[:frames, None, None] + self.spatial if self.posenc is None else self.posenc[:frames]


class EncoderBlock(PreNormBlock):
    """PreNormBlock on tokens `(B, t h w + 1, D)`, whose attention stays within a frame where `local`.

    Then the last token, which belongs to no frame, skips the attention.
    """

    def __init__(self, config: Config, local: bool):
        sizes = (config.hidden_size, config.num_heads, config.mlp_size)
        super().__init__(*sizes, eps=config.norm_eps, approximate=config.gelu)
        self.config, self.local = config, local

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.local:
            return super().forward(tokens)
        frames, last = tokens[:, :-1], tokens[:, -1:]
        frames = frames + self.attention(self.attention_norm(frames), self.attend)
        tokens = torch.cat([frames, last], dim=1)
        return tokens + self.mlp(self.mlp_norm(tokens))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`(B, t h w, heads, d)`, each frame for itself."""
        height, width = self.config.grid[1:]
        heads = [x.unflatten(1, (-1, height, width)) for x in (query, key, value)]  # (B, t, h, w, heads, d)
        if self.config.local_attention == "window":
            return window_attention(*heads, self.config.window, border=self.config.window_border).flatten(1, 3)
        return (
            attention(*(x.flatten(2, 3).flatten(0, 1) for x in heads)).unflatten(0, (query.shape[0], -1)).flatten(1, 2)
        )


class Encoder(nn.Module):
    """Video `(B, T, H, W, 3)` and ratio `(B,)` -> features `(B, t h w + 1, D)`."""

    def __init__(self, config: Config):
        super().__init__()
        self.tokenizer = Tokenizer(config)
        local = config.local_attention != "none"
        self.layers = nn.ModuleList(EncoderBlock(config, local and i % 2 == 0) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, video: Tensor, ratio: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        tokens = self.tokenizer(video, ratio)
        tap(taps, "tokens", tokens)
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens)
            tap(taps, f"encoder/{index:02d}", tokens)
        features = self.norm(tokens)
        tap(taps, "encoder/norm", features)
        return features


class PatchMLP(nn.Module):
    """RGB patches `(B, N, s, s, 3)` -> `(B, N, E)`."""

    def __init__(self, size: int, features: int, approximate: str):
        super().__init__()
        self.approximate = approximate
        self.dense_in = nn.Linear(3 * size**2, features)
        self.dense_out = nn.Linear(features, features)

    def forward(self, patches: Tensor) -> Tensor:
        return self.dense_out(linear_gelu(patches.flatten(-3), self.dense_in, self.approximate))


class PatchConv(nn.Module):
    """RGB patches `(B, N, s, s, 3)` -> `(B, N, E)`, the seed's network."""

    def __init__(self, size: int, features: int):
        super().__init__()
        self.conv = nn.Conv2d(3, CONV_CHANNELS, 3, padding=1)
        self.dense = nn.Linear(CONV_CHANNELS * size**2, features)

    def forward(self, patches: Tensor) -> Tensor:
        channels_first = patches.flatten(0, 1).movedim(-1, 1).contiguous()  # and so is `hidden`, without a copy
        hidden = F.relu(self.conv(channels_first))
        return self.dense(hidden.flatten(1)).unflatten(0, patches.shape[:2])


class QueryBuilder(nn.Module):
    """Queries and frames `(B, T, H', W', 3)` of any resolution -> query tokens `(B, N, E)`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.decoder_size
        fourier, time, rgb = config.query_parts or (width, width, width)
        self.fourier = nn.Linear(4 * config.num_bands, fourier)
        self.t_src, self.t_tgt, self.t_cam = (nn.Embedding(config.num_frames, time) for _ in range(3))
        mlp = config.rgb_embedding == "mlp"
        self.rgb = PatchMLP(config.rgb_size, rgb, config.gelu) if mlp else PatchConv(config.rgb_size, rgb)
        self.projection = nn.Linear(fourier + 3 * time + rgb, width) if config.query_parts else None
        # what lives at once: five embeddings, the RGB patch and its hidden layer, each before and after a step
        hidden = rgb if mlp else CONV_CHANNELS * config.rgb_size**2
        self.floats_per_query = 5 * width + 2 * (3 * config.rgb_size**2 + hidden)

    def forward(self, queries: Queries, frames: Tensor) -> Tensor:
        parts = [
            self.embed_uv(queries.uv),
            self.t_src(queries.t_src),
            self.t_tgt(queries.t_tgt),
            self.t_cam(queries.t_cam),
            self.rgb(self.patches(queries, frames)),
        ]
        return sum(parts) if self.projection is None else self.projection(torch.cat(parts, dim=-1))

    def embed_uv(self, uv: Tensor) -> Tensor:
        """`(B, N, 2)` -> `(B, N, width of the part)`."""
        bands, device = self.config.num_bands, uv.device
        octave = self.config.fourier == "octaves"
        make = (
            octaves(bands, scale=math.pi, device=device) if octave else linear_range(0.5, bands, bands, device=device)
        )
        uv = uv.to(wide(self.fourier.weight.dtype))
        return fourier_linear(uv, make, self.fourier.weight, self.fourier.bias)

    def patches(self, queries: Queries, frames: Tensor) -> Tensor:
        """RGB patches `(B, N, s, s, 3)` around (u, v) in frame t_src."""
        how = {"mode": "bilinear", "coordinates": "centers", "border": "replicate"}
        if self.config.rgb_sampling == "round":
            how = {"mode": "round", "coordinates": "scaled", "border": "shift"}
        patches = gather_patches(frames, queries.t_src, queries.uv, self.config.rgb_size, **how)
        patches = patches.to(self.fourier.weight.dtype)
        if frames.dtype == torch.uint8:
            patches = patches / 255
        return 2 * patches - 1 if self.config.centered else patches


class D4RT(PretrainedModel):
    """D4RT: encode a clip once, decode any number of queries about it.

        encoded = model.encode(video)
        answers = model.decode(encoded, queries)          or model(video, queries) for both

    Pixels are 0..1; values are not inspected: a NaN in a clip makes that clip's answers NaN. Queries run in chunks
    whose activations fit `model.decoder.memory_budget` bytes, so that memory does not grow with their number.
    """

    MODEL, CONFIG, DTYPE = MODEL, Config, torch.float32

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.decoder_size
        self.encoder = Encoder(config)
        self.memory_projection = nn.Linear(config.hidden_size, width) if config.project_memory else nn.Identity()
        self.query_builder = QueryBuilder(config)
        self.decoder = CrossDecoder(
            *(width, config.decoder_layers, config.decoder_heads, config.decoder_mlp_size),
            width if config.project_memory else config.hidden_size,
            eps=config.norm_eps,
            approximate=config.gelu,
        )
        self.decoder.floats_per_query = max(self.decoder.floats_per_query, self.query_builder.floats_per_query)
        self.head = nn.Linear(width, sum(SIZES))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters: normal of 0.02, cut at two deviations, as ViTs start from scratch; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)  # as large as the Fourier part of a query
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("posenc", "temporal", "spatial", "token"):
                    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        if self.encoder.tokenizer.aspect.projection is not None:
            nn.init.normal_(
                self.encoder.tokenizer.aspect.projection.bias, std=0.02
            )  # log 1 = 0 must not give a token 0
        nn.init.trunc_normal_(self.head.weight, std=0.002, a=-0.004, b=0.004)
        self.head.bias[2], self.head.bias[3:5] = 1.0, 0.5  # answers start in front of the camera, mid-frame

    def forward(
        self,
        video: Tensor,
        queries: Queries,
        aspect_ratio: Tensor | None = None,
        patch_video: Tensor | None = None,
        taps: dict[str, Tensor] | None = None,
    ) -> Prediction:
        """`encode`, then `decode`."""
        return self.decode(self.encode(video, aspect_ratio, patch_video, taps), queries, taps)

    def encode(
        self,
        video: Tensor,
        aspect_ratio: Tensor | None = None,
        patch_video: Tensor | None = None,
        taps: dict[str, Tensor] | None = None,
    ) -> Encoded:
        """Everything about a clip that no query changes.

        video: `(B, T, H, W, 3)` floating, pixels 0..1, squeezed to the config's size; 1 <= T <= num_frames.
        aspect_ratio: `(B,)` width / height before the squeeze; None says that there was none.
        patch_video: `(B, T, H', W', 3)` the same frames in any resolution, floating 0..1 or uint8, that RGB patches are
            cut from; None means `video`.
        taps: filled with "tokens", "encoder/00" .., "encoder/norm".

        Raises ValueError that names the argument, what was wanted and what came.
        """
        video = self._check_video(video)
        patch_video = video if patch_video is None else self._check_patch_video(patch_video, video)
        features = self.encoder(video, self._ratio(aspect_ratio, video), taps)
        return Encoded(features, self.decoder.prepare(self.memory_projection(features)), patch_video)

    def decode(self, encoded: Encoded, queries: Queries, taps: dict[str, Tensor] | None = None) -> Prediction:
        """Answers to queries uv `(B, N, 2)`, t_src, t_tgt, t_cam `(B, N)` about the clips of `encode`.

        taps: filled with "queries", "decoder/00" .., "decoder/norm", "outputs".

        Raises ValueError as `encode` does.
        """
        queries = self._check_queries(queries, encoded)
        chunk = self.decoder.chunk_size(len(queries.uv), self.head.weight.element_size())
        decode = lambda *inputs: self._decode(Queries(*inputs[:-1]), encoded, inputs[-1])
        parts = in_chunks(decode, queries, chunk, taps).split(SIZES, dim=-1)
        return Prediction(*(x.squeeze(-1) if size == 1 else x for x, size in zip(parts, SIZES)))

    def _decode(self, queries: Queries, encoded: Encoded, taps: dict[str, Tensor] | None) -> Tensor:
        tokens = self.query_builder(queries, encoded.patch_video)
        tap(taps, "queries", tokens)
        tokens = self.decoder(tokens, encoded.memory, taps)
        with no_autocast(tokens.device.type):  # 8 bits would be too few for a position
            dtype = wide(self.head.weight.dtype)
            outputs = F.linear(tokens.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))
        tap(taps, "outputs", outputs)
        return outputs

    def _ratio(self, ratio: Tensor | None, video: Tensor) -> Tensor:
        batch, height, width = video.shape[0], *video.shape[2:4]
        if ratio is None:
            return video.new_full((batch,), 0.0 if self.config.aspect_token == "scaled" else width / height)
        if not isinstance(ratio, Tensor) or ratio.shape != (batch,):
            raise ValueError(f"aspect_ratio: expected a tensor (B={batch},), got {getattr(ratio, 'shape', ratio)!r}")
        ratio = like(ratio, self.head.weight, "aspect_ratio")
        if may_look(ratio) and not (ratio > 0).all():
            raise ValueError(f"aspect_ratio: expected width / height above 0, got {ratio.tolist()}")
        return ratio

    def _check_video(self, video: Tensor) -> Tensor:
        height, width = self.config.image_size
        first = self.config.patch_size[0] if self.config.drop_last_frames else 1
        wanted = f"(B, {first} <= T <= {self.config.num_frames}, {height}, {width}, 3)"
        if not isinstance(video, Tensor):
            raise ValueError(f"video: expected a tensor {wanted}, got {type(video).__name__}")
        if video.ndim != 5 or video.shape[2:] != (height, width, 3):
            hint = ": the batch axis is missing" if video.ndim == 4 and video.shape[-1] == 3 else ""
            raise ValueError(f"video: expected {wanted}, got {tuple(video.shape)}{hint}")
        if not first <= video.shape[1] <= self.config.num_frames:
            raise ValueError(f"video: expected {wanted}, got {tuple(video.shape)}")
        return like(video, self.head.weight, "video")

    def _check_patch_video(self, frames: Tensor, video: Tensor) -> Tensor:
        wanted = f"(B={video.shape[0]}, T={video.shape[1]}, H, W, 3)"
        if not isinstance(frames, Tensor) or frames.ndim != 5:
            raise ValueError(f"patch_video: expected a tensor {wanted}, got {getattr(frames, 'shape', frames)!r}")
        if frames.shape[:2] != video.shape[:2] or frames.shape[-1] != 3:
            raise ValueError(f"patch_video: expected {wanted}, got {tuple(frames.shape)}")
        if frames.device != video.device:
            raise ValueError(f"patch_video: expected it on {video.device} like the video, got {frames.device}")
        return frames

    def _check_queries(self, queries: Queries, encoded: Encoded) -> Queries:
        batch, frames, device = encoded.features.shape[0], encoded.patch_video.shape[1], encoded.features.device
        uv = queries.uv
        if uv.ndim != 3 or uv.shape[0] != batch or uv.shape[2] != 2 or not uv.is_floating_point():
            raise ValueError(f"queries.uv: expected floating (B={batch}, N, 2), got {uv.dtype} {tuple(uv.shape)}")
        for name, x in queries._asdict().items():
            if x.device != device:
                raise ValueError(f"queries.{name}: expected it on {device} like the clip, got {x.device}")
            if name == "uv":
                continue
            if x.dtype != torch.int64 or x.shape != uv.shape[:2]:
                raise ValueError(
                    f"queries.{name}: expected int64 (B, N) = {tuple(uv.shape[:2])}, got {x.dtype} {tuple(x.shape)}"
                )
            if may_look(x) and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < frames:
                raise ValueError(
                    f"queries.{name}: expected frames in [0, {frames - 1}], got {int(x.min())} to {int(x.max())}"
                )
        return queries
