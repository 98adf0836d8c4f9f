"""Spatial functa: an image is fitted by gradient descent on a small map of latents, which modulates a shared SIREN.

    latent (B, s, s, c)
      | 1x1 convolution to shifts and/or scales of every sine layer           Functa.modulations
    modulations, each (B, s, s, H) or (B, s, s, 2 H)
    coords (N, 2), x along the width, in [0, 1]
      | position within the cell, or bits of the pixel's index                Functa.features
    features (N, K)
      | num_layers - 1 times: linear, modulation read at the coordinate, sine  Functa.forward
      | linear, + 1/2
    recon (B, N, C)

    fit: latents of zero, then `steps` times  latent -= rate * d/d latent of each signal's mean squared error

A latent map of side 1 is plain functa, for signals of one to three axes. Coordinates run backwards through the axes of
the signal: (x, y) for an image (H, W), (x, y, z) for voxels (D, H, W).

Source: "Spatial Functa" (arXiv 2302.03130), "From data to functa" (arXiv 2201.12204) and google-deepmind/functa (sizes,
start of the rates, + 1/2), "SIREN" (arXiv 2006.09661; start of the weights).
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, int_tuple, set_field
from fourdperf.models.layers import like, tap, wide
from fourdperf.ops import bilinear_sample
from fourdperf.ops.modulated_siren import modulated_sine

MODEL = "functa"
CHOICES = {
    "interpolation": ("nearest", "linear"),
    "modulate": ("shift", "scale", "both"),
    "rates": ("none", "one", "pixel", "channel", "full"),
    "modulation_layout": ("pixel", "upstream"),
}
RATES_START = (0.005, 0.1)
MODES = {"nearest": "nearest", "linear": "bilinear"}  # of `modulated_sine`
RULES = {"nearest": {"mode": "nearest_floor", "align_corners": False}, "linear": {}}  # of `bilinear_sample`


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes and options of a functa.

    hidden_size, num_layers: of the SIREN; the last layer is dense, the others are sines.
    omega_0: frequency of the sines.
    channels: of the signal.
    image_size: pixels along each axis of the signal, one to three; one number stands for a square image.
    latent_size, latent_channels: side s and channels c of the latent map; more than one cell only for images.
    interpolation: how modulations are read between the cells' centres, and what the network sees of a coordinate.
        "nearest" takes the cell that the coordinate lies in, and the position within it; "linear" interpolates with the
        outer cells' centres on the border of the image, and the input is the binary index of the pixel, least
        significant bit first. With one cell the input is the coordinate.
    modulate: "shift", "scale" or "both", of every sine layer.
    rates: learned step sizes (meta-SGD): "one", one each "pixel", "channel" or both ("full"); "none": `inner_rate`.
    rate_range: learned rates are clipped to it; None leaves them.
    inner_steps, inner_rate: of `fit`.
    rate_multiplier: of the learned rates, or of `inner_rate`.

    Of the JAX port "spatial_functa" (`Config.upstream`):
    modulation_layout: "upstream" reads (N, layers H) modulations as (layers, N, H) without a transpose, so that a layer
        of a pixel gets what belongs to others.
    transposed_grid: the grid's coordinates are (row, column), which everything else takes for (x, y).
    """

    hidden_size: int = 256
    num_layers: int = 10
    omega_0: float = 30.0
    channels: int = 3
    image_size: int | tuple[int, ...] = (32, 32)
    latent_size: int = 8
    latent_channels: int = 64
    interpolation: str = "nearest"
    modulate: str = "shift"
    rates: str = "none"
    rate_range: tuple[float, float] | None = (0.0, 1.0)
    inner_steps: int = 3
    inner_rate: float = 0.01
    rate_multiplier: float = 1.0
    modulation_layout: str = "pixel"
    transposed_grid: bool = False

    def __post_init__(self):
        for name in ("hidden_size", "num_layers", "channels", "latent_size", "latent_channels", "inner_steps"):
            check_int(name, getattr(self, name))
        if self.num_layers < 2:
            raise ValueError(f"num_layers: expected at least 2, a sine and the last, got {self.num_layers}")
        image = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        set_field(self, "image_size", int_tuple("image_size", image, 1, 2, 3))
        if self.latent_size > 1 and len(self.image_size) != 2:
            raise ValueError(f"latent_size: expected 1 for a signal of size {self.image_size}, got {self.latent_size}")
        check_choices(self, CHOICES)
        if self.interpolation == "linear" and self.latent_size > 1 and max(self.image_size) < 2:
            raise ValueError(f"image_size: expected an index of at least one bit, got {self.image_size}")
        for name in ("omega_0", "inner_rate", "rate_multiplier"):
            set_field(self, name, _number(name, getattr(self, name)))
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.rate_range is not None:
            if not isinstance(self.rate_range, (tuple, list)) or len(self.rate_range) != 2:
                raise ValueError(f"rate_range: expected (low, high) or None, got {self.rate_range!r}")
            set_field(self, "rate_range", tuple(_number("rate_range", x) for x in self.rate_range))
            if not self.rate_range[0] < self.rate_range[1]:
                raise ValueError(f"rate_range: expected low < high, got {self.rate_range}")
        if not isinstance(self.transposed_grid, bool):
            raise ValueError(f"transposed_grid: expected True or False, got {self.transposed_grid!r}")

    @classmethod
    def upstream(cls, **overrides) -> "Config":
        """The JAX port "spatial_functa" with all that it does differently, for its checkpoints."""
        return cls.from_dict(
            {"modulation_layout": "upstream", "transposed_grid": True, "rate_range": None, **overrides}
        )

    @property
    def axes(self) -> int:
        return len(self.image_size)

    @property
    def spatial(self) -> bool:
        """Whether modulations differ from place to place."""
        return self.latent_size > 1

    @property
    def mixes_points(self) -> bool:
        """Whether a value depends on the other coordinates of the call."""
        return self.spatial and self.modulation_layout == "upstream"

    @property
    def kinds(self) -> int:
        """Modulations per unit: 2 with scale and shift."""
        return 2 if self.modulate == "both" else 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.latent_size,) * self.axes + (self.latent_channels,)

    @property
    def rates_shape(self) -> tuple[int, ...] | None:
        """Of the learned rates, broadcastable to a latent; None where there are none."""
        if self.rates == "none":
            return None
        side = self.latent_size if self.rates in ("pixel", "full") else 1
        return (side,) * self.axes + (self.latent_channels if self.rates in ("channel", "full") else 1,)

    @property
    def bits(self) -> int:
        """Binary digits of a pixel's index along an axis."""
        return math.ceil(math.log2(max(self.image_size)))

    @property
    def input_size(self) -> int:
        return self.axes * self.bits if self.spatial and self.interpolation == "linear" else self.axes


class Functa(PretrainedModel):
    """The field that all signals share: latents and coordinates to values.

    layers      linear layers: uniform in +-1/K first, +-sqrt(6 / H) / omega_0 then (SIREN); biases zero
    modulation  c -> modulations: normal of deviation 1 / sqrt(c) (haiku's default, which functa takes), bias zero.
                Rows: all scales, then all shifts, each layer by layer
    rates       learned step sizes, if any: uniform in 0.005 .. 0.1 (functa)
    """

    MODEL, CONFIG, DTYPE = MODEL, Config, torch.float32

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, sines = config.hidden_size, config.num_layers - 1
        sizes = [config.input_size, *[width] * sines, config.channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.modulation = nn.Linear(config.latent_channels, config.kinds * sines * width)
        shape = config.rates_shape
        self.rates = None if shape is None else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        for index, layer in enumerate(self.layers):
            bound = 1 / config.input_size if index == 0 else math.sqrt(6 / config.hidden_size) / config.omega_0
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.modulation.weight, std=1 / math.sqrt(config.latent_channels))
        nn.init.zeros_(self.modulation.bias)
        if self.rates is not None:
            nn.init.uniform_(self.rates, *RATES_START)

    def zeros(self, batch: int) -> Tensor:
        """Latents `(B, s, s, c)` as `fit` starts from; with d axes `(B, 1, .., c)`."""
        return self.modulation.weight.new_zeros(batch, *self.config.latent_shape)

    def rates_now(self) -> Tensor | float:
        """The step sizes in force: a number, or a tensor that broadcasts to a latent."""
        config = self.config
        if self.rates is None:
            return config.inner_rate * config.rate_multiplier
        rates = self.rates if config.rate_range is None else self.rates.clamp(*config.rate_range)
        return rates * config.rate_multiplier

    def grid(self, size: int | tuple[int, ...] | None = None) -> Tensor:
        """Coordinates `(N, d)` of the pixels' centres, (i + 1/2) / n, in their order; `size` as image_size."""
        size = self._size(size)
        weight = self.layers[0].weight
        where = {"device": weight.device, "dtype": wide(weight.dtype)}
        axes = torch.meshgrid(*((torch.arange(n, **where) + 0.5) / n for n in size), indexing="ij")
        return torch.stack(axes if self.config.transposed_grid else axes[::-1], dim=-1).flatten(0, -2)

    def render(self, latent: Tensor, size: int | tuple[int, ...] | None = None) -> Tensor:
        """The signals `(B, *size, C)` at any resolution, by default the config's."""
        size = self._size(size)
        return self(latent, self.grid(size)).unflatten(1, size)

    def features(self, coords: Tensor) -> Tensor:
        """What the network sees of coordinates `(.., d)`: `(.., K)`, in their dtype.

        A coordinate of exactly 1 belongs to the last cell, or pixel (upstream's goes round to the first one's input).
        """
        config = self.config
        if not config.spatial:
            return coords
        if config.interpolation == "nearest":
            cells = coords * config.latent_size
            return cells - cells.detach().floor().clamp(0, config.latent_size - 1)
        size = torch.tensor(config.image_size[::-1], device=coords.device)
        index = (coords * size).long().clamp(min=torch.zeros_like(size), max=size - 1)
        shifts = torch.arange(config.bits, device=coords.device)
        return (index[..., None] >> shifts & 1).flatten(-2).to(coords.dtype)

    def modulations(self, latent: Tensor) -> tuple[Tensor, ...]:
        """Of each sine layer, `(B, s, s, H)`, or `(B, s, s, 2 H)` with scales, then shifts; `latent` `(B, s, s, c)`."""
        split = (self.config.kinds, self.config.num_layers - 1, self.config.hidden_size)
        weight, bias = (
            x.unflatten(0, split).transpose(0, 1).flatten(0, 2) for x in (self.modulation.weight, self.modulation.bias)
        )
        return F.linear(latent, weight, bias).unflatten(-1, (split[1], -1)).unbind(-2)

    def forward(self, latent: Tensor, coords: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Values `(B, N, C)` of the signals of latents `(B, s, s, c)` at `coords` `(N, d)` or `(B, N, d)`.

        taps: filled with "input", "modulation/00", .. and "layer/00", .. where a dictionary is given.
        Raises ValueError for shapes, dtypes or devices that do not fit.
        """
        latent, coords = self._check(latent, coords)
        config, features = self.config, self.features(coords)
        if not config.spatial:
            maps = self.modulations(latent.reshape(-1, 1, 1, config.latent_channels))
            return self.field(maps, features, coords.new_zeros(coords.shape[-2], 2), "nearest", taps)
        maps = self.modulations(latent)
        if config.mixes_points:
            return self.field(_mixed(maps, coords, config), features, _centres(coords), "nearest", taps)
        return self.field(maps, features, coords, MODES[config.interpolation], taps)

    def field(
        self,
        maps: tuple[Tensor, ...],
        features: Tensor,
        xy: Tensor,
        mode: str,
        taps: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Values `(B, N, C)` where each layer's modulations `(B, h, w, ..)` are read at `xy` `(.., N, 2)`.

        features: the network's input `(.., N, K)`, whose dtype values have. mode: of `modulated_sine`.
        """
        config, x = self.config, features.to(self.layers[0].weight.dtype)
        *sines, last = self.layers
        tap(taps, "input", features)
        for index, (layer, map) in enumerate(zip(sines, maps)):
            x = modulated_sine(layer(x), map, xy, omega=config.omega_0, modulate=config.modulate, mode=mode)
            tap(taps, f"modulation/{index:02d}", map)
            tap(taps, f"layer/{index:02d}", x)
        return last(x).to(features.dtype) + 0.5

    def _size(self, size: int | tuple[int, ...] | None) -> tuple[int, ...]:
        axes = self.config.axes
        if size is None:
            return self.config.image_size
        return int_tuple("size", (size,) * axes if isinstance(size, int) else size, axes)

    def _check(self, latent: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.config.latent_shape
        if not isinstance(latent, Tensor) or latent.shape[1:] != shape:
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"latent: expected a tensor ({wanted}), got {getattr(latent, 'shape', latent)!r}")
        return like(latent, self.layers[0].weight, "latent"), self.check_coords(coords, latent.shape[0])

    def check_coords(self, coords: Tensor, batch: int) -> Tensor:
        """Coordinates of that many signals in the dtype that they are read in. Raises ValueError for others."""
        axes = self.config.axes
        if not isinstance(coords, Tensor) or coords.shape[-1:] != (axes,) or coords.shape[:-2] not in ((), (batch,)):
            wanted = f"(N, {axes}) or (B={batch}, N, {axes})"
            raise ValueError(f"coords: expected a tensor {wanted}, got {getattr(coords, 'shape', coords)!r}")
        weight = self.layers[0].weight
        like(coords, weight, "coords")
        return coords.to(wide(weight.dtype))


def _mixed(maps: tuple[Tensor, ...], xy: Tensor, config: Config) -> tuple[Tensor, ...]:
    """Upstream's modulations of each layer at `xy`: maps `(B, 1, N, ..)` with a pixel for every point.

    All of a kind is read as (layers, N, H) where it is (N, layers, H).
    """
    layers, kinds, width = config.num_layers - 1, config.kinds, config.hidden_size
    read = bilinear_sample(torch.cat(maps, dim=-1), xy, **RULES[config.interpolation]).unflatten(
        -1, (layers, kinds, width)
    )
    batch, points = read.shape[:2]
    mixed = read.permute(3, 0, 1, 2, 4).reshape(kinds, batch, layers, points, width)
    return mixed.permute(2, 1, 3, 0, 4).flatten(-2)[:, :, None].unbind(0)


def _centres(points: Tensor) -> Tensor:
    """Where a map `(B, 1, N, ..)` with a pixel for every one of `points` `(.., N, d)` is read for each: `(N, 2)`."""
    number = points.shape[-2]
    x = (torch.arange(number, device=points.device, dtype=points.dtype) + 0.5) / number
    return torch.stack([x, torch.full_like(x, 0.5)], dim=-1)


class Fitted(NamedTuple):
    """What `fit` found.

    latent  (B, s, s, c)
    loss    (B,)            mean squared error of each signal
    recon   (B, N, C)
    losses  (steps + 1, B)  the same before each step and after the last, without gradients
    """

    latent: Tensor
    loss: Tensor
    recon: Tensor
    losses: Tensor


def fit(
    model: Functa,
    target: Tensor,
    coords: Tensor | None = None,
    *,
    steps: int | None = None,
    order: int = 0,
    chunk: int | None = None,
) -> Fitted:
    """Latents of signals `target` `(B, N, C)`, known at `coords` `(N, d)` or `(B, N, d)`, by default the config's grid.

    steps: of gradient descent, by default the config's.
    order: of the outer gradient in the model's parameters, rates included. 0: none. 1: inner gradients count as
        constants (first-order MAML). 2: exact. Steps keep nothing but latents, and make their graph again when it is
        needed; only the last forward pass is kept, and that of a signal larger than a tile is made again too.
    chunk: signals at a time, by default as many as fill a tile: 1024 points a thread on a CPU, 65536 on a GPU. More of
        them take more memory, about 50 kB a point with the default sizes.
    Raises ValueError for shapes, dtypes or devices that do not fit, and an unknown order.
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order: expected 0, 1 or 2, got {order!r}")
    if order == 0:
        with torch.inference_mode(False), torch.no_grad():
            return _fit(model, *_known(model, target, coords), steps, order, chunk)
    return _fit(model, *_known(model, target, coords), steps, order, chunk)


def _tile(device: torch.device) -> int:
    """Points worked on together: on a CPU as many as stay in its caches, on a GPU many for few launches."""
    return 1024 * min(max(torch.get_num_threads(), 2), 16) if device.type == "cpu" else 65536


def _known(model: Functa, target: Tensor, coords: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is to be fitted, checked; copied where an inference mode made it, because no graph may hold it then."""
    coords = model.grid() if coords is None else coords
    if not isinstance(target, Tensor) or target.ndim != 3 or target.shape[1] == 0:
        raise ValueError(f"target: expected a tensor (B, N >= 1, C), got {getattr(target, 'shape', target)!r}")
    coords = model.check_coords(coords, target.shape[0])
    wanted = (coords.shape[-2], model.config.channels)
    if target.shape[1:] != wanted:
        raise ValueError(f"target: expected a tensor (B, {wanted[0]}, {wanted[1]}), got {tuple(target.shape)}")
    target = like(target, coords, "target")
    return tuple(x.clone() if x.is_inference() else x for x in (target, coords))


def _fit(model, target, coords, steps, order, chunk) -> Fitted:
    config, (batch, points, _) = model.config, target.shape
    if steps is not None and steps != 0:
        check_int("steps", steps)
    limit = _tile(target.device)
    chunk = max(1, limit // points) if chunk is None else chunk
    check_int("chunk", chunk)
    rows, parts = _slices(batch, chunk), _slices(points, points if config.mixes_points else limit)
    tiles = [(row, part) for row in rows for part in parts]
    shared = coords.ndim == 2 and config.channels < batch and not config.mixes_points
    parameters = [p for name, p in model.named_parameters() if name != "rates" and p.requires_grad]

    latent, losses = model.zeros(batch), []
    for step in range(config.inner_steps if steps is None else steps):
        rule = (_gradient, tiles)
        if step == 0 and shared:
            rule = (_gradient_at_zero, [(slice(None), part) for part in parts])
        inputs = (latent, *parameters) if order == 2 else (latent.detach(),)
        gradient, loss = Descent.apply(model, *rule, target, coords, *inputs)
        latent = latent - model.rates_now() * gradient
        losses.append(loss)
    recon = torch.cat([torch.cat([_values(model, latent[r], coords, r, p) for p in parts], dim=1) for r in rows])
    loss = (recon - target).square().mean((1, 2))
    return Fitted(latent, loss, recon, torch.stack([*losses, loss.detach()]))


def _slices(length: int, size: int) -> list[slice]:
    """At least one, of at least one entry where there are any."""
    return [slice(start, start + max(1, size)) for start in range(0, max(1, length), max(1, size))]


def _part(coords: Tensor, rows: slice, points: slice) -> Tensor:
    return coords[points] if coords.ndim == 2 else coords[rows, points]


def _values(model: Functa, latent: Tensor, coords: Tensor, rows: slice, points: slice) -> Tensor:
    """The field of latents, of which no activations are kept if they are of a part of a signal only."""
    where = _part(coords, rows, points)
    if torch.is_grad_enabled() and where.shape[-2] < coords.shape[-2]:
        return checkpoint(model, latent, where, use_reentrant=False)
    return model(latent, where)


class Descent(torch.autograd.Function):
    """The derivative of each signal's mean squared error in its latent `(B, s, s, c)`, and that error `(B,)`.

    gradient_of: `_gradient` or what stands for it, called for each of the tiles (signals, points). Latents and
    parameters are all that is kept: the backward pass makes the gradient again, then its derivative, tile by tile.
    """

    @staticmethod
    def forward(ctx, model, gradient_of, tiles, target, coords, latent, *parameters):
        ctx.rule = model, gradient_of, tiles
        ctx.save_for_backward(target, coords, latent, *parameters)
        device = latent.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        model, mean = _frozen(model), 1 / target[0].numel() if len(target) else 0
        gradient, error = torch.zeros_like(latent), target.new_zeros(target.shape[0])
        for rows, points in tiles:
            z = latent[rows].detach().requires_grad_()
            part, squares = gradient_of(model, z, target[rows, points], _part(coords, rows, points), False)
            gradient[rows] += part
            error[rows] += squares
        error *= mean
        ctx.mark_non_differentiable(error)
        return gradient.mul_(mean), error

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_gradient, _):
        model, gradient_of, tiles = ctx.rule
        target, coords, latent, *parameters = ctx.saved_tensors
        d_gradient = d_gradient / target[0].numel()
        d_latent, *d_parameters = (torch.zeros_like(x) for x in (latent, *parameters))
        with torch.autocast(*ctx.autocast):
            for rows, points in tiles:
                z = latent[rows].detach().requires_grad_()
                gradient, _ = gradient_of(model, z, target[rows, points], _part(coords, rows, points), True)
                inputs, d = (z, *parameters), d_gradient[rows]
                d_z, *parts = torch.autograd.grad(gradient, inputs, d, allow_unused=True, materialize_grads=True)
                d_latent[rows] += d_z
                for total, part in zip(d_parameters, parts):
                    total += part
        return None, None, None, None, None, d_latent, *d_parameters


def _frozen(model: Functa) -> Functa:
    """The same model on the same memory, whose parameters want no gradient: fewer activations are kept for one."""
    return copy.deepcopy(model, {id(p): p.detach() for p in model.parameters()})


def _gradient(
    model: Functa, latent: Tensor, target: Tensor, coords: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """The derivative of each signal's squared error in its latent, a leaf, and that error `(B,)`."""
    with torch.enable_grad():
        error = (model(latent, coords) - target).square().sum((1, 2))
        return torch.autograd.grad(error.sum(), latent, create_graph=create_graph)[0], error.detach()


def _gradient_at_zero(
    model: Functa, latent: Tensor, target: Tensor, coords: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """`_gradient` where all latents are zero: the field is the same for all signals, and so is its Jacobian.

    A latent map may be read before it is made into modulations, since both are linear and the weights of a reading add
    up to one. So the Jacobian of each point's values is taken in the latent that is read there, once for all points of
    the same input (with "nearest" cells look alike); a signal's residual goes through it, then back to the cells with
    the weights that it was read with.
    """
    config, side = model.config, model.config.latent_size
    inputs, which = model.features(coords).unique(dim=0, return_inverse=True)
    with torch.enable_grad():
        read = latent.new_zeros(1, 1, len(inputs), config.latent_channels, requires_grad=True)
        fields = model.field(model.modulations(read), inputs, _centres(inputs), "nearest")[0]
        rows = (
            torch.autograd.grad(x, read, retain_graph=True, create_graph=create_graph)[0][0, 0] for x in fields.sum(0)
        )
        jacobian = torch.stack(tuple(rows), dim=1).to(fields.dtype)  # (N, C, c)
        residual = fields[which] - target
        gradient = 2 * torch.einsum("bnv,nvc->bnc", residual, jacobian[which])
        if config.spatial:
            cells = torch.eye(side * side, dtype=coords.dtype, device=coords.device).unflatten(0, (side, side))
            gradient = bilinear_sample(cells, coords, **RULES[config.interpolation]).T @ gradient
        else:
            gradient = gradient.sum(1)
        return gradient.view(latent.shape), residual.detach().square().sum((1, 2))


def psnr(recon: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each signal in dB, for a peak of 1: (B, ..) -> (B,)."""
    return -10 * (recon - target).square().flatten(1).mean(1).log10()


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)
