"""Two ways of a linear over a base and sparse deltas: the deltas beside the base's own kernel, or merged for the call.

Few rows: what costs time is reading weights, so the base stays packed and each delta is read beside it. Many rows: one
delta is added to a temporary float weight, which lives as long as the call, and the vendor's product does the rest;
rows of different deltas have no weight in common, so that they go the first way whatever their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.kernels.delta_add import delta_add
from compress.kernels.delta_gemv import delta_gemv
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.lanes import LaneWeight
from compress.kernels.packed_linear import choose_packed
from compress.kernels.packed_unpack import unpack_weight

__all__ = ["ADD", "GEMV", "MERGE", "ROWS", "beside", "merged"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def beside(
    x: Tensor, base: Tensor | LaneWeight, deltas: DeltaRows, task: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """``x`` [M, I] to [M, O]: the base's product, then the deltas added to it; rounded to ``x``'s dtype twice."""
    y = _base_product(x, base, bias)
    return delta_gemv(x, y, deltas, task)


def _base_product(x: Tensor, base: Tensor | LaneWeight, bias: Tensor | None) -> Tensor:
    if isinstance(base, LaneWeight):
        return choose_packed(x, base).run(x, base, bias)
    return linear(x, base, None if bias is None else bias.to(x.dtype))


def merged(
    x: Tensor, base: Tensor | LaneWeight, deltas: DeltaRows, task: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """``x`` [M, I] to [M, O], all rows of the one delta; the sum of weights is rounded to ``x``'s dtype."""
    assert task is None
    weight = unpack_weight(base, x.dtype) if isinstance(base, LaneWeight) else base.clone()
    delta_add(weight, deltas)
    return linear(x, weight, None if bias is None else bias.to(x.dtype))


# Where merging gets faster depends on density, and was not measured: this is where the packed kernels hand over, too.
GEMV = Kernel(run=beside, requires=Requires(dtypes=_DTYPES, rows=(1, 128)))
MERGE = Kernel(
    run=merged,
    requires=Requires(dtypes=_DTYPES, bits=(0, 2, 3, 4, 5, 6, 7, 8), group_sizes=(16, 32, 64, 128, 256), mixed=False),
)
ROWS = Kernel(run=beside, requires=Requires(dtypes=_DTYPES))
ADD = Kernel(run=delta_add, requires=Requires(dtypes=_DTYPES))
