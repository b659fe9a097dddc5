"""A layer done by two thin ones: the same function at full rank, the reference beside it, and the branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.calib.factors import Thin, best_factors
from compress.graph.layers import layer_calls, list_layers
from compress.graph.simplify import simplify
from compress.graph.split import split_layer
from compress.graph.traced import TracedModel, trace
from compress.records.layers import LayerSpec, Split


class Mixed(nn.Module):
    """Every kind of layer that can be split, strided and dilated, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2)
        self.line = nn.Conv1d(8, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.wide(x)).flatten(2)
        return self.head(torch.relu(self.line(y)).transpose(1, 2))


@pytest.fixture
def traced() -> TracedModel:
    torch.manual_seed(2)
    model = trace(Mixed().eval(), (torch.randn(2, 3, 9, 9),))
    simplify(model)
    return model


def factors(model: TracedModel, layer: str, rank: int) -> tuple[Tensor, Tensor]:
    weight = model.tensor(f"{layer}.weight")
    thin = Thin.of(best_factors(weight, None).truncated(rank), weight)
    return thin.down, thin.up.flatten(1)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("layer", "rank"), [("wide", 8), ("line", 6), ("head", 5)])
def test_at_full_rank_the_model_computes_the_same(traced: TracedModel, layer: str, rank: int) -> None:
    x = torch.randn(3, 3, 9, 9)
    wanted = traced.module(x)
    split_layer(traced, Split(layer=layer, rank=rank), *factors(traced, layer, rank))
    torch.testing.assert_close(traced.module(x), wanted, rtol=1e-4, atol=1e-5)
    names = list(layer_calls(traced))
    place = names.index(f"{layer}.down")
    assert names[place + 1] == f"{layer}.up"
    assert layer not in names
    assert f"{layer}.weight" not in traced.module.state_dict()
    specs = {spec.name: spec for spec in list_layers(traced)}
    assert not any(spec.refusal for spec in specs.values())


@pytest.mark.slow
def test_below_it_the_two_are_the_low_rank_map(traced: TracedModel) -> None:
    x = torch.randn(3, 3, 9, 9)
    down, up = factors(traced, "wide", 3)
    dense = traced.copy()
    dense.set_tensor("wide.weight", (up @ down.flatten(1)).reshape(8, 3, 3, 3))
    split_layer(traced, Split(layer="wide", rank=3), down, up)
    torch.testing.assert_close(traced.module(x), dense.module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_reference_still_computes_the_whole_layer(traced: TracedModel) -> None:
    x = torch.randn(3, 3, 9, 9)
    wanted = traced.module(x)
    split = Split(layer="wide", rank=2)
    changed, reference = traced.copy(), traced.copy()
    split_layer(changed, split, *factors(traced, "wide", 2))
    split_layer(reference, split, *factors(traced, "wide", 2), reference=True)
    torch.testing.assert_close(reference.module(x), wanted, rtol=0, atol=0)
    names = {node.name for node in reference.graph.nodes}
    # Whatever the changed graph calls, the reference knows what it is to be.
    assert {node.name for calls in layer_calls(changed).values() for node in calls} <= names
    for part in split.parts:
        torch.testing.assert_close(reference.tensor(f"{part}.weight"), changed.tensor(f"{part}.weight"))


@pytest.mark.slow
def test_a_branch_is_added_and_the_rest_makes_up_for_it(traced: TracedModel) -> None:
    x = torch.randn(3, 3, 9, 9)
    wanted = traced.module(x)
    down, up = factors(traced, "head", 2)
    weight = traced.tensor("head.weight")
    split_layer(traced, Split(layer="head", rank=2, form="branch"), down, up)
    torch.testing.assert_close(traced.module(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(traced.tensor("head.weight"), weight - up @ down)
    assert [name for name in layer_calls(traced) if name.startswith("head")] == ["head.down", "head", "head.up"]


@pytest.mark.parametrize(
    ("changes", "split", "reason"),
    [
        ({"groups": 4}, {}, "groups"),
        ({"calls": 2}, {}, "called 2 times"),
        ({}, {"rank": 9}, "allowed are 1 to 8"),
        ({"kind": "embedding", "weight_shape": (8, 4)}, {}, "no matrix"),
        ({}, {"form": "branch"}, "only a linear"),
        ({"refusal": "because"}, {}, "because"),
    ],
)
def test_what_cannot_be_split_says_why(changes: dict[str, object], split: dict[str, object], reason: str) -> None:
    layer = LayerSpec(**({"name": "a", "kind": "conv2d", "weight_shape": (8, 4, 3, 3), "macs": 1, "rows": 1} | changes))  # type: ignore[arg-type]
    found = Split(**({"layer": "a", "rank": 2} | split)).refusal(layer)  # type: ignore[arg-type]
    assert found is not None
    assert reason in found
