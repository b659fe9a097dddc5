"""What ONNX Runtime made of every layer: read from the graph it optimised.

An integer layer must have become an integer kernel and a float layer must still be float: the runtime does neither without being asked in the right way, and says nothing when it does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx

from compress.exporters.session import open_session

__all__ = ["fused_operators", "misplaced_layers"]

_INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"}
_FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def fused_operators(path: Path, provider: str) -> dict[str, list[str]]:
    """Operators in the graph ONNX Runtime optimised from ``path``, by the name of the node they replace."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, "ORT_ENABLE_ALL", provider=provider, optimized=optimized)
        # Large models carry their weights beside the graph; only the nodes are of interest.
        graph = onnx.load(optimized, load_external_data=False).graph
    found: dict[str, list[str]] = {}
    for node in graph.node:
        name = node.name.partition("_token_")[0].removesuffix("_nchwc")
        found.setdefault(name, []).append(node.op_type)
    return found


def misplaced_layers(operators: Mapping[str, list[str]], computes: Mapping[str, str]) -> list[str]:
    """A sentence for every layer that does not run as planned.

    Args:
        operators: what :func:`fused_operators` found.
        computes: "integer" or "float" for every layer of the graph.
    """
    sentences = []
    for layer, compute in computes.items():
        nodes = [kind for name, kinds in operators.items() if _is_layer(name, layer) for kind in kinds]
        wanted = _INTEGER if compute == "integer" else _FLOAT
        layer_nodes = [kind for kind in nodes if kind in _INTEGER | _FLOAT]
        if not layer_nodes:
            sentences.append(f"layer {layer} is planned {compute}, but the optimised graph has no node of that name")
        elif wrong := sorted(set(layer_nodes) - wanted):
            sentences.append(f"layer {layer} is planned {compute}, but ONNX Runtime runs it as {', '.join(wrong)}")
    return sentences


def _is_layer(node: str, layer: str) -> bool:
    """A node is named after its layer, with ``_1``, ``_2`` ... for further calls of a shared one."""
    rest = node.removeprefix(layer)
    return node.startswith(layer) and (not rest or (rest[0] == "_" and rest[1:].isdigit()))
