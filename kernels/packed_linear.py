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

__all__ = [
    "check_places",
    "checked_bias",
    "checked_weight",
    "choose_packed",
    "flat_rows",
    "packed_linear",
    "packed_lowrank_linear",
    "row_length",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def choose_packed(x: Tensor, weight: LaneWeight, rank: int = 0, trained: bool = False) -> Choice:
    """The kernel that multiplies ``x`` [M, I] with ``weight``, and why others do not.

    ``rank`` is the branch's, ``trained`` whether its factors may still be being written.
    """
    return choose(
        Call.on(
            x,
            "packed_linear",
            weight.outputs,
            bits=weight.bits,
            group_size=weight.group_size,
            rank=rank,
            trained=trained,
            aligned=weight.units.data_ptr() % 4 == 0,
        )
    )


def row_length(x: Tensor) -> int:
    """I of ``x`` [..., I].

    Raises:
        ValueError: it has no last dimension, or nothing in it.
    """
    if x.dim() == 0 or not x.shape[-1]:
        raise ValueError(f"x of shape {tuple(x.shape)}; a linear takes [..., I], of 1 input or more")
    return x.shape[-1]


def check_places(x: Tensor, **parts: Tensor | None) -> None:
    """Refuse what is not on ``x``'s device: a kernel would take its address for one of that device.

    Raises:
        ValueError: a part is elsewhere.
    """
    for name, part in parts.items():
        if part is not None and part.device != x.device:
            raise ValueError(
                f"{name} on {part.device} and x on {x.device}; move one of them: both must be on one device"
            )


def checked_weight(
    x: Tensor, units: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> LaneWeight:
    """The weight, its sizes checked against ``x`` and each other: a kernel would read past the end of wrong ones."""
    if not 2 <= bits <= 8 or group_size < 1:
        raise ValueError(f"{bits} bits in groups of {group_size}; allowed are 2 to 8 bits, and groups of 1 or more")
    check_places(x, units=units, scale=scale, zero_point=zero_point)
    if scale.dim() != 2:
        raise ValueError(f"scale of shape {tuple(scale.shape)}; a weight has a row of them for each output: [O, G]")
    inputs, outputs = row_length(x), scale.shape[0]
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
    flat = x.reshape(-1, row_length(x))
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@torch.library.custom_op("compress::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, units: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """``x`` [..., I] of float16, bfloat16 or float32; the rest as in LaneWeight; ``bias`` [O]. Returns [..., O].

    Raises:
        ValueError: units, scales, zero points or ``bias`` have another size or type than ``bits`` and ``group_size``
            ask for, or are on another device.
    """
    weight = checked_weight(x, units, scale, zero_point, bits, group_size)
    bias = checked_bias(bias, weight.outputs, x)
    flat = flat_rows(x)
    if not (len(flat) and weight.outputs):
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
    check_places(x, up=up, down=down)
    rank = down.shape[0] if down.dim() else 0
    if rank < 1 or tuple(down.shape) != (rank, weight.inputs) or tuple(up.shape) != (weight.outputs, rank):
        raise ValueError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)}; the weight is {weight.outputs} x {weight.inputs}, and "
            f"needs [{weight.outputs}, R] and [R, {weight.inputs}] of a rank R from 1 on"
        )
    if up.dtype is not x.dtype or down.dtype is not x.dtype:
        raise ValueError(f"up of {up.dtype} and down of {down.dtype}; x needs both of {x.dtype}, its own type")
    flat = flat_rows(x)
    if not (len(flat) and weight.outputs):
        return x.new_empty(*x.shape[:-1], weight.outputs)
    # Factors that an optimizer's step or a copy, launched just before, may still be writing are not read ahead.
    trained = any(part.requires_grad or part.stride(-1) != 1 for part in (up, down))
    up, down = (part if part.stride(-1) == 1 else part.contiguous() for part in (up, down))
    choice = choose_packed(flat, weight, rank, trained)
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
