"""Neural Isometries of the original, as parameter trees of Flax, to a checkpoint directory of ours, and back.

The result computes what the original computes: `Config.upstream` names every choice of it that is not ours. A model of
fourdperf.jax.models.niso has the same names; for one with our choices give these as overrides.
"""

import re
from collections.abc import Mapping

from fourdperf.convert.flax_tree import SUFFIXES, TreeFormat
from fourdperf.convert.table import ConvRow, Row, shape_of
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.niso import MODEL, MODELS, WINDOWS, Config, Model

__all__ = ["MODEL", "SUFFIXES", "convert", "export", "infer_config", "load", "load_tree", "table"]


def table(config: Config) -> list[Row]:
    """All rows of a model of any kind."""
    c = config
    rows = operator("operator.", "kernel/", c.spatial, c.op_dim)
    if c.encoder_channels:
        sizes = (c.channels, c.encoder_channels, c.encoder_depth, c.latent_channels, c.kernel_size, c.stem_channels)
        rows += encoder("encoder.", "encoder/", *sizes, c.biases)
    if c.kind == "autoencoder" and c.decoder_channels:
        sizes = (c.latent_channels, c.decoder_channels, c.decoder_depth, c.channels, c.kernel_size)
        rows += decoder("decoder.", "decoder/", *sizes, c.biases)
    if c.kind == "classifier":
        sizes = (c.latent_channels, c.head_features, c.head_layers, c.num_classes, c.gram_features)
        rows += orthogonal_net("head.", "model/", *sizes, c.upstream_modules)
    if c.kind == "pose":
        rows += skip_mlp("head.", "model/", c.pose_inputs, c.head_features, c.head_layers, 9, False)
    return rows


def operator(ours: str, theirs: str, spatial: int, op_dim: int) -> list[Row]:
    shapes = {"M": (spatial,), "Phi": (spatial, op_dim), "Lambda": (op_dim,)}
    return [Row(ours + name, shape, ((theirs + name, shape),)) for name, shape in shapes.items()]


def encoder(ours, theirs, inputs, channels, depth, outputs, kernel_size, stem, biases) -> list[Row]:
    """The original's list of modules has places for the activation after the stem, the means, the last activation."""
    rows, place = _linear(f"{ours}stem", f"{theirs}module_list_0", inputs, stem), 2
    levels, place = _levels(ours, theirs, place, stem, channels, depth, kernel_size, biases)
    return rows + levels + _last(ours, theirs, place, channels[-1], outputs)


def decoder(ours, theirs, inputs, channels, depth, outputs, kernel_size, biases) -> list[Row]:
    rows, place = _levels(ours, theirs, 0, inputs, channels, depth, kernel_size, biases)
    return rows + _last(ours, theirs, place, channels[-1], outputs)


def _levels(ours, theirs, place, inputs, channels, depth, kernel_size, biases) -> tuple[list[Row], int]:
    rows = []
    for level, (width, blocks) in enumerate(zip(channels, depth)):
        place += level > 0
        for block in range(blocks):
            name = f"{theirs}module_list_{place}/"
            rows += res_block(f"{ours}levels.{level}.{block}.", name, inputs, width, kernel_size, biases)
            inputs, place = width, place + 1
    return rows, place


def _last(ours: str, theirs: str, place: int, width: int, outputs: int) -> list[Row]:
    norm = instance_norm(f"{ours}norm", f"{theirs}module_list_{place}", width)
    return norm + _linear(f"{ours}out", f"{theirs}module_list_{place + 2}", width, outputs)


def res_block(ours: str, theirs: str, inputs: int, width: int, kernel_size: int, biases: bool) -> list[Row]:
    rows = instance_norm(f"{ours}norm_in", f"{theirs}LayerNorm_0", inputs)
    rows += instance_norm(f"{ours}norm_out", f"{theirs}LayerNorm_1", width)
    for name, index, channels in (("conv_in", 0, inputs), ("conv_out", 1, width)):
        shape, square = (width, channels, kernel_size, kernel_size), (kernel_size, kernel_size)
        source = (f"{theirs}Conv_{index}/kernel", (*square, channels, width))
        rows.append(ConvRow(f"{ours}{name}.weight", shape, (source,)))
        if biases:
            rows.append(Row(f"{ours}{name}.bias", (width,), ((f"{theirs}Conv_{index}/bias", (width,)),)))
    return rows + _linear(f"{ours}skip", f"{theirs}Dense_0", inputs, width, biases)


def instance_norm(ours: str, theirs: str, width: int) -> list[Row]:
    names = (("weight", "scale"), ("bias", "bias"))
    return [Row(f"{ours}.{a}", (width,), ((f"{theirs}/{b}", (1, 1, 1, width)),)) for a, b in names]


def orthogonal_net(ours, theirs, inputs, width, layers, outputs, gram, upstream_modules) -> list[Row]:
    counts = (2 * (layers - layers // 2), 2 * (layers // 2))
    if upstream_modules:
        counts = (layers // 2 + 1,) * 2
    rows = _linear(f"{ours}skip", f"{theirs}Dense_0", inputs, width, False)
    rows += orthogonal_mlp(f"{ours}mlp_in.", f"{theirs}orth_mlp_0/", inputs, width, counts[0])
    rows += orthogonal_mlp(f"{ours}mlp_out.", f"{theirs}orth_mlp_1/", width, width, counts[1])
    return rows + orthogonal_out(f"{ours}out.", f"{theirs}orth_out_0/", width, outputs, gram)


def orthogonal_mlp(ours: str, theirs: str, inputs: int, width: int, modules: int) -> list[Row]:
    rows = []
    for index in range(modules):
        names = f"{ours}layers.{index}", f"{theirs}layers_{index}"
        rows += orthogonal_neuron(*names, inputs, width) if index % 2 else orthogonal_norm(*names, inputs)
        inputs = width if index % 2 else inputs
    return rows


def orthogonal_norm(ours: str, theirs: str, width: int) -> list[Row]:
    names = (("scale", "scale"), ("damping", "eps"))
    return [Row(f"{ours}.{a}", (width,), ((f"{theirs}/{b}", (width,)),)) for a, b in names]


def orthogonal_neuron(ours: str, theirs: str, inputs: int, width: int) -> list[Row]:
    query = _linear(f"{ours}.query", f"{theirs}/Dense_0", inputs, width, False)
    return query + _linear(f"{ours}.key", f"{theirs}/Dense_1", inputs, width, False)


def orthogonal_out(ours: str, theirs: str, width: int, outputs: int, gram: int) -> list[Row]:
    entries = gram * (gram + 1) // 2
    return [
        *orthogonal_norm(f"{ours}norm", f"{theirs}orth_norm_0", width),
        *orthogonal_neuron(f"{ours}neuron", f"{theirs}orth_neuron_0", width, gram),
        *_linear(f"{ours}dense_in", f"{theirs}Dense_0", entries, 4 * entries),
        *_linear(f"{ours}dense_out", f"{theirs}Dense_1", 4 * entries, outputs),
    ]


def mlp(ours, theirs, inputs, width, layers, outputs, first_activation) -> list[Row]:
    """The original's list of layers has a place for each activation, which comes before its layer."""
    sizes, rows = [inputs, *[width] * (layers - 1), outputs], []
    for index, pair in enumerate(zip(sizes, sizes[1:])):
        rows += _linear(f"{ours}layers.{index}", f"{theirs}layers_{2 * index + first_activation}", *pair)
    return rows


def skip_mlp(ours, theirs, inputs, width, layers, outputs, first_activation) -> list[Row]:
    half = layers // 2
    rows = _linear(f"{ours}skip", f"{theirs}Dense_0", inputs, width)
    rows += mlp(f"{ours}mlp_in.", f"{theirs}MLP_0/", inputs, width, layers - half, width, first_activation)
    return rows + mlp(f"{ours}mlp_out.", f"{theirs}MLP_1/", width, width, half, outputs, True)


def _linear(ours: str, theirs: str, inputs: int, outputs: int, bias: bool = True) -> list[Row]:
    weight = Row(f"{ours}.weight", (outputs, inputs), ((f"{theirs}/kernel", (inputs, outputs)),), transpose=True)
    return [weight, *[Row(f"{ours}.bias", (outputs,), ((f"{theirs}/bias", (outputs,)),))] * bias]


def infer_config(shapes: Mapping[str, tuple[int, ...]], overrides: Mapping | None = None) -> Config:
    """The config of a tree of the original, from the names and shapes of its arrays; `overrides` replace its fields.

    No array shows image_size, which must be given, nor channels where there is no encoder. `clustered` is true there
    and false elsewhere, as in the original's experiments. head_layers of the original's classifiers is even.
    """
    overrides = dict(overrides or {})
    fields = {"op_dim": shape_of(shapes, "kernel/Lambda", 1)[0]}
    has = lambda prefix: any(name.startswith(prefix) for name in shapes)
    fields["clustered"] = not has("encoder/")
    if has("encoder/"):
        last = _places(shapes, "encoder/")[-1]
        fields["channels"], fields["stem_channels"] = shape_of(shapes, "encoder/module_list_0/kernel", 2)
        fields["encoder_channels"], fields["encoder_depth"] = _infer_levels(shapes, "encoder/")
        fields["latent_channels"] = shape_of(shapes, f"encoder/module_list_{last}/kernel", 2)[1]
        fields["kernel_size"] = shape_of(shapes, "encoder/module_list_2/Conv_0/kernel", 4)[0]
        fields["biases"] = "encoder/module_list_2/Conv_0/bias" in shapes
    if has("decoder/"):
        fields["decoder_channels"], fields["decoder_depth"] = _infer_levels(shapes, "decoder/")
    if has("model/orth_"):
        fields["kind"] = "classifier"
        fields["head_features"] = shape_of(shapes, "model/Dense_0/kernel", 2)[1]
        fields["gram_features"] = shape_of(shapes, "model/orth_out_0/orth_neuron_0/Dense_0/kernel", 2)[1]
        fields["num_classes"] = shape_of(shapes, "model/orth_out_0/Dense_1/kernel", 2)[1]
        counts = [len(_places(shapes, f"model/orth_mlp_{index}/", "layers")) for index in range(2)]
        halved = overrides.get("upstream_modules", True)
        fields["head_layers"] = max(1, 2 * (counts[0] - 1) if halved else sum(counts) // 2)
    elif has("model/"):
        fields["kind"] = "pose"
        inputs, fields["head_features"] = shape_of(shapes, "model/Dense_0/kernel", 2)
        fields["head_input"] = "motion" if inputs == 2 * WINDOWS**2 else "tau"  # which has a square of inputs
        fields["head_layers"] = sum(len(_places(shapes, f"model/MLP_{index}/", "layers")) for index in range(2))
    needed = ("image_size",) if has("encoder/") else ("image_size", "channels")
    if missing := [name for name in needed if name not in overrides]:
        raise CheckpointError(f"{' and '.join(missing)}: no array shows it; pass it as an override")
    return Config.upstream(**{**fields, **overrides})


def _places(shapes: Mapping[str, tuple[int, ...]], prefix: str, kind: str = "module_list") -> list[int]:
    """The places of a list of modules that have arrays, ascending."""
    matches = (re.match(rf"{prefix}{kind}_(\d+)/", name) for name in shapes)
    places = sorted({int(match[1]) for match in matches if match})
    if not places:
        raise CheckpointError(f"missing {prefix}{kind}_..")
    return places


def _infer_levels(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Width and number of residual blocks of each level; a place is left out between levels."""
    channels, depth, before = [], [], None
    for place in _places(shapes, prefix):
        kernel = f"{prefix}module_list_{place}/Conv_0/kernel"
        if kernel not in shapes:
            continue
        if before is None or place > before + 1:
            channels.append(shape_of(shapes, kernel, 4)[3])
            depth.append(0)
        depth[-1], before = depth[-1] + 1, place
    return tuple(channels), tuple(depth)


def _warning(model: Model) -> str:
    """What of a model's modules the original would not build."""
    config, found = model.config, []
    if config.encoder_channels and not config.biases:
        found.append("no biases in residual blocks")
    if config.kind == "classifier" and not config.upstream_modules:
        found.append("all modules of the equivariant layers")
    if config.kind == "pose" and config.head_input == "motion":
        found.append("a head on motion")
    return f"the original has other modules: {'; '.join(found)}" if found else ""


FORMAT = TreeFormat(MODEL, Config, lambda config: MODELS[config.kind](config), table, infer_config, _warning)
load_tree, load, convert, export = FORMAT.load_tree, FORMAT.load, FORMAT.convert, FORMAT.export
