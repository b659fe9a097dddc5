"""Where a graph is cut into blocks: between places where one value is alive."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calib.blocks import Block, find_blocks
from compress.graph.fold import fold_batch_norm
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from tests.networks import Residual


def traced_of(module: nn.Module, *shape: int) -> TracedModel:
    traced = trace(module.eval(), (torch.randn(2, *shape),))
    simplify(traced)
    fold_batch_norm(traced)
    return traced


def named(blocks: list[Block]) -> list[tuple[str, ...]]:
    return [block.layers for block in blocks]


@pytest.mark.slow
def test_a_residual_block_is_one_and_activations_and_pools_stay_with_what_they_follow() -> None:
    traced = traced_of(Residual(), 3, 8, 8)
    blocks = find_blocks(traced)
    assert named(blocks) == [("stem",), ("body.a", "body.b", "short"), ("head",)]
    assert blocks[0].input is None
    nodes = {node.name: node for node in traced.graph.nodes}
    for before, after in itertools.pairwise(blocks):
        assert after.input == before.output
    assert nodes[blocks[0].output].target is torch.ops.aten.relu.default
    # The pool and the flatten come before the head, not with it.
    assert nodes[blocks[1].output].target not in (torch.ops.aten.relu.default, torch.ops.aten.linear.default)
    assert nodes[blocks[2].output].target is torch.ops.aten.linear.default


@pytest.mark.slow
def test_single_layers() -> None:
    blocks = find_blocks(traced_of(Residual(), 3, 8, 8), whole=False)
    assert named(blocks) == [("stem",), ("body.a",), ("body.b",), ("short",), ("head",)]
    assert [block.name for block in blocks] == ["stem", "body.a", "body.b", "short", "head"]


class Transformer(nn.Module):
    """One pre-norm block whose positions no layer has touched."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.place = nn.Parameter(torch.randn(5, 8))
        self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        y = self.one(x)
        weights = (self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1)
        x = x + self.out(weights @ self.v(y))
        return x + self.down(F.gelu(self.up(self.two(x))))


@pytest.mark.slow
def test_a_transformers_halves_are_blocks() -> None:
    blocks = find_blocks(traced_of(Transformer(), 5, 6))
    assert named(blocks) == [("embed",), ("q", "k", "v", "out"), ("up", "down")]


@pytest.mark.slow
def test_a_chain_is_cut_behind_every_layer() -> None:
    chain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    assert named(find_blocks(traced_of(chain, 1, 10, 10))) == [("0",), ("3",), ("6",)]


@pytest.mark.slow
def test_an_embedding_of_the_samples_is_where_a_residual_begins() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 8), nn.Embedding(5, 8)
            self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            return self.head(x + self.down(torch.relu(self.up(x + self.places(torch.arange(5))))))

    traced = trace(Words().eval(), (torch.randint(9, (2, 5)),))
    simplify(traced)
    assert named(find_blocks(traced)) == [("up", "down"), ("head",)]


class Several(nn.Module):
    """An output on the way, and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)
        self.body, self.late = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        return self.early(x), self.late(torch.relu(self.body(x)))


@pytest.mark.slow
def test_between_several_outputs_every_layer_is_alone() -> None:
    assert named(find_blocks(traced_of(Several(), 1, 8, 8))) == [("stem",), ("early",), ("body",), ("late",)]


@pytest.mark.slow
def test_the_number_of_a_class_is_no_end_of_a_block() -> None:
    class Numbered(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.both, self.body, self.head = both, nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.head(x + self.body(x))
            return (y.argmax(1), y) if self.both else y.argmax(1)

    for both in (True, False):
        traced = traced_of(Numbered(both), 6)
        last = find_blocks(traced)[-1]
        (node,) = (node for node in traced.graph.nodes if node.name == last.output)
        assert node.target is torch.ops.aten.linear.default


def test_an_activation_behind_another_layer_is_not_its_blocks() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.a, self.b = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            side = self.side(x)
            x = self.b(torch.relu(self.a(x)))
            return torch.relu(side) + torch.relu(x)

    traced = traced_of(Late(), 1, 6, 6)
    ends = {block.name: block.output for block in find_blocks(traced, whole=False)}
    targets = {node.name: node.target for node in traced.graph.nodes}
    assert targets[ends["side"]] is torch.ops.aten.conv2d.default
    assert targets[ends["a"]] is targets[ends["b"]] is torch.ops.aten.relu.default
