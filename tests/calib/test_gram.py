"""Gram matrices against the plain computation: outputs of the layer itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calib.gram import Gram, rows_of


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "padding", "dilation", "groups"),
    [
        ((5, 6, 9, 8), (4, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((5, 6, 9, 8), (8, 3, 3, 2), (2, 1), (1, 0), (1, 2), 2),
        ((3, 6, 7, 7), (6, 1, 3, 3), (2, 2), (0, 0), (1, 1), 6),
        ((4, 6, 11), (6, 2, 5), (2,), (2,), (1,), 3),
    ],
    ids=["plain", "grouped, uneven", "depthwise", "conv1d"],
)
def test_energy_is_the_squared_norm_of_the_outputs(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    x, w = torch.randn(shape), torch.randn(weight)
    gram = Gram()
    for batch in x.split(2):
        gram.update(rows_of(batch, weight[2:], groups, stride, padding, dilation))
    conv = F.conv1d if len(weight) == 3 else F.conv2d
    output = conv(x.double(), w.double(), None, stride, padding, dilation, groups)
    assert gram.energy(w) == pytest.approx(float(output.square().sum()), rel=1e-5)


def test_rows_of_several_blocks() -> None:
    rows = torch.randn(1, 40, 1100)
    gram = Gram()
    gram.update(rows)
    torch.testing.assert_close(gram.matrix()[0], rows[0].T @ rows[0], rtol=1e-4, atol=1e-4)


def test_streaming_equals_one_pass() -> None:
    rows: Tensor = torch.randn(1, 64, 5)
    streamed, whole = Gram(), Gram()
    for part in rows.split(7, dim=1):
        streamed.update(part)
    whole.update(rows)
    weight = torch.randn(3, 5)
    assert streamed.energy(weight) == pytest.approx(whole.energy(weight), rel=1e-6)
    assert whole.energy(weight) == pytest.approx(float((rows[0] @ weight.T).square().sum()), rel=1e-5)
