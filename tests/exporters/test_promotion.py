"""Promotions that are put in from kept values are those that torch finds by running the graph."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.fx.passes import type_promotion

from compress.exporters import promotion, translation
from compress.exporters.build import build_onnx
from compress.graph.traced import trace


class Mixed(nn.Module):
    """Numbers of several types in one operator, one behind another, and a result that is cast back."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", torch.arange(6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = (x > 0) * x + self.steps
        narrow = kept.to(torch.float16) * 3
        halves = self.steps / 2 + narrow
        whole = (x.round().to(torch.int32) + self.steps).clamp(0, 5)
        return kept * 2, halves + 1, whole + 0.5, torch.sqrt(self.steps * (x > 0)), torch.where(x > 0, x, whole)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2 + (x > 0), lambda x: x - 1, (x,)) + 1


def described(module: nn.Module) -> list[str]:
    graph = build_onnx(trace(module.eval(), (torch.randn(2, 6),))).graph
    return [str(node) for node in graph]


@pytest.mark.slow
@pytest.mark.parametrize("make", [Mixed, Branches, lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)])
def test_the_file_is_torchs_own(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    if isinstance(module, nn.TransformerEncoderLayer):
        module = nn.Sequential(nn.Unflatten(1, (1, 6)), module)
    got = described(module)
    monkeypatch.setattr(translation, "kept_values", contextlib.nullcontext)
    assert got == described(module)
    assert len(got) > 1
    assert isinstance(module, nn.Sequential) or any("Cast" in each for each in got)


def test_a_torch_without_that_pass_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type_promotion, "_TypePromotionInterpreter")
    with promotion.kept_values():
        assert not hasattr(type_promotion, "_TypePromotionInterpreter")


def test_the_pass_is_put_back() -> None:
    before = type_promotion._TypePromotionInterpreter.run_node
    with promotion.kept_values():
        assert type_promotion._TypePromotionInterpreter.run_node is not before
    assert type_promotion._TypePromotionInterpreter.run_node is before
