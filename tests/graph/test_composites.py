"""Decomposing with few composite operators patched gives the graph that torch's own search for all of them gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from compress.exporters import translation
from compress.exporters.build import build_onnx
from compress.graph.composites import make_functional
from compress.graph.traced import export_program, trace
from tests.networks import Residual
from tests.sweep import sweep


class Composites(nn.Module):
    """Composite operators that stay whole, ones that are views of others, and in-place ones."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.rows = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], 4, 8).contiguous()
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        parts = [each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (q, k, v)]
        y = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        y = self.out(y).add_(x)
        y[:, 0] = 0
        y = torch.einsum("nld,nmd->nlm", y, y).matmul(y).clamp_(-3, 3)
        y = F.pad(F.silu(y, inplace=True), (0, 0, 0, 1)).to(torch.float64).to(torch.float32)
        return torch.selu_(self.rows(y)[0].flatten(1)).view_as(y.flatten(1))


class Branches(nn.Module):
    """Composite operators within the branches of a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.a(x).reshape(-1, 6), lambda x: torch.selu(self.b(x)), (x,))


MODELS = {
    "convolutions": (Residual, (3, 8, 8)),
    "composites": (Composites, (32,)),
    "branches": (Branches, (6,)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
}


def program_of(name: str) -> ExportedProgram:
    make, shape = MODELS[name]
    return export_program(make().eval(), (torch.randn(2, *shape),), dynamic_batch=True)


def texts(program: ExportedProgram) -> list[str]:
    """Every graph of ``program``, subgraphs after it."""
    return [str(getattr(each, "graph", "")) for each in program.graph_module.modules()]


@pytest.mark.matrix
@sweep("name", MODELS, sample=["composites", "branches"])
def test_the_graph_is_torchs_own(name: str) -> None:
    program = program_of(name)
    wanted, got = program.run_decompositions({}), make_functional(program)
    assert texts(got) == texts(wanted)
    assert len(list(got.graph.nodes)) > 4
    assert got.graph_signature == wanted.graph_signature


@pytest.mark.matrix
@sweep("name", ["convolutions", "composites", "transformer"], sample=["composites"])
def test_the_file_is_torchs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = MODELS[name]
    traced = trace(make().eval(), (torch.randn(2, *shape),))
    got = build_onnx(traced)
    monkeypatch.setattr(translation, "composites_listed_once", lambda program: contextlib.nullcontext())
    wanted = build_onnx(traced)
    assert [(n.op_type, n.attributes) for n in got.graph] == [(n.op_type, n.attributes) for n in wanted.graph]
    assert len(got.graph) > 4


@pytest.mark.matrix
def test_a_composite_registered_after_the_list_was_made() -> None:
    build_onnx(trace(Residual().eval(), (torch.randn(2, 3, 8, 8),)))
    library = torch.library.Library("compress_tests", "FRAGMENT")
    library.define("doubled_relu(Tensor x) -> Tensor")
    library.impl("doubled_relu", lambda x: torch.relu(x) * 2, "CompositeImplicitAutograd")

    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            called: Callable[[Tensor], Tensor] = torch.ops.compress_tests.doubled_relu
            return called(x) + 1

    kinds = {node.op_type for node in build_onnx(trace(Late(), (torch.randn(2, 6),))).graph}
    assert {"Relu", "Mul", "Add"} <= kinds
