"""How far a graph moves when all its floats change by a millionth, as sums in another order change them.

On coarse grids a small difference flips codes, and a deep transformer makes much of little: two correct programs are
then as far apart as this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from compress.graph.layers import LAYER_KINDS
from compress.graph.traced import TracedModel

__all__ = ["moved_outputs"]

aten = torch.ops.aten
_SHARE = 1e-6
# Their results are sums, whose rounding is of the size of the terms, not of what is left of them.
_SUMS = {*LAYER_KINDS, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default}
_SUMS |= {aten.scaled_dot_product_attention.default}
# What is on a grid stays on it: there floats have no rounding.
_GRIDS = ("compress.fake_quantize.default", "compress.fake_quantize_dynamic.default")
_LARGEST = 1e30  # beyond are masks, which overflow


def moved_outputs(traced: TracedModel, batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Every output over all ``batches``, concatenated, of the graph with its weights and activations moved."""
    moved = traced.copy()
    generator = torch.Generator().manual_seed(0)
    for node in moved.graph.find_nodes(op="get_attr"):
        value = moved.tensor(str(node.target))
        if value.is_floating_point() and not str(node.target).endswith("scale"):
            moved.set_tensor(str(node.target), _moved(value, generator, sums=False))
    walk = _Moved(moved.module, generator)
    with torch.no_grad():
        results = [tree_leaves(walk.run(*batch)) for batch in batches]
    return [torch.cat([torch.atleast_1d(part) for part in parts]) for parts in zip(*results, strict=True)]


class _Moved(fx.Interpreter):
    """Runs a graph and moves what each of its operators gives, codes and values on grids left out."""

    def __init__(self, module: fx.GraphModule, generator: torch.Generator) -> None:
        super().__init__(module)
        self._generator = generator

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or str(n.target) in _GRIDS:
            return value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return _moved(value, self._generator, sums=n.target in _SUMS)


def _moved(value: Tensor, generator: torch.Generator, *, sums: bool) -> Tensor:
    small = value.abs() < _LARGEST
    size = value
    if sums and small.any():
        size = value[small].double().square().mean().sqrt().to(value.dtype)
    noise = torch.randn(value.shape, generator=generator).to(value.dtype)
    return torch.where(small, value + _SHARE * size * noise, value)
