"""`fourdperf bench`: times ops and models against the best alternatives a user has."""

import importlib
from pathlib import Path

import torch

from fourdperf.benchmarks import harness
from fourdperf.ops import OPS


def bench(
    names: list[str] | None = None,
    json: Path | None = None,
    csv: Path | None = None,
    rounds: int = 15,
    device: str | None = None,
) -> None:
    """Times ops and models; answers are checked first, and a wrong one is not timed.

    Args:
        names: files in benchmarks/ (resize, models ...); default all ops.
        json: file for machine, versions, roofs and every row, written anew after each case.
        csv: file to which the rows of each case are appended as it is done, such as benchmarks/results/cpu.csv.
        rounds: interleaved rounds per case.
        device: 'cpu' or 'cuda'; default cuda where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    files = Path(harness.__file__).parent.glob("*.py")
    known = sorted(file.stem for file in files if "\ndef cases(" in file.read_text())
    names = names or list(OPS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"names must be among {', '.join(known)}, got {', '.join(unknown)}")
    harness.with_malloc_settings()
    cases = (case for name in names for case in importlib.import_module(f"fourdperf.benchmarks.{name}").cases(device))
    harness.report(cases, device, rounds, csv, json)
