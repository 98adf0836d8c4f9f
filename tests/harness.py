"""check_op: one op on one backend against its eager version in float64, forward and every gradient.

The tolerance is not tuned: an implementation may err twice (gradients: three times) as much as plain PyTorch in the
same dtype errs against float64, plus one rounding of the output. float64 itself is held to PyTorch's float32 error
scaled by the ratio of the two epsilons, once more than the others because the reference errs as well.
"""

import dataclasses

import numpy as np
import pytest
import torch

from fourdperf import native
from tests.cuda_emulator import build as emulator

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
EMULATED = "cuda_emulated"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a test runs: backend name, device, and for native CPU code the instruction set.

    `EMULATED` in place of an instruction set: the CUDA kernels, executed on the CPU (tests/cuda_emulator).
    """

    backend: str
    device: str
    isa: str | None = None

    def __str__(self):
        return "-".join(filter(None, (self.backend, self.device, self.isa)))

    def missing(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.isa == EMULATED:
            return None if emulator.compiler() else "no C++ compiler to build the CUDA kernels for the CPU with"
        if self.backend == "native":
            library, reason = native.library(self.device)
            if reason:
                return reason
            if self.isa and self.isa not in library.cpu_isas():
                return f"this processor has no {self.isa}"
        return None


# On a machine with a GPU Triton is compiled and runs there; without one it runs in its interpreter on the CPU.
TARGETS = (
    *(Target("native", "cpu", isa) for isa in (*ISAS, EMULATED)),
    *(
        (Target("native", "cuda"), Target("triton", "cuda"))
        if torch.cuda.is_available()
        else (Target("triton", "cpu"),)
    ),
)


def device_of(backend: str) -> str:
    """Where a backend runs that a test names: Triton where it is compiled, the others on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def jax_device() -> str:
    """Where JAX puts its arrays, in torch's words."""
    import jax

    return "cuda" if jax.default_backend() == "gpu" else "cpu"


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def tolerance(eager_error: float, dtype: torch.dtype, largest: float, factor: float) -> float:
    """factor x eager's own error in `dtype` + one rounding of an output as large as `largest`."""
    return factor * eager_error + EPS[dtype] * largest


def check_op(
    function,
    inputs: dict,
    target: Target,
    dtype: torch.dtype,
    *,
    grads: tuple[str, ...] | None = None,
    roundings: int = 0,
) -> None:
    """Asserts that `function(**inputs, backend=...)` on `target` agrees with its eager backend; see the module.

    Args:
        inputs: tensors by argument name; floating ones are rounded to `dtype` first. Others are passed as they are.
        grads: inputs whose gradients are compared; default all floating ones.
        roundings: of the largest output, that it may always err: what theory grants a backward stable algorithm.
    """
    floating = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    grads = tuple(floating) if grads is None else grads
    rounded = {name: x.to(dtype) if name in floating else x for name, x in inputs.items()}
    run = lambda backend, as_dtype, device: _run(function, rounded, floating, grads, backend, as_dtype, device)

    # float64 is its own reference, which errs too: plain PyTorch's error there is that of float32, scaled
    double = dtype == torch.float64
    plain_dtype = torch.float32 if double else dtype
    scale = EPS[torch.float64] / EPS[torch.float32] if double else 1.0
    exact, exact_grads = run("eager", torch.float64, "cpu")
    plain, plain_grads = run("eager", plain_dtype, target.device)
    ours, our_grads = run(target.backend, dtype, target.device)

    assert ours.dtype == dtype and ours.shape == exact.shape
    emulated, found = target.isa == EMULATED, {"": (ours, our_grads)}
    if emulated and dtype == torch.float32:  # threads run in another order, which is the order of atomic sums too
        found[", once more"] = run(target.backend, dtype, target.device)
    for when, (out, grad) in found.items():
        _compare(f"out{when}", out, plain, exact, dtype, 2 + double, scale, roundings)
        for name in grads:
            _compare(f"d_{name}{when}", grad[name], plain_grads[name], exact_grads[name], dtype, 3 + double, scale)
    if target.backend == "native" and target.device == "cpu" and not emulated:
        again, again_grads = run(target.backend, dtype, target.device)
        assert torch.equal(ours, again), "out differs between two runs"
        for name in grads:
            assert torch.equal(our_grads[name], again_grads[name]), f"d_{name} differs between two runs"


def opcheck(op, args, dtype: torch.dtype) -> None:
    """torch.library.opcheck; for 16-bit types of schema and fake alone: autograd and tracing are as in float32."""
    light = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(op, args, **({} if dtype == torch.float32 else light))


def _run(function, inputs, floating, grads, backend, dtype, device):
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    inputs |= {name: inputs[name].to(dtype).detach().requires_grad_(name in grads) for name in floating}
    out = function(**inputs, backend=backend)
    if not grads:
        return out.detach(), {}
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(out, [inputs[name] for name in grads], cotangent.to(torch.bfloat16).to(out))
    return out.detach(), dict(zip(grads, gradients))


def _compare(name, ours, plain, exact, dtype, factor, scale, roundings=0):
    assert ours.dtype == dtype, f"{name} has dtype {ours.dtype}"
    if exact.numel() == 0:
        return
    error = (ours.double().cpu() - exact).abs().max().item()
    eager_error = (plain.double().cpu() - exact).abs().max().item() * scale
    largest = exact.abs().max().item()
    allowed = max(tolerance(eager_error, dtype, largest, factor), roundings * EPS[dtype] * largest)
    assert error <= allowed, f"{name}: error {error:.3e}, plain PyTorch {eager_error:.3e}, allowed {allowed:.3e}"


def same(a: torch.Tensor, b: torch.Tensor, target: Target) -> bool:
    """Whether two results of a target are equal; CUDA kernels that add with atomics may differ by the order of sums."""
    if target.device == "cuda" or target.isa == EMULATED:
        return torch.allclose(a, b, rtol=0, atol=16 * EPS[a.dtype] * b.abs().nan_to_num().max().item(), equal_nan=True)
    return torch.equal(a, b)


def same_in_jax(ours, theirs: torch.Tensor) -> bool:
    """Whether JAX got what torch did on `jax_device()` from the same machine code; on a GPU to two roundings."""
    ours, theirs, eps = np.asarray(ours.astype("float32")), theirs.float(), EPS[theirs.dtype] * theirs.is_cuda
    return ours.shape == theirs.shape and np.allclose(
        ours, theirs.cpu().numpy(), rtol=0, atol=2 * eps * theirs.abs().max().item()
    )


def same_with_threads(function) -> None:
    """Asserts that the tensors `function()` gives are the same bits, whatever the number of threads."""
    want, before = function(), torch.get_num_threads()
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(function(), want, strict=True))
    finally:
        torch.set_num_threads(before)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The values of `x` in a larger tensor: no axis is contiguous, and the gaps hold NaN."""
    big = torch.full([2 * size + 1 for size in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The values of `x` with the memory order of its axes reversed."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)
