"""What ONNX Runtime made of every layer: read from the graph it optimised.

An integer layer must have become an integer kernel and a float layer must still be float: the runtime does neither
without being asked in the right way, and says nothing when it does not.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from compress.exporters.session import open_session

__all__ = [
    "FLOAT_ISLANDS",
    "LAYER_OPERATORS",
    "OptimizedGraph",
    "fused_operators",
    "misplaced_layers",
    "name_before",
    "open_optimized",
    "operators_by_layer",
    "optimized_nodes",
]

_INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"}
# Operators that have an integer kernel; a float one between integer layers costs two casts and often a layout change.
FLOAT_ISLANDS = {"Add", "AveragePool", "GlobalAveragePool", "Concat", "ReduceMean"}
_FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_BLOCKS = {"MatMulNBits"}
LAYER_OPERATORS = _INTEGER | _FLOAT | _BLOCKS
_WANTED = {"integer": _INTEGER, "dynamic": _INTEGER, "blocks": _BLOCKS, "blocks-float": _BLOCKS, "float": _FLOAT}

# What a MatMul becomes with its bias (where rows are of known number), a transpose before it or a scale behind it:
# MatMulAddFusion, MatmulTransposeFusion/, MatMulScaleFusion/.
_ANOTHER = re.compile(r"(/\w+Fusion/?)+$")


@dataclass(frozen=True, eq=False)
class OptimizedGraph:
    """What ONNX Runtime made of a file.

    Attributes:
        model: the optimised graph with its weights.
        nodes: its nodes in order, each with the name of the node of the file that it replaces.
    """

    model: onnx.ModelProto
    nodes: list[tuple[onnx.NodeProto, str]]


def open_optimized(path: Path, provider: str) -> tuple[ort.InferenceSession, OptimizedGraph]:
    """A session on ``path`` with all optimisations, and the graph that it runs."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = open_session(path, "ORT_ENABLE_ALL", provider=provider, optimized=optimized)
        model = onnx.load(optimized)
    return session, OptimizedGraph(model, _named(model.graph, path))


def optimized_nodes(path: Path, provider: str) -> list[tuple[onnx.NodeProto, str]]:
    """Nodes of the graph ONNX Runtime optimised from ``path``, each with the name of the node that it replaces."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, "ORT_ENABLE_ALL", provider=provider, optimized=optimized)
        # Large models carry their weights beside the graph; only the nodes are of interest.
        return _named(onnx.load(optimized, load_external_data=False).graph, path)


def _named(graph: onnx.GraphProto, path: Path) -> list[tuple[onnx.NodeProto, str]]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    makers, own = {value: node for node in nodes for value in node.output}, {node.name for node in nodes}
    found = []
    for node in graph.node:
        name = name_before(node.name, own)
        if name not in own and name.endswith("_nchwc") and node.op_type in _FLOAT:
            name = _layer_behind(name.removesuffix("_nchwc"), makers)
        found.append((node, name))
    return found


def name_before(name: str, own: Collection[str] = ()) -> str:
    """The name that the node called ``name`` in an optimised graph had before, ``own`` being those of the file's nodes.

    What a user's layer is called may look like something the runtime has added, so the longest name that the file has
    is taken; only where it has none of them everything that looks so is cut off.
    """
    bare = name.removeprefix("fused ")  # a Gemm with its ReLU
    cuts = [bare, *(bare[: match.start()] for match in reversed(list(re.finditer("_token_", bare))))]
    possible = [name, *(each for cut in cuts for each in (cut, _ANOTHER.sub("", cut)))]
    return next((each for each in possible if each in own), possible[-1])


def fused_operators(path: Path, provider: str) -> dict[str, list[str]]:
    """Operators in the graph ONNX Runtime optimised from ``path``, by the name of the node they replace."""
    return operators_by_layer(optimized_nodes(path, provider))


def operators_by_layer(nodes: Iterable[tuple[onnx.NodeProto, str]]) -> dict[str, list[str]]:
    """Operators of ``nodes``, by the name that each of them has beside it."""
    found: dict[str, list[str]] = {}
    for node, name in nodes:
        found.setdefault(name, []).append(node.op_type)
    return found


def _layer_behind(value: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The layer that ``value`` comes from: the blocked layout names a Conv after its output, or its activation's."""
    node = makers.get(value)
    while node is not None and node.op_type not in _FLOAT:
        sources = [makers[name] for name in node.input if name in makers]
        node = next((source for source in sources if source.op_type == "Conv"), sources[0] if sources else None)
    return value if node is None else str(node.name)


def misplaced_layers(operators: Mapping[str, list[str]], computes: Mapping[str, str]) -> list[str]:
    """A sentence for every layer that does not run as planned.

    Args:
        operators: what :func:`fused_operators` found.
        computes: "integer", "blocks" or "float" for every layer of the graph.
    """
    sentences = []
    for layer, compute in computes.items():
        nodes = [kind for name, kinds in operators.items() if _is_layer(name, layer) for kind in kinds]
        wanted = _WANTED[compute]
        layer_nodes = [kind for kind in nodes if kind in LAYER_OPERATORS]
        if not layer_nodes:
            sentences.append(f"layer {layer} is planned {compute}, but the optimised graph has no node of that name")
        elif wrong := sorted(set(layer_nodes) - wanted):
            sentences.append(f"layer {layer} is planned {compute}, but ONNX Runtime runs it as {', '.join(wrong)}")
    return sentences


def _is_layer(node: str, layer: str) -> bool:
    """A node is named after its layer, with ``#1``, ``#2`` ... for further calls of a shared one."""
    return node.partition("#")[0] == layer
