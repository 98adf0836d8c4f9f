"""Neural Isometries in Flax: the reference that the PyTorch file is compared with, in numbers and, under jit, in time.

The same classes and functions in the same order, with `taps` under the same names, and the losses of
fourdperf.train.niso_loss after them; parameters are named as the original names them. Plain jnp, channels last.
`from_pretrained` reads the same directories.
"""

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
from fourdperf.convert.niso import table
from fourdperf.jax.models.layers import read_pretrained, tap
from fourdperf.jax.ops import procrustes
from fourdperf.models.niso import LENGTH_FLOOR, MASS_FLOOR, MODEL, MODELS, STILL, WINDOW_WIDTH, WINDOWS, Config
from fourdperf.models.niso_nets import DAMPING_START, NEURON_EPS, NORM_EPS
from fourdperf.train.niso_loss import NORM_EPS as LOSS_EPS
from fourdperf.train.niso_loss import TEMPERATURE, TINY

LINEAR = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def dense(features: int, bias: bool = True, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=LINEAR, name=name)


# ---- the operator


class Basis(NamedTuple):
    """Functions with Phi^T diag(M) Phi = 1 and their eigenvalues, ascending; see the PyTorch class."""

    mass: Array
    functions: Array
    eigenvalues: Array
    mask: Array


class IsometricOperator(nn.Module):
    """A learned operator on fields of `spatial` points, by its first functions; see the PyTorch class."""

    op_dim: int
    spatial: int
    clustered: bool = False
    gradient: str = "exact"

    def setup(self):
        normal = nn.initializers.orthogonal() if self.gradient == "exact" else nn.initializers.normal(1.0)
        self.M = self.param("M", nn.initializers.ones, (self.spatial,))
        self.Phi = self.param("Phi", normal, (self.spatial, self.op_dim))
        self.Lambda = self.param("Lambda", nn.initializers.uniform(1.0), (self.op_dim,))

    def basis(self) -> Basis:
        """The functions in force; their order follows the eigenvalues."""
        mass = jnp.square(self.M) + MASS_FLOOR
        root = jnp.sqrt(mass)[:, None]
        functions = procrustes(root * self.Phi, gradient=self.gradient, backend="jnp") / root
        eigenvalues = jnp.square(self.Lambda)
        if self.clustered:
            order = jnp.argsort(jax.lax.stop_gradient(eigenvalues), stable=True)
            functions, eigenvalues = functions[:, order], eigenvalues[order]
        else:
            eigenvalues = jnp.cumsum(eigenvalues)
        return Basis(mass, functions, eigenvalues, eigenvalue_mask(eigenvalues))

    def project(self, x: Array, basis: Basis) -> Array:
        """Coefficients Phi^T M x `(B, k, C)` of fields `(B, N, C)`."""
        return (basis.functions * basis.mass[:, None]).T @ x

    def unproject(self, coefficients: Array, basis: Basis) -> Array:
        """Fields Phi c `(B, N, C)` of coefficients `(B, k, C)`."""
        return basis.functions @ coefficients

    def align(self, a: Array, b: Array, basis: Basis) -> Array:
        """The rotation tau `(B, k, k)` nearest to mask * b a^T, of coefficients `(B, k, C)`: tau a is close to b."""
        return procrustes(basis.mask * (b @ a.mT), special=True, gradient=self.gradient, backend="jnp")

    def isometry(self, a: Array, b: Array, basis: Basis) -> Array:
        """The rotation tau `(B, k, k)` of coefficients that takes fields a to b, both `(B, N, C)`."""
        return self.align(self.project(a, basis), self.project(b, basis), basis)

    def motion(self, tau: Array, basis: Basis, grid: tuple[int, int]) -> Array:
        """How far rotations tau `(.., k, k)` move windows on the grid, `(.., 2, W)`; see the PyTorch class."""
        windows, offsets = gaussian_windows(grid)
        a, q = self.project(windows, basis), self.project(offsets, basis)
        moved = (tau - tau.mT) @ a
        return jnp.einsum("okw,...kw->...ow", q, moved) / jnp.maximum(jnp.square(a).sum(0), LENGTH_FLOOR)


def gaussian_windows(grid: tuple[int, int]) -> tuple[Array, Array]:
    """Fields g `(N, W)` around W = 6 x 6 places evenly over the grid, and (x - place) g `(2, N, W)`."""
    middles = lambda count: (jnp.arange(count) + 0.5) * (WINDOWS / count)
    down, across = (middles(size)[:, None] - middles(WINDOWS) for size in grid)
    offset = jnp.stack(jnp.broadcast_arrays(down[:, None, :, None], across[:, None])).reshape(2, -1, WINDOWS**2)
    window = jnp.exp(jnp.square(offset).sum(0) / (-2 * WINDOW_WIDTH**2))
    return window, offset * window


def eigenvalue_mask(eigenvalues: Array) -> Array:
    """exp(-|Lambda_i - Lambda_j|) `(.., k, k)` of eigenvalues `(.., k)`."""
    return jnp.exp(-jnp.abs(eigenvalues[..., None, :] - eigenvalues[..., None]))


# ---- convolutional nets


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-6) over the grid, of each sample and channel, scaled, shifted; `(B, H, W, C)`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (1, 1, 1, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x - x.mean((1, 2), keepdims=True)
        deviation = jnp.sqrt(jnp.square(x).mean((1, 2), keepdims=True) + NORM_EPS)
        return x * (scale / deviation) + bias


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))), `(B, H, W, C)` -> `(B, H, W, D)`; zeros outside the image."""

    features: int
    kernel_size: int = 3
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv(name: str) -> nn.Conv:
            size = (self.kernel_size,) * 2
            return nn.Conv(self.features, size, use_bias=self.bias, kernel_init=LINEAR, name=name)

        hidden = nn.silu(InstanceNorm(name="LayerNorm_0")(x))
        hidden = nn.silu(InstanceNorm(name="LayerNorm_1")(conv("Conv_0")(hidden)))
        return dense(self.features, self.bias, "Dense_0")(x) + conv("Conv_1")(hidden)


def _mean(x: Array) -> Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


def _double(x: Array) -> Array:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _levels(module: nn.Module, resample: Callable[[Array], Array]) -> tuple[list, list[int]]:
    """Modules in the original's order, and where each level ends."""
    modules, ends = [], []
    for level, (width, blocks) in enumerate(zip(module.channels, module.depth)):
        modules += [resample] * (level > 0)
        modules += [ResBlock(width, module.kernel_size, module.bias) for _ in range(blocks)]
        ends.append(len(modules))
    return modules, ends


class ConvEncoder(nn.Module):
    """Observations `(B, H, W, C)` -> fields `(B, h, w, D)`: levels of residual blocks, 2 x 2 means between them."""

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    out_channels: int
    kernel_size: int = 3
    stem_channels: int = 48
    bias: bool = False

    def setup(self):
        levels, ends = _levels(self, _mean)
        self.ends = [end + 2 for end in ends]
        self.module_list = [
            dense(self.stem_channels),
            nn.silu,
            *levels,
            InstanceNorm(),
            nn.silu,
            dense(self.out_channels),
        ]

    def __call__(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        names = {2: "encoder/stem", len(self.module_list): "encoder/out"}
        return _run(self, x, taps, names | {end: f"encoder/{index:02d}" for index, end in enumerate(self.ends)})


class ConvDecoder(nn.Module):
    """Fields `(B, h, w, D)` -> observations `(B, H, W, C)`: levels of residual blocks, points doubled between them."""

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    out_channels: int
    kernel_size: int = 3
    bias: bool = False

    def setup(self):
        levels, self.ends = _levels(self, _double)
        self.module_list = [*levels, InstanceNorm(), nn.silu, dense(self.out_channels)]

    def __call__(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        names = {len(self.module_list): "decoder/out"}
        return _run(self, x, taps, names | {end: f"decoder/{index:02d}" for index, end in enumerate(self.ends)})


def _run(net: nn.Module, x: Array, taps: dict[str, Array] | None, names: dict[int, str]) -> Array:
    """All modules of a net in turn; `names` of what stands after so many."""
    for index, module in enumerate(net.module_list, start=1):
        x = module(x)
        if index in names:
            tap(taps, names[index], x)
    return x


# ---- equivariant nets: vectors of K numbers in C channels, (B, K, C); a rotation of K rotates what they give


class OrthogonalNeuron(nn.Module):
    """A vector's SiLU: of q the part along k, p = <q, k> / |k|^2 k, becomes sigmoid(<q, k>) p; q, k are linear in x."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        query, key = (dense(self.features, False, name)(x) for name in ("Dense_0", "Dense_1"))
        along = (query * key).sum(-2, keepdims=True)
        return query - nn.sigmoid(-along) * along / (jnp.square(key).sum(-2, keepdims=True) + NEURON_EPS) * key


class OrthogonalNorm(nn.Module):
    """Each channel's vector over its root mean square: scale x / sqrt(mean_K x^2 + |damping| + 1e-6)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        damping = self.param("eps", nn.initializers.constant(DAMPING_START), x.shape[-1:])
        return scale * (x / jnp.sqrt(jnp.square(x).mean(-2, keepdims=True) + jnp.abs(damping) + NORM_EPS))


class OrthogonalMLP(nn.Module):
    """`num_layers` pairs of (OrthogonalNorm, OrthogonalNeuron), or the first `num_layers` modules of that list."""

    features: int
    num_layers: int
    upstream_modules: bool = False

    def setup(self):
        count = self.num_layers if self.upstream_modules else 2 * self.num_layers
        self.layers = [OrthogonalNeuron(self.features) if index % 2 else OrthogonalNorm() for index in range(count)]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class OrthogonalOut(nn.Module):
    """Vectors `(B, K, C)` -> invariant numbers `(B, out)`: two linear layers on a Gram matrix."""

    out_features: int
    gram_features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = OrthogonalNeuron(self.gram_features, name="orth_neuron_0")(OrthogonalNorm(name="orth_norm_0")(x))
        rows, columns = jnp.triu_indices(self.gram_features)
        gram = (x.mT @ x)[..., rows, columns]
        hidden = nn.silu(dense(4 * gram.shape[-1], name="Dense_0")(gram))
        return dense(self.out_features, name="Dense_1")(hidden)


class OrthogonalNet(nn.Module):
    """Vectors `(B, K, C)` -> invariant numbers `(B, out)`; see the PyTorch class."""

    features: int
    num_layers: int
    out_features: int
    gram_features: int = 64
    upstream_modules: bool = False

    @nn.compact
    def __call__(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        first, second = self.num_layers - self.num_layers // 2, self.num_layers // 2
        if self.upstream_modules:
            first = second = self.num_layers // 2 + 1
        mlp = lambda layers, name: OrthogonalMLP(self.features, layers, self.upstream_modules, name=name)
        x = mlp(first, "orth_mlp_0")(x) + dense(self.features, False, "Dense_0")(x)
        tap(taps, "head/in", x)
        x = mlp(second, "orth_mlp_1")(x)
        tap(taps, "head/out", x)
        return OrthogonalOut(self.out_features, self.gram_features, name="orth_out_0")(x)


# ---- plain nets


class MLP(nn.Module):
    """`num_layers` linear layers with a SiLU before each, before the first only with `first_activation`."""

    features: int
    num_layers: int
    out_features: int
    first_activation: bool = True

    def setup(self):
        widths = [self.features] * (self.num_layers - 1) + [self.out_features]
        self.layers = [module for width in widths for module in (nn.silu, dense(width))][not self.first_activation :]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class SkipMLP(nn.Module):
    """An MLP of `num_layers` in two halves, the first beside a linear map; where odd, the first has one layer more."""

    features: int
    num_layers: int
    out_features: int
    first_activation: bool = True

    @nn.compact
    def __call__(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        half = self.num_layers // 2
        first = MLP(self.features, self.num_layers - half, self.features, self.first_activation, name="MLP_0")
        x = first(x) + dense(self.features, name="Dense_0")(x)
        tap(taps, "head/in", x)
        return MLP(self.features, half, self.out_features, name="MLP_1")(x)


# ---- rigid motions


def lift_se3(x: Array) -> Array:
    """Nine numbers `(.., 9)` as a pose `(.., 4, 4)`: two vectors, made orthonormal, and a translation."""
    first, second, translation = jnp.split(x, 3, axis=-1)
    first = _unit(first)
    third = _unit(jnp.cross(first, second))
    upper = jnp.stack([first, jnp.cross(third, first), third, translation], axis=-1)
    return _with_last_row(upper, jnp.ones_like(upper[..., :1, :1]))


def inverse_se3(pose: Array) -> Array:
    """The inverse `(.., 4, 4)` of poses `(.., 4, 4)`."""
    rotation = pose[..., :3, :3].mT
    upper = jnp.concatenate([rotation, -rotation @ pose[..., :3, 3:]], axis=-1)
    return _with_last_row(upper, pose[..., 3:, 3:])


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), LENGTH_FLOOR))


def _with_last_row(upper: Array, one: Array) -> Array:
    row = jnp.concatenate([jnp.zeros_like(upper[..., :1, :3]), one], axis=-1)
    return jnp.concatenate([upper, row], axis=-2)


# ---- models


class Related(NamedTuple):
    """What `Autoencoder` finds of observations a and b; see the PyTorch class."""

    basis: Basis
    coefficients_a: Array
    coefficients_b: Array
    tau: Array
    recon_a: Array
    recon_b: Array


class Model(nn.Module):
    """What all kinds share: encoder and operator."""

    config: Config

    def setup(self):
        c = self.config
        self.kernel = IsometricOperator(c.op_dim, c.spatial, c.clustered, c.procrustes_gradient)
        if c.encoder_channels:
            sizes = (c.encoder_channels, c.encoder_depth, c.latent_channels, c.kernel_size, c.stem_channels)
            self.encoder = ConvEncoder(*sizes, c.biases)

    def encode(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        """Fields `(B, N, D)` of observations `(B, H, W, C)`."""
        if self.config.encoder_channels:
            x = self.encoder(x, taps)
        return x.reshape(len(x), -1, x.shape[-1])


class Autoencoder(Model):
    """Encoder, operator and decoder; without encoder and decoder, the operator alone on observations as fields."""

    def setup(self):
        super().setup()
        c = self.config
        if c.decoder_channels:
            self.decoder = ConvDecoder(c.decoder_channels, c.decoder_depth, c.channels, c.kernel_size, c.biases)

    def decode(self, fields: Array, taps: dict[str, Array] | None = None) -> Array:
        """Observations `(B, H, W, C)` of fields `(B, N, D)`."""
        x = fields.reshape(len(fields), *self.config.grid, -1)
        return self.decoder(x, taps) if self.config.decoder_channels else x

    def __call__(self, a: Array, b: Array, taps: dict[str, Array] | None = None) -> Related:
        """Observations `(B, H, W, C)` and their transforms."""
        operator = self.kernel
        basis = operator.basis()
        fields = jnp.split(self.encode(jnp.concatenate([a, b]), taps), 2)
        of_a, of_b = (operator.project(x, basis) for x in fields)
        tau = operator.align(of_a, of_b, basis)
        taken = jnp.concatenate([tau.mT @ of_b, tau @ of_a])
        recon_a, recon_b = jnp.split(self.decode(operator.unproject(taken, basis), taps), 2)
        tap(taps, "functions", basis.functions)
        tap(taps, "eigenvalues", basis.eigenvalues)
        tap(taps, "coefficients", jnp.concatenate([of_a, of_b]))
        tap(taps, "tau", tau)
        return Related(basis, of_a, of_b, tau, recon_a, recon_b)


class Classifier(Model):
    """Observations `(B, H, W, C)` -> logits `(B, classes)`; gradients stop at the encoder, by default at the basis."""

    def setup(self):
        super().setup()
        c = self.config
        sizes = (c.head_features, c.head_layers, c.num_classes, c.gram_features)
        self.model = OrthogonalNet(*sizes, c.upstream_modules)

    def __call__(self, x: Array, taps: dict[str, Array] | None = None) -> Array:
        basis = self.kernel.basis()
        if not self.config.train_basis:
            basis = jax.lax.stop_gradient(basis)
        coefficients = self.kernel.project(jax.lax.stop_gradient(self.encode(x, taps)), basis)
        tap(taps, "coefficients", coefficients)
        return self.model(coefficients, taps)


class PosePredictor(Model):
    """Frames `(B, T, H, W, C)` -> poses of each frame but the first seen from the one before, `(B, T - 1, 4, 4)`."""

    def setup(self):
        super().setup()
        c = self.config
        self.model = SkipMLP(c.head_features, c.head_layers, 9, first_activation=False)

    def __call__(self, video: Array, taps: dict[str, Array] | None = None) -> Array:
        batch, frames = video.shape[:2]
        basis = jax.lax.stop_gradient(self.kernel.basis())
        fields = self.encode(video.reshape(-1, *video.shape[2:]), taps)
        coefficients = self.kernel.project(fields, basis)
        coefficients = coefficients.reshape(batch, frames, *coefficients.shape[1:])
        tau = jax.lax.stop_gradient(self.kernel.align(coefficients[:, :-1], coefficients[:, 1:], basis))
        tap(taps, "tau", tau)
        if self.config.head_input == "tau":
            pose = self.model(tau.reshape(batch, frames - 1, -1), taps)
        else:
            motion = self.kernel.motion(tau, basis, self.config.grid)
            tap(taps, "motion", motion)
            motion = motion.reshape(batch, frames - 1, -1)
            ahead, back = self.model(jnp.stack([motion, -motion]), taps)
            pose = jnp.array(STILL) + (ahead - back) / 2
        tap(taps, "pose", pose)
        return lift_se3(pose)


FLAX_MODELS = {"autoencoder": Autoencoder, "classifier": Classifier, "pose": PosePredictor}


# ---- losses


def l1(a: Array, b: Array) -> Array:
    """The mean of |a - b|."""
    return jnp.abs(a - b).mean()


def multiplicity_loss(mask: Array) -> Array:
    """How much eigenvalues cluster, by their mask `(.., k, k)`."""
    laplacian = mask.sum(-1)[..., None] * jnp.eye(mask.shape[-1]) - mask
    return (jnp.sqrt(jnp.square(laplacian).sum((-2, -1)) + LOSS_EPS) / mask.shape[-1]).mean()


def equivariance_loss(tau: Array, a: Array, b: Array) -> Array:
    """l1 between coefficients `(B, k, D)` and what the rotation tau `(B, k, k)` makes of each other's."""
    return l1(tau @ a, b) + l1(tau.mT @ b, a)


def contrast_loss(a: Array, b: Array) -> Array:
    """How badly Gram matrices of coefficients `(B, k, D)` tell a pair's views from others; see the PyTorch function."""
    x = jnp.concatenate([a, b])
    gram = (x.mT @ x).reshape(len(x), -1) / jnp.maximum(jnp.square(x).sum((-2, -1)), TINY)[:, None]
    gram = gram - gram.mean(0)
    gram = gram / jnp.maximum(jnp.linalg.norm(gram, axis=1, keepdims=True), TINY)
    logits = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, gram @ gram.T / TEMPERATURE)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(jnp.arange(len(x)), len(a))).mean()


def orientation_loss(a: Array, b: Array) -> Array:
    """l1 between rotation matrices `(.., 3, 3)`."""
    return l1(a, b)


def scale_procrustes(a: Array, b: Array, *, negative_scale: bool = False) -> tuple[Array, Array]:
    """l1 between points a and s b, both `(B, T, 3)`, and s b; see the PyTorch function."""
    size = jnp.maximum(jnp.square(b).sum((-2, -1), keepdims=True), TINY)
    if negative_scale:
        scale = jax.lax.stop_gradient((a * b).sum((-2, -1), keepdims=True) / size)
    else:
        scale = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True) / jnp.sqrt(size)
    return l1(a, scale * b), scale * b


def laplacian_loss(related: Related, a: Array, b: Array, *, beta: float) -> dict[str, Array]:
    """recon + beta mult, of fields `(B, H, W, C)` without an encoder."""
    recon = l1(related.recon_a, a) + l1(related.recon_b, b)
    mult = multiplicity_loss(related.basis.mask)
    return {"loss": recon + beta * mult, "recon": recon, "mult": mult}


def encode_loss(
    related: Related, a: Array, b: Array, *, alpha: float, beta: float, gamma: float = 0.0
) -> dict[str, Array]:
    """recon + alpha equiv + beta mult + gamma contrast, of observations `(B, H, W, C)`."""
    parts = laplacian_loss(related, a, b, beta=beta)
    equiv = equivariance_loss(related.tau, related.coefficients_a, related.coefficients_b)
    parts = {"loss": parts["loss"] + alpha * equiv, "recon": parts["recon"], "equiv": equiv, "mult": parts["mult"]}
    if gamma:
        parts["contrast"] = contrast_loss(related.coefficients_a, related.coefficients_b)
        parts["loss"] = parts["loss"] + gamma * parts["contrast"]
    return parts


def classification_loss(logits: Array, labels: Array) -> dict[str, Array]:
    """Cross-entropy of logits `(B, classes)` and labels `(B,)`; "acc" is the share of right answers."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"loss": loss, "acc": (logits.argmax(-1) == labels).mean()}


def pose_loss(relative: Array, poses: Array, *, negative_scale: bool = False) -> dict[str, Array]:
    """rotation + position; see the PyTorch function."""
    truth = inverse_se3(poses[:, :-1]) @ poses[:, 1:]
    rotation = orientation_loss(truth[..., :3, :3], relative[..., :3, :3])
    position, _ = scale_procrustes(truth[..., :3, 3], relative[..., :3, 3], negative_scale=negative_scale)
    return {"loss": rotation + position, "rotation": rotation, "position": position}


class State(NamedTuple):
    """A training state: the parameters and the optimizer's."""

    params: Any
    optimizer: optax.OptState


def train_step(
    loss: Callable[..., dict[str, Array]], optimizer: optax.GradientTransformation, state: State, *batch: Array
) -> tuple[State, dict[str, Array]]:
    """One step down `loss(params, *batch)["loss"]`; returns the state, and the loss's parts before it.

    Jit it with loss and optimizer bound: they are no arrays.
    """

    def value(params):
        parts = loss(params, *batch)
        return parts["loss"], parts

    (_, parts), gradient = jax.value_and_grad(value, has_aux=True)(state.params)
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), inner), parts


# ---- checkpoints


def from_pretrained(path: str | os.PathLike) -> tuple[Model, dict]:
    """The model of a directory written by a PyTorch model's `save_pretrained`, and its variables in fp32.

    Raises CheckpointError (a ValueError) that names the file, and the keys that are missing, unknown or misshapen.
    """
    config, state = read_pretrained(path, MODEL, Config, lambda config: MODELS[config.kind](config))
    return FLAX_MODELS[config.kind](config), {"params": flax_params(state, config)}


def flax_params(state: Mapping[str, torch.Tensor], config: Config) -> dict:
    """A copy of the PyTorch model's tensors, by name, as the tree of this model's parameters, fp32."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), nested(unpacked(table(config), state)))
