"""Scaling 4D Representations (4DS) in Flax: the reference that the PyTorch file is compared with.

The same classes in the same order, written the plain way (a convolution for the patches, attention as two einsums,
`jax.image.resize` itself). Parameters are named and shaped as in the released checkpoints, so that
`model.apply({"params": tree}, video)` takes their arrays as they are. `taps` are filled under the same names.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fourdperf.jax.models.layers import PreNormBlock
from fourdperf.models.scaling4d import FINAL, Config, ReadoutConfig


class PatchEmbedding(nn.Module):
    """Non-overlapping convolution: video `(B, T, H, W, C)` -> `(B, t, h, w, D)`."""

    patch_size: tuple[int, int, int]
    features: int

    @nn.compact
    def __call__(self, video: Array) -> Array:
        size = self.patch_size
        return nn.Conv(self.features, kernel_size=size, strides=size, padding="VALID", dtype=video.dtype)(video)


class LearnedEmbedding(nn.Module):
    """One parameter `embeddings`, whose leading axes of length one are left out of its shape."""

    shape: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Array:
        first = next(i for i, size in enumerate(self.shape) if size > 1 or i == len(self.shape) - 1)
        return self.param("embeddings", nn.initializers.normal(0.02), self.shape[first:], self.dtype)


class Tokenizer(nn.Module):
    """Patch embedding plus learned positions: video `(B, T, H, W, C)` -> tokens `(B, t h w, D)`."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.patch_embedding = PatchEmbedding(self.config.patch_size, self.config.hidden_size)
        self.posenc = LearnedEmbedding((*self.config.grid, self.config.hidden_size), self.dtype)

    def __call__(self, video: Array) -> Array:
        tokens = self.patch_embedding(video)
        if tokens.shape[1:4] != self.config.grid:
            raise ValueError(
                f"video: {video.shape} has a patch grid of {tokens.shape[1:4]}, the embedding has {self.config.grid}"
            )
        tokens = tokens + self.posenc()
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


class PostNormBlock(PreNormBlock):
    """h = x + attention(x); then norm(h + mlp(norm(h)))."""

    def __call__(self, tokens: Array) -> Array:
        tokens = tokens + self.attention(tokens)
        return self.mlp_norm(tokens + self.mlp(self.attention_norm(tokens)))


class ParallelBlock(PreNormBlock):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def __call__(self, tokens: Array) -> Array:
        return tokens + self.attention(self.attention_norm(tokens)) + self.mlp(self.mlp_norm(tokens))


BLOCKS = {"pre_norm": PreNormBlock, "post_norm": PostNormBlock, "parallel": ParallelBlock}


class GeneralizedTransformer(nn.Module):
    """The blocks, run `n_iter` times; tokens `(B, N, D)` -> upstream's list, and the state after the last layer."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        sizes = (c.num_heads, c.mlp_size, c.qk_features, c.v_features, self.dtype)
        self.layers = [BLOCKS[c.block](*sizes) for _ in range(c.num_layers)]

    def __call__(self, tokens: Array, taps: dict[str, Array] | None = None) -> list[Array]:
        states, state = [tokens], tokens
        for iteration in range(self.config.n_iter):
            if iteration > 0:
                state = jnp.concatenate([state, tokens], axis=-2)
            last = iteration == self.config.n_iter - 1
            for index, layer in enumerate(self.layers):
                if last:
                    states.append(state)
                state = layer(state)
                if last and taps is not None:
                    taps[f"encoder/{index:02d}"] = state
        return [*states, state]


class Encoder(nn.Module):
    """Tokenizer and transformer: video `(B, T, H, W, C)` -> upstream's list, and the state after the last layer."""

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = Tokenizer(self.config, self.dtype)
        self.processor = GeneralizedTransformer(self.config, self.dtype)

    def __call__(
        self, video: Array, taps: dict[str, Array] | None = None, ids_keep: Array | None = None
    ) -> list[Array]:
        tokens = self.encoder(video)
        if ids_keep is not None:
            tokens = jnp.take_along_axis(tokens, ids_keep[..., None], axis=1)
        if taps is not None:
            taps["tokens"] = tokens
        return self.processor(tokens, taps)


class EncoderToReadout(nn.Module):
    """Cubic resize along time: features `(B, t h w, D)` -> `(B, num_frames, h w, D)`."""

    num_frames: int

    def __call__(self, features: Array, frames: int) -> Array:
        features = features.reshape(features.shape[0], frames, -1, features.shape[-1])
        shape = (features.shape[0], self.num_frames, *features.shape[2:])
        return jax.image.resize(features, shape, jax.image.ResizeMethod.CUBIC)


class ReadoutMLP(nn.Module):
    """The readout's MLP, whose layers carry Flax's automatic names."""

    hidden_size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.hidden_size, dtype=x.dtype, name="Dense_0")(x))
        return nn.Dense(x.shape[-1], dtype=x.dtype, name="Dense_1")(hidden)


class AttentionReadout(nn.Module):
    """Cross-attention from queries into features `(B, T, N, C)`; shapes as in the PyTorch file."""

    config: ReadoutConfig

    @nn.compact
    def __call__(self, features: Array, queries: Array | None = None, training: bool = False) -> Array:
        config, dtype = self.config, features.dtype
        heads = (config.num_heads, config.num_params // config.num_heads)
        vjepa = config.match_vjepa_implementation
        if vjepa:
            features = nn.LayerNorm(dtype=dtype)(features)
        if config.add_temporal_posenc:
            shape = (config.num_frames, 1, features.shape[-1])
            features = features + LearnedEmbedding(shape, name="temporal_posenc")().astype(dtype)
        features = features.reshape(features.shape[0], -1, features.shape[-1])

        if config.query_features is None:
            query = self.param("query", nn.initializers.normal(0.02), (config.num_queries, *heads), dtype)
            query = jnp.broadcast_to(query.astype(dtype), (features.shape[0], *query.shape))
        else:
            query = nn.Dense(config.num_params, dtype=dtype)(queries).reshape(*queries.shape[:2], *heads)
        key = nn.DenseGeneral(heads, use_bias=vjepa, dtype=dtype, name="key_embedding")(features)
        value = nn.DenseGeneral(heads, use_bias=vjepa, dtype=dtype, name="value_embedding")(features)
        token = nn.dot_product_attention(query, key, value)
        token = nn.Dropout(config.dropout_rate, deterministic=not training)(token)
        token = token.reshape(*token.shape[:2], -1)

        if vjepa:
            token = query.reshape(token.shape) + nn.Dense(config.num_params, dtype=dtype)(token)
            token = token + ReadoutMLP(4 * config.num_params, name="MLP_0")(nn.LayerNorm(dtype=dtype)(token))
        output = self.arrange(nn.Dense(config.num_classes, dtype=dtype)(token))
        if config.num_test_clips > 1 and not training:
            output = nn.softmax(output)
            output = output.reshape(-1, config.num_test_clips, *output.shape[1:]).mean(axis=1)
        return output

    def arrange(self, output: Array) -> Array:
        """Decode patches to pixels, or drop the axis of a single query."""
        if self.config.output_shape is None:
            return output.squeeze(1) if output.shape[1] == 1 else output
        t, h, w = self.config.num_patches
        a, b, c = self.config.decoding_patch_size
        output = output.reshape(-1, t, h, w, a, b, c, output.shape[-1] // math.prod((a, b, c)))
        return output.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, t * a, h * b, w * c, output.shape[-1])


class Scaling4D(nn.Module):
    """4DS: the encoder, and the readout when the config has one.

    dtype: of the LayerNorms and the position embedding, upstream's one knob; the rest follows its input.
    Parameters lie under `encoder` and `processor`, or, with a readout, under `layers_0` and `layers_2`.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.config.readout is None:
            self.features = Encoder(self.config, self.dtype)
            nn.share_scope(self, self.features)
        else:
            self.layers_0 = Encoder(self.config, self.dtype)
            self.layers_1 = EncoderToReadout(self.config.readout.num_frames)
            self.layers_2 = AttentionReadout(self.config.readout)

    def __call__(self, video: Array, taps: dict[str, Array] | None = None, *, queries: Array | None = None) -> Array:
        """The readout's prediction, or, without a readout, the last feature of upstream's list."""
        if self.config.readout is None:
            return self.features(video, taps)[self.config.num_layers]
        features = self.layers_0(video, taps)[self.config.feature_index]
        features = self.layers_1(features, self.config.grid[0])
        prediction = self.layers_2(features, queries)
        if taps is not None:
            taps |= {"readout/features": features, "readout/prediction": prediction}
        return prediction

    def encode(
        self,
        video: Array,
        *,
        layers: Iterable[int | str] | None = None,
        taps: dict[str, Array] | None = None,
        ids_keep: Array | None = None,
    ) -> list[Array]:
        """Features by position in upstream's list (None: all); "final" is the state after the last layer."""
        encoder = self.features if self.config.readout is None else self.layers_0
        states = encoder(video, taps, ids_keep)
        length = self.config.num_layers + 1
        return [states[length if p == FINAL else p % length] for p in (range(length) if layers is None else layers)]
