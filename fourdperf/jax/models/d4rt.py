"""D4RT in Flax: the reference that the PyTorch file is compared with.

The same classes in the same order, written the plain way (a convolution for the patches, attention as two einsums, all
queries at once). `taps` are filled under the same names. `from_pretrained` reads the same directories.
"""

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fourdperf.data.queries import Queries
from fourdperf.jax.models.layers import CrossDecoder, PreNormBlock, attention, read_pretrained, tap
from fourdperf.jax.models.scaling4d import PatchEmbedding
from fourdperf.jax.ops import fourier_embed, gather_patches, linear_range, octaves, window_attention
from fourdperf.models.d4rt import D4RT as TorchD4RT
from fourdperf.models.d4rt import MODEL, SIZES, Config, Prediction


class Encoded(NamedTuple):
    """A clip, ready for queries: features `(B, t h w + 1, D)`, keys and values of every layer, frames for patches."""

    features: Array
    memory: list[tuple[Array, Array]]
    patch_video: Array


class AspectToken(nn.Module):
    """The ratio width / height `(B,)` -> a token `(B, 1, D)`."""

    config: Config

    @nn.compact
    def __call__(self, ratio: Array) -> Array:
        ratio, width = ratio[:, None, None], self.config.hidden_size
        if self.config.aspect_token == "linear":
            return nn.Dense(width, name="projection")(jnp.log(ratio))
        return self.param("token", nn.initializers.normal(0.02), (width,)) * (1 + 0.1 * ratio)


class Tokenizer(nn.Module):
    """Video `(B, T, H, W, 3)` and ratio `(B,)` -> tokens `(B, t h w + 1, D)`."""

    config: Config

    def setup(self):
        c, init = self.config, nn.initializers.normal(0.02)
        frames, *space = c.grid
        self.patch_embedding = PatchEmbedding(c.patch_size, c.hidden_size)
        if c.patch_norm:
            self.norm = nn.LayerNorm(c.norm_eps)
        if c.positions == "joint":
            self.posenc = self.param("posenc", init, (frames, *space, c.hidden_size))
        else:
            self.temporal = self.param("temporal", init, (frames, c.hidden_size))
            self.spatial = self.param("spatial", init, (*space, c.hidden_size))
        self.aspect = AspectToken(c)

    def __call__(self, video: Array, ratio: Array) -> Array:
        missing = -video.shape[1] % self.config.patch_size[0]
        if missing and not self.config.drop_last_frames:
            video = jnp.concatenate([video, *[video[:, -1:]] * missing], axis=1)
        if self.config.centered:
            video = 2 * video - 1
        tokens = self.patch_embedding(video)
        if self.config.patch_norm:
            tokens = self.norm(tokens)
        tokens = tokens + self.positions(tokens.shape[1])
        tokens = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
        return jnp.concatenate([tokens, self.aspect(ratio)], axis=1)

    def positions(self, frames: int) -> Array:
        """`(t, h, w, D)` of the first frames."""
        if self.config.positions == "joint":
            return self.posenc[:frames]
        return self.temporal[:frames, None, None] + self.spatial


class EncoderBlock(PreNormBlock):
    """PreNormBlock whose attention stays within a frame where `config` is given; then the last token skips it."""

    config: Config | None = None

    def __call__(self, tokens: Array) -> Array:
        if self.config is None:
            return super().__call__(tokens)
        frames, last = tokens[:, :-1], tokens[:, -1:]
        frames = frames + self.attention(self.attention_norm(frames), self.attend)
        tokens = jnp.concatenate([frames, last], axis=1)
        return tokens + self.mlp(self.mlp_norm(tokens))

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """`(B, t h w, heads, d)`, each frame for itself."""
        _, height, width = self.config.grid
        heads = query.shape[2:]
        if self.config.local_attention == "window":
            q, k, v = (x.reshape(x.shape[0], -1, height, width, *heads) for x in (query, key, value))
            out = window_attention(q, k, v, self.config.window, border=self.config.window_border)
        else:
            out = attention(*(x.reshape(-1, height * width, *heads) for x in (query, key, value)))
        return out.reshape(query.shape)


class Encoder(nn.Module):
    """Video `(B, T, H, W, 3)` and ratio `(B,)` -> features `(B, t h w + 1, D)`."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        sizes = (c.num_heads, c.mlp_size, c.hidden_size, c.hidden_size, self.dtype, c.norm_eps, c.gelu == "tanh")
        local = c.local_attention != "none"
        self.tokenizer = Tokenizer(c)
        self.layers = [EncoderBlock(*sizes, c if local and i % 2 == 0 else None) for i in range(c.num_layers)]
        self.norm = nn.LayerNorm(c.norm_eps)

    def __call__(self, video: Array, ratio: Array, taps: dict[str, Array] | None = None) -> Array:
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

    features: int
    approximate: bool

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        hidden = nn.Dense(self.features, name="dense_in")(patches.reshape(*patches.shape[:2], -1))
        return nn.Dense(self.features, name="dense_out")(nn.gelu(hidden, self.approximate))


class PatchConv(nn.Module):
    """RGB patches `(B, N, s, s, 3)` -> `(B, N, E)`, the seed's network."""

    features: int

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        hidden = nn.relu(nn.Conv(64, (3, 3), padding=1, name="conv")(patches))
        hidden = jnp.moveaxis(hidden, -1, 2).reshape(*patches.shape[:2], -1)
        return nn.Dense(self.features, name="dense")(hidden)


class QueryBuilder(nn.Module):
    """Queries and frames `(B, T, H', W', 3)` of any resolution -> query tokens `(B, N, E)`."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, width = self.config, self.config.decoder_size
        fourier, time, rgb = c.query_parts or (width, width, width)
        self.fourier = nn.Dense(fourier, dtype=self.dtype)
        self.t_src, self.t_tgt, self.t_cam = (nn.Embed(c.num_frames, time) for _ in range(3))
        self.rgb = PatchMLP(rgb, c.gelu == "tanh") if c.rgb_embedding == "mlp" else PatchConv(rgb)
        if c.query_parts:
            self.projection = nn.Dense(width)

    def __call__(self, queries: Queries, frames: Array) -> Array:
        parts = [
            self.embed_uv(queries.uv),
            self.t_src(queries.t_src),
            self.t_tgt(queries.t_tgt),
            self.t_cam(queries.t_cam),
            self.rgb(self.patches(queries, frames)),
        ]
        return self.projection(jnp.concatenate(parts, axis=-1)) if self.config.query_parts else sum(parts)

    def embed_uv(self, uv: Array) -> Array:
        """`(B, N, 2)` -> `(B, N, width of the part)`."""
        bands = self.config.num_bands
        octave = self.config.fourier == "octaves"
        return self.fourier(
            fourier_embed(uv, octaves(bands, scale=math.pi) if octave else linear_range(0.5, bands, bands))
        )

    def patches(self, queries: Queries, frames: Array) -> Array:
        """RGB patches `(B, N, s, s, 3)` around (u, v) in frame t_src."""
        how = {"mode": "bilinear", "coordinates": "centers", "border": "replicate"}
        if self.config.rgb_sampling == "round":
            how = {"mode": "round", "coordinates": "scaled", "border": "shift"}
        patches = gather_patches(frames, queries.t_src, queries.uv, self.config.rgb_size, **how).astype(self.dtype)
        if frames.dtype == jnp.uint8:
            patches = patches / 255
        return 2 * patches - 1 if self.config.centered else patches


class D4RT(nn.Module):
    """D4RT: `model.apply(variables, video, queries)`, or `encode` and `decode` as methods; see the PyTorch class.

    Variables, video and ratio are of `dtype`, (u, v) is fp32 and so are the answers.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        if c.project_memory:
            self.memory_projection = nn.Dense(c.decoder_size)
        self.query_builder = QueryBuilder(c, self.dtype)
        self.decoder = CrossDecoder(
            *(c.decoder_size, c.decoder_layers, c.decoder_heads, c.decoder_mlp_size),
            eps=c.norm_eps,
            approximate=c.gelu == "tanh",
            dtype=self.dtype,
        )
        self.head = nn.Dense(sum(SIZES), dtype=jnp.float32)

    def __call__(
        self,
        video: Array,
        queries: Queries,
        aspect_ratio: Array | None = None,
        patch_video: Array | None = None,
        taps: dict[str, Array] | None = None,
    ) -> Prediction:
        return self.decode(self.encode(video, aspect_ratio, patch_video, taps), queries, taps)

    def encode(
        self,
        video: Array,
        aspect_ratio: Array | None = None,
        patch_video: Array | None = None,
        taps: dict[str, Array] | None = None,
    ) -> Encoded:
        batch, _, height, width, _ = video.shape
        if aspect_ratio is None:
            aspect_ratio = jnp.full(batch, 0.0 if self.config.aspect_token == "scaled" else width / height, video.dtype)
        features = self.encoder(video, aspect_ratio, taps)
        memory = self.memory_projection(features) if self.config.project_memory else features
        return Encoded(features, self.decoder.prepare(memory), video if patch_video is None else patch_video)

    def decode(self, encoded: Encoded, queries: Queries, taps: dict[str, Array] | None = None) -> Prediction:
        tokens = self.query_builder(queries, encoded.patch_video)
        tap(taps, "queries", tokens)
        outputs = self.head(self.decoder.decode(tokens, encoded.memory, taps=taps))
        tap(taps, "outputs", outputs)
        parts = jnp.split(outputs, np.cumsum(SIZES)[:-1], axis=-1)
        return Prediction(*(x.squeeze(-1) if size == 1 else x for x, size in zip(parts, SIZES)))


def from_pretrained(path: str | os.PathLike, dtype: str = "float32") -> tuple[D4RT, dict]:
    """The model of a directory written by the PyTorch model's `save_pretrained`, and its variables, in `dtype`.

    Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
    """
    config, state = read_pretrained(path, MODEL, Config, TorchD4RT)
    params = flax_params({key: x.float().numpy() for key, x in state.items()}, config)
    return D4RT(config, jnp.dtype(dtype)), {"params": jax.tree.map(lambda x: jnp.asarray(x, dtype), params)}


def flax_params(state: Mapping[str, np.ndarray], config: Config) -> dict:
    """The PyTorch model's tensors, by name, as the tree of this model's parameters, fp32."""
    tree = {}
    for key, x in state.items():
        for path, part in _flax_tensors(key, np.asarray(x, np.float32), config):
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = jnp.asarray(part)
    return tree


def _flax_tensors(key: str, x: np.ndarray, config: Config) -> list[tuple[list[str], np.ndarray]]:
    """Paths and arrays that one PyTorch tensor becomes."""
    *path, kind = key.replace("layers.", "layers_").replace("blocks.", "blocks_").split(".")
    heads = config.num_heads if path[0] == "encoder" else config.decoder_heads
    if kind not in ("weight", "bias"):
        return [([*path, kind], x)]
    if path[-1].endswith("norm"):
        return [([*path, "scale" if kind == "weight" else "bias"], x)]
    if path[-1] in ("t_src", "t_tgt", "t_cam"):
        return [([*path, "embedding"], x)]
    if path[-2:] == ["patch_embedding", "projection"]:
        shape = (*config.patch_size, 3, -1)
        return [
            ([*path[:-1], "Conv_0", "bias"], x)
            if kind == "bias"
            else ([*path[:-1], "Conv_0", "kernel"], x.T.reshape(shape))
        ]
    if path[-1] == "conv":
        return [([*path, "bias"], x) if kind == "bias" else ([*path, "kernel"], x.transpose(2, 3, 1, 0))]
    if path[-1] == "qkv":
        names = ("query", "key", "value")
        return [
            item
            for name, part in zip(names, np.split(x, 3))
            for item in _flax_tensors(".".join([*path[:-1], name, kind]), part, config)
        ]
    name = "bias" if kind == "bias" else "kernel"
    x = x if kind == "bias" else x.T
    if path[-2:-1] == ["attention"]:
        if path[-1] != "out":
            x = x.reshape(*x.shape[:-1], heads, -1)
        elif kind == "weight":
            x = x.reshape(heads, -1, x.shape[-1])
    return [([*path, name], x)]
