"""``compress::lowrank_linear``: ``up @ (down @ x) + bias``, at any rank that is asked for in the call.

Factors are ordered (compress/lowrank): the first b columns of ``up`` and rows of ``down`` are the best weight of rank
b. A smaller rank is a shorter read of the same tensors: ``down``'s first rows lie together, and ``up``'s rows are read
from their beginning, so nothing is copied or packed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.dispatch import Call, Choice, choose
from compress.kernels.packed_linear import checked_bias, flat_rows

__all__ = ["choose_lowrank", "lowrank_linear"]


def choose_lowrank(x: Tensor, up: Tensor, down: Tensor, rank: int) -> Choice:
    """The kernel that takes ``x`` [M, I] through the two factors, and why others do not."""
    return choose(Call.on(x, "lowrank_linear", up.shape[0], rank=rank))


@torch.library.custom_op("compress::lowrank_linear", mutates_args=())
def lowrank_linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, rank: int) -> Tensor:
    """``x`` [..., I], ``up`` [O, R] and ``down`` [R, I] of its dtype, ``bias`` [O], to [..., O] at ``rank``.

    Raises:
        ValueError: the factors do not fit each other or ``x``, are not row-major, or have fewer components; or the
            bias does not fit.
    """
    inputs, total = x.shape[-1], up.shape[1]
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
    if not len(flat):
        return x.new_empty(*x.shape[:-1], up.shape[0])
    choice = choose_lowrank(flat, up, down, rank)
    y: Tensor = choice.run(flat, up[:, :rank], down[:rank], bias)
    return y.reshape(*x.shape[:-1], -1)


@lowrank_linear.register_fake
def _shape(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, rank: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])
