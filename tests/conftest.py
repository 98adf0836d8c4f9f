"""Without a GPU, Triton kernels run in its interpreter. On one, convolutions are in full float32. Fresh memory is NaN.
`target` runs a test on every backend."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the other cores are the other workers'; read when torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from fourdperf import native  # noqa: E402
from tests.cuda_emulator import build as emulator  # noqa: E402
from tests.harness import EMULATED, TARGETS, Target  # noqa: E402

# torch notes on first use which factories obey `with torch.device(...)`: that must not be the patched ones below
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever an op allocates starts as NaN, so that an element it forgets to write is seen."""

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if (
                tensor.is_floating_point()
                and tensor.device.type in ("cpu", "cuda")
                and not torch.compiler.is_compiling()
            ):
                tensor.detach().fill_(float("nan"))
            return tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(params=TARGETS, ids=str)
def target(request) -> Target:
    """Every (backend, device, instruction set) there can be; skipped with its reason where it cannot run."""
    yield from in_use(request.param)


def in_use(wanted: Target):
    reason = wanted.missing()
    if reason:
        pytest.skip(reason)
    if wanted.isa is None:
        yield wanted
        return
    if wanted.isa == EMULATED:
        with pytest.MonkeyPatch.context() as patch:
            kernels = emulator.build()
            patch.setattr(native, "library", lambda device: (kernels, None))
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
            yield wanted
        return
    library = native.library("cpu")[0]
    before = library.cpu_isa()
    library.set_cpu_isa(wanted.isa)
    yield wanted
    library.set_cpu_isa(before)


@pytest.fixture(scope="module")
def one_thread():
    """For sizes too small to share: threads that wait for each other are slow where others work as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
