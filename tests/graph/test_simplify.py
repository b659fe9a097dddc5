from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.graph.layers import list_layers
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace


class Of(nn.Module):
    """A module around a function, with a convolution so that there is something to list."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))  # type: ignore[operator]


@torch.no_grad()
def check(module: nn.Module, x: Tensor) -> tuple[TracedModel, Counter[str]]:
    """Simplify; the function must not change. The operators that are left, by their short names."""
    traced = trace(module.eval(), (x,))
    simplify(traced)
    torch.testing.assert_close(traced.module(x), module(x), rtol=1e-5, atol=1e-6)
    kinds = Counter(str(node.target).split(".")[1] for node in traced.graph.nodes if "aten." in str(node.target))
    return traced, kinds


IMAGE = torch.randn(4, 3, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "gone"),
    [
        (lambda x: nn.functional.dropout(x, 0.5, training=False), {"dropout", "clone", "native_dropout"}),
        (lambda x: x.permute(0, 2, 3, 1).contiguous() * 2, {"clone", "contiguous"}),
        (lambda x: x.detach() + 1, {"detach"}),
        (lambda x: x[:, :, :, :] + 1, {"slice"}),
        (lambda x: x[:, :, 0:] + 1, {"slice"}),
    ],
    ids=["dropout", "contiguous", "detach", "slice all", "slice from zero"],
)
def test_identities_go(function: object, gone: set[str]) -> None:
    _, kinds = check(Of(function), IMAGE)
    assert not gone & set(kinds)


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, :, 1:], lambda x: x[:, :, :-1], lambda x: x[:, :, ::2], lambda x: x[:, :3]],
    ids=["from one", "to last but one", "every second", "first three"],
)
def test_slices_that_cut_stay(function: object) -> None:
    _, kinds = check(Of(function), IMAGE)
    assert kinds["slice"] == 1


def test_a_view_after_a_dropped_copy_still_runs() -> None:
    _, kinds = check(Of(lambda x: x.permute(0, 2, 3, 1).contiguous().view(-1, 8 * 8 * 4)), IMAGE)
    assert kinds["reshape"] == 1
    assert not kinds["view"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding="same"), (3, 8, 8)),
        (nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)), (3, 8, 8)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), (4, 8, 8)),
        (nn.Conv2d(3, 4, 3, padding="valid", stride=2), (3, 9, 9)),
        (nn.Conv1d(3, 4, 5, padding="same"), (3, 12)),
    ],
)
def test_named_padding_becomes_numbers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    traced, _ = check(nn.Sequential(layer), torch.randn(4, *shape))
    (spec,) = list_layers(traced)
    assert spec.refusal is None


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_uneven_padding_stays_and_is_refused() -> None:
    traced, _ = check(nn.Sequential(nn.Conv2d(3, 4, 4, padding="same")), IMAGE)
    (spec,) = list_layers(traced)
    assert "padding 'same' is uneven" in str(spec.refusal)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dims", [(2, 3), (-1, -2), (3, 2)])
def test_a_mean_over_positions_becomes_a_pool(dims: tuple[int, int], keep: bool) -> None:
    _, kinds = check(Of(lambda x: x.mean(dims, keepdim=keep)), IMAGE)
    assert kinds["adaptive_avg_pool2d"] == 1
    assert not kinds["mean"]


@pytest.mark.parametrize("dims", [(1,), (1, 2), (1, 2, 3), (3,), None])
def test_another_mean_stays(dims: tuple[int, ...] | None) -> None:
    _, kinds = check(Of(lambda x: torch.mean(x, dims, keepdim=True)), IMAGE)
    assert kinds["mean"] == 1


class Bare(nn.Module):
    """Parameters called anything, at the root and below."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.inner = nn.Module()
        self.inner.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.inner.table) + self.weight.sum()


def test_every_weight_gets_a_layers_name() -> None:
    traced, _ = check(Bare(), torch.randn(4, 3))
    assert [spec.name for spec in list_layers(traced)] == ["weight", "inner.table"]
    assert {name for name, _ in traced.module.named_buffers()} >= {"weight.weight", "inner.table.weight"}
