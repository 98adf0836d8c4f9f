"""Scaling 4D Representations (4DS): a video ViT, and an attention readout on its features.

    video (B, T, H, W, C)
      | PatchEmbedding, learned positions                        Tokenizer
    tokens (B, t h w, D)
      | num_layers blocks of self-attention and MLP              GeneralizedTransformer
    features_0 .. features_L, each (B, N, D)
      | one feature, resized along time from t to T'             EncoderToReadout
    readout features (B, T', h w, D)
      | cross-attention from learned or given queries            AttentionReadout
    prediction (B, Q, classes), or (B, T, H, W, c) when patches are decoded

Source: "Scaling 4D Representations" (arXiv 2412.15212), google-deepmind/representations4d.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, from_fields, int_tuple, set_field
from fourdperf.models.layers import LAYER_NORM_EPS, MLP, PatchEmbedding, PreNormBlock, attention, like, may_look, tap
from fourdperf.ops import resize

MODEL = "scaling4d"
FINAL = "final"


class Variant(NamedTuple):
    """The sizes that a variant's name stands for."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int


VARIANTS = {
    "mu": Variant(32, 1, 2, 128),
    "Ti": Variant(192, 12, 3, 768),
    "S": Variant(384, 12, 6, 1536),
    "M": Variant(512, 12, 8, 2048),
    "B": Variant(768, 12, 12, 3072),
    "L": Variant(1024, 24, 16, 4096),
    "H": Variant(1280, 32, 16, 5120),
    "g": Variant(1408, 40, 16, 6144),
    "G": Variant(1664, 48, 16, 8192),
    "e": Variant(1792, 56, 16, 15360),
}


def parse_variant(name: str) -> tuple[str, int | None]:
    """Split "B", "ViT-B" or "vit_B/16" into the key of VARIANTS and the spatial patch size, if one is named.

    Raises ValueError with the list of names otherwise. Case matters: g and G are two sizes.
    """
    match = re.fullmatch(rf"(?:(?i:vit)[-_])?({'|'.join(VARIANTS)})(?:/([1-9]\d*))?", str(name))
    if not match:
        raise ValueError(
            f"variant: expected one of {', '.join(VARIANTS)}, optionally as ViT-<name> and with /<patch>, got {name!r}"
        )
    return match[1], match[2] and int(match[2])


@dataclass(frozen=True)
class ReadoutConfig:
    """EncoderToReadout and AttentionReadout.

    num_classes: size of the last axis of the output, before any decoding of patches.
    num_params, num_heads: width of the attention and its heads; the MLP has four times that width.
    num_frames: frames that the features are resized to along time.
    num_queries: learned queries; their axis is removed from the output when there is one.
    query_features: width of queries passed to `forward`; None means learned queries.
    depth: which feature is read; see `feature_index`.
    match_vjepa_implementation: LayerNorm before, biases on keys and values, residual MLP after the attention.
    add_temporal_posenc: a learned embedding per frame.
    num_test_clips: in eval mode, softmax and mean over so many neighbouring entries of the batch.
    output_shape, decoding_patch_size: (T, H, W) or (T, H, W, c), and the patch (t, h, w) that each query decodes to.
    """

    num_classes: int
    num_params: int
    num_heads: int
    num_frames: int
    num_queries: int = 1
    query_features: int | None = None
    depth: float = 0.95
    match_vjepa_implementation: bool = True
    add_temporal_posenc: bool = True
    num_test_clips: int = 1
    dropout_rate: float = 0.0
    output_shape: tuple[int, ...] | None = None
    decoding_patch_size: tuple[int, int, int] | None = None

    def __post_init__(self):
        for name in ("num_classes", "num_params", "num_heads", "num_frames", "num_queries", "num_test_clips"):
            check_int(f"readout.{name}", getattr(self, name))
        if self.query_features is not None:
            check_int("readout.query_features", self.query_features)
        if self.num_params % self.num_heads:
            raise ValueError(
                f"readout.num_params: expected a multiple of num_heads {self.num_heads}, got {self.num_params}"
            )
        if not 0 < self.depth <= 1:
            raise ValueError(f"readout.depth: expected a number in (0, 1], got {self.depth!r}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"readout.dropout_rate: expected a number in [0, 1), got {self.dropout_rate!r}")
        if (self.output_shape is None) != (self.decoding_patch_size is None):
            raise ValueError("readout.output_shape and readout.decoding_patch_size: give both or neither")
        if self.output_shape is not None:
            set_field(self, "output_shape", int_tuple("readout.output_shape", self.output_shape, 3, 4))
            set_field(
                self, "decoding_patch_size", int_tuple("readout.decoding_patch_size", self.decoding_patch_size, 3)
            )
            self._check_patches()

    def _check_patches(self) -> None:
        for size, patch in zip(self.output_shape, self.decoding_patch_size):
            if size % patch:
                raise ValueError(
                    f"readout.output_shape: expected multiples of the patch {self.decoding_patch_size}, "
                    f"got {self.output_shape}"
                )
        channels = self.output_shape[3] if len(self.output_shape) == 4 else 1
        classes = math.prod(self.decoding_patch_size) * channels
        if self.num_classes != classes:
            raise ValueError(
                f"readout.num_classes: patches {self.decoding_patch_size} of {channels} channels need {classes}, "
                f"got {self.num_classes}"
            )
        queries = math.prod(self.num_patches)
        if self.query_features is None and self.num_queries != queries:
            raise ValueError(f"readout.num_queries: {self.num_patches} patches need {queries}, got {self.num_queries}")

    @property
    def num_patches(self) -> tuple[int, int, int]:
        """Decoded patches along time, height and width."""
        return tuple(size // patch for size, patch in zip(self.output_shape, self.decoding_patch_size))

    @classmethod
    def dense(
        cls,
        output_shape: Sequence[int] = (16, 224, 224, 1),
        decoding_patch_size: Sequence[int] = (2, 8, 8),
        *,
        num_params: int = 1024,
        num_heads: int = 16,
        **options,
    ) -> "ReadoutConfig":
        """A readout with one value per pixel and channel; the defaults are those of the released depth model."""
        output_shape = int_tuple("output_shape", output_shape, 3, 4)
        patch = int_tuple("decoding_patch_size", decoding_patch_size, 3)
        return cls(
            **{
                "num_classes": math.prod(patch) * (output_shape[3] if len(output_shape) == 4 else 1),
                "num_params": num_params,
                "num_heads": num_heads,
                "num_frames": output_shape[0],
                "num_queries": math.prod(size // p for size, p in zip(output_shape, patch)),
                "output_shape": output_shape,
                "decoding_patch_size": patch,
                **options,
            }
        )


@dataclass(frozen=True)
class Config(BaseConfig):
    """Everything needed to rebuild a 4DS model.

    hidden_size, num_layers, num_heads, mlp_size: as in VARIANTS; mlp_size None means four times hidden_size.
    patch_size, video_size: (time, height, width); what is left over when a video is cut into patches is dropped.
    channels: of the video.
    n_iter: passes through the same layers; from the second on the tokens are appended again.
    qk_features, v_features: widths of queries and keys, and of values; None means hidden_size, and qk_features.
    block: pre_norm (every released model), post_norm or parallel.
    readout: None for the encoder alone.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int | None = None
    patch_size: tuple[int, int, int] = (2, 16, 16)
    video_size: tuple[int, int, int] = (16, 224, 224)
    channels: int = 3
    n_iter: int = 1
    qk_features: int | None = None
    v_features: int | None = None
    block: str = "pre_norm"
    readout: ReadoutConfig | None = None

    def __post_init__(self):
        check_int("hidden_size", self.hidden_size)
        set_field(self, "mlp_size", 4 * self.hidden_size if self.mlp_size is None else self.mlp_size)
        set_field(self, "qk_features", self.hidden_size if self.qk_features is None else self.qk_features)
        set_field(self, "v_features", self.qk_features if self.v_features is None else self.v_features)
        for name in ("num_layers", "num_heads", "mlp_size", "channels", "n_iter", "qk_features", "v_features"):
            check_int(name, getattr(self, name))
        for name in ("qk_features", "v_features"):
            size = getattr(self, name)
            if size % self.num_heads:
                raise ValueError(f"{name}: expected a multiple of num_heads {self.num_heads}, got {size}")
        set_field(self, "patch_size", int_tuple("patch_size", self.patch_size, 3))
        set_field(self, "video_size", int_tuple("video_size", self.video_size, 3))
        if 0 in self.grid:
            raise ValueError(f"video_size: expected at least one patch of {self.patch_size}, got {self.video_size}")
        check_choices(self, {"block": BLOCKS})
        if isinstance(self.readout, Mapping):
            set_field(self, "readout", from_fields(ReadoutConfig, self.readout, "readout."))
        if self.readout is not None and not isinstance(self.readout, ReadoutConfig):
            raise ValueError(f"readout: expected a ReadoutConfig or None, got {type(self.readout).__name__}")
        if self.readout is not None and self.n_iter > 1 and self.feature_index != 0:
            raise ValueError(f"n_iter: a readout needs features of one grid of tokens, so n_iter 1, got {self.n_iter}")

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "Config":
        """The config of a model size: `Config.from_variant("B", readout=ReadoutConfig.dense())`.

        A patch in the name ("B/14") sets the patch's height and width, where upstream ignores it; giving another
        `patch_size` as well is an error. Raises ValueError for unknown names and fields.
        """
        key, patch = parse_variant(name)
        fields = {**VARIANTS[key]._asdict(), **overrides}
        if patch is not None:
            given = fields.setdefault("patch_size", (cls.patch_size[0], patch, patch))
            if tuple(given[1:]) != (patch, patch):
                raise ValueError(f"patch_size: the variant {name!r} says {patch}x{patch}, got {tuple(given)}")
        return cls.from_dict(fields)

    @property
    def variant(self) -> str | None:
        """The key of VARIANTS with these sizes, or None."""
        sizes = Variant(self.hidden_size, self.num_layers, self.num_heads, self.mlp_size)
        return next((name for name, variant in VARIANTS.items() if variant == sizes), None)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along time, height and width."""
        return tuple(size // patch for size, patch in zip(self.video_size, self.patch_size))

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def feature_index(self) -> int:
        """Position in the feature list that the readout reads.

        Upstream's rule, int(length * depth) - 1, which is -1 for a small depth in a short list: the last feature then.
        """
        length = self.num_layers + 1
        return (int(length * self.readout.depth) - 1) % length


class Tokenizer(nn.Module):
    """Patch embedding plus learned positions: video `(B, T, H, W, C)` -> tokens `(B, t h w, D)`."""

    def __init__(self, config: Config):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config.patch_size, config.channels, config.hidden_size)
        self.posenc = nn.Parameter(torch.empty(*config.grid, config.hidden_size))

    def forward(self, video: Tensor, ids_keep: Tensor | None = None, interpolate: bool | str = False) -> Tensor:
        posenc = self.positions(video, interpolate).flatten(0, 2)
        if ids_keep is not None:
            posenc = posenc[ids_keep]
        return self.patch_embedding(video, ids_keep) + posenc

    def positions(self, video: Tensor, interpolate: bool | str) -> Tensor:
        """The position embedding `(t, h, w, D)` for the patch grid of `video`."""
        trained = tuple(self.posenc.shape[:3])
        grid = tuple(size // patch for size, patch in zip(video.shape[1:4], self.patch_embedding.patch_size))
        if grid == trained:
            return self.posenc
        if 0 in grid or not interpolate:
            raise ValueError(
                f"video: {tuple(video.shape)} has a patch grid of {grid}, the position embedding has {trained}"
                + ("" if 0 in grid else "; pass interpolate='linear' or 'cubic' to resize it")
            )
        return resize(self.posenc, grid, (0, 1, 2), method="linear" if interpolate is True else interpolate)


class PostNormBlock(PreNormBlock):
    """h = x + attention(x); then norm(h + mlp(norm(h))).

    The MLP's branch alone is normalised on its way in: the sum goes on from h itself, as in the reference.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return self.mlp_norm(tokens + self.mlp(self.attention_norm(tokens)))


class ParallelBlock(PreNormBlock):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attention(self.attention_norm(tokens)) + self.mlp(self.mlp_norm(tokens))


BLOCKS = {"pre_norm": PreNormBlock, "post_norm": PostNormBlock, "parallel": ParallelBlock}


class GeneralizedTransformer(nn.Module):
    """The blocks, run `n_iter` times; from the second time on the tokens are appended again.

    tokens `(B, N, D)` -> the states asked for, by position: 0 is the tokens, i >= 1 the state after i - 1 blocks of the
    last iteration. Blocks that none of them needs are not run.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.n_iter = config.n_iter
        sizes = (config.hidden_size, config.num_heads, config.mlp_size, config.qk_features, config.v_features)
        self.layers = nn.ModuleList(BLOCKS[config.block](*sizes) for _ in range(config.num_layers))

    def forward(self, tokens: Tensor, positions: set[int], taps: dict[str, Tensor] | None = None) -> dict[int, Tensor]:
        states = {0: tokens}
        last = max(positions, default=0)
        if last == 0:
            return states
        state = tokens
        for _ in range(self.n_iter - 1):
            for layer in self.layers:
                state = layer(state)
            state = torch.cat([state, tokens], dim=-2)
        for position in range(1, last + 1):
            if position > 1:
                state = self.layers[position - 2](state)
                tap(taps, f"encoder/{position - 2:02d}", state)
            if position in positions:
                states[position] = state
        return states


class Encoder(nn.Module):
    """Tokenizer and transformer: video `(B, T, H, W, C)` -> states by position; see GeneralizedTransformer."""

    def __init__(self, config: Config):
        super().__init__()
        self.tokenizer = Tokenizer(config)
        self.processor = GeneralizedTransformer(config)

    def forward(
        self,
        video: Tensor,
        positions: set[int],
        taps: dict[str, Tensor] | None = None,
        ids_keep: Tensor | None = None,
        interpolate: bool | str = False,
    ) -> dict[int, Tensor]:
        tokens = self.tokenizer(video, ids_keep, interpolate)
        tap(taps, "tokens", tokens)
        return self.processor(tokens, positions, taps)


class EncoderToReadout(nn.Module):
    """Cubic resize along time: features `(B, t h w, D)` -> `(B, num_frames, h w, D)`."""

    def __init__(self, num_frames: int):
        super().__init__()
        self.num_frames = num_frames

    def forward(self, features: Tensor, frames: int) -> Tensor:
        return resize(features.unflatten(1, (frames, -1)), (self.num_frames,), (1,), method="cubic")


class AttentionReadout(nn.Module):
    """Cross-attention from queries into features `(B, T, N, C)`.

    queries: `(B, Q, query_features)` where the config asks for them, else none: they are learned.
    Returns `(B, Q, num_classes)`; `(B, num_classes)` for one query; `(B, T, H, W, c)` when patches are decoded. In eval
    mode with num_test_clips n > 1: softmax over the last axis and the mean over each n neighbours of the batch.
    """

    def __init__(self, config: ReadoutConfig, features: int):
        super().__init__()
        self.config = config
        width, vjepa = config.num_params, config.match_vjepa_implementation
        self.norm = nn.LayerNorm(features, eps=LAYER_NORM_EPS) if vjepa else None
        self.temporal_posenc = (
            nn.Parameter(torch.empty(config.num_frames, 1, features)) if config.add_temporal_posenc else None
        )
        learned = config.query_features is None
        self.query = nn.Parameter(torch.empty(config.num_queries, width)) if learned else None
        self.query_projection = None if learned else nn.Linear(config.query_features, width)
        self.key_value = nn.Linear(features, 2 * width, bias=vjepa)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.out = nn.Linear(width, width) if vjepa else None
        self.mlp_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if vjepa else None
        self.mlp = MLP(width, 4 * width) if vjepa else None
        self.head = nn.Linear(width, config.num_classes)

    def forward(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        query = self.embed_queries(queries, features)
        output = self.head(self.attend(query, self.embed_features(features)))
        return self.average_clips(self.arrange(output))

    def embed_queries(self, queries: Tensor | None, features: Tensor) -> Tensor:
        """Learned or projected queries `(B, Q, num_params)`."""
        if self.query is not None:
            if queries is not None:
                raise ValueError(f"queries: this readout has learned queries, got {tuple(queries.shape)}")
            return self.query.expand(features.shape[0], -1, -1)
        wanted = f"(B={features.shape[0]}, Q, {self.config.query_features})"
        if queries is None:
            raise ValueError(f"queries: this readout needs queries {wanted}, got none")
        if queries.ndim != 3 or (queries.shape[0], queries.shape[2]) != (features.shape[0], self.config.query_features):
            raise ValueError(f"queries: expected {wanted}, got {tuple(queries.shape)}")
        return self.query_projection(like(queries, self.query_projection.weight, "queries"))

    def embed_features(self, features: Tensor) -> Tensor:
        """Normalised features with their time embedding, `(B, T N, C)`."""
        if features.ndim != 4 or features.shape[3] != self.key_value.in_features:
            raise ValueError(f"features: expected (B, T, N, {self.key_value.in_features}), got {tuple(features.shape)}")
        features = like(features, self.key_value.weight, "features")
        if self.norm is not None:
            features = self.norm(features)
        if self.temporal_posenc is not None:
            if features.shape[1] != self.config.num_frames:
                raise ValueError(f"features: expected T={self.config.num_frames} frames, got {tuple(features.shape)}")
            features = features + self.temporal_posenc
        return features.flatten(1, 2)

    def attend(self, query: Tensor, features: Tensor) -> Tensor:
        """Cross-attention, and the residual MLP of V-JEPA's readout: `(B, Q, num_params)`."""
        key, value = self.key_value(features).chunk(2, dim=-1)
        heads = (x.unflatten(-1, (self.config.num_heads, -1)) for x in (query, key, value))
        token = self.dropout(attention(*heads)).flatten(-2)
        if self.mlp is None:
            return token
        token = query + self.out(token)
        return token + self.mlp(self.mlp_norm(token))

    def arrange(self, output: Tensor) -> Tensor:
        """Decode patches to pixels, or drop the axis of a single query."""
        if self.config.output_shape is None:
            return output.squeeze(1)
        output = output.unflatten(2, (*self.config.decoding_patch_size, -1)).unflatten(1, self.config.num_patches)
        output = output.permute(0, 1, 4, 2, 5, 3, 6, 7)
        return output.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def average_clips(self, output: Tensor) -> Tensor:
        clips = self.config.num_test_clips
        if clips == 1 or self.training:
            return output
        if output.shape[0] % clips:
            raise ValueError(f"features: expected a batch that is a multiple of {clips} clips, got {output.shape[0]}")
        return output.softmax(dim=-1).unflatten(0, (-1, clips)).mean(dim=1)


class Scaling4D(PretrainedModel):
    """4DS: the encoder, and the readout when the config has one.

    Videos are `(B, T, H, W, C)`, floating point, frames scaled to 0..1 as the released models saw them; they are
    converted to the dtype of the parameters. Values are not inspected: a NaN in a clip makes that clip's features NaN.
    """

    MODEL, CONFIG = MODEL, Config

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.encoder_to_readout = EncoderToReadout(config.readout.num_frames) if config.readout else None
        self.readout = AttentionReadout(config.readout, config.hidden_size) if config.readout else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters from upstream's distributions."""
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                if ".mlp." in name and name.startswith("encoder"):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    _lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.encoder.tokenizer.posenc, std=0.02)
        for name in ("temporal_posenc", "query"):
            if getattr(self.readout, name, None) is not None:
                nn.init.normal_(getattr(self.readout, name), std=0.02)

    def forward(
        self,
        video: Tensor,
        taps: dict[str, Tensor] | None = None,
        *,
        queries: Tensor | None = None,
        interpolate: bool | str = False,
    ) -> Tensor:
        """The readout's prediction, or, without a readout, the last feature of upstream's list (features_L).

        taps: filled with "tokens", "encoder/00" (the state after layer 0) .., "readout/features", "readout/prediction",
            as far as they are computed on the way.
        queries: `(B, Q, query_features)`, for readouts made for them.
        interpolate: as in `encode`.
        """
        if self.readout is None:
            if queries is not None:
                raise ValueError(f"queries: this model has no readout, got {tuple(queries.shape)}")
            return self.encode(video, layers=(-1,), taps=taps, interpolate=interpolate)[0]
        (features,) = self.encode(video, layers=(self.config.feature_index,), taps=taps, interpolate=interpolate)
        features = self.encoder_to_readout(features, video.shape[1] // self.config.patch_size[0])
        tap(taps, "readout/features", features)
        prediction = self.readout(features, queries)
        tap(taps, "readout/prediction", prediction)
        return prediction

    def encode(
        self,
        video: Tensor,
        *,
        layers: Iterable[int | str] | None = None,
        taps: dict[str, Tensor] | None = None,
        ids_keep: Tensor | None = None,
        interpolate: bool | str = False,
    ) -> list[Tensor]:
        """Features of a video, one `(B, N, D)` per entry of `layers`, in that order.

        layers: positions in upstream's list: 0 is the tokens after the position embedding, i >= 1 the state that goes
            INTO layer i - 1 in the last iteration (so 1 equals 0 when n_iter is 1), negative ones count from its end.
            "final" is the state after the last layer, which upstream never returns (nor trained, maybe: with n_iter 1
            its parameters reach none of upstream's outputs). None means upstream's whole list.
            Layers that nothing asked for needs are not run.
        taps: as in `forward`.
        ids_keep: int64 `(B, K)`; the layers see only these tokens of each clip, in this order.
        interpolate: False refuses a video whose patch grid is not the model's, as upstream does; "linear" (or True) and
            "cubic" resize the position embedding to the video's grid.

        Raises ValueError that names the argument, what was wanted and what came.
        """
        positions = self._positions(layers)
        video = self._check_video(video)
        if ids_keep is not None:
            self._check_ids(ids_keep, video)
        if interpolate not in (False, True, "linear", "cubic"):
            raise ValueError(f"interpolate: expected False, True, 'linear' or 'cubic', got {interpolate!r}")
        states = self.encoder(video, set(positions), taps, ids_keep, interpolate)
        return [states[position] for position in positions]

    def _positions(self, layers: Iterable[int | str] | None) -> list[int]:
        """Positions in upstream's list, to which the state after the last layer is appended."""
        length = self.config.num_layers + 1
        positions = []
        for layer in range(length) if layers is None else layers:
            if layer == FINAL:
                positions.append(length)
            elif isinstance(layer, int) and -length <= layer < length:
                positions.append(layer % length)
            else:
                raise ValueError(f"layers: expected integers in [{-length}, {length - 1}] or {FINAL!r}, got {layer!r}")
        return positions

    def _check_video(self, video: Tensor) -> Tensor:
        wanted = f"(B, T, H, W, {self.config.channels})"
        if not isinstance(video, Tensor):
            raise ValueError(f"video: expected a tensor {wanted}, got {type(video).__name__}")
        if video.ndim != 5 or video.shape[-1] != self.config.channels:
            hint = ": the batch axis is missing" if video.ndim == 4 and video.shape[-1] == self.config.channels else ""
            raise ValueError(f"video: expected {wanted}, got {tuple(video.shape)}{hint}")
        return like(video, self.encoder.tokenizer.posenc, "video")

    def _check_ids(self, ids_keep: Tensor, video: Tensor) -> None:
        if ids_keep.dtype != torch.int64 or ids_keep.ndim != 2 or ids_keep.shape[0] != video.shape[0]:
            raise ValueError(
                f"ids_keep: expected int64 (B={video.shape[0]}, K), got {ids_keep.dtype} {tuple(ids_keep.shape)}"
            )
        if ids_keep.device != video.device:
            raise ValueError(f"ids_keep: expected it on {video.device} like the video, got {ids_keep.device}")
        # On a GPU looking at the values would wait for the device; indexing there reports them in its own way.
        if may_look(ids_keep) and ids_keep.numel():
            grid = (size // patch for size, patch in zip(video.shape[1:4], self.config.patch_size))
            tokens, low, high = math.prod(grid), int(ids_keep.min()), int(ids_keep.max())
            if low < 0 or high >= tokens:
                raise ValueError(f"ids_keep: expected values in [0, {tokens - 1}], got {low} to {high}")


class Masking(NamedTuple):
    """A random choice of tokens, per clip.

    ids_keep `(B, K)`: kept tokens, in random order, for `Scaling4D.encode`.
    ids_restore `(B, N)`: position of each token in [kept, removed], so that `x.gather(1, ids_restore)` puts such a
        sequence back in the order of the video.
    mask `(B, N)`: True where a token was removed.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def random_masking(
    batch_size: int,
    num_tokens: int,
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Remove `ratio` of the tokens of each clip, drawn uniformly without replacement; at least one stays.

    The generator must live on `device` (by default the generator's own, or the CPU).
    """
    check_int("batch_size", batch_size)
    check_int("num_tokens", num_tokens)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio!r}")
    if device is None and generator is not None:
        device = generator.device
    kept = max(1, round(num_tokens * (1 - ratio)))
    order = torch.rand(batch_size, num_tokens, generator=generator, device=device).argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    return Masking(order[:, :kept], ids_restore, ids_restore >= kept)


def _lecun_normal_(weight: Tensor) -> None:
    """A normal cut at two standard deviations, with variance 1 / fan_in after the cut."""
    std = math.sqrt(1 / weight.shape[1]) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
