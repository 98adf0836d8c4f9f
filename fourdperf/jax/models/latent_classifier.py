"""Latent classifiers in Flax: the reference that the PyTorch file is compared with.

The same classes in the same order, with `taps` under the same names. Parameters are named as the seed names them, but
for the ResNet. `from_pretrained` reads the same directories, `train_step` is the seed's recipe.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch
from flax import linen as nn
from jax import Array

from fourdperf.convert.flax_tree import nested, unpacked
from fourdperf.convert.latent_classifier import table
from fourdperf.jax.models.layers import SelfAttention, read_pretrained, tap
from fourdperf.models.latent_classifier import MODEL, Config
from fourdperf.models.latent_classifier import LatentClassifier as TorchLatentClassifier


class MLP(nn.Module):
    """Latent `(B, ..., c)` of s s c numbers -> logits `(B, classes)`."""

    config: Config

    @nn.compact
    def __call__(self, latent: Array, taps: dict[str, Array] | None = None, train: bool = False) -> Array:
        c = self.config
        x = latent.reshape(len(latent), -1)
        for index in range(c.num_layers):
            x = nn.Dropout(c.dropout)(
                nn.silu(nn.Dense(c.hidden_size, name=f"Dense_{index}")(x)), deterministic=not train
            )
            tap(taps, f"layers/{index:02d}", x)
        return nn.Dense(c.num_classes, name=f"Dense_{c.num_layers}")(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP with dropout of both branches and of the MLP's hidden layer."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Array, train: bool = False) -> Array:
        c = self.config
        drop = lambda x: nn.Dropout(c.dropout)(x, deterministic=not train)
        attention = SelfAttention(c.num_heads, c.hidden_size, c.hidden_size, name="attn")
        tokens = tokens + drop(attention(nn.LayerNorm(name="layer_norm_1")(tokens)))
        hidden = nn.gelu(nn.Dense(c.mlp_size, name="linear_0")(nn.LayerNorm(name="layer_norm_2")(tokens)))
        return tokens + drop(nn.Dense(c.hidden_size, name="linear_3")(drop(hidden)))


class Head(nn.Module):
    """A norm, whose result is tapped, and a linear layer; named as nn.Sequential names them."""

    classes: int

    def setup(self):
        self.layers = [nn.LayerNorm(), nn.Dense(self.classes)]

    def __call__(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        norm, linear = self.layers
        features = norm(x)
        tap(taps, "norm", features)
        return linear(features)


class Transformer(nn.Module):
    """Latent `(B, ..., c)` -> logits `(B, classes)`, from the class token, which comes first."""

    config: Config

    @nn.compact
    def __call__(self, latent: Array, taps: dict[str, Array] | None = None, train: bool = False) -> Array:
        c, init = self.config, nn.initializers.normal(0.02)
        tokens = nn.Dense(c.hidden_size, name="input_layer")(latent.reshape(len(latent), -1, latent.shape[-1]))
        token = self.param("cls_token", init, (1, c.hidden_size))
        positions = self.param("pos_embedding", init, (1 + c.latent_size**2, c.hidden_size))
        tokens = jnp.concatenate([jnp.broadcast_to(token, (len(tokens), *token.shape)), tokens], axis=1)
        tokens = nn.Dropout(c.dropout)(tokens + positions[: tokens.shape[1]], deterministic=not train)
        tap(taps, "tokens", tokens)
        for index in range(c.num_layers):
            tokens = TransformerBlock(c, name=f"transformer_{index}")(tokens, train)
            tap(taps, f"blocks/{index:02d}", tokens)
        return Head(c.num_classes, name="mlp_head")(tokens[:, 0], taps)


def _group_norm(channels: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), name=name)


def _conv(channels: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (3, 3), padding=1, kernel_init=nn.initializers.he_normal(), name=name)


class ResNetBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))) on `(B, h, w, D)`."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        c, width = self.config, self.config.hidden_size
        drop = lambda x: nn.Dropout(c.dropout)(x, deterministic=not train)
        hidden = _conv(width, "conv_in")(drop(nn.relu(_group_norm(width, "norm_in")(x))))
        return x + _conv(width, "conv_out")(drop(nn.relu(_group_norm(width, "norm_out")(hidden))))


class ResNet(nn.Module):
    """Latent `(B, h, w, c)` -> logits `(B, classes)`, from the mean over the map."""

    config: Config

    @nn.compact
    def __call__(self, latent: Array, taps: dict[str, Array] | None = None, train: bool = False) -> Array:
        c = self.config
        x = _conv(c.hidden_size, "stem")(latent)
        tap(taps, "stem", x)
        for index in range(c.num_layers):
            x = ResNetBlock(c, name=f"blocks_{index}")(x, train)
            tap(taps, f"blocks/{index:02d}", x)
        features = nn.relu(_group_norm(c.hidden_size, "norm")(x)).mean((1, 2))
        tap(taps, "norm", features)
        return nn.Dense(c.num_classes, name="head")(features)


BODIES = {"mlp": MLP, "transformer": Transformer, "resnet": ResNet}


class LatentClassifier(nn.Module):
    """Latents `(B, s, s, c)` -> logits `(B, classes)`; `train` needs the random numbers of `rngs={"dropout": key}`."""

    config: Config

    def setup(self):
        self.body = BODIES[self.config.kind](self.config)
        nn.share_scope(self, self.body)  # the tree has the body's names at its top, as the seed's has

    def __call__(self, latent: Array, taps: dict[str, Array] | None = None, train: bool = False) -> Array:
        logits = self.body(latent / self.config.normalizing_factor, taps, train)
        tap(taps, "logits", logits)
        return logits


class State(NamedTuple):
    """A training state; `average` is the exponential moving average of the parameters."""

    params: Any
    average: Any
    optimizer: optax.OptState


def train_step(
    model: LatentClassifier,
    optimizer: optax.GradientTransformation,
    state: State,
    latent: Array,
    labels: Array,
    key: Array | None = None,
    *,
    smoothing: float = 0.0,
    decay: float = 0.999,
) -> tuple[State, Array]:
    """One step on the mean cross-entropy with smoothed labels `(B,)`; returns the state and the loss before the step.

    key: for dropout; without one there is none. Jit it with model and optimizer bound: they are no arrays.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, model.config.num_classes), smoothing)

    def loss(params):
        rngs = None if key is None else {"dropout": key}
        logits = model.apply({"params": params}, latent, train=key is not None, rngs=rngs)
        return optax.softmax_cross_entropy(logits, targets).mean()

    value, gradient = jax.value_and_grad(loss)(state.params)
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, optax.incremental_update(params, state.average, 1 - decay), inner), value


def from_pretrained(path: str | os.PathLike) -> tuple[LatentClassifier, dict]:
    """The model of a directory written by the PyTorch model's `save_pretrained`, and its variables in fp32.

    Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
    """
    config, state = read_pretrained(path, MODEL, Config, TorchLatentClassifier)
    return LatentClassifier(config), {"params": flax_params(state, config)}


def flax_params(state: Mapping[str, torch.Tensor], config: Config) -> dict:
    """The PyTorch model's tensors, by name, as the tree of this model's parameters, fp32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nested(unpacked(table(config), state)))
