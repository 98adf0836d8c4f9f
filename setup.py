"""Runs CMake + ninja for the native libraries; everything else is in pyproject.toml.

FOURDPERF_CUDA=auto|0|1      build the CUDA library: if a toolkit is found (auto), never (0), or fail without one (1)
FOURDPERF_CUDA_ARCHS=80;90   compute capabilities, PTX of the last one is added (default 80;86;89;90)
FOURDPERF_NATIVE=0           no native library and no compiler: everything on the eager backend
FOURDPERF_SANITIZE=1         AddressSanitizer and UBSan build of the CPU library (see `make sanitize`)
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FOLDERS = {"fourdperf.kernels": "kernels", "fourdperf.benchmarks": "benchmarks"}  # package -> folder


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}{'-sanitize' * _flag('SANITIZE')}"
        jaxlib = find_spec("jaxlib")
        import pybind11

        configure = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FOURDPERF_OUT": out,
            "FOURDPERF_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FOURDPERF_JAXLIB_INCLUDE": Path(jaxlib.origin).parent / "include" if jaxlib else "",
            "FOURDPERF_CUDA": os.environ.get("FOURDPERF_CUDA", "auto"),
            "FOURDPERF_CUDA_ARCHS": os.environ.get("FOURDPERF_CUDA_ARCHS", "80;86;89;90"),
            "FOURDPERF_SANITIZE": "ON" if _flag("SANITIZE") else "OFF",
        }
        build.mkdir(parents=True, exist_ok=True)
        # A build environment of pip has a new path every time, so a cache would name files that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        # the cmake and ninja of the environment that runs this, also where it has not been activated
        env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        options = [f"-D{k}={v}" for k, v in configure.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)

    def copy_extensions_to_source(self):
        """For an editable install: everything that CMake delivered, not only the module that setuptools knows of."""
        built = Path(self.build_lib, "fourdperf")
        for stale in (ROOT / "fourdperf").glob("_cuda*.so"):
            stale.unlink()
        for file in [*built.glob("_c*.so"), built / "_build_info.json"]:
            new = ROOT / "fourdperf" / f"{file.name}.new"
            shutil.copy2(file, new)
            new.replace(ROOT / "fourdperf" / file.name)  # a running process keeps its old library


def _flag(name, default="0"):
    return os.environ.get(f"FOURDPERF_{name}", default) == "1"


setup(
    packages=[*find_packages(include=["fourdperf", "fourdperf.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={"fourdperf": ["weights/**/*", "reconstruct/viewer.*"]},
    ext_modules=[Extension("fourdperf._cpu", [])] * _flag("NATIVE", "1"),
    cmdclass={"build_ext": CMakeBuild},
)
