"""Functas of the JAX port "spatial_functa", as parameter trees of Flax, to a checkpoint directory of ours, and back.

The result computes what the port computes: `Config.upstream` names every choice of the port that is not ours. A functa
of fourdperf.jax.models.functa has the same names; for one with our choices give these as overrides.
"""

import re
from collections.abc import Mapping

from fourdperf.convert.flax_tree import SUFFIXES, TreeFormat
from fourdperf.convert.table import Row, shape_of
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.functa import MODEL, Config, Functa

__all__ = ["MODEL", "SUFFIXES", "convert", "export", "infer_config", "load", "load_tree", "table"]

RATES = "lrs/lrs"
MODULATION = "latent_to_modulation/network/kernel"


def table(config: Config) -> list[Row]:
    """All rows of a functa."""
    c, sines = config, config.num_layers - 1
    sizes = [c.input_size, *[c.hidden_size] * sines, c.channels]
    names = [*(f"kernel_net_{index}/linear" for index in range(sines)), f"kernel_net_{sines}"]
    rows = []
    for index, (name, inputs, outputs) in enumerate(zip(names, sizes, sizes[1:])):
        rows += [
            Row(f"layers.{index}.weight", (outputs, inputs), ((f"{name}/kernel", (inputs, outputs)),), transpose=True),
            Row(f"layers.{index}.bias", (outputs,), ((f"{name}/bias", (outputs,)),)),
        ]
    inputs, outputs = c.latent_channels, c.kinds * sines * c.hidden_size
    source = (MODULATION, (1, 1, inputs, outputs))
    rows += [
        Row("modulation.weight", (outputs, inputs), (source,), transpose=True),
        Row("modulation.bias", (outputs,), (("latent_to_modulation/network/bias", (outputs,)),)),
    ]
    if c.rates_shape is not None:
        rows.append(Row("rates", c.rates_shape, ((RATES, c.rates_shape),)))
    return rows


def infer_config(shapes: Mapping[str, tuple[int, ...]], overrides: Mapping | None = None) -> Config:
    """The config of a tree of the port, from the names and shapes of its arrays; `overrides` replace its fields.

    No array shows omega_0 (30), modulate ("shift" where there is one of the two), inner_steps (3), inner_rate (0.01)
    and rate_multiplier (1), which have these defaults. No array shows image_size, which is 32 x 32 where the network's
    input is two numbers and must be given otherwise. So must latent_size, unless there are learned rates for each
    pixel, or coordinates of one or three axes.
    """
    overrides = dict(overrides or {})
    indices = [int(match[1]) for match in (re.match(r"kernel_net_(\d+)/", name) for name in shapes) if match]
    sines = max(indices, default=0)
    inputs, width = shape_of(shapes, "kernel_net_0/linear/kernel", 2)
    _, _, channels, modulations = shape_of(shapes, MODULATION, 4)
    fields = {
        "hidden_size": width,
        "num_layers": sines + 1,
        "channels": shape_of(shapes, f"kernel_net_{sines}/kernel", 2)[1],
        "latent_channels": channels,
        "interpolation": "linear" if inputs > 3 else "nearest",
        "modulate": "both" if modulations == 2 * sines * width else "shift",
    }
    side = 1
    if RATES in shapes:
        side, *_, last = shape_of(shapes, RATES, 2, 3, 4)
        each_pixel, each_channel = side > 1, last > 1
        names = {(False, False): "one", (True, False): "pixel", (False, True): "channel", (True, True): "full"}
        fields["rates"] = names[each_pixel, each_channel]
    if side > 1 or inputs in (1, 3):
        fields["latent_size"] = side
    missing = [name for name in ("latent_size", "image_size") if name not in {**fields, **overrides}]
    if inputs == 2:
        missing = [name for name in missing if name != "image_size"]
    if missing:
        raise CheckpointError(f"{' and '.join(missing)}: no array shows it; pass it as an override")
    return Config.upstream(**{**fields, **overrides})


def _warning(model: Functa) -> str:
    """What of a functa the port would not do."""
    config, found = model.config, []
    if config.spatial and not config.mixes_points:
        found.append(f"modulation_layout is {config.modulation_layout}, there upstream")
    if config.axes != 2:
        found.append(f"signals of size {config.image_size}, there images")
    if model.rates is not None and config.rate_range is not None:
        low, high = config.rate_range
        if bool(((model.rates < low) | (model.rates > high)).any()):
            found.append(f"learned rates are clipped to {config.rate_range}, there not")
    return f"the port computes otherwise than we do: {'; '.join(found)}" if found else ""


FORMAT = TreeFormat(MODEL, Config, Functa, table, infer_config, _warning)
load_tree, load, convert, export = FORMAT.load_tree, FORMAT.load, FORMAT.convert, FORMAT.export
