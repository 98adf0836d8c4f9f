"""Which implementation of a JAX op runs: 'ffi' (the native kernels through XLA's FFI) or 'jnp', and why not the other."""

import functools

import jax

from fourdperf import native

NAMES = ("ffi", "jnp")
_LIBRARIES = {"cpu": "cpu", "gpu": "cuda"}  # JAX's platform -> ours


def platform() -> str:
    """Where JAX puts arrays that nobody placed: 'cpu', 'gpu' ..."""
    device = jax.config.jax_default_device
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def ffi_why_not(device: str | None = None) -> str | None:
    """Why FFI calls cannot run on `device` ('cpu' or 'gpu'; default: `platform()`).

    Arrays may have been placed elsewhere, which a trace does not show: the CPU's and the GPU's targets are registered
    together, and XLA takes those of the place.
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
