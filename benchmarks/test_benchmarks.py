"""`pytest benchmarks/ [--names models,d4rt]`: the cases of `fourdperf bench [models d4rt]`, by default all ops.
One pytest-benchmark group per case, a test per provider, whose answer is first compared with the first provider's."""

import functools
import importlib

import pytest
import torch
from fourdperf.benchmarks.harness import _wait, disagreement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases(name):
    return importlib.import_module(f"fourdperf.benchmarks.{name}").cases(DEVICE)


def pytest_generate_tests(metafunc):
    """Builds the cases one after another for the names of their providers, and keeps none."""
    tests = [
        pytest.param((name, index), provider, id=f"{name}-{case.name}-{case.direction}-{case.dtype}-{provider}")
        for name in metafunc.config.getoption("names").split(",")
        for index, case in enumerate(_cases(name))
        for provider in case.providers
    ]
    metafunc.parametrize("built, provider", tests, indirect=["built"])


_last = {}  # name -> its cases, and the number and the value of the last one that was taken


def _case(name, index):
    """Tests come in the order of the cases, so that each is built once more; in another order they begin anew."""
    cases, number, case = _last.pop(name, None) or (_cases(name), -1, None)
    _last.clear()
    if number > index:
        cases, number = _cases(name), -1
    while number < index:
        case, number = next(cases), number + 1
    _last[name] = cases, number, case
    return case


@functools.lru_cache(maxsize=1)
def _build(name, index):
    """The case, and the first provider's answer."""
    case = _case(name, index)
    return case, next(iter(case.providers.values()))()


@pytest.fixture
def built(request):
    return _build(*request.param)


def test_speed(built, provider, benchmark):
    case, answer = built
    function = case.providers[provider]
    if isinstance(function, str):
        pytest.skip(function)
    if provider != next(iter(case.providers)):
        error = disagreement(answer, function())
        assert error <= case.tolerance, f"differs from ours by {error:.1e}, allowed {case.tolerance:.0e}"
    benchmark.group = f"{case.op}: {case.name}, {case.direction}, {case.dtype}"
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    benchmark.pedantic(lambda: _wait(function()), rounds=7, warmup_rounds=1)
