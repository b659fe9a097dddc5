"""The truth about a product with a low-rank weight: two matrix products. On a GPU with many rows, also the fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires

__all__ = ["KERNEL", "lowrank_reference"]


def lowrank_reference(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [M, I] to ``up`` [O, R] @ (``down`` [R, I] @ x) + bias, [M, O]."""
    return torch.nn.functional.linear(x @ down.T, up, None if bias is None else bias.to(x.dtype))


KERNEL = Kernel(
    run=lowrank_reference,
    # float64 alone is exact enough for gradients to be compared with differences.
    requires=Requires(dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64), capability=None),
)
