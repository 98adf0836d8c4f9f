"""Times an op or model against the best alternatives of a user, in one process and interleaved.

A case holds providers: functions without arguments that compute the same thing. Before anything is timed their answers
must agree with the first provider's; a wrong answer is not timed, nor is a provider that fails. Each round runs every
provider once, so slow phases of a shared machine hit all alike; printed are p20, p50 and p80 over the rounds, the ratio of
medians to the first provider, GB/s (bytes read + written) or TFLOP/s with the share of the roof measured in the same run,
and peak memory above what was allocated before.
"""

import contextlib
import csv
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

# glibc gives memory of large tensors back to the kernel at once and faults it in again: the same setting for all peers
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclasses.dataclass
class Case:
    """One row group of a table.

    Attributes:
        op: file stem in benchmarks/.
        name: the shape, and the model that it comes from.
        dtype: as printed.
        providers: name -> function without arguments returning a tensor, array or a nest of them, or a string that says
            why this peer cannot run. The first is ours; the others are compared with it.
        bytes, flops: what the computation needs at least (0: not printed).
        tolerance: largest allowed |difference| over the largest value.
        direction: 'forward', 'forward+backward', 'second order' ...
    """

    op: str
    name: str
    dtype: str
    providers: dict[str, Callable | str]
    bytes: int = 0
    flops: int = 0
    tolerance: float = 1e-4
    direction: str = "forward"


@dataclasses.dataclass
class Row:
    op: str
    case: str
    direction: str
    dtype: str
    provider: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    speed: float | None = None  # median of the first provider over this one's: above 1 is faster than ours
    gb_s: float | None = None
    tflop_s: float | None = None
    roof: float | None = None  # share of the measured copy bandwidth or matmul rate, whichever is nearer
    peak_mb: float | None = None
    note: str = ""


LONG = 0.1  # seconds of a call, after which others are not timed at once: its threads may still be giving back memory
SHORT = 0.01  # seconds of a call that is timed after an untimed one: the caches and threads are as the provider before left them


def with_malloc_settings() -> None:
    """Starts this process again with MALLOC set (glibc reads it at start only)."""
    if platform.libc_ver()[0] == "glibc" and any(os.environ.get(k) != v for k, v in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, sys.orig_argv)


def jax_why_not(device: str, *others: str) -> str | None:
    """Why a peer in JAX, which needs the packages `others` too, cannot be compared on `device`, 'cpu' or 'cuda': what
    is not installed, or that JAX computes elsewhere. None where it can."""
    try:
        jax, *_ = map(importlib.import_module, ("jax", *others))
    except ImportError as error:
        return f"{error.name} is not installed"
    backend = jax.default_backend()
    if device == "cuda" and backend != "gpu":
        return "JAX sees no GPU"
    if device == "cpu" and backend != "cpu":
        return f"JAX computes on a {backend}; JAX_PLATFORMS=cpu keeps it on the CPU"
    return None


def machine(device: str) -> dict:
    """What ran: processor, device, threads, versions ("none" for what is not installed), commit. The keys are the same
    everywhere."""
    processor = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        processor = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "processor": processor,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jax": _version("jax"),
        "triton": _version("triton"),
        "commit": _commit(),
    }


def _version(package):
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return "none"


def _commit():
    """Of the checkout that this file is part of; an installed package may lie in a repository of somebody else's."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        with contextlib.suppress(OSError):  # there is no git
            command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def roofs(device: str) -> dict:
    """Measured now: copy bandwidth in GB/s (read + written), matmul rate in TFLOP/s by dtype."""
    big = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(big)
    result = {"copy": 2 * big.nbytes / _best(lambda: target.copy_(big)) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        n, largest = 256, 8192 if device == "cuda" else 2048
        product = _product(n, dtype, device)
        while n < largest and _best(product) < 0.05:  # a processor without bf16 takes seconds for what others do in one
            n *= 2
            product = _product(n, dtype, device)
        result[str(dtype).removeprefix("torch.")] = 2 * n**3 / _best(product) / 1e12
    return result


def _product(n, dtype, device):
    a = torch.randn(n, n, device=device, dtype=dtype)
    return lambda: a @ a


def _best(function, times=5):
    return min(_seconds(function, 1) for _ in range(times + 1))


def _seconds(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        out = function()
    _wait(out)
    return (time.perf_counter() - start) / repeats


def _settle(limit=1.0) -> None:
    """Waits until this process's other threads rest: some give back gigabytes after their answer is there."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        busy = time.process_time()
        time.sleep(5e-3)
        if time.process_time() - busy < 5e-4:
            return


def _wait(out):
    for leaf in _leaves(out):
        if isinstance(leaf, torch.Tensor):
            if leaf.is_cuda:
                torch.cuda.synchronize()
        elif hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()


def _leaves(out):
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, tuple | list):
        for item in out:
            yield from _leaves(item)
    elif out is not None:
        yield out


def _numbers(leaf) -> np.ndarray:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().to("cpu", torch.float64).numpy()
    return np.asarray(leaf).astype(np.float64)


def disagreement(ours, theirs) -> float:
    """Largest |difference| over the largest value, over all arrays of two outputs; inf where shapes differ or NaN shows."""
    worst = 0.0
    ours, theirs = list(_leaves(ours)), list(_leaves(theirs))
    if len(ours) != len(theirs):
        return float("inf")
    for a, b in zip(map(_numbers, ours), map(_numbers, theirs)):
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        if a.size:
            worst = max(worst, np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    return worst


def peak_megabytes(function, device: str) -> float | None:
    """Memory that one call takes on `device` above what is allocated before it, output included; None where that is not
    known, as on a GPU of what JAX allocates."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = function()
        _wait(out)
        by_torch = all(isinstance(leaf, torch.Tensor) for leaf in _leaves(out))
        return (torch.cuda.max_memory_allocated() - before) / 1e6 if by_torch else None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        _wait(function())
        return max(0.0, (_status("VmHWM") - before) * 1024 / 1e6)
    return None


def _status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])


def run(case: Case, roof: dict, device: str, rounds: int = 15, seconds: float = 3.0) -> list[Row]:
    """Times one case: `rounds` rounds, fewer (but five) where all providers together would take longer than `seconds`."""
    rows = {name: Row(case.op, case.name, case.direction, case.dtype, name) for name in case.providers}
    runnable: dict[str, Callable] = {}
    checked_by = ours = None
    for name, function in case.providers.items():
        if isinstance(function, str):
            rows[name].note = function
            continue
        try:
            out = function()
            _wait(out)
        except Exception as error:  # out of memory, not for this device ...: the others are timed all the same
            rows[name].note = f"FAILED: {error!r:.200}"
            continue
        if ours is None:
            checked_by, ours = name, out
        elif (error := disagreement(ours, out)) > case.tolerance:
            rows[name].note = f"NOT TIMED: differs from {checked_by} by {error:.1e}, allowed {case.tolerance:.0e}"
            continue
        rows[name].peak_mb = peak_megabytes(function, device)
        runnable[name] = function
    if not runnable:
        return list(rows.values())
    took = {name: _seconds(function, 1) for name, function in runnable.items()}
    repeats = {name: max(1, int(2e-3 / max(once, 1e-9))) for name, once in took.items()}
    times: dict[str, list[float]] = {name: [] for name in runnable}
    start, before = time.perf_counter(), 0.0
    while len(times[next(iter(times))]) < rounds:
        if time.perf_counter() - start > seconds and len(times[next(iter(times))]) >= 5:
            break
        for name, function in runnable.items():
            if before > LONG:
                _settle()
            if before > LONG or took[name] < SHORT:
                _wait(function())  # its data are in the caches, its threads awake
            times[name].append(_seconds(function, repeats[name]))
            before = times[name][-1]
    first = next(iter(case.providers))
    for name, sample in times.items():
        row = rows[name]
        row.p20_ms, row.p50_ms, row.p80_ms = (float(q) * 1e3 for q in np.quantile(sample, [0.2, 0.5, 0.8]))
        row.speed = float(np.median(times[first]) / np.median(sample)) if first in times else None
        row.gb_s = case.bytes / row.p50_ms / 1e6 if case.bytes else None
        row.tflop_s = case.flops / row.p50_ms / 1e9 if case.flops else None
        shares = [
            row.gb_s / roof["copy"] if row.gb_s else 0,
            row.tflop_s / roof.get(case.dtype, np.inf) if row.tflop_s else 0,
        ]
        row.roof = max(shares) or None
    return list(rows.values())


def report(
    cases: Iterable[Case],
    device: str,
    rounds: int = 15,
    csv_file: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Runs the cases. Each is printed as it is done, its rows are appended to `csv_file`, and `json_file` holds what ran
    (machine and roofs) and all rows so far."""
    header = machine(device) | {"roofs": roofs(device)}
    print(" ".join(f"{k}={v}" for k, v in header.items() if k != "roofs"))
    print(
        "roofs: " + ", ".join(f"{k} {v:.3g} {'GB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in header["roofs"].items())
    )
    rows = []
    if csv_file:
        append_csv(csv_file, header, rows)  # a file of other columns is refused before anything is timed
    for case in cases:
        print(
            f"\n{case.op}: {case.name}, {case.direction}, {case.dtype}"
            + (f", at least {case.bytes / 1e6:.1f} MB" if case.bytes else "")
            + (f", {case.flops / 1e9:.2f} GFLOP" if case.flops else "")
        )
        print(
            f"  {'':26} {'p20':>9} {'p50':>9} {'p80':>9} ms {'speed':>7} {'GB/s':>7} {'TFLOP/s':>8} {'roof':>5} {'peak MB':>8}"
        )
        done = run(case, header["roofs"], device, rounds)
        rows += done
        if csv_file:
            append_csv(csv_file, header, done)
        if json_file:
            write_json(json_file, header, rows)
        for row in done:
            if row.p50_ms is None:
                print(f"  {row.provider:26} {row.note}")
                continue
            number = lambda value, width, spec: f"{value:{width}{spec}}" if value is not None else " " * width
            print(
                f"  {row.provider:26} {row.p20_ms:9.3f} {row.p50_ms:9.3f} {row.p80_ms:9.3f}    {number(row.speed, 7, '.2f')} "
                f"{number(row.gb_s, 7, '.1f')} {number(row.tflop_s, 8, '.3f')} {number(row.roof, 5, '.0%')} "
                f"{number(row.peak_mb, 8, '.1f')}"
            )
        sys.stdout.flush()


def write_json(file: Path, header: dict, rows: list[Row]) -> None:
    """One object: what ran, and the rows. Written to a temporary file first."""
    new = file.with_name(file.name + ".new")
    new.write_text(
        json.dumps(
            header | {"command": " ".join(sys.argv), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1
        )
    )
    new.replace(file)


def append_csv(file: Path, header: dict, rows: list[Row]) -> None:
    """Appends the rows with date, command and versions to the results kept in benchmarks/results/.

    Raises:
        ValueError: the file has other columns.
    """
    known = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "fourdperf " + " ".join(sys.argv[1:]),
        **{k: v for k, v in header.items() if k != "roofs"},
        **{f"roof_{k}": v for k, v in header["roofs"].items()},
    }
    fields = [*(f.name for f in dataclasses.fields(Row)), *known]
    with open(file, "a+", newline="") as stream:
        stream.seek(0)
        found = next(csv.reader(stream), None)
        if found not in (None, fields):
            raise ValueError(f"{file}: wanted the columns {','.join(fields)}, got {','.join(found)}; name a new file")
        writer = csv.DictWriter(stream, fields)
        if found is None:
            writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row) | known
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()})
