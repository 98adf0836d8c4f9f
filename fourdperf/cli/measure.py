"""Time and peak memory of a model in a process of its own, so that neither framework counts or disturbs the other."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

__all__ = ["Job", "Measured", "measure", "peak_memory"]

# glibc returns large blocks to the system at once and takes page faults to get them back, which slows large models on
# the CPU by up to 1.7x, one framework more than the other. Both sides keep their memory.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class Job:
    """``build(*arguments)``, called in the new process, returns the function to time; it must not return before the
    work is done. ``build`` is a module's function, and ``arguments`` can be pickled. ``module`` is imported before;
    the memory held then, that of the libraries, is not counted."""

    name: str
    module: str
    build: Callable[..., Callable[[], None]]
    arguments: tuple


@dataclass(frozen=True)
class Measured:
    """Seconds per run in order, and the process's peak memory in bytes beyond what its libraries take."""

    name: str
    seconds: list[float]
    peak_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    # On Linux ru_maxrss is inherited from the process that started this one; VmHWM is not.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(jobs: Sequence[Job], rounds: int, warmup: int = 2) -> list[Measured]:
    """Runs the jobs in turn, ``rounds`` times after ``warmup`` runs of each, one at a time.

    Raises:
        RuntimeError: a job failed; its own traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pipes = []
        with _environment(ALLOCATOR):
            for job in jobs:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()
                stack.callback(_stop, process, ours)
                pipes.append(ours)
                _ask(job, ours, warmup)
        seconds = [[] for _ in jobs]
        for _ in tqdm(range(rounds), "timing", unit="round", disable=None):
            for job, pipe, found in zip(jobs, pipes, seconds):
                found.append(_ask(job, pipe, 1))
        return [Measured(job.name, s, _ask(job, pipe, 0)) for job, pipe, s in zip(jobs, pipes, seconds)]


def _ask(job: Job, pipe, runs: int):
    try:
        pipe.send(runs)
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"{job.name}: its process ended early; see its own message above") from None


def _serve(pipe, job: Job) -> None:
    """Answers a number of runs with the seconds of the last one, and 0 with the peak memory, until the pipe closes."""
    importlib.import_module(job.module)
    libraries = peak_memory()
    run = job.build(*job.arguments)
    with contextlib.suppress(EOFError):
        while True:
            runs = pipe.recv()
            for _ in range(runs):
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            pipe.send(seconds if runs else peak_memory() - libraries)


def _stop(process, pipe) -> None:
    pipe.close()
    process.join(timeout=10)
    if process.is_alive():
        process.kill()


@contextlib.contextmanager
def _environment(values: dict[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
