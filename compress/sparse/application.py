"""Deltas added to a module, in place, all or nothing, and taken out of it again to the bit.

What is added is rounded once: theta = round(theta0 + sum), the sum in float64. Subtracting would not give theta0 back
in floating point, so that whoever applies keeps what the touched entries were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import (
    Overlap,
    SparseDelta,
    SparseTensor,
    measure_overlap,
    put,
    sum_deltas,
    take,
)
from compress.sparse.deltafile import Undo

__all__ = ["Applied", "apply_deltas", "check_base", "choose_head", "revert"]


@dataclass(frozen=True, eq=False)
class Applied:
    """What was done to a module.

    Attributes:
        before: what the touched entries and the replaced tensors were.
        overlap: how much the deltas meet.
        hashes: SHA-256 of the module's tensors before, by name; empty where none was needed.
    """

    before: SparseDelta
    overlap: Overlap
    hashes: dict[str, str]

    def undo(self, module: nn.Module) -> Undo:
        """To be kept beside the model that ``module``, with the deltas, is written to.

        Raises:
            ValueError: the base was not hashed.
        """
        if not self.hashes:
            raise ValueError("the base was not hashed: apply_deltas(..., hashed=True)")
        tensors = base_tensors(module)
        touched = self.before.tensors.keys() | self.before.dense.keys()
        after = self.hashes | tensor_hashes({name: tensors[name] for name in touched})
        return Undo(self.before, base_hash(after), base_hash(self.hashes))


def apply_deltas(
    module: nn.Module,
    deltas: Mapping[str, SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    head: str | None = None,
    heads: bool = True,
    any_base: bool = False,
    hashed: bool = False,
) -> Applied:
    """Add ``deltas`` to ``module``; the same bits in whatever order they come.

    Where one delta replaces a tensor whole and another adds to it, only the first counts: what was added to the base's
    head means nothing in another one.

    Args:
        deltas: by what they are called in messages, such as their files' names.
        weights: one a delta; None: 1 each. Heads are not weighted.
        head: which delta's dense tensors are taken, where several have some.
        heads: False leaves the dense tensors of all deltas out.
        any_base: apply them to a base that is not the one they were trained on, if names and shapes fit.
        hashed: hash the base even if ``any_base`` does not need it, for :meth:`Applied.undo`.

    Raises:
        InputError: a delta is for another base, does not fit, two have heads and none was chosen, or a sum is not
            finite. The module is as it was.
    """
    tensors = base_tensors(module)
    dense = choose_head(deltas, head) if heads else {}
    for name, delta in deltas.items():  # a head that is not taken need not fit
        _check_fits(name, replace(delta, dense=dense if delta.dense is dense else {}), tensors)
    hashes = tensor_hashes(tensors) if hashed or not any_base else {}
    if not any_base:
        check_base(deltas, hashes)
    try:
        summed = sum_deltas(list(deltas.values()), weights)
    except ValueError as error:
        raise InputError(str(error)) from error
    before: dict[str, SparseTensor] = {}
    after: dict[str, Tensor] = {}
    summed = {name: each for name, each in summed.items() if name not in dense}
    for name, each in summed.items():
        old = take(tensors[name], each.index)
        new = (old.double() + each.values.to(old.device)).to(old.dtype)
        if not bool(new.isfinite().all()):
            raise InputError(f"{name} would not be finite with the deltas; use smaller weights")
        before[name] = SparseTensor(each.shape, each.dtype, each.index, old.cpu())
        after[name] = new
    replaced = {name: tensors[name].detach().cpu().clone() for name in dense}
    # Nothing can fail from here on.
    for name, new in after.items():
        put(tensors[name], before[name].index, new)
    with torch.no_grad():
        for name, whole in dense.items():
            tensors[name].copy_(whole)
    overlap = measure_overlap(list(deltas.values()), summed)
    return Applied(SparseDelta(None, before, replaced), overlap, hashes)


def revert(module: nn.Module, before: SparseDelta) -> None:
    """Put ``before`` back into ``module``, to the bit.

    Raises:
        InputError: it does not fit the module, which is then as it was.
    """
    tensors = base_tensors(module)
    _check_fits("the record of what was before", before, tensors)
    for name, each in before.tensors.items():
        put(tensors[name], each.index, each.values)
    with torch.no_grad():
        for name, whole in before.dense.items():
            tensors[name].copy_(whole)


def choose_head(deltas: Mapping[str, SparseDelta], head: str | None) -> dict[str, Tensor]:
    """The dense tensors of the delta called ``head``; None: of the one that has some, none where none has.

    Raises:
        InputError: there is no such delta, or none was named and several have some.
    """
    if head is not None:
        if head not in deltas:
            raise InputError(f"--head {head}: no such delta is given; there are {', '.join(deltas)}")
        return deltas[head].dense
    with_head = {called: delta.dense for called, delta in deltas.items() if delta.dense}
    if len(with_head) > 1:
        raise InputError(
            f"{' and '.join(with_head)} all replace a head; say whose is to be used with --head "
            f"{next(iter(with_head))}, or keep the base's with --no-heads; where there are no such options, to "
            "`compress sparse compose`, which makes one delta of them"
        )
    return next(iter(with_head.values()), {})


def check_base(deltas: Mapping[str, SparseDelta], hashes: Mapping[str, str]) -> None:
    """Refuse deltas for another base than that whose tensors have ``hashes``, by name.

    Raises:
        InputError: one of them is.
    """
    for called, delta in deltas.items():
        found = base_hash(hashes, delta.without)
        if delta.base is not None and delta.base != found:
            raise InputError(
                f"{called} is for another base: its hash is {delta.base[:12]}, the model's {found[:12]}; give the base "
                "it was trained on, or, if this one fits as well, say so to `compress sparse merge`: --any-base"
            )


def _check_fits(called: str, delta: SparseDelta, tensors: Mapping[str, Tensor]) -> None:
    shapes = {name: each.shape for name, each in delta.tensors.items()}
    shapes |= {name: tuple(each.shape) for name, each in delta.dense.items()}
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(f"{called}: the model has no {name}; the delta is for another architecture")
        if tuple(tensors[name].shape) != shape:
            if name in delta.dense and tuple(tensors[name].shape[1:]) == shape[1:]:
                raise InputError(
                    f"{called}: its head {name} has {shape[0]} outputs, the model's {tensors[name].shape[0]}; apply it "
                    "to the model it was trained on, or leave heads out"
                )
            raise InputError(
                f"{called}: {name} has shape {list(shape)} there and {list(tensors[name].shape)} in the model; the "
                "delta is for another architecture"
            )
    for name, each in delta.tensors.items():
        if not tensors[name].is_floating_point():
            raise InputError(f"{called}: {name} holds {tensors[name].dtype} in the model; deltas are added to floats")
        if len(each.index) and not 0 <= int(each.index[0]) <= int(each.index[-1]) < math.prod(each.shape):
            raise InputError(f"{called}: {name} has indices beyond its {math.prod(each.shape):,} entries")
        if not bool(each.values.isfinite().all()):
            raise InputError(f"{called}: {name} has a difference that is not finite")
