"""Type promotion made explicit, as torch's exporter to ONNX does it, without running the graph for it.

ONNX adds no integer to a float, so the exporter puts the conversions in that PyTorch makes by itself. It runs every
node on its fake tensors to learn their types, a third of an export. Each node keeps what it gave when it was made:
here only what the pass changes is run. What comes out is the same (tests/exporters/test_promotion.py). The pass is
private: where this version of torch has none of that form, everything is done torch's way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx

__all__ = ["kept_values"]


@contextlib.contextmanager
def kept_values() -> Iterator[None]:
    """Within it the pass takes the value that a node keeps, ``node.meta["val"]``, for what the node gives."""
    interpreter = _interpreter()
    if interpreter is None:
        yield
        return
    run_node = interpreter.run_node

    def run(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(self, node)
        with self._set_current_node(node):
            rule = _passes().get_type_promotion_rule(node, self.type_promotion_table)
            if rule:
                self._maybe_promote_node(node, rule)  # which runs a node that it changes
        return node.meta["val"]

    interpreter.run_node = run
    try:
        yield
    finally:
        interpreter.run_node = run_node


def _interpreter() -> Any | None:
    try:
        found = _passes()._TypePromotionInterpreter
    except (AttributeError, ImportError):
        return None
    needed = ("run_node", "_set_current_node", "_maybe_promote_node")
    return found if all(hasattr(found, name) for name in needed) else None


def _passes() -> Any:
    from torch.onnx._internal.fx.passes import type_promotion

    return type_promotion
