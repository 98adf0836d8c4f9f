"""Which implementation of a JAX op runs: 'ffi' (the native kernels through XLA's FFI) or 'jnp', and why not the other."""

import functools

import jax

from fourdperf import native

NAMES = ("ffi", "jnp")
_LIBRARIES = {"cpu": "cpu", "gpu": "cuda"}  # JAX's platform -> ours


def precise(function):
    """The function with products in full float32, where JAX's default on a GPU is TF32. (As a decorator JAX's own
    context was not re-entrant in older versions, and derivatives of derivatives re-enter.)"""

    @functools.wraps(function)
    def run(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return run


def platform(*arrays) -> str:
    """Where the first array lies whose place is known, outside of a trace; else where JAX puts what nobody placed."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return next(iter(x.devices())).platform
    device = jax.config.jax_default_device
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def ffi_why_not(device: str | None = None) -> str | None:
    """Why FFI calls cannot run on `device` ('cpu' or 'gpu'; default: `platform()`).

    A trace does not show where arrays lie: the CPU's and the GPU's targets are registered together, and XLA takes those
    of the place; whether there are any is told of the default device then.
    """
    for place in ("cpu", jax.default_backend()):
        _register(place)
    return _register(device or platform())


@functools.cache
def _register(device: str) -> str | None:
    """Registers the library's targets, once; why there are none."""
    kind = _LIBRARIES.get(device)
    if kind is None:
        return f"the native kernels run on cpu and gpu, not on {device}"
    library, reason = native.library(kind)
    if library is None:
        return reason
    if not hasattr(library, "ffi_targets"):
        return "the native library was built without jaxlib's FFI headers"
    try:
        for name, target in library.ffi_targets.items():
            jax.ffi.register_ffi_target(name, target, platform="cpu" if kind == "cpu" else "CUDA")
    except Exception as error:  # an older jaxlib refuses handlers of a newer API with its own error types
        return f"this jaxlib ({jax.lib.__version__}) refuses the handlers: {error}"
    return None


def choose(op: str, why_not: str | None, backend: str | None) -> str:
    """'ffi' where it can run (why_not is None) and 'jnp' otherwise; the one asked for by name, or ValueError."""
    if backend is None:
        return "ffi" if why_not is None else "jnp"
    if backend not in NAMES:
        raise ValueError(f"{op}: backend must be one of {list(NAMES)}, got {backend!r}")
    if backend == "ffi" and why_not is not None:
        raise ValueError(f"{op}: backend 'ffi' cannot run: {why_not}")
    return backend
