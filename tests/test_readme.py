"""What the README shows runs: its Python examples, and the commands that it lists exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.strip().splitlines()[0][:40])
def test_examples_run(example):
    if "jax" in example:
        pytest.importorskip("jax")
    exec(compile(example, "README.md", "exec"), {})


def test_commands_exist():
    from fourdperf.cli.main import COMMANDS
    from fourdperf.cli.train import train

    shown = set(re.findall(r"^fourdperf (\w+)", README, re.MULTILINE))
    assert shown and shown <= set(COMMANDS)
    trained = set(re.findall(r"fourdperf train ([\w.]+)", README)) | set(re.findall(r"\bniso\.[a-z]+_[a-z]+\b", README))
    assert "niso.laplacian" in trained
    for name in trained:
        command = train
        for word in name.split("."):
            command = command[word]
    targets = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{target}:" in makefile for target in targets)
