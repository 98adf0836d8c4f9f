"""Builds `_cuda`, the CUDA kernels of csrc/, for the CPU (see cuda_runtime.h beside this file).

A .cu file becomes C++ by three substitutions:
    kernel<T><<<grid, block, bytes, stream>>>(a);   ->  emulator::launch("kernel<T>", grid, block, bytes, stream, [&] { kernel<T>(a); });
    __shared__ A g[8], h[8];                        ->  static A g[8], h[8]; emulator::poison(g); emulator::poison(h);
    extern __shared__ ... unsigned char memory[];   ->  unsigned char* memory = emulator::dynamic_shared();
"""

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from fourdperf import native

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = "-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=fast -march=native -fno-math-errno -w -DFOURDPERF_CUDA_MODULE".split()
# in `make sanitize`, as for its CPU library
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=undefined".split()


def translate(source: str) -> str:
    """The C++ for a .cu file; line numbers stay."""
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?unsigned char (\w+)\[\];",
        r"unsigned char* \1 = emulator::dynamic_shared();",
        source,
    )

    def shared(match):
        names = re.findall(r"(\w+)\[", re.sub(r"\[[^\]]*\]", "[", match[2]))
        return f"static {match[1]} {match[2]}; " + " ".join(f"emulator::poison({name});" for name in names)

    source = re.sub(r"__shared__ (\w+) ([^;]+);", shared, source)
    out, rest = "", source
    while "<<<" in rest:
        at = rest.index("<<<")
        start = _callee(rest, at)
        end = rest.index(">>>", at)
        close = _closing(rest, end + 3)
        callee, config, call = rest[start:at], rest[at + 3 : end], rest[end + 3 : close]
        out += f'{rest[:start]}emulator::launch("{callee}", {config}, [&] {{ {callee}{call}; }})'
        rest = rest[close:]
    return out + rest


def _callee(text: str, end: int) -> int:
    """Where the name, with its template arguments, that ends at `end` begins."""
    at = end
    if text[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += {">": 1, "<": -1}.get(text[at], 0)
            if depth == 0:
                break
    while re.match(r"[\w:]", text[at - 1]):
        at -= 1
    return at


def _closing(text: str, start: int) -> int:
    """Just behind the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError("a launch is not closed")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


@functools.cache
def build(folder: Path = ROOT / "build" / "cuda_emulator"):
    """The compiled module; from `folder`, if the sources have not changed since."""
    kernels = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    files = [
        *kernels,
        *sorted((ROOT / "csrc").glob("*/*.h")),
        ROOT / "csrc" / "bindings.cpp",
        *sorted(HERE.glob("*.[hp]*")),
    ]
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    library = folder / f"_cuda-{stamp}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's other processes wait for this one's
            if not library.exists():
                _build(kernels, library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(kernels: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        sources = [Path(work, kernel.stem + ".cpp") for kernel in kernels]
        for source, kernel in zip(sources, kernels):
            source.write_text(translate(kernel.read_text()))
        link([*sources, ROOT / "csrc" / "bindings.cpp"], Path(work))
        os.replace(Path(work, "library.so"), library)


def link(sources: list[Path], folder: Path) -> Path:
    """Compiles C++ that `translate` made, two files at a time, into `folder`/library.so."""
    import pybind11

    places = (HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"])
    checks = SANITIZE if native.build_info().get("sanitize") == "ON" else []
    command = [compiler(), *FLAGS, *checks, *(f"-I{place}" for place in places)]

    def compiled(source):
        out = folder / (source.stem + ".o")
        subprocess.run([*command, "-include", "cuda_runtime.h", "-c", source, "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler(), "-shared", *checks, *objects, "-o", folder / "library.so"], check=True)
    return folder / "library.so"
