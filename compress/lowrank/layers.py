"""Layers whose weight is ``up @ down``, ordered, and may be cut to any rank while they run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.lowrank.factors import Factors, plain_factors
from compress.lowrank.unroll import spatial_matrix, spatial_weight

__all__ = ["LowRankConv2d", "LowRankLayer", "LowRankLinear", "Positions", "SpatialConv2d", "refusal"]

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Positions:
    """Where a layer computes, a sample.

    Attributes:
        output: positions of its output.
        between: positions of the map between the two filters of a :class:`SpatialConv2d`: as high as the output, as
            wide as the input. The same as ``output`` for everything that is no convolution.
    """

    output: int
    between: int

    def __add__(self, other: Positions) -> Positions:
        return Positions(self.output + other.output, self.between + other.between)


class LowRankLayer(nn.Module, ABC):
    """What the linear and the convolutions share: a matrix ``up @ down`` [outputs, inputs].

    Attributes:
        down: [R, I] of a linear, [R, I, kh, kw] of a convolution, [R, I, kh, 1] of a spatial one.
        up: [O, R]; [O * kw, R] of a spatial convolution.
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
        """Rows of the matrix: O, times the kernel's width in a spatial convolution."""
        return self.up.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the matrix: what one value between the factors reads, I times the size of its filter."""
        return math.prod(self.down.shape[1:])

    @property
    def widening(self) -> int:
        """Positions at which ``down`` computes for each one of the output."""
        return 1

    def cost(self, rank: int) -> int:
        """Weights of the form that ``rank`` is extracted to: two thin layers, or one dense one."""
        return max(rank, 1) * (self.inputs + self.outputs) if self.pays(rank) else self.inputs * self.outputs

    def pays(self, rank: int | None = None) -> bool:
        """Whether two thin layers compute no more than one dense one; a tie keeps the thin ones.

        They then have no more weights either. Rank 0 is extracted as one component of zeros, which costs what one does.
        """
        rank = max(self.rank if rank is None else rank, 1)
        return rank * (self.inputs * self.widening + self.outputs) <= self.inputs * self.outputs

    def macs(self, rank: int, positions: Positions) -> int:
        """MACs a sample of the form that ``rank`` is extracted to."""
        if not self.pays(rank):
            return self.inputs * self.outputs * positions.output
        return max(rank, 1) * (self.inputs * self._down_positions(positions) + self.outputs * positions.output)

    def saving_rank(self, positions: Positions) -> float:
        """The rank at which two thin layers have as many MACs as one dense one; they save below it."""
        dense = self.inputs * self.outputs * positions.output
        return dense / (self.inputs * self._down_positions(positions) + self.outputs * positions.output)

    def _down_positions(self, positions: Positions) -> int:
        return positions.output

    def importance(self) -> Tensor:
        """[R]: ``||up[:, j:]|| * ||down[j:]||``, non-increasing by construction (hierarchical)."""
        up, down = (_tail_norms(each) for each in (self.up.detach().square().sum(0), self._rows().square().sum(1)))
        return up * down

    def _rows(self) -> Tensor:
        return self.down.detach().flatten(1)

    def weight(self, rank: int | None = None) -> Tensor:
        """The dense weight, in the dense layer's shape."""
        up, down = self._first(self.rank if rank is None else rank)
        return (up @ down.flatten(1)).reshape(self.outputs, *self.down.shape[1:])

    @abstractmethod
    def dense(self, rank: int | None = None) -> nn.Module:
        """One ordinary layer that computes the same."""

    @abstractmethod
    def thin(self, rank: int | None = None) -> nn.Sequential:
        """Two ordinary layers that compute the same."""

    def _first(self, rank: int) -> tuple[Tensor, Tensor]:
        """``up`` and ``down`` of the first ``rank`` components; themselves where that is all, which saves a step."""
        return (self.up, self.down) if rank == self.rank else (self.up[:, :rank], self.down[:rank])

    def _thin_factors(self, rank: int | None) -> tuple[Tensor, Tensor]:
        """``up`` and ``down`` of the first ``rank`` components, or of one that is zero."""
        rank = self.rank if rank is None else rank
        if rank > 0:
            return self._first(rank)
        return self.up.new_zeros(self.outputs, 1), self.down.new_zeros(1, *self.down.shape[1:])

    def _merges(self, rank: int, rows: int) -> bool:
        """Whether multiplying ``rows`` with the product, product included, takes fewer MACs than with each factor.

        So a training step at (nearly) full rank costs what a dense one does. A traced graph holds the factors: it is
        for any number of rows.
        """
        if self.pays(rank) or torch.compiler.is_compiling():
            return False
        product = self.inputs * self.outputs
        return rank * product + rows * product < rows * rank * (self.inputs * self.widening + self.outputs)

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
        if self._merges(rank, x.shape[:-1].numel()):
            return F.linear(x, self.weight(rank), self.bias)
        up, down = self._first(rank)
        return F.linear(F.linear(x, down), up, self.bias)

    def dense(self, rank: int | None = None) -> nn.Linear:
        """One ordinary linear that computes the same."""
        layer = nn.Linear(self.inputs, self.outputs, bias=self.bias is not None, device="meta")
        return _filled(layer, self.weight(rank), self.bias)

    def thin(self, rank: int | None = None) -> nn.Sequential:
        """Two ordinary linears that compute the same; at rank 0 by way of one value, which is zero."""
        up, down = self._thin_factors(rank)
        first = nn.Linear(self.inputs, len(down), bias=False, device="meta")
        second = nn.Linear(len(down), self.outputs, bias=self.bias is not None, device="meta")
        return nn.Sequential(_filled(first, down, None), _filled(second, up, self.bias))


class LowRankConv2d(LowRankLayer):
    """``x`` [N, I, H, W] by R filters of the kernel's size, then [O, R] at every position.

    The filters carry stride, padding and dilation.
    """

    unrolling: ClassVar[str] = "channel"

    def __init__(self, factors: Factors, layer: nn.Conv2d) -> None:
        super().__init__(factors, self._filter_shape(layer), layer.bias)
        self.settings: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }

    @classmethod
    def of(cls, layer: nn.Conv2d, factors: Factors | None = None) -> LowRankConv2d:
        """``layer`` decomposed exactly, or with ``factors`` of its weight as :meth:`matrix` unrolls it.

        Raises:
            ValueError: see :func:`refusal`.
        """
        if reason := refusal(layer):
            raise ValueError(reason)
        factors = plain_factors(cls.matrix(layer.weight.detach())) if factors is None else factors
        return cls(factors, layer)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """``weight`` [O, I, kh, kw] as the matrix that is decomposed: [O, I * kh * kw]."""
        return weight.flatten(1)

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the dense kernel."""
        return self.down.shape[2], self.down.shape[3]

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.outputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the first ``active`` components; with none, the bias at every position of the true output."""
        rank = self._active()
        if rank == 0:  # one filter of zeros: how large the output is remains the convolution's own business
            zero = F.conv2d(x, x.new_zeros(1, x.shape[1], *self.kernel), None, **self.settings)
            zero = zero.new_zeros(len(zero), self.channels, *zero.shape[2:])
            return zero if self.bias is None else zero + self.bias[:, None, None]
        if self._merges(rank, len(x) * x.shape[2:].numel() // math.prod(self.settings["stride"])):
            return F.conv2d(x, self.weight(rank), self.bias, **self.settings)
        first, second = self._filters(*self._first(rank))
        settings = self._halves()
        return F.conv2d(F.conv2d(x, first, None, **settings[0]), second, self.bias, **settings[1])

    def dense(self, rank: int | None = None) -> nn.Conv2d:
        """One ordinary convolution that computes the same."""
        return _convolution(self.weight(rank), self.bias, self.settings)

    def thin(self, rank: int | None = None) -> nn.Sequential:
        """Two ordinary convolutions that compute the same; at rank 0 by way of one filter of zeros."""
        (first, second), settings = self._filters(*self._thin_factors(rank)), self._halves()
        return nn.Sequential(_convolution(first, None, settings[0]), _convolution(second, self.bias, settings[1]))

    @staticmethod
    def _filter_shape(layer: nn.Conv2d) -> torch.Size:
        return layer.weight.shape

    def _filters(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the two convolutions."""
        return down, up[:, :, None, None]

    def _halves(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the two convolutions."""
        return self.settings, {}


class SpatialConv2d(LowRankConv2d):
    """``x`` [N, I, H, W] by R filters as high as the kernel and one wide, then by [O, R] filters one high and as wide.

    The first carry the vertical part of stride, padding and dilation, the second the horizontal one; so what is between
    them is as wide as the input, which a horizontal stride makes dearer than the output.
    """

    unrolling: ClassVar[str] = "spatial"

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """``weight`` [O, I, kh, kw] as the matrix that is decomposed: [O * kw, I * kh]."""
        return spatial_matrix(weight)

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the dense kernel."""
        return self.down.shape[2], self.outputs // self.channels

    @property
    def channels(self) -> int:
        """Of the output."""
        return self._channels

    def __init__(self, factors: Factors, layer: nn.Conv2d) -> None:
        super().__init__(factors, layer)
        self._channels = layer.out_channels

    @property
    def widening(self) -> int:
        """The horizontal stride."""
        return int(self.settings["stride"][1])

    def weight(self, rank: int | None = None) -> Tensor:
        """The dense weight [O, I, kh, kw]."""
        up, down = self._first(self.rank if rank is None else rank)
        return spatial_weight(up @ down.flatten(1), (self.channels, down.shape[1], *self.kernel))

    def _down_positions(self, positions: Positions) -> int:
        return positions.between

    @staticmethod
    def _filter_shape(layer: nn.Conv2d) -> torch.Size:
        return torch.Size((*layer.weight.shape[:3], 1))

    def _filters(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return down, up.unflatten(0, (self.channels, -1)).transpose(1, 2).unsqueeze(2)

    def _halves(self) -> tuple[dict[str, Any], dict[str, Any]]:
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        for name, value in self.settings.items():
            if isinstance(value, str):  # "same" and "valid" mean the same for a part of the kernel
                first[name] = second[name] = value
            else:
                nothing = 0 if name == "padding" else 1
                first[name], second[name] = (value[0], nothing), (nothing, value[1])
        return first, second


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


def _convolution(weight: Tensor, bias: Tensor | None, settings: dict[str, Any]) -> nn.Conv2d:
    outputs, inputs, *size = weight.shape
    layer = nn.Conv2d(inputs, outputs, tuple(size), bias=bias is not None, device="meta", **settings)  # type: ignore[arg-type]
    return _filled(layer, weight, bias)


def _filled(layer: _Layer, weight: Tensor, bias: Tensor | None) -> _Layer:
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
