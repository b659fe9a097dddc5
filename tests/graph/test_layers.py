from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph.layers import activation_of, layer_calls, list_layers
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.records.layers import LayerSpec


def traced_of(module: nn.Module, x: Tensor) -> TracedModel:
    traced = trace(module.eval(), (x,))
    simplify(traced)
    return traced


def specs(module: nn.Module, x: Tensor) -> dict[str, LayerSpec]:
    return {spec.name: spec for spec in list_layers(traced_of(module, x))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "shape", "rows", "macs"),
    [
        # rows are output positions; a MAC a weight of the output's own group and position.
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 120, 120 * 8 * 27),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 11, 11), 25, 25 * 8 * 27),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 6, 6), 36, 36 * 8 * 9),
        (nn.Conv2d(8, 4, 1, groups=2), (8, 6, 6), 36, 36 * 4 * 4),
        (nn.Conv2d(3, 4, 3, dilation=2), (3, 9, 9), 25, 25 * 4 * 27),
        (nn.Conv1d(4, 6, 5), (4, 20), 16, 16 * 6 * 20),
        (nn.Linear(7, 5), (7,), 1, 35),
        (nn.Linear(7, 5), (9, 7), 9, 9 * 35),
        (nn.Linear(7, 5), (2, 9, 7), 18, 18 * 35),
    ],
)
def test_multiplications_by_hand(layer: nn.Module, shape: tuple[int, ...], rows: int, macs: int) -> None:
    spec = specs(nn.Sequential(layer), torch.randn(2, *shape))["0"]
    assert spec.rows == rows
    assert spec.macs == macs
    assert spec.parameters == layer.weight.numel()
    assert spec.groups == getattr(layer, "groups", 1)
    assert spec.weight_shape == tuple(layer.weight.shape)
    assert spec.refusal is None


class SequenceFirst(nn.Module):
    """A linear that sees [L, N, I], as inside nn.MultiheadAttention, and one that sees [N * L, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.transpose(0, 1)).transpose(0, 1).reshape(-1, 5)).reshape(-1, 7, 4)


@pytest.mark.slow
def test_the_batch_may_be_in_any_dimension_and_stays_dynamic() -> None:
    traced = traced_of(SequenceFirst(), torch.randn(3, 7, 6))
    assert [(spec.rows, spec.macs) for spec in list_layers(traced)] == [(7, 7 * 30), (7, 7 * 20)]
    # Asking for sizes must not have tied the graph to the example's batch.
    assert traced.module(torch.randn(5, 7, 6)).shape == (5, 7, 4)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.stem(x))
        x = torch.nn.functional.relu6(self.shared(torch.relu(self.shared(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
def test_execution_order_kinds_and_activations() -> None:
    found = specs(Mixed(), torch.randn(2, 3, 6, 6))
    assert [(name, spec.kind) for name, spec in found.items()] == [
        ("stem.0", "conv2d"), ("up", "conv_transpose2d"), ("shared", "conv2d"), ("head", "linear"),
    ]  # fmt: skip
    assert found["stem.0"].activation == "relu"
    assert found["stem.0"].block == "stem"
    assert found["head"].activation is None
    assert "transposed convolutions" in str(found["up"].refusal)


@pytest.mark.slow
def test_a_shared_module_is_one_layer_with_two_calls() -> None:
    shared = specs(Mixed(), torch.randn(2, 3, 6, 6))["shared"]
    assert shared.calls == 2
    assert shared.rows == 2 * 49
    assert shared.macs == 2 * 49 * 4 * 4 * 9
    assert shared.activation is None  # one call has a ReLU, the other a ReLU6


class Tied(nn.Module):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.slow
def test_tied_weights_are_listed_once() -> None:
    (spec,) = list_layers(traced_of(Tied(), torch.randn(2, 5)))
    assert spec.calls == 2
    assert spec.macs == 50


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x)) @ torch.ones(3, 3) + nn.functional.linear(x.float(), x.float()[:3, :]).sum()


@pytest.mark.slow
def test_embeddings_are_layers_and_computed_weights_refused_with_a_reason() -> None:
    traced = traced_of(Words(), torch.randint(0, 11, (4, 7)))
    found = {spec.name: spec for spec in list_layers(traced)}
    assert (found["words"].kind, found["words"].refusal, found["words"].macs) == ("embedding", None, 0)
    assert found["words"].weight_shape == (11, 6)
    assert found["head"].refusal is None
    assert [str(spec.refusal) for spec in found.values() if spec.kind == "linear" and spec.refusal] == [
        "its weight is computed, not stored"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.Hardtanh(0, 1), None),
        (nn.Tanh(), None),
    ],
)
def test_only_relu_and_relu6_count_as_the_layers_own(activation: nn.Module, name: str | None) -> None:
    traced = traced_of(nn.Sequential(nn.Linear(3, 4), activation), torch.randn(2, 3))
    (call,) = layer_calls(traced)["0"]
    found, node = activation_of(call)
    assert found == name
    assert (node is call) == (name is None)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return torch.relu(y) + y


def test_a_relu_that_does_not_read_alone_is_not_the_layers_own() -> None:
    assert specs(Branch(), torch.randn(2, 3))["fc"].activation is None
