"""Tensors of an ONNX graph that are known before it runs: read and made."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["constant_of", "initialise"]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """What ``value`` always is, or None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def initialise(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add ``array`` to ``graph`` as the initialiser called ``name``, in place of one that has the name."""
    value = ir.Value(
        name=name,
        const_value=ir.tensor(np.ascontiguousarray(array), name=name),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
    )
    graph.initializers.pop(name, None)
    graph.register_initializer(value)
    return value
