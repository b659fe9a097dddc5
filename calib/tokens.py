"""Which tokens of padded samples are real, and layers' inputs made of those alone.

Texts of a batch are padded to one length. What a model computes at padding is read by nobody, yet would count in
every range and every gram matrix: often more than the text itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calib.spill import SpilledSamples
from compress.graph.traced import TracedModel

__all__ = ["RealTokens", "blank_padding", "real_tokens", "select_real"]

_MASK = "attention_mask"
_GROUP = 16


@dataclass(frozen=True)
class RealTokens:
    """Values [N, L, C] of a layer as samples [16, C] of real tokens only, in order; an incomplete last one is left out.

    Args:
        values: of all tokens.
        places: of the real ones, counted through all samples, int64.
    """

    values: SpilledSamples
    places: Tensor

    def __len__(self) -> int:
        return len(self.places) // _GROUP

    def take(self, index: Tensor) -> Tensor:
        """The samples at ``index`` ([n] int64), as [n, 16, C]."""
        tokens = (index[:, None] * _GROUP + torch.arange(_GROUP)).reshape(-1)
        found = self.values.take_parts(self.places[tokens])
        return found.reshape(len(index), _GROUP, *found.shape[1:])


def real_tokens(traced: TracedModel, inputs: tuple[Tensor, ...] | None) -> Tensor | None:
    """bool [N, L] from the input called ``attention_mask``; None where there is none, or no padding."""
    if inputs is None or _MASK not in traced.input_names:
        return None
    mask = inputs[traced.input_names.index(_MASK)].bool()
    return mask if mask.dim() == 2 and not mask.all() and int(mask.sum()) >= _GROUP else None


def select_real(value: Tensor, mask: Tensor) -> Tensor:
    """The real tokens [T, C] of ``value`` [N, L, C]; other values as they are.

    Args:
        mask: of the same samples.
    """
    return value[mask] if value.dim() == 3 and value.shape[:2] == mask.shape else value


def blank_padding(value: Tensor, mask: Tensor) -> Tensor:
    """``value`` [N, L, C] with zeros at padding; other values as they are.

    Args:
        mask: of the same samples.
    """
    return value * mask[..., None] if value.dim() == 3 and value.shape[:2] == mask.shape else value
