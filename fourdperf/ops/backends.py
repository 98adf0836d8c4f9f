"""Which implementation of an op runs, and why another one cannot.

An op lists its backends, fastest first. Each has `why_not(*args) -> str | None`, and that one function serves the
choice, the error when a backend was asked for by name, the skip reason in tests and the table of `fourdperf info`.

    with use_backend("eager"): ...      forces a backend for the ops called inside (FOURDPERF_BACKEND does so for all)
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.autograd import forward_ad

from fourdperf import native

NAMES = ("native", "triton", "eager")
_library = torch.library.Library("fourdperf", "FRAGMENT")
_forced: str | None = os.environ.get("FOURDPERF_BACKEND") or None


@dataclass(frozen=True)
class Backend:
    """One implementation: `run(*args)`, and `why_not(*args)`, which says in words why it cannot take them, or None.

    `device_why_not(*tensors)` is the part of why_not that the device, the installation and the transformation decide.
    """

    name: str
    run: Callable
    device_why_not: Callable
    args_why_not: Callable | None = None

    def why_not(self, *args) -> str | None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        reason = self.device_why_not(*tensors)
        return reason if reason or self.args_why_not is None else self.args_why_not(*args)


@contextlib.contextmanager
def use_backend(name: str | None):
    """Ops called inside use backend `name` ('native', 'triton', 'eager'; None chooses again), or raise ValueError."""
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {NAMES} or None, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(op: str, backends: tuple, args: tuple, backend: str | None) -> Callable:
    """The `run` of the first backend that can take `args`; of the one asked for by name, or ValueError with its reason."""
    name = backend or _forced
    if name is None:
        for candidate in backends:
            if candidate.why_not(*args) is None:
                return candidate.run
    for candidate in backends:
        if candidate.name == name:
            reason = candidate.why_not(*args)
            if reason is None:
                return candidate.run
            raise ValueError(f"{op}: backend {name!r} cannot run: {reason}")
    raise ValueError(f"{op}: backend must be one of {[b.name for b in backends]}, got {name!r}")


def native_why_not(*tensors) -> str | None:
    """Why the compiled library cannot take these tensors."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda"):
        return f"the native kernels run on cpu and cuda, not on {device}"
    return _transform_why_not() or _native_missing(device)


def triton_why_not(*tensors) -> str | None:
    """Why Triton kernels cannot take these tensors."""
    device = tensors[0].device.type
    if device != "cuda" and not (device == "cpu" and _triton_interprets()):
        return f"Triton kernels run on cuda (on cpu with TRITON_INTERPRET=1), not on {device}"
    return _transform_why_not() or _triton_missing()


def eager_why_not(*tensors) -> None:
    """Plain torch runs everywhere."""
    return None


def wants_gradient(x: torch.Tensor) -> bool:
    """Whether autograd, or a transform of torch.func at any level, follows `x`. Inside vmap a tensor itself says no."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            if x.requires_grad:
                return True
            x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def _transform_why_not() -> str | None:
    """Which transformation going on right now reaches plain torch operations only."""
    if forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.compile does not trace its derivative inside torch.func transforms"
    return None


def _constant(function):
    """Marks a fact about the process: torch.compile takes its answer as a constant.

    What torch.compiler.assume_constant_result does, which however imports the whole of dynamo (a second, and Triton).
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def _native_missing(device: str) -> str | None:
    return native.library(device)[1]


@_constant
def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def _triton_missing() -> str | None:
    return None if find_spec("triton") else "the package triton is not installed"


# ---- registration: every op is defined here, in Python, so that it exists with or without a compiled library


def define(
    schema: str,
    *,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    vmap: Callable | None = None,
    **implementations: Callable,
):
    """Defines `fourdperf::<schema>` and returns it as a callable that takes positional arguments.

    `implementations` maps dispatch keys (CPU, CUDA) to functions. Schema, fake (shapes), autograd, vmap and kernels are
    registered each on its own; torch.library.opcheck tests the seams. A backward that is to be differentiated again must
    be made of ops defined here (through the callables that this returns) and of torch's own.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    for key, implementation in implementations.items():
        _library.impl(name, _on_its_device(implementation) if key == "CUDA" else implementation, key)
    torch.library.register_fake(f"fourdperf::{name}", fake, lib=_library)
    op = getattr(torch.ops.fourdperf, name)
    if vmap is not None:
        torch.library.register_vmap(f"fourdperf::{name}", vmap, lib=_library)
    if backward is None:
        return op
    torch.library.register_autograd(f"fourdperf::{name}", backward, setup_context=setup_context, lib=_library)
    # An autograd formula registered with torch.library is refused by torch.func.grad and its kin; the same formula as an
    # autograd.Function is not.
    members = {"forward": op, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    function = type(
        name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items() if member}
    )

    def call(*args):
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return op(*args)

    return call


def _on_its_device(implementation):
    """A launch goes to the current device, which may not be that of the tensors."""

    def run(*args):
        with torch.cuda.device(next(arg.device for arg in args if isinstance(arg, torch.Tensor))):
            return implementation(*args)

    return run


DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def where(x: torch.Tensor):
    """(library, threads or stream) for a launch on the device of `x`."""
    if x.device.type == "cuda":
        return native.library("cuda")[0], torch.cuda.current_stream(x.device).cuda_stream
    return native.library("cpu")[0], torch.get_num_threads()
