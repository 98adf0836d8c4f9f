"""Synthetic scenes, rendered and answered exactly: see `scene`."""

from fourdperf.data.scenes.scene import Rendering, Scene

__all__ = ["Rendering", "Scene"]
