"""Whether the tensors in a finished ONNX file are those that its graph is exported with, value by value.

Distances of outputs do not show a single code that was flipped; an export of the same graph is the same to the byte.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.exporters.build import build_onnx
from compress.graph.traced import TracedModel

__all__ = ["changed_tensors"]

_NAMED = 3


def changed_tensors(traced: TracedModel, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """A sentence for each of the first tensors of the file ``path`` that ``traced`` has other values of.

    Returns:
        those sentences; and notes, where another version of the exporter wrote the file and tensors have no like.
    """
    wanted, found = _tensors(build_onnx(traced)), _tensors(ir.load(path))
    notes: tuple[str, ...] = ()
    if unlike := sorted(wanted.keys() ^ found.keys()):
        notes = (
            f"{len(unlike)} of the file's tensors, {unlike[0]} the first, are not called as this version exports them, "
            "and were not compared value by value",
        )
    changed = [name for name in wanted if name in found and not _same(wanted[name], found[name])]
    sentences = [_difference(name, wanted[name], found[name]) for name in changed[:_NAMED]]
    if len(changed) > _NAMED:
        sentences.append(f"and {len(changed) - _NAMED} more tensors are not those of the graph")
    return sentences, notes


def _tensors(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _difference(name: str, wanted: np.ndarray, found: np.ndarray) -> str:
    if wanted.dtype != found.dtype or wanted.shape != found.shape:
        kinds = (f"{each.dtype} {'x'.join(map(str, each.shape)) or 'scalar'}" for each in (found, wanted))
        return "{} in the file is {}, in the graph beside it {}".format(name, *kinds)
    # As bytes: NaN is like itself, and 0 unlike -0.
    rows = (np.ascontiguousarray(each).reshape(-1).view(np.uint8).reshape(each.size, -1) for each in (wanted, found))
    unlike = np.flatnonzero(np.not_equal(*rows).any(1))
    place = int(unlike[0])
    return (
        f"{name}: {len(unlike):,} of {wanted.size:,} values are not those of the graph beside the file, the first at "
        f"{place}: {found.reshape(-1)[place]} in the file, {wanted.reshape(-1)[place]} in the graph"
    )
