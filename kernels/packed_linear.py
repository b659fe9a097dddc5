"""``compress::packed_linear`` and ``compress::packed_lowrank_linear``: linears whose weight stays packed as they run.

    packed_linear(x)          =  x W^T + bias                       W = (codes - zero_point) * scale
    packed_lowrank_linear(x)  =  x W^T + (x down^T) up^T + bias

The weight comes in compress.kernels.lanes's layout. Which kernel multiplies is decided a call, by rows and device
(kernels/dispatch.py). The branch's rank-sized product is computed once, and the packed kernel adds ``up`` times it
before it writes its outputs.

A kernel may read its weight before the kernel launched before it has ended, so that the two overlap. Weights are
constants of inference; code that writes one and multiplies with it next must synchronize in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.dispatch import Call, Choice, choose
from compress.kernels.lanes import LaneWeight, unit_shape

__all__ = ["checked_bias", "checked_weight", "choose_packed", "flat_rows", "packed_linear", "packed_lowrank_linear"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def choose_packed(x: Tensor, weight: LaneWeight, rank: int = 0) -> Choice:
    """The kernel that multiplies ``x`` [M, I] with ``weight``, and why others do not."""
    return choose(
        Call.on(x, "packed_linear", weight.outputs, bits=weight.bits, group_size=weight.group_size, rank=rank)
    )


def checked_weight(
    x: Tensor, units: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> LaneWeight:
    """The weight, its sizes checked against ``x`` and each other: a kernel would read past the end of wrong ones."""
    if not 2 <= bits <= 8 or group_size < 1:
        raise ValueError(f"{bits} bits in groups of {group_size}; allowed are 2 to 8 bits, and groups of 1 or more")
    inputs, outputs = x.shape[-1], scale.shape[0]
    wanted = unit_shape(outputs, inputs, bits)
    if tuple(units.shape) != wanted or units.dtype is not torch.int16 or not units.is_contiguous():
        raise ValueError(
            f"units {units.dtype} {tuple(units.shape)}; {bits} bits x {outputs} x {inputs} need contiguous int16 "
            f"{wanted}"
        )
    grid = (outputs, -(-inputs // group_size))
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        if tuple(part.shape) != grid or not part.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(part.shape)}; groups of {group_size} need contiguous {grid}")
    if scale.dtype not in _FLOATS:
        raise ValueError(f"scale of {scale.dtype}; allowed are {', '.join(map(str, _FLOATS))}")
    if zero_point.dtype is not torch.uint8:
        raise ValueError(f"zero_point of {zero_point.dtype}; it must be torch.uint8")
    return LaneWeight(units, scale, zero_point, bits, inputs, group_size)


def checked_bias(bias: Tensor | None, outputs: int, x: Tensor) -> Tensor | None:
    """``bias`` made contiguous: a kernel would read past the end of a short one, and past a strided one's entries.

    Raises:
        ValueError: it has another size, type or device than a product of ``x`` with so many ``outputs`` takes.
    """
    if bias is None:
        return None
    if tuple(bias.shape) != (outputs,) or bias.dtype not in (*_FLOATS, x.dtype) or bias.device != x.device:
        raise ValueError(
            f"bias {bias.dtype} {tuple(bias.shape)} on {bias.device}; {outputs} outputs on {x.device} need "
            f"({outputs},) of {', '.join(map(str, _FLOATS))}"
        )
    return bias.contiguous()


def flat_rows(x: Tensor) -> Tensor:
    """``x`` as [M, I], its rows contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@torch.library.custom_op("compress::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, units: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """``x`` [..., I] of float16, bfloat16 or float32; the rest as in LaneWeight; ``bias`` [O]. Returns [..., O].

    Raises:
        ValueError: units, scales, zero points or ``bias`` have another size or type than ``bits`` and ``group_size``
            ask for.
    """
    weight = checked_weight(x, units, scale, zero_point, bits, group_size)
    bias = checked_bias(bias, weight.outputs, x)
    flat = flat_rows(x)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], weight.outputs)
    return choose_packed(flat, weight).run(flat, weight, bias).reshape(*x.shape[:-1], -1)


@torch.library.custom_op("compress::packed_lowrank_linear", mutates_args=())
def packed_lowrank_linear(
    x: Tensor,
    units: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """As :func:`packed_linear`, plus a branch of ``down`` [R, I] and ``up`` [O, R], both of ``x``'s dtype.

    Raises:
        ValueError: as there, or the branch does not fit the weight.
    """
    weight = checked_weight(x, units, scale, zero_point, bits, group_size)
    bias = checked_bias(bias, weight.outputs, x)
    rank = down.shape[0]
    if tuple(down.shape) != (rank, weight.inputs) or tuple(up.shape) != (weight.outputs, rank):
        raise ValueError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)}; the weight is {weight.outputs} x {weight.inputs}"
        )
    if up.dtype is not x.dtype or down.dtype is not x.dtype:
        raise ValueError(f"up of {up.dtype} and down of {down.dtype}; x needs both of {x.dtype}, its own type")
    up, down = (part if part.stride(-1) == 1 else part.contiguous() for part in (up, down))
    flat = flat_rows(x)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], weight.outputs)
    choice = choose_packed(flat, weight, rank)
    if choice.name == "packed_gemv":
        from compress.kernels.thin_gemv import inner_gemv

        y = choice.run(flat, weight, bias, (inner_gemv(flat, down), up), inputs_ready=True)
    elif choice.name == "packed_dot":
        from compress.kernels.thin_dot import thin_dot

        y = choice.run(flat, weight, bias, (thin_dot(flat, down, None), up))
    else:
        y = choice.run(flat, weight, bias, (flat @ down.T, up))
    return y.reshape(*x.shape[:-1], -1)


@packed_linear.register_fake
@packed_lowrank_linear.register_fake
def _shape(x: Tensor, units: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])
