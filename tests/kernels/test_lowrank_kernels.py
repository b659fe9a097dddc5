"""Kernels of low-rank weights against float64, at every rank of the same tensors; fresh memory holds NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.kernels.dispatch import Call, choose
from compress.kernels.lowrank_linear import choose_lowrank, lowrank_linear
from compress.kernels.lowrank_reference import lowrank_reference
from compress.kernels.thin_dot import lowrank_dot
from compress.kernels.thin_gemv import lowrank_gemv
from tests.sweep import sweep

pytestmark = pytest.mark.usefixtures("outputs_of_nan")


def dot_in_splits(*arguments: Any) -> Any:
    """Both products split."""
    return lowrank_dot(*arguments, tiles=((16, 32, 3, 1, 2), (16, 16, 2, 1, 2)))


KERNELS = {"gemv": (lowrank_gemv, 2), "dot": (lowrank_dot, 5), "splits": (dot_in_splits, 18)}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
@sweep("dtype", [torch.float32, torch.float16, torch.bfloat16], sample=[torch.float16])
@sweep("rank", [1, 21, 40], sample=[21])
def test_every_rank_of_the_same_factors(
    kernel: str, dtype: torch.dtype, rank: int, device: str, assert_near: Any
) -> None:
    run, rows = KERNELS.get(kernel, (lowrank_reference, 5))
    up, down = torch.randn(37, 40, device=device).to(dtype), torch.randn(40, 300, device=device).to(dtype)
    x, bias = torch.randn(rows, 300, device=device).to(dtype), torch.randn(37, device=device).to(dtype)
    wanted = x.double() @ down[:rank].double().T @ up[:, :rank].double().T + bias.double()
    assert_near(run(x, up[:, :rank], down[:rank], bias), wanted)


def test_operator(device: str, assert_near: Any) -> None:
    up, down = torch.randn(12, 8, device=device), torch.randn(8, 20, device=device)
    x = torch.randn(2, 3, 20, device=device)
    got = lowrank_linear(x, up, down, None, 5)
    assert_near(got, x.double() @ down[:5].double().T @ up[:, :5].double().T)
    torch.library.opcheck(lowrank_linear, (x, up, down, None, 5), test_utils=("test_schema", "test_faketensor"))
    assert lowrank_linear(x[:0], up, down, None, 5).shape == (0, 3, 12)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients(rank: int, with_bias: bool) -> None:
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 7), (4, 5), (5, 7), (4,))]
    x, up, down, bias = given if with_bias else [*given[:3], None]
    parts = given if with_bias else given[:3]
    y = lowrank_linear(x, up, down, bias, rank)
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, parts, direction)
    flat = x.reshape(-1, 7)
    wanted = lowrank_reference(flat, up[:, :rank], down[:rank], bias).reshape(y.shape)
    for got, exact in zip(found, torch.autograd.grad(wanted, parts, direction), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    assert not found[1][:, rank:].any()
    assert not found[2][rank:].any()
    assert torch.autograd.gradcheck(lowrank_linear, (x, up, down, bias, rank))
    assert torch.autograd.gradgradcheck(lowrank_linear, (x, up, down, bias, rank))


@pytest.mark.slow
def test_gradients_of_what_is_asked_for() -> None:
    x, up, down = torch.randn(3, 7).bfloat16(), torch.randn(4, 5).bfloat16(), torch.randn(5, 7).bfloat16()
    bias = torch.zeros(4, requires_grad=True)
    lowrank_linear(x, up, down.requires_grad_(), bias, 2).float().sum().backward()
    assert x.grad is None
    assert up.grad is None
    assert down.grad is not None
    assert down.grad.dtype is torch.bfloat16
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((4,), 3.0))
    torch.library.opcheck(lowrank_linear, (x, up, down, bias, 2))


def test_factors_in_training_are_not_read_ahead() -> None:
    call = Call("lowrank_linear", "cuda", (9, 0), torch.bfloat16, 1, 4096, 4096, rank=512)
    assert choose(call).name == "thin_gemv"
    choice = choose(call._replace(trained=True))
    assert choice.name == "thin_dot"
    assert choice.refused == (
        "thin_gemv: only weights that stay as they are, not trained ones: it reads ahead of what may still write them",
    )
    x, up, down = torch.zeros(1, 7), torch.zeros(4, 5), torch.zeros(5, 7)
    trained = "thin_gemv: only on GPUs, not on cpu; only weights that stay as they are"
    assert choose_lowrank(x, up.requires_grad_(), down, 5).refused[0].startswith(trained)
    assert not choose_lowrank(x, up.detach(), down, 5).refused[0].startswith(trained)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="ranks from 1 to R"):
        lowrank_linear(torch.zeros(1, 20), torch.zeros(12, 8), torch.zeros(8, 20), None, rank)


def test_columns_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="must be row-major"):
        lowrank_linear(torch.zeros(1, 20), torch.zeros(8, 12).T, torch.zeros(8, 20), None, 3)
