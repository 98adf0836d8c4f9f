"""Neural Isometries: a latent space in which observations that are related in the world are related by isometries.

    observations a, b (B, H, W, C), b a transform of a
      | convolutional encoder; where there is none, observations are fields             ConvEncoder
    fields A, B on a grid (B, N, D), N = h w
      | coefficients in learned functions Phi (N, k), Phi^T diag(M) Phi = 1             IsometricOperator.project
    coefficients Phi^T M A, Phi^T M B (B, k, D)
      | nearest rotation to mask * (Phi^T M B) (Phi^T M A)^T                             IsometricOperator.align
    tau (B, k, k), which takes A to B, and where eigenvalues differ much is small
      | tau^T B beside A, tau A beside B, decoded                                       ConvDecoder
    recon_a, recon_b (B, H, W, C)

The mass M, the functions Phi and their eigenvalues Lambda are learned. mask_ij = exp(-|Lambda_i - Lambda_j|), so that
tau nearly commutes with the operator that has these functions and eigenvalues, as an isometry does with the Laplacian.

On the frozen encoder and operator: a classifier, equivariant to rotations of coefficients up to their Gram matrix
(Classifier), and relative camera poses from tau between frames, or from what tau moves where (PosePredictor).

Source: "Neural Isometries" (arXiv 2405.19296), "Vector Neurons" (arXiv 2104.12229).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.checkpoint import PretrainedModel
from fourdperf.models.config import BaseConfig, check_choices, check_int, int_tuple, set_field
from fourdperf.models.layers import like, may_look, tap, wide
from fourdperf.models.niso_nets import ConvDecoder, ConvEncoder, OrthogonalNet, SkipMLP
from fourdperf.ops import procrustes
from fourdperf.ops.checks import no_autocast

MODEL = "niso"
KINDS = ("autoencoder", "classifier", "pose")
GRADIENTS = ("exact", "regularized")
HEAD_INPUTS = ("tau", "motion")
WINDOWS = 6  # each way over the grid, in which motion is read from tau
WINDOW_WIDTH = 0.7  # their standard deviation over their distance
STILL = (1.0, 0, 0, 0, 1, 0, 0, 0, 0)  # the identity's nine numbers
MASS_FLOOR = 1e-8
LENGTH_FLOOR = 1e-8  # of the squared length of what is made a unit vector
AnyModel = TypeVar("AnyModel", bound="Model")


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes and options of a model of any kind.

    kind: "autoencoder", "classifier" or "pose".
    image_size: (H, W) of observations; one number stands for a square.
    channels: C of observations.
    latent_channels: D of fields; without an encoder they have the observations' channels.
    op_dim: number k of functions, at most that of grid points N.
    clustered: eigenvalues are free, each a square, and start close together; otherwise they are cumulative sums of
        squares.
    encoder_channels, encoder_depth: width and number of residual blocks of each level, from fine to coarse; none: no
        encoder and no decoder.
    decoder_channels, decoder_depth: the same from coarse to fine; by default the encoder's backwards.
    kernel_size: of convolutions.
    stem_channels: of the linear layer that the encoder starts with.
    num_classes: of a classifier.
    head_features, head_layers: width and number of layers of a classifier's or a pose predictor's head.
    gram_features: vectors whose Gram matrix a classifier sees.
    head_input: what a pose predictor's head sees: "motion", how far tau moves windows on the grid
        (`IsometricOperator.motion`), where the opposite motion gives the opposite pose; or, as in the original and in
        configs without this field, "tau", its k^2 entries.

    Of the original (`Config.upstream`):
    biases: of convolutions and skips in residual blocks. Each is a constant in space, which the last instance norm of
        the net removes: they do nothing.
    upstream_modules: a classifier's equivariant layers are (norm, neuron) pairs; the original makes a pair for each
        layer and runs the first modules of that list, as many as it has layers.
    train_basis: a classifier's training moves the backbone's mass and functions too; the encoder stays.
    procrustes_gradient: "regularized", which goes to zero where singular values meet; "exact" is finite there as well.
    negative_scale: in a pose predictor's training, the one factor that a sequence's positions are known up to may be
        negative: what is learned is the axis of the motion, and not which way along it.
    """

    kind: str = "autoencoder"
    image_size: int | tuple[int, ...] = (16, 16)
    channels: int = 3
    latent_channels: int = 64
    op_dim: int = 64
    clustered: bool = False
    encoder_channels: tuple[int, ...] = ()
    encoder_depth: tuple[int, ...] = ()
    decoder_channels: tuple[int, ...] | None = None
    decoder_depth: tuple[int, ...] | None = None
    kernel_size: int = 3
    stem_channels: int = 48
    num_classes: int = 10
    head_features: int = 64
    head_layers: int = 4
    gram_features: int = 64
    head_input: str = "tau"
    biases: bool = False
    upstream_modules: bool = False
    train_basis: bool = False
    procrustes_gradient: str = "exact"
    negative_scale: bool = False

    def __post_init__(self):
        check_choices(self, {"kind": KINDS, "head_input": HEAD_INPUTS, "procrustes_gradient": GRADIENTS})
        image = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        set_field(self, "image_size", int_tuple("image_size", image, 2))
        levels = len(self.encoder_channels)
        for name, default in (("decoder_channels", "encoder_channels"), ("decoder_depth", "encoder_depth")):
            if getattr(self, name) is None:
                set_field(self, name, tuple(reversed(getattr(self, default))))
        for name in ("encoder_channels", "encoder_depth", "decoder_channels", "decoder_depth"):
            set_field(self, name, int_tuple(name, getattr(self, name), levels))
        if levels == 0:
            set_field(self, "latent_channels", self.channels)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                check_int(field.name, value)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name}: expected True or False, got {value!r}")
        if min(self.grid) < 1:
            raise ValueError(f"image_size: expected at least {self.stride} pixels each way, got {self.image_size}")
        if self.kind == "autoencoder" and any(size % self.stride for size in self.image_size):
            raise ValueError(f"image_size: expected multiples of {self.stride}, got {self.image_size}")
        if self.op_dim > self.spatial:
            raise ValueError(
                f"op_dim: expected at most {self.spatial}, the points of the grid {self.grid}, got {self.op_dim}"
            )
        if self.kind == "pose" and self.head_layers < 2:
            raise ValueError(f"head_layers: expected at least 2 for poses, got {self.head_layers}")

    @classmethod
    def upstream(cls, **overrides) -> "Config":
        """The original with all that it does differently, for its checkpoints."""
        options = dict.fromkeys(("biases", "upstream_modules", "train_basis", "negative_scale"), True)
        options["procrustes_gradient"] = "regularized"
        return cls.from_dict({**options, **overrides})

    @property
    def stride(self) -> int:
        """Pixels of an observation to a grid point, each way."""
        return 2 ** max(0, len(self.encoder_channels) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.image_size
        return height // self.stride, width // self.stride

    @property
    def spatial(self) -> int:
        """Number of grid points N."""
        return math.prod(self.grid)

    @property
    def pose_inputs(self) -> int:
        """How many numbers a pose predictor's head sees."""
        return self.op_dim**2 if self.head_input == "tau" else 2 * WINDOWS**2


# ---- the operator


class Basis(NamedTuple):
    """Functions with Phi^T diag(M) Phi = 1, their eigenvalues ascending, in fp32 at least.

    mass         (N,)     M
    functions    (N, k)   Phi
    eigenvalues  (k,)     Lambda
    mask         (k, k)   exp(-|Lambda_i - Lambda_j|)
    """

    mass: Tensor
    functions: Tensor
    eigenvalues: Tensor
    mask: Tensor


class IsometricOperator(nn.Module):
    """A learned operator on fields of `spatial` points, by its `op_dim` first functions; and isometries between fields.

    M       (N,)    of the mass M^2 + 1e-8: ones
    Phi     (N, k)  of the functions, M^-1/2 times the nearest orthonormal columns to M^1/2 Phi: orthonormal; normal
                    for the regularized gradient, which is zero at orthonormal columns
    Lambda  (k,)    of the eigenvalues, clustered: squares of uniform numbers in 0 .. 1; else their cumulative sum

    gradient: of both projections onto orthonormal matrices, "exact" or "regularized" (`fourdperf.ops.procrustes`).

    Autocast does not reach it: it computes in fp32, or in the parameters' dtype where that is wider. Values are looked
    at on a CPU outside of torch.compile only, where it costs little: `basis` refuses a mass of zero, `align` fields of
    zero, both what is not finite. Elsewhere `check` looks at the parameters when it is called; a NaN goes on to the
    loss, where the trainer stops.

    Raises ValueError for an op_dim over the number of points, for shapes that do not fit, and the values above.
    """

    def __init__(self, op_dim: int, spatial: int, *, clustered: bool = False, gradient: str = "exact"):
        super().__init__()
        check_int("op_dim", op_dim)
        check_int("spatial", spatial)
        if op_dim > spatial:
            raise ValueError(f"op_dim: expected at most spatial, {spatial}, got {op_dim}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
        self.clustered, self.gradient = clustered, gradient
        self.M = nn.Parameter(torch.empty(spatial))
        self.Phi = nn.Parameter(torch.empty(spatial, op_dim))
        self.Lambda = nn.Parameter(torch.empty(op_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.M)
        nn.init.orthogonal_(self.Phi) if self.gradient == "exact" else nn.init.normal_(self.Phi)
        nn.init.uniform_(self.Lambda)

    def basis(self) -> Basis:
        """The functions in force; their order follows the eigenvalues."""
        if may_look(self.M):
            self.check()
        with no_autocast(self.M.device.type):
            M, Phi, Lambda = (x.to(wide(x.dtype)) for x in (self.M, self.Phi, self.Lambda))
            mass = M.square() + MASS_FLOOR
            root = mass.sqrt()[:, None]
            functions = procrustes(root * Phi, gradient=self.gradient) / root
            eigenvalues = Lambda.square()
            if self.clustered:
                order = eigenvalues.detach().argsort(stable=True)
                functions, eigenvalues = functions.index_select(1, order), eigenvalues.index_select(0, order)
            else:
                eigenvalues = eigenvalues.cumsum(0)
            return Basis(mass, functions, eigenvalues, eigenvalue_mask(eigenvalues))

    def project(self, x: Tensor, basis: Basis) -> Tensor:
        """Coefficients Phi^T M x `(B, k, C)` of fields `(B, N, C)`."""
        spatial = self.M.shape[0]
        if x.ndim < 2 or x.shape[-2] != spatial:
            raise ValueError(f"x: expected fields (B, {spatial}, C), got {tuple(x.shape)}")
        with no_autocast(x.device.type):
            weighted = basis.functions * basis.mass[:, None]
            return _product(weighted.mT, x)

    def unproject(self, coefficients: Tensor, basis: Basis) -> Tensor:
        """Fields Phi c `(B, N, C)` of coefficients `(B, k, C)`."""
        op_dim = self.Lambda.shape[0]
        if coefficients.ndim < 2 or coefficients.shape[-2] != op_dim:
            raise ValueError(f"coefficients: expected (B, {op_dim}, C), got {tuple(coefficients.shape)}")
        with no_autocast(coefficients.device.type):
            return _product(basis.functions, coefficients)

    def align(self, a: Tensor, b: Tensor, basis: Basis) -> Tensor:
        """The rotation tau `(B, k, k)` nearest to mask * b a^T, of coefficients `(B, k, C)`: tau a is close to b."""
        if a.shape != b.shape:
            raise ValueError(f"a and b: expected one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        with no_autocast(a.device.type):
            correlation = (b.to(basis.mask.dtype) @ a.to(basis.mask.dtype).mT).mul_(basis.mask)
            if may_look(correlation):
                _check_correlation(correlation, a, b)
            return procrustes(correlation, special=True, gradient=self.gradient)

    def isometry(self, a: Tensor, b: Tensor, basis: Basis) -> Tensor:
        """The rotation tau `(B, k, k)` of coefficients that takes fields a to b, both `(B, N, C)`."""
        return self.align(self.project(a, basis), self.project(b, basis), basis)

    def motion(self, tau: Tensor, basis: Basis, grid: tuple[int, int]) -> Tensor:
        """How far rotations tau `(.., k, k)` move windows on the grid, down and across, over the windows' distance:
        `(.., 2, W)`.

        Of a window g around c, with coefficients a, it is <(x - c) g, tau a - tau^T a> / <a, a>: about d for a map that
        moves everything by a d that is less than a window. tau^T, which is tau back in time, has the opposite motion.
        """
        windows, offsets = gaussian_windows(grid, basis.functions)
        a, q = self.project(windows, basis), self.project(offsets, basis)
        with no_autocast(tau.device.type):
            moved = (tau - tau.mT) @ a
            return torch.einsum("okw,...kw->...ow", q, moved) / a.square().sum(0).clamp(min=LENGTH_FLOOR)

    @torch.no_grad()
    def check(self) -> None:
        """Raises ValueError for a mass of zero, which never moves again, and parameters that are not finite."""
        for name, x in self.named_parameters(recurse=False):
            if not _is_finite(x):
                raise ValueError(f"{name}: expected finite numbers, got {x[~x.isfinite()][0].item()}")
        if not self.M.all():
            where = (self.M == 0).nonzero()[0].item()
            raise ValueError(f"M: expected a mass at every point, got zero at point {where}")


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix x `(.., m, C)` of `(m, n)` and `(.., n, C)`, a product for each sample: nothing is copied or turned."""
    return matrix.expand(*x.shape[:-2], *matrix.shape) @ x.to(matrix.dtype)


def gaussian_windows(grid: tuple[int, int], x: Tensor) -> tuple[Tensor, Tensor]:
    """Fields g `(N, W)` around W = 6 x 6 places evenly over the grid, and (x - place) g `(2, N, W)`, down and across.

    Coordinates of points run from 0 to 6 each way, so that neighbouring places are 1 apart. As `x` in dtype and device.
    """
    middles = lambda count: (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) * (WINDOWS / count)
    down, across = (middles(size)[:, None] - middles(WINDOWS) for size in grid)
    offset = torch.stack(torch.broadcast_tensors(down[:, None, :, None], across[:, None])).flatten(3).flatten(1, 2)
    window = (offset.square().sum(0) / (-2 * WINDOW_WIDTH**2)).exp()
    return window, offset * window


def eigenvalue_mask(eigenvalues: Tensor) -> Tensor:
    """exp(-|Lambda_i - Lambda_j|) `(.., k, k)` of eigenvalues `(.., k)`."""
    return (eigenvalues[..., None, :] - eigenvalues[..., None]).abs().neg().exp()


@torch.no_grad()
def _check_correlation(correlation: Tensor, a: Tensor, b: Tensor) -> None:
    """Raises ValueError where a sample's is not finite, or zero, and says whose fault it is."""
    size = correlation.flatten(-2).norm(dim=-1)
    if bool(((size > 0) & (size < math.inf)).all()):
        return
    for name, x in (("a", a), ("b", b)):
        _check_finite(name, x)
        zero = ~x.flatten(-2).any(-1).flatten()
        if zero.any():
            raise ValueError(f"{name}: expected fields that are not zero, got one at sample {zero.nonzero()[0].item()}")
    raise ValueError(
        "a and b: expected products of their coefficients within the range of floats, got zero or infinity"
    )


# ---- rigid motions


def lift_se3(x: Tensor) -> Tensor:
    """Nine numbers `(.., 9)` as a pose `(.., 4, 4)`: two vectors, made orthonormal, and a translation.

    The first column of the rotation is along the first vector, the third along the cross product of the two. A squared
    length below 1e-8 counts as 1e-8, so that a vector of zero, or one along the other, gives columns that are no unit
    vectors.
    """
    if x.shape[-1:] != (9,):
        raise ValueError(f"x: expected nine numbers (.., 9), got {tuple(x.shape)}")
    first, second, translation = x.split(3, dim=-1)
    first = _unit(first)
    third = _unit(torch.linalg.cross(first, second))
    upper = torch.stack([first, torch.linalg.cross(third, first), third, translation], dim=-1)
    return _with_last_row(upper, torch.ones_like(upper[..., :1, :1]))


def inverse_se3(pose: Tensor) -> Tensor:
    """The inverse `(.., 4, 4)` of poses `(.., 4, 4)`."""
    if pose.shape[-2:] != (4, 4):
        raise ValueError(f"pose: expected (.., 4, 4), got {tuple(pose.shape)}")
    rotation = pose[..., :3, :3].mT
    return _with_last_row(torch.cat([rotation, -rotation @ pose[..., :3, 3:]], dim=-1), pose[..., 3:, 3:])


def _unit(x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).clamp(min=LENGTH_FLOOR).rsqrt()


def _with_last_row(upper: Tensor, one: Tensor) -> Tensor:
    return torch.cat([upper, F.pad(one, (3, 0))], dim=-2)


# ---- models


class Related(NamedTuple):
    """What `Autoencoder` finds of observations a and b.

    basis           the operator's functions
    coefficients_a  (B, k, D)
    coefficients_b  (B, k, D)
    tau             (B, k, k)     tau coefficients_a is close to coefficients_b
    recon_a         (B, H, W, C)  decoded from tau^T coefficients_b
    recon_b         (B, H, W, C)  decoded from tau coefficients_a
    """

    basis: Basis
    coefficients_a: Tensor
    coefficients_b: Tensor
    tau: Tensor
    recon_a: Tensor
    recon_b: Tensor


class Model(PretrainedModel):
    """What all kinds share: encoder, operator, and how they are stored. `kind`: of the config that fits."""

    MODEL, CONFIG, DTYPE = MODEL, Config, torch.float32
    kind: str

    def __init__(self, config: Config):
        super().__init__()
        if config.kind != self.kind:
            raise ValueError(f"config: expected kind {self.kind!r} for {type(self).__name__}, got {config.kind!r}")
        c = self.config = config
        self.encoder = None
        if c.encoder_channels:
            sizes = (c.channels, c.encoder_channels, c.encoder_depth, c.latent_channels, c.kernel_size)
            self.encoder = ConvEncoder(*sizes, stem_channels=c.stem_channels, bias=c.biases)
        self.operator = IsometricOperator(c.op_dim, c.spatial, clustered=c.clustered, gradient=c.procrustes_gradient)

    def encode(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Fields `(B, N, D)` of observations `(B, H, W, C)`."""
        x = self._check("x", x)
        return (x if self.encoder is None else self.encoder(x, taps)).flatten(1, 2)

    def _check(self, name: str, x: Tensor) -> Tensor:
        """Observations `(B, H, W, C)` in the parameters' dtype. Raises ValueError for others, and for NaN and infinity
        on a CPU outside of torch.compile."""
        wanted = (*self.config.image_size, self.config.channels)
        if not isinstance(x, Tensor) or x.shape[1:] != wanted:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"{name}: expected a tensor (B, {shape}), got {getattr(x, 'shape', x)!r}")
        x = like(x, self.operator.M, name)
        if may_look(x):
            _check_finite(name, x)
        return x


class Autoencoder(Model):
    """Encoder, operator and decoder; without encoder and decoder, the operator alone on observations as fields."""

    kind = "autoencoder"

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.decoder = None
        if c.decoder_channels:
            sizes = (c.latent_channels, c.decoder_channels, c.decoder_depth, c.channels, c.kernel_size)
            self.decoder = ConvDecoder(*sizes, bias=c.biases)

    def decode(self, fields: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Observations `(B, H, W, C)` of fields `(B, N, D)`."""
        x = like(fields, self.operator.M, "fields").unflatten(1, self.config.grid)
        return x if self.decoder is None else self.decoder(x, taps)

    def forward(self, a: Tensor, b: Tensor, taps: dict[str, Tensor] | None = None) -> Related:
        """Observations `(B, H, W, C)` and their transforms.

        taps: filled with "encoder/..", "functions", "eigenvalues", "coefficients", "tau" and "decoder/..", a before b,
        where a dictionary is given. Raises ValueError for shapes, dtypes, devices or values that do not fit.
        """
        if a.shape != b.shape:
            raise ValueError(f"a and b: expected one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        a, b = self._check("a", a), self._check("b", b)
        if self.encoder is not None:
            a, b = self.encoder(torch.cat([a, b]), taps).chunk(2)
        basis = self.operator.basis()
        of_a, of_b = (self.operator.project(x.flatten(1, 2), basis) for x in (a, b))
        tau = self.operator.align(of_a, of_b, basis)
        tap(taps, "functions", basis.functions)
        tap(taps, "eigenvalues", basis.eigenvalues)
        if taps is not None:
            taps["coefficients"] = torch.cat([of_a, of_b])
        tap(taps, "tau", tau)
        with no_autocast(tau.device.type):
            taken = tau.mT @ of_b, tau @ of_a
        if self.decoder is None:
            recon_a, recon_b = (self.decode(self.operator.unproject(x, basis)) for x in taken)
        else:
            recon_a, recon_b = self.decode(self.operator.unproject(torch.cat(taken), basis), taps).chunk(2)
        return Related(basis, of_a, of_b, tau, recon_a, recon_b)


class Frozen(Model):
    """A head on an encoder and an operator that do not learn, but for a classifier's mass and functions with
    `train_basis`: it does not see the eigenvalues."""

    def __init__(self, config: Config):
        super().__init__(config)
        trained = config.train_basis and self.kind == "classifier"
        self.operator.requires_grad_(trained)
        self.operator.Lambda.requires_grad_(False)
        if self.encoder is not None:
            self.encoder.requires_grad_(False)

    @classmethod
    def on(cls: type[AnyModel], backbone: Autoencoder, **fields) -> AnyModel:
        """A new head on a copy of the encoder and operator of `backbone`; `fields` of the config replace its own."""
        config = dataclasses.replace(backbone.config, **{"kind": cls.kind, **fields})
        model = cls(config).to(backbone.operator.M)
        own = model.state_dict()
        model.load_state_dict({**own, **{k: x for k, x in backbone.state_dict().items() if k in own}})
        return model

    def encode(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        return super().encode(x, taps).detach()


class Classifier(Frozen):
    """Observations `(B, H, W, C)` -> logits `(B, classes)`, the same for rotated coefficients."""

    kind = "classifier"

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        sizes = (c.latent_channels, c.head_features, c.head_layers, c.num_classes, c.gram_features)
        self.head = OrthogonalNet(*sizes, upstream_modules=c.upstream_modules)

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """taps: filled with "encoder/..", "coefficients" and "head/.."."""
        fields = self.encode(x, taps)
        coefficients = self.operator.project(fields, self.operator.basis()).to(self.operator.M.dtype)
        tap(taps, "coefficients", coefficients)
        return self.head(coefficients, taps)


class PosePredictor(Frozen):
    """Frames `(B, T, H, W, C)` -> poses of each frame but the first seen from the one before, `(B, T - 1, 4, 4)`.

    With poses g (world from camera) that is inverse(g_t) g_t+1; lengths are known up to one factor for each sequence.
    What the head h makes of a motion m is the identity + (h(m) - h(-m)) / 2, in nine numbers (`lift_se3`); of tau it is
    the pose itself.
    """

    kind = "pose"

    def __init__(self, config: Config):
        super().__init__(config)
        self.head = SkipMLP(config.pose_inputs, config.head_features, config.head_layers, 9, first_activation=False)

    @classmethod
    def on(cls, backbone: Autoencoder, **fields) -> "PosePredictor":
        """As `Frozen.on`, with a head on motion where `fields` have no head_input."""
        return super().on(backbone, **{"head_input": "motion", **fields})

    def forward(self, video: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """taps: filled with "encoder/..", "tau", "motion" where the head sees it, "head/in" and "pose"."""
        if video.ndim != 5 or video.shape[1] < 2:
            raise ValueError(f"video: expected (B, T >= 2, H, W, C), got {tuple(video.shape)}")
        basis = self.operator.basis()
        fields = self.encode(self._check("video", video.flatten(0, 1)), taps)
        coefficients = self.operator.project(fields, basis).unflatten(0, video.shape[:2])
        before, after = coefficients[:, :-1].flatten(0, 1), coefficients[:, 1:].flatten(0, 1)
        tau = self.operator.align(before, after, basis).unflatten(0, (len(video), -1)).detach()
        tap(taps, "tau", tau)
        if self.config.head_input == "tau":
            pose = self.head(tau.flatten(-2).to(self.operator.M.dtype), taps)
        else:
            motion = self.operator.motion(tau, basis, self.config.grid)
            tap(taps, "motion", motion)
            motion = motion.flatten(-2).to(self.operator.M.dtype)
            ahead, back = self.head(torch.stack([motion, -motion]), taps)
            pose = torch.tensor(STILL, dtype=ahead.dtype, device=ahead.device) + (ahead - back) / 2
        tap(taps, "pose", pose)
        return lift_se3(pose.to(wide(pose.dtype)))


MODELS = {model.kind: model for model in (Autoencoder, Classifier, PosePredictor)}


def _check_finite(name: str, x: Tensor) -> None:
    if not _is_finite(x):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _is_finite(x: Tensor) -> bool:
    return not x.numel() or bool(torch.stack(x.detach().aminmax()).isfinite().all())
