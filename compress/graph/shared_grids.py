"""Values that lose themselves on a grid that is made for larger ones.

What an integer concatenation or add writes lies on one grid, as wide as its parts together. A part whose own range is a
few steps of it keeps a few values; an operator behind it cannot tell.
"""

from __future__ import annotations

import torch
from torch import fx

from compress.graph.layers import LAYER_KINDS, activation_of, layer_name
from compress.graph.quantizers import fake_quantize_op, operands, origin, readers
from compress.graph.traced import TracedModel

__all__ = ["coarse_parts"]

aten = torch.ops.aten
_JOINTS = {aten.cat.default: "concatenation", aten.add.Tensor: "sum"}
_FEW_STEPS = 4.0


def coarse_parts(traced: TracedModel) -> list[str]:
    """A sentence for every part of an integer concatenation or add that spans less than four steps of its grid.

    Args:
        traced: a graph whose grids are set.
    """
    sentences = []
    for node in traced.graph.nodes:
        if node.target not in _JOINTS:
            continue
        behind = [user for user in activation_of(node)[1].users if user.target is fake_quantize_op()]
        if not behind:
            continue
        widest = max(behind, key=lambda each: each.args[3])
        step = float(traced.tensor(str(widest.args[1].target)))
        layers = sorted({layer_name(each) for each in readers(widest) if each.target in LAYER_KINDS})
        for part in dict.fromkeys(operands(node)):
            if part.target is not fake_quantize_op():
                continue
            steps = float(traced.tensor(str(part.args[1].target))) * ((1 << part.args[3]) - 1) / step
            if steps < _FEW_STEPS:
                sentences.append(
                    f"{_JOINTS[node.target]} {node.name}: what comes from {_maker(part)} spans {steps:.2g} steps of "
                    "the 8-bit grid that the result has, and is all but lost there"
                    + (
                        f"; to keep it, leave float what reads it: {' '.join(f'--ignore {name}' for name in layers)}"
                        if layers
                        else ""
                    )
                )
    return sentences


def _maker(part: fx.Node) -> str:
    """The layer that has made ``part``, else the operator."""
    made = origin(part)
    return layer_name(made) if made.target in LAYER_KINDS else made.name
