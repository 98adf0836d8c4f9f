"""Runs of the command line in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
DEADLINE = 200  # seconds, of a busy machine


def kill_after_checkpoint(command: list[str], out: Path) -> None:
    """kill -9 after the first checkpoint, wherever the run is then."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=-3, stderr=-3)
    until = time.monotonic() + DEADLINE
    while not (out / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def torchrun(*arguments) -> subprocess.CompletedProcess:
    """The command in two processes, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fourdperf"]
    arguments = [*command, *map(str, arguments)]
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
