"""Factors for data and grids: the best of their rank, and no worse for being balanced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calib.factors import Thin, balanced, best_factors, multiply_up
from compress.calib.gram import SeenRows
from compress.calib.observers import activation_grid
from compress.graph.quantizers import fake_quantize_op
from compress.kernels.table import register_operators
from compress.quant.problem import Effort, LayerProblem
from compress.quant.rtn import MSE
from compress.records.layers import QuantOption

register_operators()


@pytest.fixture
def rows() -> Tensor:
    """Inputs whose directions differ in length, a few of them far beyond the rest."""
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(32, 32, generator=generator) * torch.logspace(1, -1, 32)[:, None]
    return torch.randn(3000, 32, generator=generator) @ mixed


def test_best_on_the_rows_beats_every_other_map_of_the_rank(rows: Tensor) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(6))
    seen = SeenRows(lambda x: x[None])
    for batch in rows.split(500):
        seen.update(batch)
    wanted = rows @ weight.T

    def error(factors: Thin) -> float:
        return float((multiply_up(rows @ factors.down.T, factors.up, None) - wanted).square().sum())

    for rank in (1, 5, 12, 24):
        aware = best_factors(weight, seen.gram()).truncated(rank)
        plain = best_factors(weight, None).truncated(rank)
        found = error(Thin.of(aware, weight))
        assert found <= error(Thin.of(plain, weight)) * (1 + 1e-4) + 1e-9 * float(wanted.square().sum())
        # The energies say it without the rows.
        tail = best_factors(weight, seen.gram()).relative_errors()[rank] * wanted.square().sum()
        assert found == pytest.approx(float(tail), rel=1e-2, abs=1e-3 * float(wanted.square().sum()))


@pytest.mark.parametrize("option", [QuantOption(bits=4, act_bits=8), QuantOption(bits=3, symmetric=False)], ids=str)
def test_balanced_factors_compute_the_same_and_quantize_better(rows: Tensor, option: QuantOption) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(7))
    gram = rows.T @ rows
    thin = Thin.of(best_factors(weight, gram).truncated(12), weight)
    # Lengths as unequal as they come: any balance must find its way back from there.
    skewed = torch.logspace(2, -2, 12)
    start = Thin(thin.down * skewed[:, None], thin.up / skewed)
    made = balanced(start, rows[:1000], option)
    torch.testing.assert_close(made.weight, thin.weight, rtol=1e-3, atol=1e-4)
    assert quantized_error(made, rows, option) < 0.5 * quantized_error(start, rows, option)


def quantized_error(thin: Thin, rows: Tensor, option: QuantOption) -> float:
    """On all rows, every grid chosen anew."""
    down, up = (
        MSE.solve(LayerProblem("", each, None, lambda x, *_: x), option, Effort(0, 0)).weight.dequantize()
        for each in (thin.down, thin.up)
    )
    between = rows @ down.T
    if option.act_bits:
        grid = activation_grid(float(between.min()), float(between.max()), option.act_bits, torch.uint8)
        between = fake_quantize_op()(between, *grid, option.act_bits)  # type: ignore[operator]
    return float((between @ up.T - rows @ thin.weight.T).square().sum())


def test_rows_stop_when_there_are_enough() -> None:
    seen = SeenRows(lambda x: x[None])
    count = 0
    while not seen.full:
        seen.update(torch.randn(9000, 4))
        count += 1
    before = seen.gram().clone()
    seen.update(torch.randn(9000, 4))
    assert count == 8
    assert torch.equal(seen.gram(), before)
    assert seen.sample().shape == (2048, 4)
