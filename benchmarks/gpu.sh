#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of less than ten minutes: build, op tests on the device, benchmarks.
# Needs no network: torch, jax, triton, pybind11, cmake, ninja, pytest and hypothesis must be there. OUT (default: gpu_out)
# gets the build log, the test log, the rows as CSV and JSON.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_out}
mkdir -p "$out"
python=${PYTHON:-python3}
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1

FOURDPERF_CUDA=1 FOURDPERF_CUDA_ARCHS=$arch "$python" -m pip install --quiet --no-build-isolation --no-deps --editable . \
  >"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; exit 1; }
timeout 240 "$python" -m pytest tests/ops tests/test_build.py -q --maxfail=20 >"$out/tests.log" 2>&1
tail -25 "$out/tests.log"
timeout 240 "$python" -c '
import sys
from fourdperf.cli.bench import bench
from pathlib import Path
out = Path(sys.argv[1])
bench(json=out / "gpu.json", csv=out / "gpu.csv", rounds=9)
' "$out" 2>&1 | tee "$out/bench.log" | tail -60
