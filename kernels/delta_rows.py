"""The layout sparse deltas have for kernels: one owner, specified here, tested against golden bytes.

T deltas to one weight [O, I] lie in three tensors, row after row, delta after delta:

- ``starts`` int32 [T, O + 1]: row ``o`` of delta ``t`` has the entries from ``starts[t, o]`` to ``starts[t, o + 1]``.
- ``columns`` [K]: of each entry, increasing in a row. int16 that holds the column's low 16 bits where I is at most
  65,536 (column 40,000 is -25,536), else int32.
- ``values`` [K]: what is added there; float16, bfloat16 or float32.

Storage (compress/sparse/deltafile.py) is made for the file; this is made once, when a delta is loaded. At 16-bit values
an entry takes four bytes: at 5 % density a delta is two fifths of its base at 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DeltaRows", "column_dtype"]

_SHORT = 1 << 16
_MOST = (1 << 31) - 1


def column_dtype(inputs: int) -> torch.dtype:
    """What columns of rows of ``inputs`` entries are stored as."""
    return torch.int16 if inputs <= _SHORT else torch.int32


@dataclass(frozen=True)
class DeltaRows:
    """T sparse deltas to one weight [O, I], in this module's layout.

    Attributes:
        starts: int32 [T, O + 1].
        columns: int16 or int32 [K].
        values: [K].
        inputs: I.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    inputs: int

    @property
    def count(self) -> int:
        """T, how many deltas."""
        return self.starts.shape[0]

    @property
    def outputs(self) -> int:
        """O."""
        return self.starts.shape[1] - 1

    def to(self, device: str | torch.device) -> DeltaRows:
        """The same deltas on ``device``."""
        starts, columns, values = (part.to(device) for part in (self.starts, self.columns, self.values))
        return DeltaRows(starts, columns, values, self.inputs)

    def full_columns(self) -> Tensor:
        """Columns as int64 [K]."""
        return self.columns.long() & (_SHORT - 1) if self.columns.dtype is torch.int16 else self.columns.long()

    def rows_of(self, delta: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column (int64 [k]) and value [k] of every entry of one delta."""
        starts = self.starts[delta].long()
        rows = torch.repeat_interleave(torch.arange(self.outputs, device=starts.device), starts.diff())
        span = slice(int(starts[0]), int(starts[-1]))
        return rows, self.full_columns()[span], self.values[span]

    @staticmethod
    def from_flat(shape: Sequence[int], index: Tensor, values: Tensor, dtype: torch.dtype = torch.float32) -> DeltaRows:
        """One delta to a weight of ``shape`` [O, ...], as compress.sparse has it; rows are flattened behind O.

        Args:
            index: int64 [K], flat and increasing.
            values: [K], stored as ``dtype``.

        Raises:
            ValueError: the indices do not increase within the weight, there are not as many values, one of them is not
                finite in ``dtype``, or there are 2**31 entries and more.
        """
        outputs, inputs = shape[0], torch.Size(shape[1:]).numel()
        if index.shape != values.shape or index.dim() != 1:
            raise ValueError(f"{tuple(index.shape)} indices and {tuple(values.shape)} values; give one value an index")
        if len(index) > _MOST:
            raise ValueError(f"{len(index):,} entries; a weight's delta has at most {_MOST:,}: split the weight")
        if len(index) and not (
            bool((index.diff() > 0).all()) and int(index[0]) >= 0 and int(index[-1]) < outputs * inputs
        ):
            raise ValueError(f"indices must increase within 0 to {outputs * inputs - 1:,}")
        stored = values.to(dtype)
        if not bool(stored.isfinite().all()):
            raise ValueError(f"values reach beyond {dtype}; keep them as torch.float32")
        bounds = torch.arange(outputs + 1, device=index.device) * inputs
        starts = torch.searchsorted(index, bounds).to(torch.int32)[None]
        # Narrowing keeps the low bits, which is what is stored.
        return DeltaRows(starts, (index % inputs).to(column_dtype(inputs)), stored, inputs)

    @staticmethod
    def stack(deltas: Sequence[DeltaRows]) -> DeltaRows:
        """Several deltas to one base as one.

        Raises:
            ValueError: there is none, they are for weights of different shapes or have values of different types, or
                together 2**31 entries and more.
        """
        kinds = {(each.outputs, each.inputs, each.values.dtype) for each in deltas}
        if len(kinds) != 1:
            raise ValueError(f"deltas of {sorted(map(str, kinds))}; stacked ones have one shape [O, I] and one dtype")
        total = sum(len(each.values) for each in deltas)
        if total > _MOST:
            raise ValueError(f"{total:,} entries together; a stack has at most {_MOST:,}: make two")
        starts, offset = [], 0
        for each in deltas:
            starts.append(each.starts + offset)
            offset += len(each.values)
        columns, values = (torch.cat(parts) for parts in zip(*((d.columns, d.values) for d in deltas), strict=True))
        return DeltaRows(torch.cat(starts), columns, values, deltas[0].inputs)
