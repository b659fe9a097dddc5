"""A transformation that changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.calib.metaaug import augmentation


class Unchanged(nn.Module):
    """The identity, with a weight to train that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.weight


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network that is made is that one."""
    monkeypatch.setattr(augmentation, "make_network", lambda *_: Unchanged())
