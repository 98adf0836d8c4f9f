"""`fourdperf bench`: times ops and models against the best alternatives a user has."""

import importlib
from pathlib import Path

from fourdperf.benchmarks import harness
from fourdperf.cli.checkpoints import Device, pick_device
from fourdperf.ops import OPS


def bench(
    names: list[str] | None = None,
    json: Path | None = None,
    csv: Path | None = None,
    rounds: int = 15,
    device: Device = "auto",
) -> None:
    """Times ops and models; answers are checked first, and a wrong one is not timed.

    Args:
        names: files in benchmarks/ (resize, models ...); default all ops.
        json: file for machine, versions, roofs and every row, written anew after each case.
        csv: file to which the rows of each case are appended as it is done, such as benchmarks/results/cpu.csv.
        rounds: interleaved rounds per case.
        device: where to compute.

    Raises:
        ValueError: a name, `rounds` or `device` cannot be, or `csv` has other columns.
        OSError: a file cannot be written.
    """
    if rounds < 1:
        raise ValueError(f"--rounds: wanted at least 1, got {rounds}")
    device = pick_device(device).type
    files = Path(harness.__file__).parent.glob("*.py")
    known = sorted(file.stem for file in files if "\ndef cases(" in file.read_text())
    names = names or list(OPS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"names must be among {', '.join(known)}, got {', '.join(unknown)}")
    for file in filter(None, (json, csv)):
        file.parent.mkdir(parents=True, exist_ok=True)
    harness.with_malloc_settings()
    cases = (case for name in names for case in importlib.import_module(f"fourdperf.benchmarks.{name}").cases(device))
    harness.report(cases, device, rounds, csv, json)
