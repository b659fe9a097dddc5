"""What block kernels do to a layer's input: each block of a row rounded to int8, symmetrically (accuracy level 4).

No simulation of the weights shows it. A value far larger than the rest of its block takes their codes away.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_blocks"]

_TOP = 127


def round_blocks(x: Tensor, block: int) -> Tensor:
    """``x`` [..., K] as a kernel of ``block`` weights sees it."""
    missing = -x.shape[-1] % block
    blocks = torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1, keepdim=True) / _TOP).clamp(min=torch.finfo(x.dtype).tiny)
    return (torch.round(blocks / scale) * scale).flatten(-2)[..., : x.shape[-1]]
