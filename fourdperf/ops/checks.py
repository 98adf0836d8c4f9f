"""Checks of arguments, and of autocast. Every message names the argument, says what was wanted and what came."""

import contextlib

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(condition, message: str) -> None:
    """Raises ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_floating(name: str, x) -> None:
    """`x` must be a dense torch.Tensor of float64, float32, bfloat16 or float16."""
    if not isinstance(x, torch.Tensor):  # no message is made where all is well: that would take longer than the check
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}")


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_same(name: str, x, other: str, y) -> None:
    """Tensors `x` and `y` must share dtype and device."""
    require(x.dtype == y.dtype, f"{name} must have the dtype of {other} ({y.dtype}), got {x.dtype}")
    require(x.device == y.device, f"{name} must be on the device of {other} ({y.device}), got {x.device}")


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of this type; some, such as meta, have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def no_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Inside, products on devices of this type are in the dtype of their operands."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()
