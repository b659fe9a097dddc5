"""Deltas of the published code (github.com/cambridgeltl/composable-sft): ``pytorch_diff.bin``, read and written.

It is a file of torch.save: ``{"diffs": {name: {"size", "index_steps", "values"}}, "abs": {name: tensor}}``. Indices are
flat with the *first* dimension fastest, in order, each as its distance from the one before, the first from 0; values
are float32. Earlier versions have ``body`` and ``head``, and sparse tensors instead of the coding; they are read too.
The form holds no hash of the base, so that nothing tells whether a delta fits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import read_safely
from compress.errors import InputError
from compress.factory import one_line
from compress.sparse.delta import SparseDelta, SparseTensor

__all__ = ["REFERENCE_FILE", "read_reference", "write_reference"]

REFERENCE_FILE = "pytorch_diff.bin"


def read_reference(path: str | os.PathLike[str]) -> SparseDelta:
    """The delta in ``path``, a file or a folder that holds ``pytorch_diff.bin``; its base is unknown.

    Raises:
        InputError: the file is missing, damaged, would run code, or holds something else.
    """
    file = Path(path) / REFERENCE_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"There is no file {file}; check the path")
    content = read_safely(file)
    body = _part(content, "diffs", "body")
    if body is None:
        raise InputError(f"{file} is no delta of the published code: it has neither 'diffs' nor 'body'")
    tensors = {}
    for name, each in body.items():
        try:
            tensors[name] = _decoded(each)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"{file}: {name} is damaged ({one_line(error)}); get it again") from error
    dense = _part(content, "abs", "head") or {}
    for name, each in dense.items():
        if not isinstance(each, Tensor) or not bool(each.isfinite().all()):
            raise InputError(f"{file}: {name} is damaged: a finite tensor is needed; get it again")
    return SparseDelta(None, tensors, dict(dense), {"source": file.name})


def write_reference(delta: SparseDelta, path: str | os.PathLike[str]) -> Path:
    """Write ``delta`` to ``path`` as the published code reads it, whole or not at all; values become float32."""
    diffs = {}
    for name, each in delta.tensors.items():
        index, values = each.index.numpy(), each.values.float()
        if len(each.shape) > 1 and len(index):
            index = np.ravel_multi_index(np.unravel_index(index, each.shape), each.shape, order="F")
            order = np.argsort(index)
            index, values = index[order], values[torch.from_numpy(order)]
        steps = np.diff(index, prepend=np.int64(0)).tolist()
        diffs[name] = {"size": torch.Size(each.shape), "index_steps": steps, "values": values}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.partial")
    torch.save({"diffs": diffs, "abs": delta.dense}, temporary)
    os.replace(temporary, file)
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
