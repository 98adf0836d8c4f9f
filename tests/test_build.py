"""What the compilers made: no weak symbols across instruction sets, no spills in CUDA and Triton kernels."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fourdperf import native
from fourdperf.ops import OPS

ROOT = Path(__file__).parents[1]
OBJECTS = sorted(ROOT.glob("build/cmake-*/CMakeFiles/cpu_*.dir/csrc/*/*.o"))
CUDA_SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))


def cuobjdump() -> str | None:
    try:
        import triton

        bundled = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"), None)
    except ImportError:
        bundled = None
    return str(bundled) if bundled else shutil.which("cuobjdump")


@pytest.mark.skipif(not OBJECTS, reason="no object files here (the library came from a wheel)")
@pytest.mark.parametrize("file", OBJECTS, ids=lambda file: f"{file.parents[2].stem}-{file.name.split('.')[0]}")
def test_no_symbol_of_one_instruction_set_can_serve_another(file):
    """The linker keeps one copy of a weak symbol: if that was compiled for AVX-512, an older processor would stop there."""
    symbols = subprocess.run(["nm", "-C", str(file)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if re.match(r"^[0-9a-f]+ [WVu] ", line)]
    shared = [line for line in weak if not re.search(r"DW\.ref|typeinfo|vtable", line)]
    assert not shared, "\n".join(shared)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.heavy), "sm_90"])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda file: file.stem)
def test_cuda_kernels_spill_nothing(source, arch, tmp_path):
    """ptxas' own report: no spills; no stack in the hot kernels (those without a <tables> role: *_totals/_weights)."""
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-arch={arch}",
        "--expt-relaxed-constexpr",
        "-Xptxas=-v",
        "-I",
        str(ROOT / "csrc"),
        "-c",
        str(source),
        "-o",
        str(tmp_path / "out.o"),
    ]
    report = subprocess.run(command, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr[-3000:]
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        report.stderr,
        re.DOTALL,
    )
    assert kernels, "ptxas reported no kernel"
    for name, stack, *spills in kernels:
        assert all(spill == "0" for spill in spills), f"{name} spills: {spills}"
        assert stack == "0" or re.search(r"_(totals|weights)_kernel", name), f"{name} uses {stack} bytes of stack"


AOT = """
import importlib, json, subprocess, sys, tempfile, traceback
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend


def front_end(kernel, signature, constexprs, options, target):
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(options))
    ASTSource(fn=kernel, signature=signature, constexprs=constexprs).make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def check(op, arch):
    count, target = 0, GPUTarget("cuda", arch, 32)
    for kernel, signature, constexprs, options in importlib.import_module(f"fourdperf.kernels.{op}").aot():
        # a launch turns integers of 1 into constants, which have no .to(): all of them here, read and not compiled further
        ones = {p.name: 1 for p in kernel.params if signature[p.name] in ("i32", "i64") and not p.do_not_specialize}
        front_end(kernel, signature | dict.fromkeys(ones, "constexpr"), constexprs | ones, options, target)
        compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constexprs),
                                  target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True).stdout
        line = next(line for line in usage.splitlines() if "REG:" in line)
        fields = dict(field.split(":") for field in line.split() if field.count(":") == 1)
        assert fields["STACK"] == "0" and fields["LOCAL"] == "0", f"{kernel.__name__} {constexprs}: {line}"
        count += 1
    assert count, "aot() yields no kernel"


(cuobjdump, *ops), errors = sys.argv[1:], {}
for op in ops:
    for arch in (80, 90):
        errors[f"{op} sm_{arch}"] = None
        try:
            check(op, arch)
        except Exception:
            errors[f"{op} sm_{arch}"] = traceback.format_exc()
print(json.dumps(errors))
"""
KERNELS = [op for op in OPS if (ROOT / f"kernels/{op}.py").exists()]


@pytest.fixture(scope="module")
def triton_errors():
    """What went wrong with "<op> sm_<arch>", or None; one process compiles all, as Triton takes seconds to load."""
    pytest.importorskip("triton")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, neither in triton nor on PATH")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", AOT, tool, *KERNELS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", KERNELS)
def test_triton_kernels_compile_without_spills(op, arch, triton_errors):
    error = triton_errors[f"{op} {arch}"]
    assert error is None, error[-3000:]


def test_import_is_quiet_and_needs_little():
    """Importing the package and its ops prints nothing and loads neither JAX, Triton, OpenCV nor the CUDA library."""
    code = (
        "import sys, fourdperf, fourdperf.ops, fourdperf.models.scaling4d; "
        "loaded = [m for m in ('jax', 'flax', 'triton', 'cv2', 'fourdperf._cuda', 'lightning') if m in sys.modules]; "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_the_library_eager_serves(monkeypatch, capsys):
    import torch

    from fourdperf.cli.info import info
    from fourdperf.ops import resize

    missing = lambda device: (None, "the native library is not built (pip install -e .)")
    monkeypatch.setattr(native, "library", missing)
    x = torch.randn(2, 8, 3)
    assert resize(x, 16, 1).shape == (2, 16, 3)
    with pytest.raises(ValueError, match="native library is not built"):
        resize(x, 16, 1, backend="native")
    info()
    assert "the native library is not built" in capsys.readouterr().out


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16", "sse9"])
def test_the_instruction_set_can_be_forced(isa):
    library, reason = native.library("cpu")
    if reason:
        pytest.skip(reason)
    code = "from fourdperf import native; print(native.library('cpu')[0].cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"FOURDPERF_CPU_ISA": isa}
    )
    if isa in library.cpu_isas():
        assert done.stdout.strip() == isa
    else:
        assert "isa must be one that this processor has" in done.stderr


def test_info_names_every_op(capsys):
    from fourdperf.cli.info import info

    info()
    out = capsys.readouterr().out
    assert all(op in out for op in OPS) and "cpu library" in out


def test_versions_agree():
    from importlib.metadata import version

    import fourdperf

    assert fourdperf.__version__ == version("fourdperf")
    importlib.import_module("fourdperf.benchmarks.harness")
