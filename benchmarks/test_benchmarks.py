"""`pytest benchmarks/`: every case that `fourdperf bench` knows, one pytest-benchmark group per case, a test per provider."""

import importlib

import pytest
import torch
from fourdperf.benchmarks.harness import _wait

from fourdperf.ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _tests():
    for op in OPS:
        for case in importlib.import_module(f"fourdperf.benchmarks.{op}").cases(DEVICE):
            for provider, function in case.providers.items():
                yield pytest.param(case, function, id=f"{op}-{case.name}-{case.direction}-{case.dtype}-{provider}")


@pytest.mark.parametrize("case, function", _tests())
def test_speed(case, function, benchmark):
    if isinstance(function, str):
        pytest.skip(function)
    benchmark.group = f"{case.op}: {case.name}, {case.direction}, {case.dtype}"
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    benchmark.pedantic(lambda: _wait(function()), rounds=7, warmup_rounds=1)
