"""`fourdperf info`: versions, what is built, and for every op which backends run here and why the others do not."""

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fourdperf import __version__, native
from fourdperf.ops import OPS
from fourdperf.ops.backends import NAMES

PACKAGES = ("torch", "triton", "jax", "jaxlib", "flax", "numpy", "opencv-python-headless", "safetensors")


def info() -> None:
    """Prints versions, what is built and for which processors, and a table op x backend with the reasons."""
    print(f"fourdperf {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print("packages      " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    _print_build()
    _print_ops()


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _print_build():
    build = native.build_info()
    cpu, why_no_cpu = native.library("cpu")
    if cpu:
        print(
            f"cpu library   built by {build['compiler']} for {', '.join(build['isas'].split(';'))}; "
            f"this processor runs {', '.join(cpu.cpu_isas())}; in use: {cpu.cpu_isa()}"
        )
        print(
            f"jax ffi       {'built' if hasattr(cpu, 'ffi_targets') else 'not built: no jaxlib headers at build time'}"
        )
    else:
        print(f"cpu library   none: {why_no_cpu}")
    cuda, why_no_cuda = native.library("cuda")
    if cuda:
        print(f"cuda library  built by nvcc {build['cuda']} for {', '.join(build['cuda_archs'].split(';'))}")
    else:
        print(f"cuda library  none: {why_no_cuda}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"gpu           {device}")


def _print_ops():
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    width = max(map(len, OPS))
    print(f"\n{'op':{width}}  device  {'  '.join(f'{name:6}' for name in NAMES)}  ffi (jax)   ")
    reasons: dict[str, None] = {}
    for op in OPS:
        backends = importlib.import_module(f"fourdperf.ops.{op}").BACKENDS
        for device in devices:
            x = torch.zeros(1, device=device)
            found = {backend.name: backend.device_why_not(x) for backend in backends} | {"ffi": _ffi_why_not(device)}
            cells = []
            for name in (*NAMES, "ffi"):
                reason = found.get(name, "this op has no such backend")
                cells.append(f"{'yes' if reason is None else 'no':6}")
                if reason:
                    reasons[f"{name} on {device}: {reason}"] = None
            print(f"{op:{width}}  {device:6}  {'  '.join(cells)}")
    for reason in reasons:
        print(f"  {reason}")


def _ffi_why_not(device):
    try:
        from fourdperf.jax.ops.backends import ffi_why_not
    except ImportError as error:
        return str(error)
    return ffi_why_not("gpu" if device == "cuda" else "cpu")
