"""The wheel: builds in an isolated environment without torch, installs into an empty one, and works there."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = """
import torch, fourdperf
from fourdperf import native
from fourdperf.ops import resize
from fourdperf.models.scaling4d import Config, Scaling4D
import fourdperf.kernels, fourdperf.benchmarks
assert "site-packages" in fourdperf.__file__
assert native.library("cpu")[0] is not None
assert resize(torch.randn(1, 8, 4, 32), 16, 1, backend="native").shape == (1, 16, 4, 32)
"""


@pytest.mark.heavy
def test_wheel_installs_and_works_in_an_empty_environment(tmp_path):
    constraints = str(ROOT / "constraints.txt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PIP_CONSTRAINT": constraints, "PIP_BUILD_CONSTRAINT": constraints, "FOURDPERF_CUDA": "0"}
    run = lambda *command: subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT))
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:  # nothing that was built here, or the wheel would not show that it builds
        assert not [name for name in tar.getnames() if name.endswith((".so", "_build_info.json"))]
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", str(tmp_path / "empty"))
    python = str(tmp_path / "empty/bin/python")
    run(python, "-m", "pip", "install", "--quiet", str(wheel))
    run(python, "-c", SMOKE)
    run(str(tmp_path / "empty/bin/fourdperf"), "info")
