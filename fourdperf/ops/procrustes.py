"""procrustes: the nearest orthogonal matrix, U V^T of the thin SVD, as in the orthogonal Procrustes problem.

    x = U diag(s) V^T  ->  R = U V^T, which maximises trace(R^T x) and minimises |R - x|_F
    special=True, m == n:  R = U diag(1, .., 1, det(U V^T)) V^T, the nearest rotation (det R = +1)

x (..., m, n) -> (..., m, n): orthonormal columns where m >= n, orthonormal rows where m < n (there special changes
nothing: a determinant needs m == n). For min |A - R B|_F over R, x = A B^T.

Derivative. R^T x = H is symmetric, with eigenvalues s (the last with the sign of det x, for special). With P = R^T dx,

    dR = R W + (I - R R^T) dx H^-1,   H W + W H = P - P^T
    gradient='exact'        that: in the eigenvectors of H, W_ij = (P_ij - P_ji) / (s_i + s_j), accurate for equal s
    gradient='regularized'  W_ij = (P_ij - P_ji) (s_j - s_i) D / (D^2 + 1e-8), D = s_j^2 - s_i^2: the derivative of an
                            SVD with its divisions softened, which vanishes where s_i = s_j, as the authors have it

A direction that x does not determine, because s_i + s_j (for m > n also s_i) is zero to rounding, gets none: gradients
are finite. 'exact' has derivatives of any order in eager, reverse and forward mode; 'regularized' has the first alone.

Where x does not determine R (rank below n - 1, or below n with m > n or without special; for special also det x < 0
and s_n = s_(n-1)), one of the nearest matrices is taken. A matrix with NaN or infinity gives NaN.

Native and Triton kernels take square matrices; a tall one is Q T with a triangular T (torch.linalg.qr), and R = Q R(T).

Dtypes: float64, float32; bfloat16 and float16 are computed in float32. Autocast changes nothing.

Other conventions:
    torch, numpy                     U, _, Vh = torch.linalg.svd(x, full_matrices=False); U @ Vh
    scipy.linalg                     orthogonal_procrustes(A, B) is procrustes(A^T B); polar(x)[0] is procrustes(x)
    geometry.nearest_rotation        the same as special=True for (..., 3, 3)

Raises ValueError for a dtype that is not floating, fewer than two axes, an unknown option, or a backend that cannot run.

Sources: Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966; Kabsch, 1976; the regularized
gradient: Mitchel et al., "Neural Isometries", 2024.
"""

import math

import torch

from fourdperf.ops.backends import (
    DTYPE_CODES,
    Backend,
    choose,
    define,
    eager_why_not,
    native_why_not,
    triton_why_not,
    wants_gradient,
    where,
)
from fourdperf.ops.checks import check_choice, check_floating, no_autocast, require

GRADIENTS = ("exact", "regularized")
LARGEST_ON_GPU = 64  # of the kernels that hold a matrix in shared memory or in registers
NEWTON_STEPS = {torch.float32: 9, torch.float64: 11}
_HALF = (torch.bfloat16, torch.float16)


def procrustes(
    x: torch.Tensor, *, special: bool = False, gradient: str = "exact", backend: str | None = None
) -> torch.Tensor:
    """The nearest orthogonal matrices. See the module for all else.

    Args:
        x: (..., m, n)
        special: for m == n, the nearest rotations: determinant +1.
        gradient: 'exact', or 'regularized' as in the code of Neural Isometries.

    Returns:
        (..., m, n) in the dtype of x.
    """
    check_floating("x", x)
    require(x.ndim >= 2, f"x must have shape (..., m, n), got {tuple(x.shape)}")
    require(isinstance(special, bool), f"special must be a bool, got {special!r}")
    check_choice("gradient", gradient, GRADIENTS)
    m, n = x.shape[-2:]
    args = x if m >= n else x.mT, special and m == n, gradient
    out = choose("procrustes", BACKENDS, args, backend)(*args)
    return out if m >= n else out.mT


# ---- eager


def procrustes_eager(x, special=False, gradient="exact"):
    """The reference in plain torch: x (..., m, n) with m >= n."""
    if x.numel() == 0:
        return x * 1
    with no_autocast(x.device.type):
        rule = _Reverse if torch.compiler.is_compiling() else _Eager
        return rule.apply(x.float() if x.dtype in _HALF else x, special, gradient == "exact")[0].to(x.dtype)


class _Eager(torch.autograd.Function):
    """x -> R, and (without derivatives) the eigenvectors V (..., n, n) and eigenvalues s (..., n) of H = R^T x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, special, exact):
        finite = x.isfinite().all(-1).all(-1)[..., None, None]
        u, s, vh = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
        if special:
            last = _sign(u @ vh)[..., None]
            sign = torch.cat([torch.ones_like(s[..., 1:]), last], -1)
            u, s = u * sign[..., None, :], s * sign
        return torch.where(finite, u @ vh, torch.nan), vh.mT, s

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.exact = inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx, d_out, *_):
        return _derivative(d_out, *ctx.saved_tensors, ctx.exact), None, None

    @staticmethod
    def jvp(ctx, d_x, *_):
        return _derivative(d_x, *ctx.saved_tensors, ctx.exact), None, None


def _sign(r):
    """det R (...) of orthogonal matrices, by QR: torch's threaded LU goes wrong on some processors for n >= 192."""
    reflected, tau = torch.geqrf(r)
    return reflected.diagonal(dim1=-2, dim2=-1).sign().prod(-1) * torch.where(tau != 0, -1.0, 1.0).prod(-1)


class _Reverse(torch.autograd.Function):
    """_Eager for torch.compile, which takes no jvp and traces the backward pass: first derivatives in reverse mode."""

    @staticmethod
    def forward(ctx, x, special, exact):
        r, v, s = _Eager.forward(x, special, exact)
        ctx.exact = exact
        ctx.save_for_backward(x, r, v, s)
        ctx.mark_non_differentiable(v, s)
        return r, v, s

    @staticmethod
    def backward(ctx, d_out, *_):
        return _derivative(d_out, *ctx.saved_tensors, ctx.exact, _Solve.forward), None, None


def _derivative(g, x, r, v, s, exact, solve=None):
    """dR along dx = g; also, since that map is its own adjoint, the gradient with respect to x where R receives g."""
    if solve is None:
        solve = _Solve.apply
    with no_autocast(g.device.type):
        h, p = r.mT @ x, r.mT @ g
        smallest = x.shape[-2] * torch.finfo(s.dtype).eps * s[..., :1, None]
        row, column = s[..., None, :], s[..., :, None]
        total = row + column
        gap = (row - column) * total
        weight = _weigh(total, smallest) if exact else (row - column) * gap / (gap.square() + 1e-8)
        out = r @ solve(h, p - p.mT, v, weight, True, exact)
        if x.shape[-2] > x.shape[-1]:
            out = out + solve(h, g - r @ p, v, _weigh(row, smallest), False, exact)
        return out


def _weigh(x, smallest):
    return torch.where(x.abs() > smallest, 1 / x, 0)


class _Solve(torch.autograd.Function):
    """Y of H Y + Y H = C, or of Y H = C: H with eigenvectors v, weight 1 / (s_i + s_j), or 1 / s_j."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, c, v, weight, both_sides, exact):
        return v @ ((v.mT @ c @ v) * weight) @ v.mT if both_sides else ((c @ v) * weight) @ v.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, _, v, weight, ctx.both_sides, ctx.exact = inputs
        ctx.save_for_backward(h, v, weight, output)
        ctx.save_for_forward(h, v, weight, output)

    @staticmethod
    def _solve(ctx, h, c, v, weight):
        if not ctx.exact:
            raise RuntimeError("procrustes: gradient='regularized' has no second derivative; 'exact' has")
        return _Solve.apply(h, c, v, weight, ctx.both_sides, True)

    @staticmethod
    def backward(ctx, d_y):
        h, v, weight, y = ctx.saved_tensors
        d_c = _Solve._solve(ctx, h, d_y, v, weight)
        d_h = -(d_c @ y.mT + y.mT @ d_c) if ctx.both_sides else -(y.mT @ d_c)
        return d_h, d_c, None, None, None, None

    @staticmethod
    def jvp(ctx, d_h, d_c, *_):
        h, v, weight, y = ctx.saved_tensors
        return _Solve._solve(ctx, h, d_c - (d_h @ y + y @ d_h if ctx.both_sides else y @ d_h), v, weight)


# ---- schema, fake, autograd, vmap
#
# procrustes_solve: y of h y + y h = p - p^T, for h = R^T x. That map of p is its own adjoint, and so is dR of dx.
# procrustes_inverse: h^-1, without eigenvectors whose eigenvalues are below `smallest` of the largest.


def _fake(x, special):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(*x.shape[:-2], x.shape[-1])


def _fake_like(h, *_):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _inverse_vmap(info, in_dims, h, smallest):
    return _inverse(h.movedim(in_dims[0], 0), smallest), 0


def _inverse_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _inverse_backward(ctx, d_y):
    (y,) = ctx.saved_tensors
    with no_autocast(y.device.type):
        return -y @ d_y @ y, None


def _inverse_forward(h, smallest):
    """By Cholesky, unless an eigenvalue may be too small: then by eigenvectors."""
    if h.numel() == 0:
        return torch.empty_like(h)
    h = (h + h.mT) / 2
    factor, failed = torch.linalg.cholesky_ex(h)
    root = torch.linalg.solve_triangular(factor, torch.eye(h.shape[-1], dtype=h.dtype, device=h.device), upper=False)
    y = root.mT @ root
    bad = ~((y.norm(dim=(-2, -1)) * h.norm(dim=(-2, -1)) * smallest < 1) & (failed == 0))
    if bad.any():
        finite, whole = _finite(h[bad])
        s, v = torch.linalg.eigh(finite)
        weight = _weigh(s, smallest * s.abs().amax(-1, keepdim=True))
        y[bad] = torch.where(whole, (v * weight[..., None, :]) @ v.mT, torch.nan)
    return y


_inverse = define(
    "procrustes_inverse(Tensor h, float smallest) -> Tensor",
    fake=_fake_like,
    setup_context=_inverse_context,
    backward=_inverse_backward,
    vmap=_inverse_vmap,
    CPU=_inverse_forward,
    CUDA=_inverse_forward,
)


def _define(suffix, kernels):
    """The op on kernels.polar(x, out, flip, special) and kernels.solve(h, p, flip, y): contiguous, square, not empty."""

    def forward(x, special):
        out, flip = _fake(x, special)
        with no_autocast(x.device.type):  # an op defined here does not end it
            if x.numel() and x.shape[-2] == x.shape[-1]:
                kernels.polar(x.contiguous(), out, flip, special)
            elif x.numel():
                q, t = torch.linalg.qr(x)
                turn = torch.empty_like(t, memory_format=torch.contiguous_format)
                kernels.polar(t.contiguous(), turn, flip, special)
                torch.matmul(q, turn, out=out)
        return out, flip

    def forward_solve(h, p, flip):
        h, p, flip = h.contiguous(), p.contiguous(), flip.contiguous()
        y = torch.empty_like(h)
        if h.numel():
            kernels.solve(h, p, flip, y)
        return y

    def context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], *output)

    def backward(ctx, d_out, _):
        x, r, flip = ctx.saved_tensors
        with no_autocast(x.device.type):
            p = r.mT @ d_out
            if x.shape[-2] == x.shape[-1]:
                return r @ solve(r.mT @ x, p, flip), None
            h = r.mT.double() @ x.double()  # else the part below would err some times as much as by an SVD
            inverse = _inverse(h, x.shape[-2] * torch.finfo(x.dtype).eps).to(x.dtype)
            return r @ solve(h.to(x.dtype), p, flip) + (d_out - r @ p) @ inverse, None

    def context_solve(ctx, inputs, output):
        h, _, flip = inputs
        ctx.save_for_backward(h, flip, output)

    def backward_solve(ctx, d_y):
        h, flip, y = ctx.saved_tensors
        with no_autocast(h.device.type):
            d_p = solve(h, d_y, flip)
            return (d_p @ y + y @ d_p) / 2, d_p, None

    def vmap(info, in_dims, x, special):
        return polar(x.movedim(in_dims[0], 0), special), (0, 0)

    def vmap_solve(info, in_dims, *args):
        moved = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(args, in_dims)
        )
        return solve(*moved), 0

    solve = define(
        f"procrustes{suffix}_solve(Tensor h, Tensor p, Tensor flip) -> Tensor",
        fake=_fake_like,
        setup_context=context_solve,
        backward=backward_solve,
        vmap=vmap_solve,
        CPU=forward_solve,
        CUDA=forward_solve,
    )
    polar = define(
        f"procrustes{suffix}(Tensor x, bool special) -> (Tensor, Tensor)",
        fake=_fake,
        setup_context=context,
        backward=backward,
        vmap=vmap,
        CPU=forward,
        CUDA=forward,
    )
    return lambda x, special, gradient: polar(x.float() if x.dtype in _HALF else x, special)[0].to(x.dtype)


# ---- native and Triton


class _Native:
    """Launches csrc/procrustes; on a GPU larger matrices are left to torch's batched products and inverses."""

    @staticmethod
    def polar(x, out, flip, special):
        if x.is_cuda and x.shape[-1] > LARGEST_ON_GPU:
            return polar_by_inverses(x, out, flip, special)
        library, launch = where(x)
        library.procrustes(x.data_ptr(), out.data_ptr(), flip.data_ptr(), *_sizes(x), special, launch)

    @staticmethod
    def solve(h, p, flip, y):
        if h.is_cuda and h.shape[-1] > LARGEST_ON_GPU:
            s, v = torch.linalg.eigh(_finite((h + h.mT) / 2)[0])
            y.copy_(_solve_in_eigenvectors(p, v, s, h))
            return
        library, launch = where(h)
        library.procrustes_solve(h.data_ptr(), p.data_ptr(), flip.data_ptr(), y.data_ptr(), *_sizes(h), launch)


class _Triton:
    """Launches kernels/procrustes.py, whose orthogonal rows give all that is wanted in a few products.

    Thousands of turns leave them orthogonal to some n roundings only: see the last steps of both.
    """

    @staticmethod
    def polar(x, out, flip, special):
        g, v = _rotated(_unit(x)[0].mT)
        size = torch.linalg.vector_norm(g, dim=-1)
        least = torch.finfo(x.dtype).eps ** 2 * size.amax(-1)
        u = g / size[..., None]
        out.copy_(u.mT @ v)
        flip.zero_()
        if special:
            last = size.argmin(-1)[..., None, None].expand(*size.shape[:-1], 1, size.shape[-1])
            negative = (_sign(out) < 0)[..., None]
            flip.copy_(torch.where(negative, v.gather(-2, last)[..., 0, :], 0))
            out.sub_(2 * u.gather(-2, last).mT * flip[..., None, :])
        out.copy_(_newton_schulz(out)[0])
        _repair(x, out, flip, special, size.amin(-1) <= least)

    @staticmethod
    def solve(h, p, flip, y):
        scaled, scale = _unit((h + h.mT) / 2)
        # the turned vector turned back, and then made an eigenvector apart, the largest one
        turned = flip.ne(0).any(-1, keepdim=True)
        last = -(flip[..., None, :] @ scaled @ flip[..., None])[..., 0]
        big = 2 * last + 2 * h.shape[-1]
        g, v = _rotated(scaled + (big * flip)[..., None] * flip[..., None, :])
        s = torch.linalg.vector_norm(g, dim=-1)
        apart = torch.nn.functional.one_hot(s.argmax(-1), s.shape[-1]).bool() & turned
        s = torch.where(apart, -last, s)
        y.copy_(_solve_in_eigenvectors(p, v.mT, s / scale[..., 0], h))


def _rotated(x):
    from fourdperf.kernels.procrustes import jacobi

    x = x.contiguous()
    g, v = torch.empty_like(x), torch.empty_like(x)
    n = x.shape[-1]
    jacobi(x.view(-1, n, n), g.view(-1, n, n), v.view(-1, n, n))
    return g, v


def _sizes(x):
    return DTYPE_CODES[x.dtype], x.shape[:-2].numel(), x.shape[-1]


def _unit(x):
    """x times a power of two that brings its largest entry into [1/2, 1), and that factor (..., 1, 1); NaN stays NaN."""
    exponent = torch.frexp(x.abs().amax((-2, -1), keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(x[..., :1, :1]), -exponent.clamp_min(math.frexp(torch.finfo(x.dtype).tiny)[1]))
    return x * scale, scale


def _finite(x):
    """x with zeros for the matrices that hold NaN or infinity, and which ones do not (..., 1, 1)."""
    finite = x.isfinite().all(-1).all(-1)[..., None, None]
    return torch.where(finite, x, 0), finite


def _newton_schulz(r):
    """r, nearly orthogonal, a step nearer; and r^T r - 1 before."""
    gram = r.mT @ r
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return r - r @ gram / 2, gram


def _solve_in_eigenvectors(p, v, s, h):
    """y of h y + y h = p - p^T, from eigenvectors v and eigenvalues s of h; and once more for what is left of that."""
    smallest = s.shape[-1] * torch.finfo(s.dtype).eps * s.abs().amax(-1)[..., None, None]
    weight = _weigh(s[..., None, :] + s[..., :, None], smallest)
    skew = lambda x: (x - x.mT) / 2
    solve = lambda c: skew(v @ ((v.mT @ c @ v) * weight) @ v.mT)
    y = solve(p - p.mT)
    hy = (h + h.mT) / 2 @ y
    y = y + solve(p - p.mT - (hy - hy.mT))
    return torch.where(_finite(h)[1], y, torch.nan)


def _repair(x, out, flip, special, bad):
    """Where the matrices are `bad` (...): R and flip from an SVD."""
    bad = bad | ~_finite(x)[1][..., 0, 0]
    if bad.any():
        r, v, s = _Eager.forward(x[bad], special, True)
        out[bad] = r
        flip[bad] = torch.where(torch.signbit(s[..., -1:]), v[..., -1], 0)


def polar_by_inverses(x, out, flip, special):
    """The iteration of csrc/procrustes in torch, for many large matrices on a GPU: x <- (mu x + x^-T / mu) / 2."""
    y = _unit(x)[0]
    for step in range(NEWTON_STEPS[x.dtype]):
        inverse = torch.linalg.inv_ex(y).inverse
        norms = (inverse.abs().sum(dim).amax(-1) / y.abs().sum(dim).amax(-1) for dim in (-2, -1))
        mu = torch.sqrt(torch.sqrt(next(norms)) * torch.sqrt(next(norms)))[..., None, None]
        y = (mu * y + inverse.mT / mu) / 2
    y, gram = _newton_schulz(y)
    out.copy_(y)
    bad = ~(gram.abs().amax((-2, -1)) <= 1e-3)
    flip.zero_()
    if special:
        negative = (_sign(out) < 0) & ~bad
        if negative.any():
            r = out[negative]
            h = r.mT @ x[negative]
            v = torch.linalg.eigh((h + h.mT) / 2).eigenvectors[..., :1]
            out[negative] = r - 2 * (r @ v) @ v.mT
            flip[negative] = v[..., 0]
    _repair(x, out, flip, special, bad)


def _gradient_why_not(x, special, gradient):
    if gradient != "exact" and wants_gradient(x):
        return "it has the exact gradient alone"
    return None


def _triton_args_why_not(x, special, gradient):
    if x.shape[-1] > LARGEST_ON_GPU:
        return f"it takes n <= {LARGEST_ON_GPU}, got {x.shape[-1]}"
    if x.dtype == torch.float64:
        return "it computes in float32"
    return _gradient_why_not(x, special, gradient)


BACKENDS = (
    Backend("native", _define("", _Native), native_why_not, _gradient_why_not),
    Backend("triton", _define("_triton", _Triton), triton_why_not, _triton_args_why_not),
    Backend("eager", procrustes_eager, eager_why_not),
)
