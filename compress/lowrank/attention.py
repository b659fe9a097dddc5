"""``nn.MultiheadAttention`` with its four projections apart, so that each can be decomposed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OpenAttention", "attention_refusal", "open_attention"]


class OpenAttention(nn.Module):
    """Computes what an ``nn.MultiheadAttention`` does; ``q``, ``k``, ``v`` and ``out`` are ordinary linears.

    The attributes that ``nn.TransformerEncoderLayer`` looks at before it takes its own fast path are here, and say no.
    """

    in_proj_bias = None
    in_proj_weight = None
    _qkv_same_embed_dim = True

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dropout = attention.dropout
        weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3) if attention.in_proj_bias is not None else (None, None, None)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments and results as ``nn.MultiheadAttention``."""
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (x[None] if self.batch_first else x[:, None] for x in (query, key, value))
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        heads = [self._heads(linear(x)) for linear, x in ((self.q, query), (self.k, key), (self.v, value))]
        mask = _merged_mask(attn_mask, key_padding_mask, len(query), self.num_heads, query.dtype)
        scores = heads[0] @ heads[1].transpose(-2, -1) * heads[0].shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        output = self.out((weights @ heads[2]).transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        shown: Tensor | None = None
        if need_weights:
            shown = weights.mean(1) if average_attn_weights else weights
        if unbatched:
            output = output.squeeze(0 if self.batch_first else 1)
            shown = shown.squeeze(0) if shown is not None else None
        return output, shown

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def attention_refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why ``attention`` cannot be opened; None when it can."""
    if not attention._qkv_same_embed_dim:
        return "its keys and values have widths of their own"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds a position of its own (add_bias_kv or add_zero_attn)"
    return None


def open_attention(attention: nn.MultiheadAttention) -> OpenAttention:
    """The same function with its projections apart.

    Raises:
        ValueError: see :func:`attention_refusal`.
    """
    if reason := attention_refusal(attention):
        raise ValueError(reason)
    return OpenAttention(attention).train(attention.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _merged_mask(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype) -> Any:
    """Both masks as one that is added to the scores [N, heads, L, S]."""
    found: Tensor | None = None
    if mask is not None:
        found = _added(mask, dtype)
        found = found.unflatten(0, (batch, heads)) if found.dim() == 3 else found
    if padding is not None:
        hidden = _added(padding if padding.dim() == 2 else padding[None], dtype)[:, None, None]
        found = hidden if found is None else found + hidden
    return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
