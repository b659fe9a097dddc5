"""What a launch needs to know about the device a tensor is on; asked at the call, never at import."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "capability",
    "launch_options",
    "multiprocessors",
    "on_its_device",
    "overlaps",
    "power_of_two",
    "shared_memory",
]

# What one program may ask for, in KiB; elsewhere the least of them.
_SHARED = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}

_P = ParamSpec("_P")
_R = TypeVar("_R")


@cache
def _properties(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    if device.type != "cuda":
        return None, 1
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that ``x`` is on; None elsewhere."""
    return _properties(x.device)[0]


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors the GPU has that ``x`` is on; 1 elsewhere."""
    return _properties(x.device)[1]


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may ask for on the GPU that ``x`` is on; the least there is elsewhere."""
    found = capability(x)
    return 1024 * (_SHARED.get(found, 99) if found is not None else 99)


def overlaps(x: Tensor) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, from Hopper on)."""
    found = capability(x)
    return found is not None and found >= (9, 0)


def launch_options(x: Tensor) -> dict[str, Any]:
    """What every launch says: products and sums may fuse, and on Hopper the launch may overlap the one before."""
    if capability(x) is None:
        return {}
    return {"enable_fp_fusion": True, **({"launch_pdl": True} if overlaps(x) else {})}


def on_its_device(launcher: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """``launcher`` with its first argument's GPU as the current one, which is where triton launches."""

    @wraps(launcher)
    def there(x: Tensor, /, *rest: _P.args, **named: _P.kwargs) -> _R:
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return launcher(x, *rest, **named)
        with torch.cuda.device_of(x):
            return launcher(x, *rest, **named)

    return there


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number`` (1 or more)."""
    return 1 << (number - 1).bit_length()
