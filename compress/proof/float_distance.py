"""How far a finished file is from the float model: what calibration and rounding cost, whatever the labels say.

The gate compares the file with the graph that is quantized already, and can show nothing of that.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx

from compress.errors import InputError
from compress.exporters.session import open_session, run_session
from compress.graph.layers import LAYER_KINDS, layer_name
from compress.graph.traced import call_module, node_sizes, tensors_in
from compress.intake.model import Intake
from compress.proof.distance import cosine, relative_l2, worst_sample
from compress.records.report import FloatDistance, OutputDistance

__all__ = ["final_operands", "float_distance"]

aten = torch.ops.aten
_BATCH = 32
_SAME = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}


def float_distance(
    intake: Intake, path: Path, inputs: tuple[Tensor, ...], source: str, provider: str = "CPUExecutionProvider"
) -> FloatDistance:
    """The outputs of the ONNX file ``path`` against those of the module that ``intake`` was made of.

    Args:
        inputs: [N, ...] each.
        source: what they are, for the report.

    Raises:
        InputError: the module gives other outputs than its graph.
    """
    traced = intake.traced
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    count = len(inputs[0]) if traced.dynamic_batch else len(inputs[0]) // size * size
    batches = list(zip(*(x[:count].split(size) for x in inputs), strict=True))
    with torch.no_grad():
        results = [list(tensors_in(call_module(intake.original, batch, intake.names))) for batch in batches]
    wanted = [torch.cat([torch.atleast_1d(part) for part in parts]) for parts in zip(*results, strict=True)]
    session = open_session(path, "ORT_ENABLE_ALL", provider=provider)
    got = run_session(session, batches)
    if [each.shape for each in got] != [each.shape for each in wanted]:
        shapes = (" and ".join("x".join(map(str, each.shape)) for each in found) for found in (got, wanted))
        raise InputError("the file's outputs are {}, the float model's {}".format(*shapes))
    names = [each.name for each in session.get_outputs()]
    rows = [_distance(*each) for each in zip(names, got, wanted, traced.outputs(), strict=True)]
    return FloatDistance(samples=count, source=source, outputs=tuple(rows))


def _distance(name: str, got: Tensor, wanted: Tensor, node: fx.Node) -> OutputDistance:
    worst, furthest = worst_sample([got], [wanted])
    found = OutputDistance(
        name=name,
        relative_l2=relative_l2(got, wanted),
        cosine=cosine(got, wanted),
        worst_sample=worst,
        worst_relative_l2=furthest,
    )
    dim, operands = final_operands(node)
    if len(operands) < 2 or sum(size for _, size in operands) != wanted.shape[dim]:
        return found
    parts = (each.split([size for _, size in operands], dim) for each in (got, wanted))
    distances = [relative_l2(*pair) for pair in zip(*parts, strict=True)]
    place = max(range(len(distances)), key=lambda each: (distances[each] != distances[each], distances[each]))
    first = sum(size for _, size in operands[:place])
    return found.model_copy(
        update={
            "worst_operand": f"{operands[place][0]}, {first} to {first + operands[place][1] - 1} of dimension {dim}",
            "worst_operand_relative_l2": distances[place],
        }
    )


def final_operands(node: fx.Node) -> tuple[int, list[tuple[str, int]]]:
    """What ``node``, an output, is concatenated of: the dimension, and names and sizes along it; one if of nothing.

    A part is called after the layer that it comes from by functions of one value alone, else after its node.
    """
    order = list(range(len(node_sizes(node))))  # where dimensions of the value at hand are in the output
    while True:
        if node.target in _SAME:
            pass
        elif node.target is aten.transpose.int:
            first, second = (int(each) for each in node.args[1:3])  # type: ignore[arg-type]
            order[first], order[second] = order[second], order[first]
        elif node.target is aten.permute.default:
            moved = list(order)
            for place, each in enumerate(node.args[1]):  # type: ignore[arg-type]
                moved[each] = order[place]
            order = moved
        else:
            break
        (node,) = node.all_input_nodes
    if node.target is not aten.cat.default:
        return 0, [(_called(node), node_sizes(node)[order.index(0)])] if order else []
    dim = _dimension(node)
    return order[dim], _parts(node, dim)


def _dimension(cat: fx.Node) -> int:
    return int(cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)) % len(node_sizes(cat))  # type: ignore[arg-type]


def _parts(cat: fx.Node, dim: int) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for each in cat.args[0]:  # type: ignore[union-attr]
        assert isinstance(each, fx.Node)
        if each.target is aten.cat.default and _dimension(each) == dim:
            found += _parts(each, dim)
        else:
            found.append((_called(each), node_sizes(each)[dim]))
    return found


def _called(node: fx.Node) -> str:
    at = node
    while at.target not in LAYER_KINDS:
        if len(at.all_input_nodes) != 1:
            return node.name
        (at,) = at.all_input_nodes
    return layer_name(at)
