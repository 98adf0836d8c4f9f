#!/usr/bin/env bash
# Builds the CPU library with AddressSanitizer and UBSan beside the ordinary one, and runs the op tests on it: every
# instruction set, odd and empty shapes, and the fuzzers. A finding stops the run.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
FOURDPERF_SANITIZE=1 FOURDPERF_CUDA=0 PATH="$BIN:$PATH" "$BIN/python" setup.py --quiet build_ext --inplace
ln -s ../kernels fourdperf/kernels
ln -s ../benchmarks fourdperf/benchmarks
# Python itself is not instrumented: the runtimes are loaded first, and leaks at exit are Python's own.
PYTHONPATH="$copy" "$BIN/python" -c "from fourdperf import native; assert native.build_info()['sanitize'] == 'ON', native.build_info()"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
PYTHONPATH="$copy" "$BIN/python" -m pytest tests/ops -q -p no:cacheprovider -k "native or fuzz or ffi or empty or contiguous" "$@"
