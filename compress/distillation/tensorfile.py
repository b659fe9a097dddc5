"""Tensors and strings in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save
from torch import Tensor

from compress.errors import InputError
from compress.files.outputs import new_file

__all__ = ["read_tensors", "write_tensors"]

_STRINGS = "strings"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> None:
    """Write ``path``; a reader sees the file before or the one after."""
    # One entry: the format's own order of several changes from process to process.
    told = {_STRINGS: json.dumps(dict(strings), sort_keys=True)}
    with new_file(path) as temporary:
        # Through Python's own file, whose errors are OSErrors that say why.
        temporary.write_bytes(save({name: each.contiguous() for name, each in tensors.items()}, told))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`write_tensors` wrote.

    Raises:
        InputError: the file is damaged or of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})[_STRINGS])
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is truncated or no file of `compress distill`; delete it, it is made again"
        ) from error
