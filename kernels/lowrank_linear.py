"""``compress::lowrank_linear``: ``up @ (down @ x) + bias``, at any rank that is asked for in the call.

Factors are ordered (compress/lowrank): the first b columns of ``up`` and rows of ``down`` are the best weight of rank
b. A smaller rank is a shorter read of the same tensors: ``down``'s first rows lie together, and ``up``'s rows are read
from their beginning, so nothing is copied or packed again. Components beyond it get a gradient of zero.

Factors that require gradients go past the kernel that reads them before the kernel launched before it has ended
(kernels/thin_gemv.py): that one may be an optimizer's step. Code that writes others and multiplies with them next must
synchronize in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.dispatch import Call, Choice, choose
from compress.kernels.packed_linear import check_places, checked_bias, flat_rows, row_length

__all__ = ["choose_lowrank", "lowrank_linear"]


def choose_lowrank(x: Tensor, up: Tensor, down: Tensor, rank: int) -> Choice:
    """The kernel that takes ``x`` [M, I] through the two factors, and why others do not."""
    trained = up.requires_grad or down.requires_grad
    return choose(Call.on(x, "lowrank_linear", up.shape[0], rank=rank, trained=trained))


@torch.library.custom_op("compress::lowrank_linear", mutates_args=())
def lowrank_linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, rank: int) -> Tensor:
    """``x`` [..., I], ``up`` [O, R] and ``down`` [R, I] of its dtype, ``bias`` [O], to [..., O] at ``rank``.

    Raises:
        ValueError: the factors do not fit each other or ``x``, are not row-major or elsewhere, or have fewer
            components; or the bias does not fit.
    """
    check_places(x, up=up, down=down)
    inputs, total = row_length(x), up.shape[-1] if up.dim() == 2 else 0
    if tuple(down.shape) != (total, inputs) or not 1 <= rank <= total:
        raise ValueError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} at rank {rank}; allowed are [O, R] and [R, {inputs}] "
            "and ranks from 1 to R"
        )
    if up.stride(1) != 1 or down.stride(1) != 1:
        raise ValueError(f"up has strides {up.stride()} and down {down.stride()}; both must be row-major")
    if up.dtype is not x.dtype or down.dtype is not x.dtype:
        raise ValueError(f"up of {up.dtype} and down of {down.dtype}; x needs both of {x.dtype}, its own type")
    bias = checked_bias(bias, up.shape[0], x)
    flat = flat_rows(x)
    if not (len(flat) and len(up)):
        return x.new_empty(*x.shape[:-1], up.shape[0])
    choice = choose_lowrank(flat, up, down, rank)
    y: Tensor = choice.run(flat, up[:, :rank], down[:rank], bias)
    return y.reshape(*x.shape[:-1], -1)


@lowrank_linear.register_fake
def _shape(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, rank: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, up, down, bias, rank = inputs
    ctx.save_for_backward(x, up, down)
    ctx.rank, ctx.bias_dtype = rank, None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, up, down = ctx.saved_tensors
    kept_up, kept_down, left_out = up[:, : ctx.rank], down[: ctx.rank], up.shape[1] - ctx.rank
    flat, of_y = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, up.shape[0])
    of_inner = of_y @ kept_up  # [M, rank]
    wanted_x, wanted_up, wanted_down, wanted_bias, _ = ctx.needs_input_grad
    return (
        (of_inner @ kept_down).reshape(x.shape) if wanted_x else None,
        pad(of_y.T @ (flat @ kept_down.T), (0, left_out)) if wanted_up else None,
        pad(of_inner.T @ flat, (0, 0, 0, left_out)) if wanted_down else None,
        of_y.sum(0).to(ctx.bias_dtype) if wanted_bias else None,
        None,
    )


lowrank_linear.register_autograd(_gradients, setup_context=_remember)
