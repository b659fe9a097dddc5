from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph.fold import fold_batch_norm
from compress.graph.layers import layer_calls
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace


def with_statistics(module: nn.Module) -> nn.Module:
    """``module`` in eval mode with statistics and parameters a training might have left."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 3.0)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.eval()


def norms_left(traced: TracedModel) -> int:
    return sum("batch_norm" in str(node.target) for node in traced.graph.nodes)


@torch.no_grad()
def check_fold(module: nn.Module, x: Tensor, left: int = 0) -> TracedModel:
    """Trace and fold; the function must not change, and ``left`` BatchNorms must remain."""
    module = with_statistics(module)
    traced = trace(module, (x,))
    simplify(traced)
    wanted = module(x)
    fold_batch_norm(traced)
    torch.testing.assert_close(traced.module(x), wanted, rtol=1e-4, atol=1e-5)
    assert norms_left(traced) == left
    assert len(traced.notes) == bool(left)
    return traced


FOLDED = {
    "plain": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 9, 9)),
    "without bias": (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (3, 9, 9)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (4, 9, 9)),
    "depthwise": (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, stride=2), nn.BatchNorm2d(6)), (6, 9, 9)),
    "dilated": (nn.Sequential(nn.Conv2d(3, 5, 3, dilation=2, padding=2), nn.BatchNorm2d(5)), (3, 9, 9)),
    "same padding": (nn.Sequential(nn.Conv2d(3, 5, 3, padding="same"), nn.BatchNorm2d(5)), (3, 9, 9)),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8)), (3, 20)),
    "linear": (nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8)), (7,)),
    "no affine": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), (3, 9, 9)),
    "large epsilon": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.5)), (3, 9, 9)),
    "two in a row": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), (3, 9, 9)),
    "chain": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        ),
        (3, 9, 9),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOLDED))
def test_function_stays(name: str) -> None:
    module, shape = FOLDED[name]
    check_fold(module, torch.randn(4, *shape))


def test_statistics_are_those_the_norm_stood_for() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    traced = check_fold(module, torch.randn(4, 3, 9, 9))
    assert list(traced.statistics) == ["0"]
    assert torch.equal(traced.statistics["0"].mean, module[1].bias)
    assert torch.equal(traced.statistics["0"].deviation, module[1].weight.abs())


def test_a_module_of_the_user_is_left_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = module[0].weight.detach().clone()
    check_fold(module, torch.randn(4, 3, 9, 9))
    assert torch.equal(module[0].weight, before)


class Shared(nn.Module):
    """One convolution, two normalisations: folding either would change the other's result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedNorm(nn.Module):
    """Two convolutions, one normalisation: each may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) * self.norm(self.b(x))


class Functional(nn.Module):
    """Weights that no Conv2d module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.w))


@pytest.mark.slow
def test_a_shared_convolution_is_not_folded() -> None:
    traced = check_fold(Shared(), torch.randn(4, 3, 9, 9), left=2)
    assert "2 BatchNorms are not folded ('first', 'second'): the layer before it is called more than" in traced.notes[0]


@pytest.mark.slow
def test_a_convolution_read_elsewhere_is_not_folded() -> None:
    traced = check_fold(ReadTwice(), torch.randn(4, 3, 9, 9), left=1)
    assert "also read elsewhere" in traced.notes[0]


@pytest.mark.slow
def test_norms_that_stay_for_one_reason_are_one_note() -> None:
    blocks = [nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=i > 0), nn.Conv2d(3, 3, 1)) for i in range(6)]
    traced = check_fold(nn.Sequential(*blocks), torch.randn(4, 3, 9, 9), left=6)
    assert traced.notes == [
        "6 BatchNorms are not folded ('0.1', '1.1', '2.1', '3.1' and 2 more): no convolution or linear stands before it"
    ]


def test_a_norm_without_a_layer_before_it_is_not_folded() -> None:
    traced = check_fold(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), torch.randn(4, 3, 9, 9), left=1)
    assert "no convolution or linear" in traced.notes[0]


@pytest.mark.parametrize("features", [5, 6])
def test_a_norm_across_another_dimension_than_the_linears_is_not_folded(features: int) -> None:
    """BatchNorm1d normalises dimension 1 and a linear writes the last: with as many of both it would fit, wrongly."""
    module = nn.Sequential(nn.Linear(7, features), nn.BatchNorm1d(5))
    check_fold(module, torch.randn(4, 5, 7), left=1)


def test_a_shared_norm_is_folded_twice() -> None:
    check_fold(SharedNorm(), torch.randn(4, 3, 9, 9))


def test_functional_weights_are_folded() -> None:
    traced = check_fold(Functional(), torch.randn(4, 3, 9, 9))
    assert list(layer_calls(traced)) == ["w"]
    assert list(traced.statistics) == ["w"]
