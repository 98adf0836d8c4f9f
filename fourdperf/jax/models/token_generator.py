"""MaskGIT on codes in Flax: the logits; see fourdperf.models.token_generator."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fourdperf.jax.models.layers import tap
from fourdperf.jax.models.pretrained import Pretrained
from fourdperf.jax.models.token_blocks import TOKEN, Block
from fourdperf.models import token_generator
from fourdperf.models.token_generator import BERT_EPS


class TokenGenerator(nn.Module, Pretrained):
    """Logits `(B, N, K)` of `indices` `(B, N)` and `classes` `(B,)` or None; see the PyTorch class."""

    config: token_generator.Config
    TORCH = token_generator.TokenGenerator

    def setup(self):
        c = self.config
        bert, half = c.kind == "bert", c.num_layers // 2
        self.tokens = self.param("tokens", TOKEN, (c.vocabulary, c.hidden_size))
        self.positions = self.param("positions", TOKEN, (1 + c.num_tokens, c.hidden_size))
        if bert:
            self.segments = self.param("segments", TOKEN, (2, c.hidden_size))
        eps = BERT_EPS if bert else 1e-5
        self.norm = nn.LayerNorm(eps)
        block = lambda joined: Block(
            *(c.hidden_size, c.num_heads, c.mlp_size), qkv_bias=bert, eps=eps, post_norm=bert, joined=joined
        )
        self.blocks = [block(False) for _ in range(c.num_layers if bert else half + 1)]
        self.skip_blocks = [block(True) for _ in range(0 if bert else half)]
        self.head = nn.Dense(c.codebook_size)

    def __call__(self, indices: Array, classes: Array | None = None, taps: dict[str, Array] | None = None) -> Array:
        c = self.config
        if classes is None:
            condition = jnp.full(len(indices), c.no_class_id)
        else:
            condition = classes + c.codebook_size + 1
        x = self.tokens[jnp.concatenate([condition[:, None], indices], axis=1)] + self.positions
        if c.kind == "bert":
            x = self.norm(x + self.segments[0])
        tap(taps, "embed", x)
        early = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            early.append(x)
            tap(taps, f"block/{index:02d}", x)
        for index, (block, skip) in enumerate(zip(self.skip_blocks, early[-2::-1]), start=len(self.blocks)):
            x = block(x, skip)
            tap(taps, f"block/{index:02d}", x)
        if c.kind == "uvit":
            x = self.norm(x)
            tap(taps, "norm", x)
        return self.head(x[:, 1:])
