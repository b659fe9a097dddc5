"""What ordered dropout converges to for linear maps, where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.lowrank.factors import plain_factors, weighted_factors
from compress.lowrank.layers import LowRankLinear
from compress.lowrank.sampler import RankSampler


def trained(start: Tensor, inputs: Tensor, wanted: Tensor, steps: int, rate: float) -> LowRankLinear:
    """A linear map [O, I] trained with ordered dropout to give ``wanted`` [N, O] for ``inputs`` [N, I]."""
    layer = LowRankLinear.of(nn.Linear(start.shape[1], start.shape[0], bias=False).requires_grad_(False))
    with torch.no_grad():
        factors = plain_factors(start)
        layer.up.copy_(factors.up)
        layer.down.copy_(factors.down)
    layer.up.requires_grad_(True)
    layer.down.requires_grad_(True)
    sampler = RankSampler({"layer": layer}, seed=0)
    optimizer = torch.optim.SGD([layer.up, layer.down], rate)
    for _ in range(steps):
        with sampler.step():
            loss = (layer(inputs) - wanted).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer.requires_grad_(False)


@pytest.mark.matrix
def test_uniform_inputs_give_the_svd() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=generator))[0] for n in (6, 9))
    wanted = left @ torch.diag(torch.tensor([8.565, 7.111, 3.24])) @ right.T
    layer = trained(torch.randn(6, 9, generator=generator), torch.eye(9), wanted.T, steps=8000, rate=0.1)
    best = plain_factors(wanted)
    for rank in range(1, 7):
        truth = best.truncated(min(rank, 3)).product()
        error = (layer.weight(rank) - truth).norm() / truth.norm()
        assert error < 2e-3, (rank, error)
    lengths = layer.up.detach().norm(dim=0) * layer.down.detach().norm(dim=1)
    torch.testing.assert_close(lengths[:3], torch.tensor([8.565, 7.111, 3.24]), rtol=2e-3, atol=0)
    assert float(lengths[3:].max()) < 0.05


@pytest.mark.matrix
def test_reproducing_its_inputs_gives_the_principal_components() -> None:
    generator = torch.Generator().manual_seed(2)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    scales = torch.linspace(1.6, 0.5, 8)
    x = torch.randn(500, 8, generator=generator)
    x = torch.linalg.qr(x)[0] * 500**0.5 * scales @ axes.T  # these variances exactly
    layer = trained(torch.randn(8, 8, generator=generator) * 0.4, x, x, steps=6000, rate=0.15)
    vectors = torch.linalg.eigh(x.T @ x)[1]
    vectors = vectors.flip(1)
    for rank in range(1, 8):
        best = (x - x @ vectors[:, :rank] @ vectors[:, :rank].T).norm() / x.norm()
        got = (x - x @ layer.weight(rank).T).norm() / x.norm()
        assert abs(float(got - best)) < 1e-3, (rank, got, best)
    for rank in range(1, 5):
        ours = torch.linalg.qr(layer.up.detach()[:, :rank])[0]
        assert float(torch.linalg.svdvals(ours.T @ vectors[:, :rank]).min()) > 0.999


@pytest.mark.matrix
def test_uneven_inputs_give_the_weighted_optimum_and_so_does_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 7, generator=generator)
    axes = torch.linalg.qr(torch.randn(7, 7, generator=generator))[0]
    x = torch.linalg.qr(torch.randn(400, 7, generator=generator))[0] * 400**0.5
    x = x * torch.linspace(1.5, 0.6, 7) @ axes.T  # condition number of the second moment: 6
    wanted = x @ weight.T
    found = weighted_factors(weight, x.T @ x)
    layer = trained(torch.randn(5, 7, generator=generator) * 0.4, x, wanted, steps=12000, rate=0.1)
    plain = plain_factors(weight)
    for rank in range(1, 6):
        errors = [
            float((x @ product.T - wanted).norm() / wanted.norm())
            for product in (layer.weight(rank), found.truncated(rank).product(), plain.truncated(rank).product())
        ]
        assert abs(errors[0] - errors[1]) < 1e-3, (rank, errors)
        predicted = float(found.relative_errors()[rank].clamp(min=0).sqrt())
        assert errors[1] == pytest.approx(predicted, abs=1e-4)
        if rank < 5:
            assert errors[2] > errors[1] + 1e-3, "the weight's own singular values are not the best order"


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=["tall", "wide"])
@pytest.mark.parametrize("seen", [200, 5], ids=["all directions", "few directions"])
def test_weighted_factors_are_exact_whole_and_optimal_cut_from_either_side(shape: tuple[int, int], seen: int) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    weight[:, -1] = weight[:, 0]  # a weight that lacks a rank
    inputs = torch.randn(seen, shape[1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    factors = weighted_factors(weight, inputs.T @ inputs)
    wanted = inputs @ weight.T
    torch.testing.assert_close(inputs @ factors.product().T, wanted, rtol=1e-6, atol=1e-7)
    if shape[0] > shape[1]:
        torch.testing.assert_close(factors.product(), weight, rtol=1e-6, atol=1e-6)
    best = torch.linalg.svdvals(wanted).square()
    for rank in range(1, min(shape)):
        error = float((inputs @ factors.truncated(rank).product().T - wanted).square().sum())
        assert error == pytest.approx(float(best[rank:].sum()), rel=1e-5, abs=1e-6 * float(best.sum()))
