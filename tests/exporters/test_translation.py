"""The exporter's table of operators: built once, only read, and done without where torch keeps it to itself."""

from __future__ import annotations

import types
from collections.abc import Iterator

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

from compress.exporters import translation
from compress.exporters.build import build_onnx
from compress.exporters.translation import operator_table
from compress.graph.traced import TracedModel, trace


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What the test puts in the place of the exporter is not kept for others."""
    yield
    operator_table.cache_clear()


def _model() -> TracedModel:
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), (torch.randn(2, 8),))


def _bytes(traced: TracedModel) -> bytes:
    return ir.to_proto(build_onnx(traced)).SerializeToString()


@pytest.mark.slow
def test_the_table_is_built_once_and_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = operator_table()
    assert table is not None, "torch no longer takes a table: see compress/exporters/translation.py"
    before = {operator: list(found) for operator, found in table.functions.items()}

    def built_again(*arguments: object, **settings: object) -> None:
        raise AssertionError("the table was built again")

    monkeypatch.setattr(_registration.ONNXRegistry, "from_torchlib", built_again)
    first, second = _bytes(_model()), _bytes(_model())
    assert first == second
    assert operator_table() is table
    assert table.functions == before


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("exporter", [types.SimpleNamespace(), types.SimpleNamespace(export=lambda program: None)])
def test_without_a_table_the_public_road_gives_the_same_file_and_says_what_it_costs(
    exporter: object, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = _model()
    wanted = _bytes(traced)
    operator_table.cache_clear()
    monkeypatch.setattr(translation, "_exporter", lambda: exporter)
    with pytest.warns(RuntimeWarning, match="keeps its table of ONNX operators to itself"):
        assert operator_table() is None
    assert _bytes(traced) == wanted
