"""Functa in Flax: the reference that the PyTorch file is compared with, in numbers and, under jit, in time.

The same classes and functions in the same order, with `taps` under the same names; parameters are named as the JAX port
"spatial_functa" names them. Plain jnp, batched over signals. `from_pretrained` reads the same directories.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch
from flax import linen as nn
from jax import Array

from fourdperf.convert.flax_tree import nested, unpacked
from fourdperf.convert.functa import table
from fourdperf.jax.models.layers import read_pretrained, tap
from fourdperf.models.config import int_tuple
from fourdperf.models.functa import MODEL, RATES_START, Config
from fourdperf.models.functa import Functa as TorchFuncta


def _uniform(low: float, high: float) -> Callable[..., Array]:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, low, high)


class Sine(nn.Module):
    """The linear part of a sine layer."""

    features: int
    bound: float

    def setup(self):
        self.linear = nn.Dense(self.features, kernel_init=_uniform(-self.bound, self.bound))

    def __call__(self, x: Array) -> Array:
        return self.linear(x)


class Network(nn.Module):
    """A 1x1 convolution `(.., c)` -> `(.., features)` as a matrix product."""

    features: int

    @nn.compact
    def __call__(self, latent: Array) -> Array:
        channels = latent.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(channels**-0.5), (1, 1, channels, self.features))
        return latent @ kernel[0, 0] + self.param("bias", nn.initializers.zeros, (self.features,))


class LatentToModulation(nn.Module):
    """Latent map `(B, s, s, c)` -> modulations `(B, s, s, kinds layers H)`."""

    features: int

    def setup(self):
        self.network = Network(self.features)

    def __call__(self, latent: Array) -> Array:
        return self.network(latent)


class Rates(nn.Module):
    """Learned step sizes."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("lrs", _uniform(*RATES_START), self.shape)


class Functa(nn.Module):
    """The field that all signals share: `model.apply(variables, latent, coords)`; see the PyTorch class."""

    config: Config

    def setup(self):
        c, sines = self.config, self.config.num_layers - 1
        bound = math.sqrt(6 / c.hidden_size) / c.omega_0
        bounds = [1 / c.input_size, *[bound] * (sines - 1)]
        last = nn.Dense(c.channels, kernel_init=_uniform(-bound, bound))
        self.kernel_net = [*(Sine(c.hidden_size, x) for x in bounds), last]
        self.latent_to_modulation = LatentToModulation(c.kinds * sines * c.hidden_size)
        if c.rates_shape is not None:
            self.lrs = Rates(c.rates_shape)

    def zeros(self, batch: int) -> Array:
        """Latents `(B, s, s, c)` as `fit` starts from; with d axes `(B, 1, .., c)`."""
        return jnp.zeros((batch, *self.config.latent_shape))

    def rates_now(self) -> Array | float:
        """The step sizes in force: a number, or an array that broadcasts to a latent."""
        config = self.config
        if config.rates_shape is None:
            return config.inner_rate * config.rate_multiplier
        rates = self.lrs()
        if config.rate_range is not None:
            rates = jnp.clip(rates, *config.rate_range)
        return rates * config.rate_multiplier

    def grid(self, size: int | tuple[int, ...] | None = None) -> Array:
        """Coordinates `(N, d)` of the pixels' centres, (i + 1/2) / n, in their order; `size` as image_size."""
        axes = jnp.meshgrid(*((jnp.arange(n) + 0.5) / n for n in self._size(size)), indexing="ij")
        coords = jnp.stack(axes if self.config.transposed_grid else axes[::-1], axis=-1)
        return coords.reshape(-1, self.config.axes)

    def render(self, latent: Array, size: int | tuple[int, ...] | None = None) -> Array:
        """The signals `(B, *size, C)` at any resolution, by default the config's."""
        recon = self(latent, self.grid(size))
        return recon.reshape(len(latent), *self._size(size), -1)

    def features(self, coords: Array) -> Array:
        """What the network sees of coordinates `(.., d)`: `(.., K)`."""
        config = self.config
        if not config.spatial:
            return coords
        if config.interpolation == "nearest":
            cells = coords * config.latent_size
            return cells - jnp.clip(jnp.floor(cells), 0, config.latent_size - 1)
        size = jnp.array(config.image_size[::-1])
        index = jnp.clip((coords * size).astype(jnp.int32), 0, size - 1)
        bits = index[..., None] >> jnp.arange(config.bits) & 1
        return bits.reshape(*coords.shape[:-1], -1).astype(coords.dtype)

    def modulations(self, latent: Array) -> list[Array]:
        """Of each sine layer, `(B, s, s, H)`, or `(B, s, s, 2 H)` with scales, then shifts; `latent` `(B, s, s, c)`."""
        c = self.config
        maps = self.latent_to_modulation(latent)
        maps = maps.reshape(*maps.shape[:3], c.kinds, c.num_layers - 1, c.hidden_size).swapaxes(3, 4)
        return [maps[..., layer, :, :].reshape(*maps.shape[:3], -1) for layer in range(c.num_layers - 1)]

    def __call__(self, latent: Array, coords: Array, taps: dict[str, Array] | None = None) -> Array:
        """Values `(B, N, C)` of the signals of latents `(B, s, s, c)` at `coords` `(N, d)` or `(B, N, d)`."""
        config = self.config
        if self.is_initializing():
            self.rates_now()  # which `fit` alone needs
        x = self.features(coords)
        tap(taps, "input", x)
        read = self._reader(coords)
        maps = self.modulations(latent.reshape(len(latent), *[config.latent_size] * 2, -1))
        if config.mixes_points:
            maps, read = self._mixed(read(jnp.concatenate(maps, axis=-1))), lambda map: map[:, 0]
        for index, (layer, map) in enumerate(zip(self.kernel_net, maps)):
            pre, modulation = layer(x), read(map)
            if config.modulate == "shift":
                pre = pre + modulation
            elif config.modulate == "scale":
                pre = (1 + modulation) * pre
            else:
                scale, shift = jnp.split(modulation, 2, axis=-1)
                pre = (1 + scale) * pre + shift
            x = jnp.sin(config.omega_0 * pre)
            tap(taps, f"modulation/{index:02d}", map)
            tap(taps, f"layer/{index:02d}", x)
        return self.kernel_net[-1](x) + 0.5

    def _reader(self, coords: Array) -> Callable[[Array], Array]:
        """Of maps `(B, s, s, M)`, what stands at `coords`: `(B, N, M)`, or `(B, 1, M)` where there is one cell.

        Of a gather and a product with a matrix of weights `(N, s s)`, what XLA compiles to the faster code on a CPU:
        for 8 x 8 cells and 32 x 32 pixels, with gradients of second order, "nearest" is 1.2 times as fast with the
        gather and "linear" 1.6 times with the product.
        """
        config, side = self.config, self.config.latent_size
        if not config.spatial:
            return lambda map: map.reshape(len(map), 1, -1)
        if config.interpolation == "nearest":
            cell = jnp.clip((coords * side).astype(jnp.int32), 0, side - 1)
            index = cell[..., 1] * side + cell[..., 0]
            if index.ndim == 1:
                return lambda map: map.reshape(len(map), side * side, -1)[:, index]
            return lambda map: jnp.take_along_axis(map.reshape(len(map), side * side, -1), index[..., None], axis=1)
        place = jnp.clip(coords, 0, 1) * (side - 1)
        hats = jax.nn.relu(1 - jnp.abs(place[..., None] - jnp.arange(side)))
        weights = (hats[..., 1, :, None] * hats[..., 0, None, :]).reshape(*coords.shape[:-1], side * side)
        return lambda map: weights @ map.reshape(len(map), side * side, -1)

    def _mixed(self, read: Array) -> list[Array]:
        """Upstream's modulations of each layer, `(B, 1, N, H)` or `(B, 1, N, 2 H)`, from what is read `(B, N, M)`.

        All of a kind is read as (layers, N, H) where it is (N, layers, H).
        """
        c = self.config
        batch, points, _ = read.shape
        kinds = jnp.moveaxis(read.reshape(batch, points, c.num_layers - 1, c.kinds, c.hidden_size), 3, 0)
        mixed = kinds.reshape(c.kinds, batch, c.num_layers - 1, points, c.hidden_size)
        return [jnp.concatenate(list(mixed[:, :, layer]), axis=-1)[:, None] for layer in range(c.num_layers - 1)]

    def _size(self, size: int | tuple[int, ...] | None) -> tuple[int, ...]:
        axes = self.config.axes
        if size is None:
            return self.config.image_size
        return int_tuple("size", (size,) * axes if isinstance(size, int) else size, axes)


class Fitted(NamedTuple):
    """What `fit` found; see the PyTorch class."""

    latent: Array
    loss: Array
    recon: Array
    losses: Array


def fit(
    model: Functa,
    variables: Mapping,
    target: Array,
    coords: Array | None = None,
    *,
    steps: int | None = None,
    order: int = 0,
) -> Fitted:
    """Latents of signals `target` `(B, N, C)`, known at `coords` `(N, d)` (by default the config's grid).

    steps: of gradient descent, by default the config's.
    order: of the outer gradient in `variables`; 0: none, 1: the inner gradients count as constants, 2: exact.

    For `jax.jit` bind the model, the steps and the order: `jax.jit(lambda variables, target: fit(model, variables,
    target))`.
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order: expected 0, 1 or 2, got {order!r}")
    if order == 0:
        variables = jax.lax.stop_gradient(variables)
    coords = model.grid() if coords is None else coords

    def error(latent):
        recon = model.apply(variables, latent, coords)
        losses = jnp.square(recon - target).mean((1, 2))
        return losses.sum(), (losses, recon)

    latent, losses = model.zeros(len(target)), []
    rates = model.apply(variables, method="rates_now")
    for _ in range(model.config.inner_steps if steps is None else steps):
        gradient, (loss, _) = jax.grad(error, has_aux=True)(latent)
        latent = latent - rates * (gradient if order == 2 else jax.lax.stop_gradient(gradient))
        losses.append(loss)
    _, (loss, recon) = error(latent)
    return Fitted(latent, loss, recon, jax.lax.stop_gradient(jnp.stack([*losses, loss])))


def psnr(recon: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio of each signal in dB, for a peak of 1: (B, ..) -> (B,)."""
    return -10 * jnp.log10(jnp.square(recon - target).reshape(len(target), -1).mean(1))


class State(NamedTuple):
    """A training state: the parameters and the optimizer's."""

    params: Any
    optimizer: optax.OptState


def train_step(
    model: Functa,
    optimizer: optax.GradientTransformation,
    state: State,
    target: Array,
    coords: Array | None = None,
    *,
    order: int = 2,
) -> tuple[State, dict[str, Array]]:
    """One outer step on signals `target` `(B, N, C)`; returns the state, and their mean "loss" and "psnr" before it.

    Jit it with model and optimizer bound: they are no arrays.
    """

    def outer(params):
        fitted = fit(model, {"params": params}, target, coords, order=order)
        return fitted.loss.mean(), psnr(fitted.recon, target).mean()

    (loss, decibel), gradient = jax.value_and_grad(outer, has_aux=True)(state.params)
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), inner), {"loss": loss, "psnr": decibel}


def from_pretrained(path: str | os.PathLike) -> tuple[Functa, dict]:
    """The model of a directory written by the PyTorch model's `save_pretrained`, and its variables in fp32.

    Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
    """
    config, state = read_pretrained(path, MODEL, Config, TorchFuncta)
    return Functa(config), {"params": flax_params(state, config)}


def flax_params(state: Mapping[str, torch.Tensor], config: Config) -> dict:
    """The PyTorch model's tensors, by name, as the tree of this model's parameters, fp32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nested(unpacked(table(config), state)))
