"""scenes: synthetic clips made, rendered and asked, as training needs them.

No floor in bytes: a ray costs some twenty small operations per object. The aim is 30 clips of 8 x 64 x 64 a second on two
cores, 33 ms each. The peer is the same on one thread, as a worker of a data loader runs it.
"""

import torch
from fourdperf.benchmarks.harness import Case

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene

# name: frames, height and width
SHAPES = {"training clip 8x64x64": (8, (64, 64)), "large clip 16x256x256": (16, (256, 256))}
NUM_QUERIES = 2048
SEEDS = 12  # scenes have different numbers of objects: a time is that of all of these


def cases(device: str):
    for name, (frames, size) in SHAPES.items():
        yield _case(f"{name}, made and rendered", lambda seed, f=frames, s=size: _averages(Scene(seed, f, s, device)))
        scenes = [Scene(seed, frames, size, device) for seed in range(SEEDS)]
        yield _case(f"{name}, rendered", lambda seed, scenes=scenes: _averages(scenes[seed]))
    scenes = [Scene(seed, device=device) for seed in range(SEEDS)]
    queries = Queries(torch.rand(NUM_QUERIES, 2), *torch.randint(8, (3, NUM_QUERIES)).unbind(0))
    yield _case(f"{NUM_QUERIES} queries answered", lambda seed: scenes[seed].answer(queries).xyz)


def _averages(scene: Scene) -> torch.Tensor:
    return scene.render().video.mean((1, 2))


def _case(name: str, function) -> Case:
    everything = lambda: [function(seed) for seed in range(SEEDS)]
    return Case("scenes", f"{SEEDS} x {name}", "float32", {"fourdperf": everything, "one thread": _single(everything)})


def _single(function):
    def on_one_thread():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return on_one_thread
