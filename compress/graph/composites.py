"""Composite operators (those that torch knows how to put together from others), without torch's search for them.

``ExportedProgram.run_decompositions`` and torch's exporter to ONNX each list every composite operator there is, by the
namespace, at every call; the first then patches each of the 300 it found, twice. Here a program is decomposed with
those patched that are in it, and the exporter gets the list of the first call. What comes out is the same
(tests/graph/test_composites.py); it takes a third of the time. The function that lists them is private: where this
version of torch has none, everything is done torch's way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._export import utils
from torch.export import ExportedProgram, decomp_utils, exported_program

__all__ = ["composites_listed_once", "make_functional"]

_NAME = "_collect_all_valid_cia_ops"


def make_functional(program: ExportedProgram) -> ExportedProgram:
    """``program`` without in-place operators and views of views; composite operators that are functional stay whole."""
    own = _composites_in(program)
    with _listing(exported_program, lambda: own):
        return program.run_decompositions({})


@contextlib.contextmanager
def composites_listed_once(program: ExportedProgram) -> Iterator[None]:
    """Within it torch's table of decompositions is made from a list of composite operators kept for the process.

    Those of ``program`` are in it, too: it may have some that were registered since.
    """
    with _listing(decomp_utils, lambda: _all_composites() | _composites_in(program)):
        yield


def _composites_in(program: ExportedProgram) -> set[Any]:
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    operators = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    return {operator for operator in operators if utils._is_preservable_cia_op(operator)}


@functools.cache
def _all_composites() -> set[Any]:
    found: set[Any] = utils._collect_all_valid_cia_ops()
    return found


@contextlib.contextmanager
def _listing(module: Any, composites: Callable[[], set[Any]]) -> Iterator[None]:
    """``module`` lists composite operators by ``composites`` until this ends."""
    before = getattr(module, _NAME, None)
    if before is None:
        yield
        return
    setattr(module, _NAME, composites)
    try:
        yield
    finally:
        setattr(module, _NAME, before)
