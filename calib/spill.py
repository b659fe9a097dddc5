"""Samples of one value, on disk: written batch by batch, read by index, memory flat in their number.

Plain reads and writes, not a memory map: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["SpilledSamples"]


class SpilledSamples:
    """Samples [N, ...] of one type, in one file of a scratch folder; :meth:`close` deletes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - lives as long as the object
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> SpilledSamples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def append(self, batch: Tensor) -> None:
        """Add ``batch`` [n, ...]; every batch has the same trailing shape and type."""
        self._shape, self._dtype = tuple(batch.shape[1:]), batch.dtype
        view = memoryview(batch.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        while view:  # a raw file may write less than it was given
            view = view[self._file.write(view) :]
        self._count += len(batch)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self._shape

    def take(self, index: Tensor) -> Tensor:
        """The samples at ``index`` ([n] int64), as [n, ...]."""
        return self._read(index, self._shape)

    def take_parts(self, index: Tensor) -> Tensor:
        """The parts at ``index`` ([n] int64) of samples [L, ...] put end to end, as [n, ...]."""
        return self._read(index, self._shape[1:])

    def _read(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty((len(index), *shape), dtype=self._dtype)
        size = math.prod(shape) * out.element_size()
        rows = out.view(-1).view(torch.uint8).view(len(index), size).numpy()
        for row, sample in enumerate(index.tolist()):
            if os.preadv(self._file.fileno(), [memoryview(rows[row])], sample * size) != size:
                raise OSError(f"{self._path}: sample {sample} is not there; the scratch file was cut short")
        return out

    def batches(self, size: int) -> Iterator[Tensor]:
        """All samples in order, ``size`` at a time."""
        for start in range(0, self._count, size):
            yield self.take(torch.arange(start, min(start + size, self._count)))

    def close(self) -> None:
        """Delete the file."""
        if not self._file.closed:
            self._file.close()
            self._path.unlink(missing_ok=True)
