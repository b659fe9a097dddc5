"""Measured operators, kept for the next run: a file a machine, provider and number of threads.

A time is worth nothing on another processor or runtime, so the file says where it was measured and is refused anywhere
else. It is written whole or not at all, after every measurement. A kit's table (compress/measure/kit.py) is the
exception: it holds all that a plan for another machine needs, and nothing is ever added to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from compress.errors import InputError
from compress.files.cache import cache_folder, digest
from compress.files.outputs import new_file
from compress.measure.machine import describe_environment
from compress.records.environment import Environment
from compress.records.layers import Record

__all__ = ["LatencyTable", "ModelTime", "Operator", "check_complete", "conditions", "open_table"]

_NAMED = 3


class Operator(Record):
    """One exported layer at one shape, alone; a runtime's own cost of a node is part of each time.

    ``enter_us`` and ``leave_us`` are what it costs when the layers before and after it run on the other kind of
    numbers: quantizing, dequantizing, and changes of the memory layout.
    """

    signature: str = Field(description="operator, weight, attributes and input shape with its batch")
    compute: str = Field(description="integer, float, dynamic, or the option of packed weights")
    layer_us: float
    enter_us: float
    leave_us: float


class ModelTime(Record):
    """A whole model without calibration, all on one kind of numbers where it can be."""

    layers: str = Field(description="digest of the signatures of its layers, in order")
    kind: Literal["float", "integer"]
    us: float


class LatencyTable(Record):
    """All operators measured under one set of conditions."""

    schema_version: Literal[1] = 1
    measured_by: Literal["run", "kit"] = Field("run", description="a run of ours, or a kit's measure.py")
    environment: Environment
    provider: str
    threads: int
    operators: tuple[Operator, ...] = ()
    models: tuple[ModelTime, ...] = Field((), description="of a kit's table")

    @property
    def of_kit(self) -> bool:
        """Whether it speaks of another machine, so that nothing measured here may be mixed with it."""
        return self.measured_by == "kit"

    @property
    def machine(self) -> str:
        """Whose times they are."""
        flags = ", ".join(self.environment.cpu_flags) or self.environment.architecture
        return f"{self.environment.cpu} ({flags})"

    def whole(self, layers: str, kind: str) -> float | None:
        """Microseconds of a whole model, None where it was not measured."""
        return next((each.us for each in self.models if (each.layers, each.kind) == (layers, kind)), None)

    def only(self, signatures: Collection[str]) -> LatencyTable:
        """The table with the rows of ``signatures`` alone, in an order of their own."""
        kept = sorted(
            (row for row in self.operators if row.signature in signatures), key=lambda row: (row.signature, row.compute)
        )
        return self.model_copy(update={"operators": tuple(kept)})

    def text(self) -> str:
        """As it is written to a file."""
        return self.model_dump_json(indent=1)

    def find(self, signature: str, compute: str) -> Operator | None:
        """The row of one operator, None where it was not measured."""
        return next((row for row in self.operators if (row.signature, row.compute) == (signature, compute)), None)

    def with_operators(self, rows: list[Operator]) -> LatencyTable:
        """The table with ``rows`` added, replacing older ones of the same operators."""
        new = {(row.signature, row.compute) for row in rows}
        kept = [row for row in self.operators if (row.signature, row.compute) not in new]
        return self.model_copy(update={"operators": (*kept, *rows)})

    def save(self, path: Path) -> None:
        """Write to ``path``, whole or not at all."""
        with new_file(path, "name a folder that can be written in COMPRESS_CACHE") as temporary:
            temporary.write_text(self.text())


def open_table(path: Path | None, provider: str, threads: int) -> tuple[LatencyTable, Path]:
    """The table for this machine, and the file it is kept in; an empty one where there is no file yet.

    Args:
        path: the user's own file; None: the one in the cache folder that these conditions have.

    Raises:
        InputError: the file is damaged, or was measured under other conditions; the message names them.
    """
    environment = describe_environment()
    here = conditions(environment, provider, threads)
    if path is None:
        path = cache_folder() / f"latency-{digest(here)}.json"
    if not path.exists():
        return LatencyTable(environment=environment, provider=provider, threads=threads), path
    try:
        table = LatencyTable.model_validate_json(path.read_text())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a latency table of this version; delete it, and it will be measured again"
        ) from error
    there = conditions(table.environment, table.provider, table.threads)
    for name, value in here.items():
        if table.of_kit and name == "processor":
            continue
        if table.of_kit and there[name] != value:
            raise InputError(
                f"{path} was measured with {name} {there[name]}; this run has {value}. Write a kit with `compress "
                "bench --kit` under the same conditions, and measure it there again"
            )
        if there[name] != value:
            raise InputError(
                f"{path} was measured with {name} {there[name]}; this run has {value}. Times do not carry over: leave "
                "out --latency-table, or give a file of this machine"
            )
    return table, path


def check_complete(table: LatencyTable, path: Path, wanted: Iterable[tuple[str, str]]) -> None:
    """Refuse a kit's table that lacks one of the operators ``wanted``, each a signature and a compute.

    Raises:
        InputError: naming them.
    """
    missing = [f"{signature} ({compute})" for signature, compute in wanted if table.find(signature, compute) is None]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise InputError(
            f"{path} is of other operators: it has no time of {'; '.join(missing[:_NAMED])}{more}. Write a kit for "
            "this model, batch, ranks and rows with `compress bench --kit`, and measure it on that machine"
        )


def conditions(environment: Environment, provider: str, threads: int) -> dict[str, str]:
    """What a time depends on besides what is timed."""
    return {
        "processor": f"{environment.cpu} ({', '.join(environment.cpu_flags)})",
        "onnxruntime": str(environment.onnxruntime),
        "provider": provider,
        "threads": str(threads),
    }
