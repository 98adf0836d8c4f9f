#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of less than ten minutes: build, tests on the device, benchmarks of all ops
# (attention first), or of the ones named: benchmarks/gpu.sh resize procrustes.
# Needs no network: torch, jax, triton, pybind11, cmake, ninja, pytest and hypothesis must be there; pytest-xdist is used where
# it is. OUT (default: gpu_out) gets the build log, the test log (a line per test; what failed, also where time ran out), and
# after every case the rows as CSV and JSON.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_out}
mkdir -p "$out"
python=${PYTHON:-python3}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # else JAX takes three quarters of the memory, in every process
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1

FOURDPERF_CUDA=1 FOURDPERF_CUDA_ARCHS=$arch timeout 110 \
  "$python" -m pip install --quiet --no-build-isolation --no-deps --editable . \
  >"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; exit 1; }

tests=(tests/ops tests/models/test_scaling4d.py::test_cuda_matches_cpu tests/models/test_d4rt.py::test_cuda_matches_the_cpu
  tests/data/test_scenes.py::test_a_gpu_renders_and_answers_the_same)
"$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8)
OMP_NUM_THREADS=2 timeout --signal=INT --kill-after=10 220 \
  "$python" -m pytest "${tests[@]}" -k "not native-cpu and not fuzz and not threads" -v --tb=short >"$out/tests.log" 2>&1
grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c -200 | head -40
tail -1 "$out/tests.log"

timeout 220 "$python" -c '
import sys
from fourdperf.cli.bench import bench
from fourdperf.ops import OPS
from pathlib import Path
out, *names = sys.argv[1:]
names = names or sorted(OPS, key=lambda op: "attention" not in op)
bench(names, json=Path(out, "gpu.json"), csv=Path(out, "gpu.csv"), rounds=9)
' "$out" "$@" 2>&1 | tee "$out/bench.log" | tail -60
