"""scenes: synthetic clips made, rendered and asked, as training needs them.

No floor in bytes: a ray costs some twenty small operations per object. The aim is 30 clips of 8 x 64 x 64 a second on
two cores, 33 ms each. The peer is the same on one thread, as a worker of a data loader runs it.
"""

import torch
from fourdperf.benchmarks.harness import Case

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene

NUM_QUERIES = 2048


def cases(device: str):
    # Scenes have different numbers of objects: a time is that of several.
    yield from _clip_cases("training clips 8x64x64", 12, 8, (64, 64), device)
    yield from _clip_cases("large clips 16x256x256", 2, 16, (256, 256), device)


def _clip_cases(name: str, number: int, frames: int, size: tuple[int, int], device: str):
    make = lambda: [Scene(seed, frames, size, device) for seed in range(number)]
    scenes = make()
    queries = Queries(torch.rand(NUM_QUERIES, 2), *torch.randint(frames, (3, NUM_QUERIES)).unbind(0))
    yield _case(f"{number} {name}, made and rendered", lambda: _averages(make()))
    yield _case(f"{number} {name}, rendered", lambda: _averages(scenes))
    yield _case(f"{number} {name}, {NUM_QUERIES} queries each", lambda: [scene.answer(queries).xyz for scene in scenes])


def _averages(scenes: list[Scene]) -> list[torch.Tensor]:
    return [scene.render().video.mean((1, 2)) for scene in scenes]


def _case(name: str, function) -> Case:
    return Case("scenes", name, "float32", {"fourdperf": function, "one thread": lambda: _on_one_thread(function)})


def _on_one_thread(function):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)
