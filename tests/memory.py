"""How much memory a call takes in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fourdperf.cli.measure import peak_memory


def growth(function: Callable[[], object]) -> int:
    """Bytes that the process holds at most during a call, beyond what it holds before; whatever it has held earlier."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as error:
        pytest.skip(f"the peak of this process' memory cannot be set back: {error}")
    before = peak_memory()
    function()
    return peak_memory() - before
