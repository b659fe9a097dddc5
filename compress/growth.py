"""What a ``config.json`` may ask for: no more than the weights beside it hold.

``"num_hidden_layers": 1000000`` is 28 bytes, and a million modules in Python. Counts that cannot be true are refused
as they are read; what else a configuration leads to is counted while the model is built, on torch's meta device, where
a tensor takes no memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as registration

from compress.errors import InputError
from compress.weightfiles import Extent

__all__ = ["bounded", "check_settings"]

_LAYERS = re.compile(r"(\w+_)?(layers?|depth|blocks)")
_COUNTS = re.compile(r"(num|n)_\w*(head|expert|label|class|group|bucket|token|codebook|position)\w*|\w+_size")
# Counts that are no tensor's shape, and modules without tensors: far above what any model has.
_PLENTY = 1 << 19
_MODULES, _VALUES = 1 << 12, 1 << 24
_PER_TENSOR, _PER_BYTE = 16, 8
_REMEDY = "; one of the two is another model's: get the folder again"


def check_settings(file: Path, settings: Mapping[str, Any], held: Extent) -> None:
    """Refuse counts of ``file`` beyond the tensors ``held``, or beyond their shapes.

    Raises:
        InputError: naming the setting.
    """
    pending: list[tuple[str, object]] = list(settings.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            pending += value.items()
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if _LAYERS.fullmatch(name) and value > held.tensors:
            raise InputError(
                f"{file}: {name} is {value}, and the weights beside it are {held.tensors} tensors{_REMEDY}"
            )
        if _COUNTS.fullmatch(name) and value > max(_PLENTY, held.longest):
            raise InputError(
                f"{file}: {name} is {value}, and no tensor beside it has a dimension above {held.longest}{_REMEDY}"
            )


@contextlib.contextmanager
def bounded(file: Path, held: Extent) -> Iterator[None]:
    """Stop whatever is built meanwhile where it has many times the modules or values of ``held``.

    Raises:
        InputError: from inside.
    """
    modules, values = 0, 0

    def of_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > _MODULES + _PER_TENSOR * held.tensors:
            raise InputError(f"{file} asks for more than {modules - 1} modules; {held.tensors} tensors lie beside it")

    def of_tensor(_: object, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal values
        values += tensor.numel() if tensor is not None else 0
        if values > _VALUES + _PER_BYTE * held.size:
            raise InputError(
                f"{file} asks for {values} values and more (in {name}); the weights beside it are {held.size} bytes"
                f"{_REMEDY}"
            )

    hooks = [
        registration.register_module_module_registration_hook(of_module),
        registration.register_module_parameter_registration_hook(of_tensor),
        registration.register_module_buffer_registration_hook(of_tensor),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
