"""``compress::delta_linear``, ``packed_delta_linear`` and ``add_delta_``: one base, many sparse deltas, none merged.

    delta_linear(x)_m         =  x_m (W + D_task(m))^T + bias             W in floats
    packed_delta_linear(x)_m  =  the same                                 W in codes of 2 to 8 bits, which stay packed
    add_delta_(W)             :  W += D_t, in place, the sum in float64

Deltas come in compress.kernels.delta_rows's layout. ``task`` says of each row of ``x`` which delta is its own: a batch
may hold requests of different customers; a number that is none, as -1, means the base alone; without ``task`` the one
delta there is serves all rows. As with packed weights, code that writes a delta and multiplies with it next must
synchronize in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.delta_rows import DeltaRows, column_dtype
from compress.kernels.dispatch import Call, Choice, choose
from compress.kernels.lanes import LaneWeight
from compress.kernels.packed_linear import check_places, checked_bias, checked_weight, flat_rows, row_length

__all__ = ["add_delta_", "choose_delta", "delta_linear", "packed_delta_linear"]


def choose_delta(x: Tensor, base: Tensor | LaneWeight, task: Tensor | None) -> Choice:
    """The kernel that multiplies ``x`` [M, I] with ``base`` and deltas, and why others do not."""
    if isinstance(base, LaneWeight):
        outputs, bits, group_size = base.outputs, base.bits, base.group_size
    else:
        outputs, bits, group_size = base.shape[0], 0, x.shape[1]
    return choose(Call.on(x, "delta_linear", outputs, bits=bits, group_size=group_size, mixed=task is not None))


_VALUES = (torch.float16, torch.bfloat16, torch.float32)


def _checked(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, outputs: int, inputs: int) -> DeltaRows:
    """The deltas, checked against the base, each other and the place of ``x``, before anything is launched."""
    check_places(x, starts=starts, columns=columns, values=values)
    if starts.dim() != 2 or starts.shape[1] != outputs + 1 or starts.dtype is not torch.int32:
        raise ValueError(
            f"starts {starts.dtype} {tuple(starts.shape)}; deltas to {outputs} outputs need torch.int32 "
            f"[deltas, {outputs + 1}]"
        )
    if columns.dim() != 1 or columns.shape != values.shape or columns.dtype is not column_dtype(inputs):
        raise ValueError(
            f"columns {columns.dtype} {tuple(columns.shape)} and values {tuple(values.shape)}; deltas to {inputs} "
            f"inputs need {column_dtype(inputs)} [K] and one value each"
        )
    if values.dtype not in _VALUES:
        raise ValueError(f"values of {values.dtype}; allowed are {', '.join(map(str, _VALUES))}")
    if not all(part.is_contiguous() for part in (starts, columns, values)):
        raise ValueError("starts, columns and values must be contiguous")
    return DeltaRows(starts, columns, values, inputs)


def _run(x: Tensor, base: Tensor | LaneWeight, deltas: DeltaRows, task: Tensor | None, bias: Tensor | None) -> Tensor:
    flat = flat_rows(x)
    if task is None and deltas.count != 1:
        raise ValueError(f"{deltas.count} deltas and no task; say of each row which of them is its own")
    if task is not None and (tuple(task.shape) != x.shape[:-1] or task.dtype is not torch.int32):
        raise ValueError(f"task {task.dtype} {tuple(task.shape)}; rows {tuple(x.shape[:-1])} need as many torch.int32")
    check_places(x, task=task)
    bias = checked_bias(bias, deltas.outputs, x)
    if not (len(flat) and deltas.outputs):
        return x.new_empty(*x.shape[:-1], deltas.outputs)
    own = task.reshape(-1).contiguous() if task is not None else None
    y: Tensor = choose_delta(flat, base, own).run(flat, base, deltas, own, bias)
    return y.reshape(*x.shape[:-1], -1)


@torch.library.custom_op("compress::delta_linear", mutates_args=())
def delta_linear(
    x: Tensor,
    weight: Tensor,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    task: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``x`` [..., I], ``weight`` [O, I] of its dtype, ``bias`` [O], deltas as in DeltaRows, ``task`` int32 [...], to
    [..., O].

    Raises:
        ValueError: sizes or types do not fit each other, or there are several deltas and no ``task``.
    """
    inputs = row_length(x)
    if weight.dim() != 2 or weight.shape[1] != inputs or weight.dtype is not x.dtype:
        raise ValueError(
            f"weight {weight.dtype} {tuple(weight.shape)}; x {x.dtype} needs the same type and [O, {inputs}]"
        )
    check_places(x, weight=weight)
    return _run(x, weight.contiguous(), _checked(x, starts, columns, values, *weight.shape), task, bias)


@torch.library.custom_op("compress::packed_delta_linear", mutates_args=())
def packed_delta_linear(
    x: Tensor,
    units: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    task: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """``x`` [..., I] over a base as in LaneWeight and deltas as in DeltaRows, ``task`` int32 [...], to [..., O].

    Raises:
        ValueError: as :func:`delta_linear`, and as :func:`~compress.kernels.packed_linear.packed_linear`.
    """
    weight = checked_weight(x, units, scale, zero_point, bits, group_size)
    return _run(x, weight, _checked(x, starts, columns, values, weight.outputs, weight.inputs), task, bias)


@torch.library.custom_op("compress::add_delta_", mutates_args=("weight",))
def add_delta_(weight: Tensor, starts: Tensor, columns: Tensor, values: Tensor, number: int = 0) -> None:
    """Add delta ``number`` to ``weight`` [O, ...], float and contiguous, where it lies; as on a CPU, bit for bit.

    Raises:
        ValueError: sizes or types do not fit, ``weight`` is not contiguous, or there is no such delta.
    """
    if not weight.is_contiguous() or weight.dim() < 2:
        raise ValueError(f"a weight {tuple(weight.shape)} of strides {weight.stride()}; it must be contiguous [O, ...]")
    flat = weight.view(weight.shape[0], weight[0].numel() if len(weight) else 0)
    delta = _checked(weight, starts, columns, values, *flat.shape)
    if not 0 <= number < delta.count:
        raise ValueError(f"delta {number}; there are 0 to {delta.count - 1}")
    if weight.numel():
        choose(Call.on(flat, "add_delta_", delta.outputs)).run(weight, delta, number)


@delta_linear.register_fake
def _shape(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@packed_delta_linear.register_fake
def _packed_shape(x: Tensor, units: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@add_delta_.register_fake
def _nothing(weight: Tensor, starts: Tensor, columns: Tensor, values: Tensor, number: int = 0) -> None:
    return None
