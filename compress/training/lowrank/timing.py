"""How long every member of a family takes on this machine: exported, timed beside the dense model, and remembered.

Times lie in ``latency.json`` in the family's folder, a table for every machine, runtime, number of threads and batch,
so that a folder can be carried from one device to the next and no member is measured twice.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import nn

from compress.errors import InputError
from compress.exporters.build import build_onnx, write_onnx
from compress.files.cache import digest
from compress.files.outputs import new_file
from compress.intake.model import take_in
from compress.kernels.table import register_operators
from compress.lowrank.decompose import decomposed_layers
from compress.measure.bench import bench
from compress.measure.latency_table import conditions
from compress.measure.machine import describe_environment
from compress.models.checkpoint import LoadedModel
from compress.progress import Progress, silent
from compress.records.layers import Record
from compress.training.lowrank.family import Family, cut

__all__ = ["FamilyTimes", "MemberTimer", "MemberTimes"]

TIMES = "latency.json"
_PROVIDER = "CPUExecutionProvider"
# Sessions that are open at once, the dense model's not counted.
_TOGETHER = 8


class MemberTimes(Record):
    """Microseconds a call under one set of conditions."""

    conditions: dict[str, str]
    dense_us: float
    members_us: dict[int, float] = Field({}, description="by the member's place in family.json")


class FamilyTimes(Record):
    """``latency.json``; ``family`` names the family.json that it belongs to."""

    schema_version: Literal[1] = 1
    family: str
    tables: tuple[MemberTimes, ...] = ()


@dataclass
class MemberTimer:
    """Times members of the family in ``folder``; ``module`` is its decomposed one and stays as it is.

    Attributes:
        threads: inside an operator.
        batch: samples a call.
        measured: how many files were timed so far, the dense model's not counted.
    """

    folder: Path
    module: nn.Module
    family: Family
    threads: int = 1
    batch: int = 1
    progress: Progress = silent
    measured: int = 0
    _times: FamilyTimes = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("--threads", self.threads), ("--batch", self.batch)):
            if value < 1:
                raise InputError(f"{name} {value}: at least 1")
        self._conditions = conditions(describe_environment(), _PROVIDER, self.threads) | {"batch": str(self.batch)}
        self._times = self._read()

    @property
    def dense_us(self) -> float:
        """Microseconds of the dense model's architecture; measured with the first members."""
        table = self._table()
        if table is None:
            self.times([len(self.family.members) - 1])
            table = self._table()
        assert table is not None
        return table.dense_us

    def times(self, numbers: Iterable[int]) -> dict[int, float]:
        """Microseconds of the members at ``numbers``; those that are not known yet are measured, and kept.

        Raises:
            InputError: a member cannot be exported or run.
        """
        wanted = list(numbers)
        table = self._table()
        missing = [each for each in wanted if table is None or each not in table.members_us]
        for start in range(0, len(missing), _TOGETHER):
            some = missing[start : start + _TOGETHER]
            self._add(some, self._measure(some, start, len(missing)))
        table = self._table()
        return {each: table.members_us[each] for each in wanted} if table is not None else {}

    def within(self, numbers: Sequence[int], limit_us: float) -> list[int]:
        """Of ``numbers``, by falling MACs, those from the first on that takes at most ``limit_us``; found by bisection.

        Fewer MACs are taken to be no slower, which times confirm but for their noise; where even the last one is too
        slow all are timed, and those that fit are returned, none as a rule.
        """
        low, high = 0, len(numbers) - 1
        while low < high:
            middle = (low + high) // 2
            if self.times([numbers[middle]])[numbers[middle]] <= limit_us:
                high = middle
            else:
                low = middle + 1
        if self.times([numbers[low]])[numbers[low]] <= limit_us:
            return list(numbers[low:])
        return [number for number, value in self.times(numbers).items() if value <= limit_us]

    def _measure(self, numbers: Sequence[int], done: int, total: int) -> list[float]:
        """Medians of the dense model and of the members at ``numbers``, in turn."""
        with tempfile.TemporaryDirectory(prefix="compress-") as place:
            files = [Path(place) / "dense.onnx"]
            length = self._export(_dense(self.module), files[0])
            for position, number in enumerate(numbers):
                self.progress("exporting members", done + position, total)
                module = copy.deepcopy(self.module)
                cut(self.folder, module, self.family, self.family.members[number])
                files.append(Path(place) / f"{number}.onnx")
                self._export(module, files[-1])
            report = bench(
                files, batch_sizes=(self.batch,), threads=self.threads, provider=_PROVIDER, memory=False,
                dims={"sequence": length} if length else {}, progress=self.progress,
            )  # fmt: skip
        self.measured += len(numbers)
        return [row.p50_ms * 1e3 for row in report.rows]

    def _export(self, module: nn.Module, path: Path) -> int | None:
        example = tuple(each.example(2) for each in self.family.inputs)
        traced = take_in(LoadedModel(module, example, str(self.folder), digest(str(path)))).traced
        register_operators()  # the exporter's table names them, though float members have none
        write_onnx(build_onnx(traced), path, {})
        return traced.length

    def _table(self) -> MemberTimes | None:
        return next((each for each in self._times.tables if each.conditions == self._conditions), None)

    def _add(self, numbers: Sequence[int], medians: Sequence[float]) -> None:
        table = self._table() or MemberTimes(conditions=self._conditions, dense_us=medians[0])
        # The machine may run at another speed than when the first members were timed: the dense model says which.
        scale = table.dense_us / medians[0]
        new = {number: median * scale for number, median in zip(numbers, medians[1:], strict=True)}
        table = table.model_copy(update={"members_us": dict(sorted({**table.members_us, **new}.items()))})
        others = [each for each in self._times.tables if each.conditions != self._conditions]
        self._times = self._times.model_copy(update={"tables": (*others, table)})
        with new_file(self.folder / TIMES) as temporary:
            temporary.write_text(self._times.model_dump_json(indent=1) + "\n")

    def _read(self) -> FamilyTimes:
        identity = digest(self.family.model_dump(mode="json"))
        path = self.folder / TIMES
        if not path.exists():
            return FamilyTimes(family=identity)
        try:
            found = FamilyTimes.model_validate_json(path.read_text())
        except (ValidationError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged; delete it, and members will be timed again") from error
        if found.family != identity:
            raise InputError(f"{path} belongs to another family.json; delete it, and members will be timed again")
        strange = [each for table in found.tables for each in table.members_us if each >= len(self.family.members)]
        if strange:
            raise InputError(f"{path} names member {strange[0]}, of {len(self.family.members)}; delete it")
        return found


def _dense(module: nn.Module) -> nn.Module:
    """The architecture before it was decomposed: every layer one of the dense layer's shape."""
    whole = copy.deepcopy(module)
    for name, layer in decomposed_layers(whole).items():
        whole.set_submodule(name, layer.dense())
    return whole
