"""The two compiled libraries: `_cpu` (always built) and `_cuda` (built where a CUDA toolkit was found).

Both know no framework: they take addresses, sizes, and a number of threads or a stream. A missing library is no error
here; it is a reason, which the backends give when asked why they cannot run.
"""

import functools
import importlib
import json
import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


@functools.cache
def library(device: str):
    """(module, None) for device 'cpu' or 'cuda', or (None, why there is none)."""
    name = f"_{device}"
    if not any(_PACKAGE.glob(f"{name}.*.so")):
        built = build_info()
        if not built:
            return None, "the native library is not built (pip install -e .)"
        return None, f"the {device} library is not built: there was no CUDA toolkit, or FOURDPERF_CUDA=0"
    try:
        module = importlib.import_module(f"fourdperf.{name}")
    except ImportError as error:
        return None, f"the {device} library does not load: {error}"
    if device == "cpu" and os.environ.get("FOURDPERF_CPU_ISA"):
        module.set_cpu_isa(os.environ["FOURDPERF_CPU_ISA"])
    return module, None


def build_info() -> dict:
    """Compiler, instruction sets, CUDA version and architectures of the build; empty where nothing is built."""
    file = _PACKAGE / "_build_info.json"
    return json.loads(file.read_text()) if file.exists() else {}
