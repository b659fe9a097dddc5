"""What a small file may ask for: ``config.json`` no more than the weights beside it hold, a module what is stored.

``"num_hidden_layers": 1000000`` is 28 bytes, and a million modules in Python. Counts that cannot be true are refused
as they are read; what else a configuration leads to is counted while the model is built, on torch's meta device, where
a tensor takes no memory.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

from compress.errors import InputError
from compress.models.weightfiles import Extent

__all__ = ["bounded", "check_archive", "check_module", "check_settings"]

_LAYERS = re.compile(r"(\w+_)?(layers?|depth|blocks)")
_COUNTS = re.compile(r"(num|n)_\w*(head|expert|label|class|group|bucket|token|codebook|position)\w*|\w+_size")
# Counts that are no tensor's shape, and modules without tensors: far above what any model has.
_PLENTY = 1 << 19
_MODULES, _VALUES = 1 << 12, 1 << 24
_PER_TENSOR, _PER_BYTE = 16, 8
# Of a module: parts within parts, ways to reach parts, bytes that are stored once and read many times.
_DEEPEST, _PATHS, _EXPANDED = 200, 200_000, 1 << 26
_TIMES = 4
# What members of a zip archive may grow to: so many times the file, beyond what takes no time.
_GROWTH, _SPARE = 20, 1 << 26
_REMEDY = "; one of the two is another model's: get the folder again"


def check_archive(file: Path, archive: zipfile.ZipFile, spare: int = _SPARE) -> None:
    """Refuse members that are said to be more than ``spare`` bytes and twenty times the archive's.

    Raises:
        InputError: naming both sizes.
    """
    size = file.stat().st_size
    if (grown := sum(entry.file_size for entry in archive.infolist())) > spare + _GROWTH * size:
        raise InputError(f"{file} has {size:,} bytes and would grow to {grown:,}; write it again without compression")


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
        if value < 0 and (_LAYERS.fullmatch(name) or _COUNTS.fullmatch(name)):
            raise InputError(f"{file}: {name} is {value}, and a count; get the folder again")
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


def check_module(file: Path, module: nn.Module) -> None:
    """Refuse a module out of a file whose parts are no modules, or whose walk or tensors outgrow the file.

    Every walk over a module's names takes as long as there are ways to its parts: forty levels of one shared child
    have 2 to the 40. A tensor with a step of 0 has more values than are stored.

    Raises:
        InputError: naming the part, or the tensor.
    """
    ways: dict[int, int] = {}
    open_parts: set[int] = set()
    pending: list[tuple[nn.Module, str, int, bool]] = [(module, "", 0, False)]
    while pending:
        part, name, depth, done = pending.pop()
        children = _children(file, part, name)
        if done:
            open_parts.discard(id(part))
            ways[id(part)] = 1 + sum(ways[id(child)] for _, child in children)
            if ways[id(part)] > _PATHS:
                raise InputError(
                    f"{file}: parts of {name or 'the model'} are shared so often that there are more than {_PATHS:,} "
                    "ways to reach one; such a model takes as many calls, and is not compressed"
                )
        elif id(part) in open_parts or depth > _DEEPEST:
            what = "is a part of itself" if id(part) in open_parts else f"is more than {_DEEPEST} levels deep"
            raise InputError(f"{file}: {name[:100]} {what}; no model runs like that: save it again")
        elif id(part) not in ways:
            open_parts.add(id(part))
            pending.append((part, name, depth, True))
            pending += [(child, f"{name}.{key}" if name else key, depth + 1, False) for key, child in children]
    _check_tensors(file, module)


def _children(file: Path, part: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    state = vars(part)
    for attribute, kind in (("_modules", nn.Module), ("_parameters", torch.Tensor), ("_buffers", torch.Tensor)):
        held = state.get(attribute)
        if not isinstance(held, dict) or not all(
            isinstance(key, str) and (each is None or isinstance(each, kind)) for key, each in held.items()
        ):
            raise InputError(
                f"{file} is damaged: {name or type(part).__name__} has no {attribute[1:]} as a layer has them; save "
                "the model again with torch.save(model, path)"
            )
    return [(key, child) for key, child in state["_modules"].items() if child is not None]


def _check_tensors(file: Path, module: nn.Module) -> None:
    tensors: dict[str, torch.Tensor] = {f"parameter {name}": each for name, each in module.named_parameters()}
    tensors |= {f"buffer {name}": each for name, each in module.named_buffers()}
    seen, stored, most, largest, total = set(), dict[int, int](), "", 0, 0
    for name, each in tensors.items():
        if each.is_meta or nn.parameter.is_lazy(each) or each.layout != torch.strided:
            continue
        key = (each.data_ptr(), each.shape, each.stride())
        if key in seen:
            continue
        seen.add(key)
        storage = each.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        read = each.numel() * each.element_size()
        total += read
        if read > largest:
            most, largest = name, read
    held = sum(stored.values())
    if total > _TIMES * held and total - held > _EXPANDED:
        raise InputError(
            f"{file}: its tensors have {total:,} bytes of which {held:,} are stored ({most} is expanded, or overlaps "
            "others); call .contiguous() on what is meant to be so large before saving it"
        )
