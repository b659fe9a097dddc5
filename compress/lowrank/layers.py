"""Layers whose weight is ``up @ down``, ordered, and may be cut to any rank while they run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.lowrank.factors import Factors, plain_factors

__all__ = ["LowRankConv2d", "LowRankLayer", "LowRankLinear", "refusal"]

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


class LowRankLayer(nn.Module, ABC):
    """What the linear and the convolution share.

    Attributes:
        down: [R, I] of a linear, [R, I, kh, kw] of a convolution.
        up: [O, R].
        bias: [O] or None.
        active: components that the next call uses; None: all. Set by a sampler, or by whoever cuts the rank at run
            time; never a fraction, whose rounding differs from machine to machine.
    """

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, factors: Factors, shape: torch.Size, bias: Tensor | None) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down.reshape(-1, *shape[1:]).clone())
        self.up = nn.Parameter(factors.up.clone())
        self.bias = nn.Parameter(bias.clone()) if bias is not None else None
        self.active: int | None = None

    @property
    def rank(self) -> int:
        """Components that are stored."""
        return self.up.shape[1]

    @property
    def full_rank(self) -> int:
        """Most components a weight of this shape can need."""
        return min(self.outputs, self.inputs)

    @property
    def outputs(self) -> int:
        """O."""
        return self.up.shape[0]

    @property
    def inputs(self) -> int:
        """Inputs of one output value: I, times the kernel's size."""
        return math.prod(self.down.shape[1:])

    def cost(self, rank: int) -> int:
        """Weights of the cheaper form, two thin layers or one dense one; also its MACs an output position."""
        return min(rank * (self.inputs + self.outputs), self.inputs * self.outputs)

    def pays(self, rank: int | None = None) -> bool:
        """Whether two thin layers have no more weights than one dense one; a tie keeps the thin ones."""
        return (self.rank if rank is None else rank) * (self.inputs + self.outputs) <= self.inputs * self.outputs

    def importance(self) -> Tensor:
        """[R]: ``||up[:, j:]|| * ||down[j:]||``, non-increasing by construction (hierarchical)."""
        up, down = (_tail_norms(each) for each in (self.up.detach().square().sum(0), self._rows().square().sum(1)))
        return up * down

    def _rows(self) -> Tensor:
        return self.down.detach().flatten(1)

    def weight(self, rank: int | None = None) -> Tensor:
        """The dense weight, in the dense layer's shape."""
        rank = self.rank if rank is None else rank
        return (self.up[:, :rank] @ self.down[:rank].flatten(1)).reshape(self.outputs, *self.down.shape[1:])

    @abstractmethod
    def dense(self, rank: int | None = None) -> nn.Module:
        """One ordinary layer that computes the same."""

    @abstractmethod
    def thin(self, rank: int | None = None) -> nn.Sequential:
        """Two ordinary layers that compute the same."""

    def _active(self) -> int:
        rank = self.rank if self.active is None else self.active
        if not (isinstance(rank, int) and 0 <= rank <= self.rank):
            raise ValueError(f"rank {rank}: this layer has 0 to {self.rank}, as whole numbers")
        return rank

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.rank} -> {self.outputs}, bias={self.bias is not None}"


class LowRankLinear(LowRankLayer):
    """``x`` [..., I] to [..., O] by way of at most R values."""

    @classmethod
    def of(cls, layer: nn.Linear, factors: Factors | None = None) -> LowRankLinear:
        """``layer`` decomposed exactly, or with ``factors`` in place of its own."""
        factors = plain_factors(layer.weight.detach()) if factors is None else factors
        return cls(factors, layer.weight.shape, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the first ``active`` components; with none, the bias for every row."""
        rank = self._active()
        if rank == 0:
            zero = x.new_zeros(*x.shape[:-1], self.outputs)
            return zero if self.bias is None else zero + self.bias
        return F.linear(F.linear(x, self.down[:rank]), self.up[:, :rank], self.bias)

    def dense(self, rank: int | None = None) -> nn.Linear:
        """One ordinary linear that computes the same."""
        layer = nn.Linear(self.inputs, self.outputs, bias=self.bias is not None, device="meta")
        return _filled(layer, self.weight(rank), self.bias)

    def thin(self, rank: int | None = None) -> nn.Sequential:
        """Two ordinary linears that compute the same; one that ignores its input at rank 0."""
        rank = self.rank if rank is None else rank
        if rank == 0:
            return nn.Sequential(self.dense(0))
        first = nn.Linear(self.inputs, rank, bias=False, device="meta")
        second = nn.Linear(rank, self.outputs, bias=self.bias is not None, device="meta")
        return nn.Sequential(_filled(first, self.down[:rank], None), _filled(second, self.up[:, :rank], self.bias))


class LowRankConv2d(LowRankLayer):
    """``x`` [N, I, H, W] by R filters of the kernel's size, then [O, R] at every position.

    The filters carry stride, padding and dilation.
    """

    def __init__(self, factors: Factors, layer: nn.Conv2d) -> None:
        super().__init__(factors, layer.weight.shape, layer.bias)
        self.settings: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }

    @classmethod
    def of(cls, layer: nn.Conv2d, factors: Factors | None = None) -> LowRankConv2d:
        """``layer`` decomposed exactly, or with ``factors`` of its weight unrolled to [O, I * kh * kw].

        Raises:
            ValueError: see :func:`refusal`.
        """
        if reason := refusal(layer):
            raise ValueError(reason)
        factors = plain_factors(layer.weight.detach().flatten(1)) if factors is None else factors
        return cls(factors, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the first ``active`` components; with none, the bias at every position of the true output."""
        rank = self._active()
        if rank == 0:  # one filter of zeros: how large the output is remains the convolution's own business
            middle = F.conv2d(x, torch.zeros_like(self.down[:1]), None, **self.settings)
            zero = middle.new_zeros(len(middle), self.outputs, *middle.shape[2:])
            return zero if self.bias is None else zero + self.bias[:, None, None]
        middle = F.conv2d(x, self.down[:rank], None, **self.settings)
        return F.conv2d(middle, self.up[:, :rank, None, None], self.bias)

    def dense(self, rank: int | None = None) -> nn.Conv2d:
        """One ordinary convolution that computes the same."""
        layer = self._convolution(self.down.shape[1], self.outputs, self.bias is not None)
        return _filled(layer, self.weight(rank), self.bias)

    def thin(self, rank: int | None = None) -> nn.Sequential:
        """Two ordinary convolutions that compute the same; one of zeros at rank 0."""
        rank = self.rank if rank is None else rank
        if rank == 0:
            return nn.Sequential(self.dense(0))
        second = nn.Conv2d(rank, self.outputs, 1, bias=self.bias is not None, device="meta")
        return nn.Sequential(
            _filled(self._convolution(self.down.shape[1], rank, False), self.down[:rank], None),
            _filled(second, self.up[:, :rank, None, None], self.bias),
        )

    def _convolution(self, inputs: int, outputs: int, bias: bool) -> nn.Conv2d:
        size = tuple(self.down.shape[2:])
        return nn.Conv2d(inputs, outputs, size, bias=bias, device="meta", **self.settings)  # type: ignore[arg-type]


def refusal(layer: nn.Module) -> str | None:
    """Why ``layer`` is not decomposed; None when it is."""
    if type(layer) is nn.Linear:
        return None
    if type(layer) is not nn.Conv2d:
        return f"{type(layer).__name__} is no linear and no conv2d"
    if layer.groups != 1:
        return f"a convolution of {layer.groups} groups has no matrix that would be cut"
    if layer.padding_mode != "zeros":
        return f"its padding is {layer.padding_mode}, not zeros"
    return None


def _tail_norms(squares: Tensor) -> Tensor:
    """[R]: norm of everything from each component on."""
    return squares.flip(0).cumsum(0).flip(0).sqrt()


def _filled(layer: _Layer, weight: Tensor, bias: Tensor | None) -> _Layer:
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
