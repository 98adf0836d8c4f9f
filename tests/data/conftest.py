"""Synthetic scenes on disk, written once in each layout, and what is known about them."""

import functools
import shutil
from pathlib import Path

import pytest
import torch

from fourdperf.data.augment import View
from fourdperf.data.export import export_scene
from fourdperf.data.queries import Targets
from fourdperf.data.recorded_queries import Asked, answer, ask
from fourdperf.data.scenes import Scene
from fourdperf.data.sources import Source, load_window

FRAMES, HEIGHT, WIDTH = 6, 40, 60
SEED = 4
SCALES = {"folder": 1.0, "pointodyssey": 50.0, "movi": 1.0}


@functools.lru_cache
def the_scene() -> Scene:
    return Scene(SEED, num_frames=FRAMES, size=(HEIGHT, WIDTH))


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """``stored(layout)``: the folder of the scene in a layout; not to be written to."""
    root = tmp_path_factory.mktemp("stored")

    def path(layout: str) -> Path:
        folder = root / layout / "scene"
        if not folder.exists():
            export_scene(the_scene(), folder, layout, num_tracks=200, scale=SCALES[layout])
        return folder

    return path


@pytest.fixture
def copied(stored, tmp_path):
    """``copied(layout)``: such a folder of the test's own."""

    def path(layout: str) -> Path:
        return Path(shutil.copytree(stored(layout), tmp_path / "scene"))

    return path


def whole(frames: int) -> View:
    return View(torch.arange(frames), torch.tensor([[0.0, 0, 1, 1]]).expand(frames, 4))


def asked_and_answered(source: Source, count: int = 1500, seed: int = 0) -> tuple[Asked, Targets]:
    """Queries about all frames of a source, and its answers."""
    window = load_window(source, list(range(source.num_frames)))
    generator = torch.Generator().manual_seed(seed)
    asked = ask(window, whole(source.num_frames), count, 32, generator)
    return asked, answer(window, asked)


def errors(found: Targets, exact: Targets, field: str) -> torch.Tensor:
    """The largest error of each answer that is said to be known, and in truth is."""
    known = getattr(found, f"has_{field}") & getattr(exact, f"has_{field}")
    error = (getattr(found, field) - getattr(exact, field)).abs()[known]
    return error.flatten(1).amax(1) if error.ndim > 1 else error
