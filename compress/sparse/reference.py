"""Deltas of the published code (github.com/cambridgeltl/composable-sft): ``pytorch_diff.bin``, read and written.

It is a file of torch.save (src/sft/sft.py there): ``{"diffs": {name: {"size", "index_steps", "values"}}, "abs": {name:
tensor}}``. Indices are flat with the *first* dimension fastest, in order, each as its distance from the one before, the
first from 0; values are those of a float tensor, float32 as a rule. ``abs`` replaces whole tensors, as a head. Earlier
versions have ``body`` and ``head``, and sparse tensors instead of the coding; they are read too. The form holds no hash
of the base, so that nothing tells whether a delta fits, nor which head of transformers its dense tensors are for: the
base must have that head already.

The published writer leaves numpy's integer at the head of each list of steps and Python's behind it. Such a number is
pickled as a call of numpy's, which is replaced here by one of ours: nothing but integers can come of it. The published
reader adds steps up in 32 bits, so that tensors of 2^31 entries and more are read here, and not written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import InputError, one_line
from compress.files.known_folders import lookalike
from compress.files.outputs import new_file
from compress.models.torchfile import read_safely
from compress.sparse.delta import SparseDelta, SparseTensor

__all__ = ["REFERENCE_FILE", "read_reference", "write_reference"]

REFERENCE_FILE = "pytorch_diff.bin"
_MOST = (1 << 31) - 1


class _IntegerType:
    """``numpy.dtype`` as a pickle calls it and sets its state: ``dtype("i8", False, True)``, then (3, "<", ...)."""

    def __init__(self, kind: object, *_: object) -> None:
        if not isinstance(kind, str) or kind not in ("i1", "i2", "i4", "i8"):
            raise ValueError(f"numpy's {kind!r} is no signed integer")
        self.size, self.signs = int(kind[1]), ">" if sys.byteorder == "big" else "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.signs = str(state[1])


def _integer(kind: object, raw: object) -> int:
    """``numpy.core.multiarray.scalar`` of an integer."""
    if not isinstance(kind, _IntegerType) or not isinstance(raw, bytes) or len(raw) != kind.size:
        raise ValueError("a number of numpy's is no integer")
    return int.from_bytes(raw, "big" if kind.signs == ">" else "little", signed=True)


_NUMPY: list[tuple[Callable[..., Any], str]] = [
    (_IntegerType, "numpy.dtype"),
    (_integer, "numpy.core.multiarray.scalar"),
    (_integer, "numpy._core.multiarray.scalar"),
]


def read_reference(path: str | os.PathLike[str]) -> SparseDelta:
    """The delta in ``path``, a file or a folder that holds ``pytorch_diff.bin``; its base is unknown.

    Raises:
        InputError: the file is missing, damaged, would run code, or holds something else.
    """
    file = Path(path) / REFERENCE_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(lookalike(Path(path)) or f"There is no file {file}; check the path")
    content = read_safely(file, stand_ins=_NUMPY)
    body, dense = _part(content, "diffs", "body"), _part(content, "abs", "head") or {}
    if body is None and not dense:
        raise InputError(f"{file} is no delta of the published code: it has none of 'diffs', 'abs', 'body' and 'head'")
    tensors = {}
    for name, each in (body or {}).items():
        try:
            tensors[name] = _decoded(each)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"{file}: {name} is damaged ({one_line(error)}); get it again") from error
    for name, each in dense.items():
        if name in tensors:
            raise InputError(f"{file}: {name} is both added to and replaced; get it again")
        if not isinstance(each, Tensor) or not bool(each.isfinite().all()):
            raise InputError(f"{file}: {name} is damaged: a finite tensor is needed; get it again")
    return SparseDelta(None, tensors, {name: each.detach() for name, each in dense.items()}, {"source": file.name})


def write_reference(delta: SparseDelta, path: str | os.PathLike[str]) -> Path:
    """Write ``delta`` to ``path`` as the published code reads it, whole or not at all; values become float32.

    Raises:
        InputError: a tensor is larger than the published reader can address, or there is no room.
    """
    diffs = {}
    for name, each in delta.tensors.items():
        if each.size > _MOST:
            raise InputError(
                f"{name} has {each.size:,} entries; the published form holds {_MOST:,} at most, as its reader counts "
                "in 32 bits: give --out a name that ends in .safetensors"
            )
        index, values = each.index.numpy(), each.values.float()
        if len(each.shape) > 1 and len(index):
            index = np.ravel_multi_index(np.unravel_index(index, each.shape), each.shape, order="F")
            order = np.argsort(index)
            index, values = index[order], values[torch.from_numpy(order)]
        steps = np.diff(index, prepend=np.int64(0)).tolist()
        diffs[name] = {"size": torch.Size(each.shape), "index_steps": steps, "values": values}
    file = Path(path)
    with new_file(file) as temporary:
        torch.save({"diffs": diffs, "abs": delta.dense}, temporary)
    return file


def _part(content: object, *names: str) -> Mapping[str, Any] | None:
    found = [content[name] for name in names if name in content] if isinstance(content, Mapping) else []
    return found[0] if found and isinstance(found[0], Mapping) else None


def _decoded(each: Any) -> SparseTensor:
    if isinstance(each, Tensor):
        return _sparse(each)
    shape = tuple(int(size) for size in each["size"])
    index = np.cumsum(np.asarray(each["index_steps"], np.int64))
    values = torch.as_tensor(each["values"]).reshape(-1).float()
    size = int(np.prod(shape, dtype=np.int64))
    if len(values) != len(index):
        raise ValueError(f"{len(values)} values for {len(index)} indices")
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= size or (np.diff(index) <= 0).any()):
        raise ValueError(f"indices do not increase within 0 to {size - 1}")
    if not bool(values.isfinite().all()):
        raise ValueError("a value is not finite")
    if len(shape) > 1 and len(index):
        index = np.ravel_multi_index(np.unravel_index(index, shape, order="F"), shape)
        order = np.argsort(index)
        index, values = index[order], values[torch.from_numpy(order)]
    return SparseTensor(shape, "float32", torch.from_numpy(index), values)


def _sparse(each: Tensor) -> SparseTensor:
    found = each.coalesce()
    places, values = found.indices().numpy(), found.values().float()
    if not bool(values.isfinite().all()):
        raise ValueError("a value is not finite")
    shape = tuple(each.shape)
    index = np.ravel_multi_index(tuple(places), shape).astype(np.int64)
    return SparseTensor(shape, "float32", torch.from_numpy(index), values)
