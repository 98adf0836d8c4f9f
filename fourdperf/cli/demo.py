"""``fourdperf demo``: a system end to end, without any download."""

from fourdperf.cli.demo_d4rt import d4rt
from fourdperf.cli.demo_scaling4d import scaling4d

__all__ = ["demo"]

demo = {"d4rt": d4rt, "scaling4d": scaling4d}
