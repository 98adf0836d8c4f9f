"""The ops. Every name in OPS is a file stem here, in csrc/, kernels/, fourdperf/jax/ops/, benchmarks/ and tests/ops/.

Axes in the docstrings: B batch, T frames, H, W height and width, N tokens or points, C channels, D size of a head.
"""

from fourdperf.ops.backends import use_backend
from fourdperf.ops.resize import resize, resize_eager
from fourdperf.ops.window_attention import window_attention, window_attention_eager

OPS = ("resize", "window_attention")

__all__ = ["OPS", "resize", "resize_eager", "use_backend", "window_attention", "window_attention_eager"]
