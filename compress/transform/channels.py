"""Which axis holds a layer's channels while its output passes through other operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compress.graph.quantizers import is_zero_pad

__all__ = ["Channels", "arguments", "channels_of_input", "channels_of_output", "is_relu6", "pass_through"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Channels:
    """Where a value keeps the channels: along ``axis``, each ``repeat`` times in a row (H*W after a flatten)."""

    axis: int
    repeat: int = 1


# Spatial dimensions of a convolution's values; a linear has its features last.
_CONVOLUTIONS: dict[object, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}
# f(s x) = s f(x) for s > 0, element by element; leaky slopes are no obstacle.
_HOMOGENEOUS = {aten.relu.default, aten.leaky_relu.default, aten.prelu.default}
_POOLS: dict[object, int] = {
    aten.max_pool1d.default: 1,
    aten.avg_pool1d.default: 1,
    aten.adaptive_avg_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.avg_pool2d.default: 2,
    aten.adaptive_avg_pool2d.default: 2,
}
_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of ``node``; their type, a union of everything, would need a cast at each use."""
    return node.args


def channels_of_output(call: fx.Node) -> Channels:
    """The channels of what the convolution or linear ``call`` returns."""
    rank = len(_shape(call))
    return Channels(rank - 1 - _CONVOLUTIONS.get(call.target, 0))


def channels_of_input(call: fx.Node, repeat: int) -> Channels:
    """The channels that ``call`` reads. A convolution's must not repeat; a linear's may, ``repeat`` times."""
    rank = len(_shape(arguments(call)[0]))
    spatial = _CONVOLUTIONS.get(call.target)
    return Channels(rank - 1, repeat) if spatial is None else Channels(rank - 1 - spatial)


def is_relu6(node: fx.Node) -> bool:
    """Whether ``node`` cuts its input to [0, 6]."""
    if node.target is aten.relu6.default:
        return True
    return node.target in (aten.hardtanh.default, aten.clamp.default) and tuple(arguments(node)[1:]) == (0, 6)


def pass_through(node: fx.Node, value: fx.Node, channels: Channels) -> Channels | str:
    """Where the channels of ``value`` are after ``node``, or why a positive factor on each does not pass it."""
    if node.op != "call_function" or not arguments(node) or arguments(node)[0] is not value:
        return f"{node.name} reads it"
    after: Channels | None
    if node.target in _HOMOGENEOUS:
        after = channels
    elif node.target in _POOLS:
        after = channels if channels.axis < len(_shape(value)) - _POOLS[node.target] else None
    elif node.target in _PADS:
        after = _through_pad(node, value, channels)
    elif node.target in _RESHAPES:
        after = _through_reshape(_shape(value), _shape(node), channels)
    elif node.target in _MOVES:
        after = _MOVES[node.target](node, len(_shape(value)), channels)
    else:
        return f"{node.target} follows, which a factor on each channel does not pass"
    return f"{node.name} ({node.target}) mixes its channels" if after is None else after


def _shape(node: fx.Node) -> list[int | str]:
    """Sizes of a node's value; those only known at run time as the text of their formula, which compares safely."""
    return [size if isinstance(size, int) else str(size) for size in node.meta["val"].shape]


def _through_pad(node: fx.Node, value: fx.Node, channels: Channels) -> Channels | None:
    # Reflected and repeated values scale as well, but no model at hand has them before a quantized layer.
    padded = len(arguments(node)[1]) // 2
    return channels if is_zero_pad(node) and channels.axis < len(_shape(value)) - padded else None


def _through_reshape(before: list[int | str], after: list[int | str], channels: Channels) -> Channels | None:
    """Row-major order is kept, so with the same sizes in front a longer axis repeats each channel in a row."""
    axis = channels.axis
    size = before[axis]
    if before[:axis] == after[:axis] and len(after) > axis:
        new = after[axis]
        if isinstance(size, int) and isinstance(new, int) and new % size == 0:
            return Channels(axis, channels.repeat * (new // size))
    tail = len(before) - axis
    return Channels(len(after) - tail, channels.repeat) if before[axis:] == after[-tail:] else None


def _through_permute(node: fx.Node, rank: int, channels: Channels) -> Channels | None:
    return Channels([int(dim) % rank for dim in arguments(node)[1]].index(channels.axis), channels.repeat)


def _through_transpose(node: fx.Node, rank: int, channels: Channels) -> Channels | None:
    one, other = (int(dim) % rank for dim in arguments(node)[1:3])
    return Channels({one: other, other: one}.get(channels.axis, channels.axis), channels.repeat)


def _through_select(node: fx.Node, rank: int, channels: Channels) -> Channels | None:
    dim = int(arguments(node)[1]) % rank
    return None if dim == channels.axis else Channels(channels.axis - (dim < channels.axis), channels.repeat)


def _through_slice(node: fx.Node, rank: int, channels: Channels) -> Channels | None:
    return None if int((*arguments(node), 0)[1]) % rank == channels.axis else channels


def _through_mean(node: fx.Node, rank: int, channels: Channels) -> Channels | None:
    dims = {int(dim) % rank for dim in arguments(node)[1] or range(rank)}
    keep = bool((*arguments(node), False)[2])
    if channels.axis in dims:
        return None
    return channels if keep else Channels(channels.axis - sum(dim < channels.axis for dim in dims), channels.repeat)


_MOVES: dict[object, Callable[[fx.Node, int, Channels], Channels | None]] = {
    aten.permute.default: _through_permute,
    aten.transpose.int: _through_transpose,
    aten.select.int: _through_select,
    aten.slice.Tensor: _through_slice,
    aten.mean.dim: _through_mean,
}
