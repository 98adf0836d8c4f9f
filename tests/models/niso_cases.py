"""The reference numbers in tests/goldens/niso (format: README there) as models, inputs, outputs; and live models."""

import functools

import numpy as np
import torch
from torch import Tensor, nn

from fourdperf.convert.flax_tree import packed
from fourdperf.convert.niso import table
from fourdperf.convert.table import Row
from fourdperf.data.toric import toric_eigs
from fourdperf.models.niso import MODELS, Basis, Config, Model, eigenvalue_mask, lift_se3
from tests.models import goldens

GOLDENS = goldens.GOLDENS / "niso"
names = functools.partial(goldens.names, GOLDENS)


class Case(goldens.Golden):
    """One golden file."""

    def __init__(self, name: str):
        super().__init__(GOLDENS / f"{name}.npz")

    @property
    def model(self) -> dict:
        """The sizes that the original was built with."""
        return self.spec["model"]

    def tree(self, params: dict[str, Tensor] | None = None) -> dict[str, np.ndarray]:
        return {key: x.numpy() for key, x in (params or self.params).items()}

    def fill(self, module: nn.Module, rows: list[Row]) -> nn.Module:
        """The module with the case's parameters; both sides must be complete."""
        assert {name for row in rows for name, _ in row.sources} == set(self.params)
        module.load_state_dict(packed(rows, self.tree()))
        return module

    def check(self, key: str, got: Tensor, want: Tensor | None = None, noise: str | None = None) -> None:
        """`got` against out/.. or grad/.. (or `want`), by the README's rule."""
        where, name = key.split("/", 1)
        want = (self.outputs if where == "out" else self.grads)[name] if want is None else want
        got = got.detach() if isinstance(got, Tensor) else torch.from_numpy(np.array(got))
        noise = self.spec["float32_noise"][noise or key]
        error, allowed = (got - want).abs().max().item(), 30 * noise["max_abs"] + 3e-6 * noise["ref_max"]
        assert got.shape == want.shape and error <= allowed, f"{key}: {error:.2e} > {allowed:.2e}"

    def check_gradients(self, module: nn.Module, rows: list[Row], prefix: str = "params/") -> None:
        """Every parameter's gradient; what the original knows as rounding noise only has to be small."""
        grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in module.named_parameters()}
        self.check_tree(f"grad/{prefix}", rows, grads)

    def check_tree(self, prefix: str, rows: list[Row], tensors: dict[str, Tensor]) -> None:
        """Our tensors by our names against all of the original's under `prefix`; both sides must be complete."""
        where, head = prefix.split("/", 1)
        stored = self.grads if where == "grad" else self.outputs
        stored = {key.removeprefix(head): x for key, x in stored.items() if key.startswith(head)}
        ours = {
            name: part
            for row in rows
            for (name, _), part in zip(row.sources, row.unpack(tensors[row.key].detach().numpy()), strict=True)
        }
        assert set(ours) == set(stored)
        largest = max(x.abs().max() for x in stored.values())
        for key, x in ours.items():
            if f"{prefix}{key}" in self.spec["noise_only_keys"]:
                assert np.abs(x).max() <= 1e-4 * largest, key
            elif stored[key].any():
                self.check(f"{prefix}{key}", x)
            else:
                assert not x.any(), key


# ---- live models, of other sizes than the goldens'

ENCODER = {
    "image_size": (12, 20),
    "latent_channels": 11,
    "op_dim": 13,
    "encoder_channels": (6, 9),
    "encoder_depth": (1, 1),
}
UPSTREAM = {
    "biases": True,
    "upstream_modules": True,
    "train_basis": True,
    "procrustes_gradient": "regularized",
    "negative_scale": True,
}
HEAD = {"num_classes": 5, "head_features": 7, "head_layers": 3, "gram_features": 4}
POSES = {"kind": "pose", "image_size": (13, 9), "head_features": 10, "head_layers": 5, "op_dim": 6}
ONE_LEVEL = {"image_size": (5, 4), "encoder_channels": (8,), "encoder_depth": (1,)}
LIVE = {
    "operator alone": {"image_size": (4, 5), "channels": 90, "op_dim": 20, "clustered": True},
    "operator alone, few functions": {"image_size": (6, 7), "channels": 60, "op_dim": 9},
    "autoencoder": ENCODER,
    "autoencoder, upstream": {
        **UPSTREAM,
        **ENCODER,
        "kernel_size": 5,
        "decoder_channels": (8, 5),
        "decoder_depth": (1, 2),
    },
    "classifier": {**ENCODER, **HEAD, **ONE_LEVEL, "kind": "classifier"},
    "classifier, upstream": {**UPSTREAM, **ENCODER, **HEAD, "kind": "classifier", "head_layers": 4},
    "pose": {**ENCODER, **POSES},
    "pose, upstream": {**UPSTREAM, **ENCODER, **POSES},
    "pose, motion": {**ENCODER, **POSES, "latent_channels": 20, "op_dim": 16, "head_input": "motion"},
}


def build(name: str) -> Model:
    """A model whose every parameter matters, in eval mode."""
    torch.manual_seed(0)
    config = Config.from_dict(LIVE[name])
    model = MODELS[config.kind](config).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            if x.ndim == 1 and "operator" not in key:
                x.add_(0.3 * torch.randn_like(x))
        model.operator.M.mul_(1 + 0.3 * torch.rand_like(model.operator.M))
        model.operator.Phi.add_(0.1 * torch.randn_like(model.operator.Phi))
    return model


def inputs(model: Model, batch: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
    """What the model takes: pairs that are much alike, images, or sequences."""
    c, generator = model.config, torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    if c.kind == "pose":
        return (draw(batch, 1, *c.image_size, c.channels) + 0.5 * draw(batch, 4, *c.image_size, c.channels),)
    x = draw(batch, *c.image_size, c.channels)
    return (x, 0.8 * x + 0.5 * draw(*x.shape)) if c.kind == "autoencoder" else (x,)


def targets(model: Model, batch: int = 3) -> tuple[Tensor, ...]:
    """What its loss takes beside what it gives."""
    c, generator = model.config, torch.Generator().manual_seed(2)
    if c.kind == "classifier":
        return (torch.randint(c.num_classes, (batch,), generator=generator),)
    if c.kind == "pose":
        return (lift_se3(torch.randn(batch, 4, 9, generator=generator)),)
    return inputs(model, batch)


def loss(found, model: Model, library, targets) -> dict:
    """Of the library's own losses, those of the model's kind."""
    if model.config.kind == "classifier":
        return library.classification_loss(found, *targets)
    if model.config.kind == "pose":
        return library.pose_loss(found, *targets, negative_scale=model.config.negative_scale)
    if model.config.encoder_channels:
        return library.encode_loss(found, *targets, alpha=0.5, beta=0.1, gamma=0.2)
    return library.laplacian_loss(found, *targets, beta=0.5)


def in_flax(model: Model, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors by our names -> arrays by Flax's paths."""
    return {
        name: part
        for row in table(model.config)
        for (name, _), part in zip(row.sources, row.unpack(tensors[row.key].detach().numpy()), strict=True)
    }


def exact_basis(size: int, k: int) -> Basis:
    """The torus Laplacian's first k functions on size x size points."""
    values, vectors, mass = toric_eigs(size, size)
    return Basis(mass, vectors[:, :k], values[:k], eigenvalue_mask(values[:k]))
