"""What the transformation is trained by, each a number of the batch (arXiv 2407.14726, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["margin_loss", "similarity_loss", "validation_loss"]

_SMALLEST = 1e-12


def validation_loss(wanted: Sequence[Tensor], got: Sequence[Tensor], temperature: float = 4.0) -> Tensor:
    """How far the quantized model's outputs are from the float one's: 0 where they are the same.

    One output [N, C] with C of 2 and more is taken for logits: ``KL(softmax(wanted / t) || softmax(got / t))``, mean
    over samples. Anything else (maps, numbers, several outputs) has no distribution over classes that could be known
    of: the sum of each output's squared distance relative to its squared norm, of those that are floats.
    """
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        p, q = (F.log_softmax(each[0] / temperature, 1) for each in (wanted, got))
        return F.kl_div(q, p, reduction="batchmean", log_target=True)
    pairs = [(x, y) for x, y in zip(wanted, got, strict=True) if x.is_floating_point()]
    return torch.stack([(y - x).square().sum() / x.square().sum().clamp(min=_SMALLEST) for x, y in pairs]).sum()


def margin_loss(x: Tensor, transformed: Tensor, margin: float) -> Tensor:
    """``max(0, margin - mean((x - T(x))^2))``: nothing once the images have changed enough. Any shape."""
    return F.relu(margin - (x - transformed).square().mean())


def similarity_loss(features: Tensor, transformed: Tensor) -> Tensor:
    """How far the samples are from being as similar to each other after the transformation as they were before.

    Each sample's row is a distribution over the others, ``p(i | j)`` proportional to ``(1 + cos(f_i, f_j)) / 2``, i and
    j different; KL from that of ``features`` [B, F] to that of ``transformed`` [B, F], mean over the rows
    (Probabilistic Knowledge Transfer, arXiv 1803.10837). Turning all features or scaling any of them costs nothing.
    """
    p, q = _similarities(features), _similarities(transformed)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _similarities(features: Tensor) -> Tensor:
    """Logarithms of each row's distribution, [B, B - 1]: without the sample itself."""
    count = len(features)
    unit = F.normalize(features, dim=1)
    others = ~torch.eye(count, dtype=torch.bool)
    near = (1 + unit @ unit.T)[others].view(count, count - 1).clamp(min=_SMALLEST)
    return (near / near.sum(1, keepdim=True)).log()
