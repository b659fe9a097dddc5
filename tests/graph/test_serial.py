from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.api import quantize
from compress.errors import InputError
from compress.graph.serial import GRAPH_VERSION, graph_to_json, json_to_graph
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from tests.every import every


class Heads(nn.Module):
    """Two outputs in a dict, several dtypes and constants on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.conv(x)).mean((2, 3))
        mask = (y > 0.1).to(torch.float32)
        return {"first": self.a(y * mask), "second": torch.cat([self.b(y), y.new_zeros(y.shape[0], 1)], 1)}


def round_trip(traced: TracedModel) -> TracedModel:
    stored = json.loads(json.dumps(graph_to_json(traced)))
    return json_to_graph(stored, dict(traced.module.state_dict()))


@pytest.fixture
def traced() -> TracedModel:
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(2, 3, 6, 6),))
    simplify(traced)
    return traced


@torch.no_grad()
def test_one_output(traced: TracedModel) -> None:
    again = round_trip(traced)
    x = torch.randn(5, 3, 6, 6)
    assert torch.equal(again.module(x), traced.module(x))
    assert again.dynamic_batch == traced.dynamic_batch
    assert [node.name for node in again.graph.nodes] == [node.name for node in traced.graph.nodes]
    assert torch.equal(round_trip(again).module(x), traced.module(x))


@torch.no_grad()
def test_several_outputs_become_a_tuple() -> None:
    traced = trace(Heads().eval(), (torch.randn(2, 3, 6, 6),))
    simplify(traced)
    x = torch.randn(5, 3, 6, 6)
    wanted = traced.module(x)
    got = round_trip(traced).module(x)
    assert isinstance(got, tuple)
    assert traced.output_names == round_trip(traced).output_names == ("first", "second")
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert every(torch.equal(a, b) for a, b in zip(round_trip(round_trip(traced)).module(x), got, strict=True))


class OneInATuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * 2,)


@torch.no_grad()
def test_a_tuple_of_one_becomes_its_tensor() -> None:
    got = round_trip(trace(OneInATuple(), (torch.randn(2, 3),))).module(torch.ones(4, 3))
    assert torch.equal(got, torch.full((4, 3), 2.0))


@pytest.mark.slow
@torch.no_grad()
def test_a_compressed_graph() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    result = quantize(module, calib=torch.randn(16, 3, 6, 6), bits=4, method="mse")
    compressed = TracedModel(result.module, (torch.randn(2, 3, 6, 6),), True)  # type: ignore[arg-type]
    x = torch.randn(5, 3, 6, 6)
    assert torch.equal(round_trip(compressed).module(x), compressed.module(x))


def stored_graph(traced: TracedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(json.dumps(graph_to_json(traced))), dict(traced.module.state_dict())


def call(stored: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in stored["nodes"] if node["op"] == "call_function")


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "operator.methodcaller", "prims.device_put.default", "aten.conv2d",
        "aten.conv2d.nothing", "aten.__class__.__init__", "aten.conv2d.__call__", "compress.nothing.default", "",
        # aten, and yet they reach files:
        "aten.from_file.default", "aten.save.default",
    ],
)  # fmt: skip
def test_a_forbidden_operator_is_refused(traced: TracedModel, target: str) -> None:
    stored, tensors = stored_graph(traced)
    call(stored)["target"] = target
    with pytest.raises(InputError, match="is not an operator this program knows"):
        json_to_graph(stored, tensors)


def test_a_graph_cannot_make_files(traced: TracedModel, tmp_path: Path) -> None:
    stored, tensors = stored_graph(traced)
    victim = tmp_path / "made"
    call(stored).update(target="aten.from_file.default", args=[str(victim), True, 10], kwargs={})
    with pytest.raises(InputError):
        json_to_graph(stored, tensors).module(torch.randn(2, 3, 6, 6))
    assert not victim.exists()


def test_a_missing_tensor_is_refused(traced: TracedModel) -> None:
    stored, tensors = stored_graph(traced)
    del tensors["0.bias"]
    with pytest.raises(InputError, match=r"reads tensor '0\.bias', which model\.safetensors does not hold"):
        json_to_graph(stored, tensors)


def test_another_version_is_refused(traced: TracedModel) -> None:
    stored, tensors = stored_graph(traced)
    stored["version"] = GRAPH_VERSION + 1
    with pytest.raises(InputError, match=f"has version {GRAPH_VERSION + 1}"):
        json_to_graph(stored, tensors)


def test_a_node_of_unknown_kind_is_refused(traced: TracedModel) -> None:
    stored, tensors = stored_graph(traced)
    call(stored)["op"] = "call_method"
    with pytest.raises(InputError, match=r"nodes\[\d+\]\.op is 'call_method'; allowed is one of placeholder, get_attr"):
        json_to_graph(stored, tensors)


def test_a_node_read_before_it_is_made_is_refused(traced: TracedModel) -> None:
    stored, tensors = stored_graph(traced)
    call(stored)["args"][0] = {"node": "later"}
    with pytest.raises(InputError, match="reads node 'later' before it is made"):
        json_to_graph(stored, tensors)


@pytest.mark.parametrize("constant", [{"dtype": "nn"}, {"dtype": "save"}, {"module": "float32"}, {"layout": "nothing"}])
def test_a_constant_of_another_kind_is_refused(traced: TracedModel, constant: dict[str, str]) -> None:
    stored, tensors = stored_graph(traced)
    call(stored)["args"][1] = constant
    with pytest.raises(InputError, match="unknown constant"):
        json_to_graph(stored, tensors)


def test_an_operator_from_elsewhere_cannot_be_stored(traced: TracedModel) -> None:
    (node,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    node.target = torch.nn.functional.relu
    with pytest.raises(InputError, match="which an artifact cannot store"):
        graph_to_json(traced)
