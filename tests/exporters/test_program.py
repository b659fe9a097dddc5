"""The graph as an exported program: the file is, to the byte, the one that tracing the graph again would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from compress.exporters.build import build_onnx
from compress.exporters.program import to_program, traced_program
from compress.graph.serial import graph_to_json, json_to_graph
from compress.graph.traced import TracedModel, trace
from tests.sweep import sweep


class Pooled(nn.Module):
    """A window's mean and a mean over all positions, a flattened linear, two outputs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(size), nn.Linear(16 * size * size, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.head(self.pool(y).flatten(1)), y.mean((2, 3))


class Attention(nn.Module):
    """Of any length, masked in two ways: products of values, a reshape that copies, booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, 2, 8).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        seen = (ids[:, None, None, :] > 0) & torch.ones(length, length, dtype=torch.bool).tril()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(y.transpose(1, 2).reshape(batch, length, 16)).mean(1)


class Recurrent(nn.Module):
    """Taken apart by the exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "pooled to a point": (lambda: Pooled(1), torch.randn(16, 3, 8, 8)),
    "pooled to windows": (lambda: Pooled(2), torch.randn(16, 3, 8, 8)),
    "attention": (Attention, torch.randint(0, 20, (16, 6))),
    "recurrent": (Recurrent, torch.randn(16, 5, 8)),
}
SETTLED = ("pooled to a point", "attention")


def _bytes(traced: TracedModel) -> bytes:
    return ir.to_proto(build_onnx(traced)).SerializeToString()


@pytest.fixture(scope="module")
def compressed(compress_quickly: Callable[..., TracedModel]) -> Callable[[str], TracedModel]:
    def run(name: str) -> TracedModel:
        torch.manual_seed(0)
        module, calib = CASES[name]
        return compress_quickly(module().eval(), calib, bits=4, first_last_bits=4)

    return run


@pytest.mark.slow
@sweep("name", CASES, sample=["pooled to a point"])
def test_the_file_is_that_of_a_graph_traced_again(
    name: str, compressed: Callable[[str], TracedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = compressed(name)
    found = _bytes(traced)
    monkeypatch.setattr("compress.exporters.build.to_program", traced_program)
    assert found == _bytes(traced)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("name", SETTLED)
def test_nothing_is_traced_again(
    name: str, compressed: Callable[[str], TracedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = compressed(name)

    def traced_again(*arguments: object, **settings: object) -> None:
        raise AssertionError("the graph was traced again")

    monkeypatch.setattr("torch.export.export", traced_again)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", traced_again)
    build_onnx(traced)


def test_the_graph_stays_as_it_was() -> None:
    traced = trace(Pooled(1), (torch.randn(2, 3, 8, 8),))
    before = str(traced.graph)
    program = to_program(traced)
    assert str(traced.graph) == before
    assert [spec.target for spec in program.graph_signature.input_specs if spec.target] == [
        name for name, _ in [*traced.module.named_parameters(), *traced.module.named_buffers()]
    ]
    x = torch.randn(3, 3, 8, 8)
    for got, wanted in zip(program.module()(x), traced.module(x), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.slow
def test_a_graph_from_a_file_is_traced() -> None:
    traced = trace(nn.Linear(8, 4), (torch.randn(2, 8),))
    tensors = {name: tensor.detach() for name, tensor in traced.module.state_dict().items()}
    read = json_to_graph(graph_to_json(traced), tensors)
    assert type(to_program(read)) is ExportedProgram
    assert type(to_program(traced)) is not ExportedProgram
    assert _bytes(read) == _bytes(traced)
