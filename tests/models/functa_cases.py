"""The reference numbers in tests/goldens/functa (format: README there) as models, inputs, outputs."""

import functools

from torch import Tensor

from fourdperf.models.functa import Config, Functa
from tests.models import goldens

GOLDENS = goldens.GOLDENS / "functa"
names = functools.partial(goldens.names, GOLDENS)


class Case(goldens.Golden):
    """One golden file."""

    def __init__(self, name: str):
        super().__init__(GOLDENS / f"{name}.npz")

    @property
    def config(self) -> Config:
        model = self.spec["model"]
        inner = self.spec.get("inner") or self.spec.get("train") or {}
        side, channels = (self.spec["model"]["latent_lr_shape"][axis] > 1 for axis in (0, 2))
        learned = {(False, False): "one", (True, False): "pixel", (False, True): "channel", (True, True): "full"}
        return Config.upstream(
            hidden_size=model["hidden_dim"],
            num_layers=model["num_layers"],
            omega_0=model["omega_0"],
            channels=model["output_dim"],
            image_size=(model["image_height"], model["image_width"]),
            latent_size=model["latent_spatial_dim"],
            latent_channels=model["latent_dim"],
            interpolation={"1-NN": "nearest", "linear": "linear"}[model["interpolation_type"]],
            modulate={(1, 0): "shift", (0, 1): "scale", (1, 1): "both"}[
                model["shift_modulate"], model["scale_modulate"]
            ],
            rates=learned[side, channels] if model["learn_lrs"] else "none",
            inner_steps=inner.get("inner_steps", 3),
            inner_rate=inner.get("inner_learning_rate", 0.01),
            rate_multiplier=inner.get("inner_lr_multiplier", 1.0),
        )

    def model(self) -> Functa:
        model = Functa(self.config)
        model.load_state_dict(renamed(self.params))
        return model

    def check(self, key: str, got: Tensor, want: Tensor | None = None) -> None:
        """`got` against out/.. or grad/.. (or `want`), by the README's rule."""
        where, name = key.split("/", 1)
        want = (self.outputs if where == "out" else self.grads)[name] if want is None else want
        noise = self.spec["float32_noise"][key]
        error, allowed = (got.detach() - want).abs().max().item(), 30 * noise["max_abs"] + 3e-6 * noise["ref_max"]
        assert got.shape == want.shape and error <= allowed, f"{key}: {error:.2e} > {allowed:.2e}"

    def check_all(self, prefix: str, got: dict[str, Tensor]) -> None:
        """Our tensors by our names against all of upstream's parameters under `prefix`; both sides must be complete."""
        stored = self.grads if prefix.startswith("grad/") else self.outputs
        head = prefix.split("/", 1)[1]
        theirs = {key.removeprefix(head): x for key, x in stored.items() if key.startswith(head)}
        wanted, sources = renamed(theirs), {ours(key): key for key in theirs}
        assert wanted.keys() == got.keys()
        for name, want in wanted.items():
            self.check(prefix + sources[name], got[name], want)


def ours(key: str) -> str:
    """Our name of an upstream parameter."""
    head, *_, kind = key.split("/")
    if head == "lrs":
        return "rates"
    kind = "weight" if kind == "kernel" else kind
    return f"modulation.{kind}" if head == "latent_to_modulation" else f"layers.{head.rpartition('_')[2]}.{kind}"


def renamed(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's parameters, or what is shaped as they are, as ours: kernels (.., in, out) -> (out, in)."""
    return {ours(key): x.flatten(0, -2).T if key.endswith("kernel") else x for key, x in params.items()}
