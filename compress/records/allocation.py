"""Budgets, what each way of a layer costs, and the answer with its certificate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.records.layers import QuantOption, Record, Split

__all__ = ["Allocation", "Budget", "Candidate", "Cost", "Front", "FrontPoint"]


class Cost(Record):
    """What one candidate takes of every quantity that a budget may limit."""

    size_bytes: int = Field(description="the layer as it stands in the file")
    macs: int
    bops: int = Field(description="MACs times bits of weight and activation, 32 for a float one")
    latency_us: float | None = Field(None, description="the exported operator alone; None when latency does not matter")


class Candidate(Record):
    """One way to do one layer: what it costs and how much it hurts; ``option`` None leaves the layer float."""

    layer: str
    method: str | None = None
    option: QuantOption | None = None
    format: str = "float"
    split: Split | None = Field(None, description="how it is done by thin layers; None: as one")
    cost: Cost
    error: float = Field(description="added to the model's error, in the unit of the allocation's sensitivity")

    def __str__(self) -> str:
        text = "float" if self.option is None else str(self.option)
        if self.option is not None and self.option.act_bits is None:
            text += " on floats"
        return f"{text}, {self.split}" if self.split else text


class Budget(Record):
    """The largest allowed value of one quantity: bytes, microseconds, points of accuracy, bit operations, or MACs."""

    quantity: Literal["size", "latency", "drop", "bops", "macs"]
    limit: float
    relative: bool = Field(False, description="a multiple of the float model's value, not a value")


class Allocation(Record):
    """Why a plan is what it is: the budgets, what was predicted for it, and how far from the best it can be.

    ``predicted`` and ``measured`` hold totals of the whole model by quantity: ``size`` (bytes), ``latency``
    (microseconds), ``bops``, ``error``. The certificate is ``value``, ``bound`` and ``gap``: no choice of candidates
    within the budgets has an objective below ``bound``.
    """

    budgets: tuple[Budget, ...]
    sensitivity: str = Field(description="what a candidate's error is measured by")
    objective: str = Field(description="the quantity that was minimised")
    value: float
    bound: float
    gap: float = Field(description="(value - bound) / |value|")
    status: Literal["optimal", "feasible"] = Field(description="optimal only when proven")
    solver: str
    seconds: float = Field(description="in the solver")
    predicted: dict[str, float]
    measured: dict[str, float] = Field(default_factory=dict, description="of the exported file, before calibration")
    float_totals: dict[str, float] = Field(default_factory=dict, description="of the float model")
    chosen: tuple[Candidate, ...] = Field(description="one a layer, those left float included")
    notes: tuple[str, ...] = ()
    settings: str = Field("", description="digest of the plan's settings besides its choices")
    threads: int = Field(1, description="of ONNX Runtime, where latency was measured")
    batch: int = 1
    machine: str | None = Field(None, description="whose latencies they are; None: of the machine that made the plan")


class FrontPoint(Record):
    """One plan of the front; totals in bytes, microseconds, bit operations and the sensitivity's unit."""

    number: int
    plan: str = Field(description="name of the plan's file within the folder")
    predicted: dict[str, float]
    measured: dict[str, float] = Field(description="of the exported file; with --measure also error and accuracy")
    greedy_error: float | None = Field(description="what greedy allocation predicts within the same budget")
    limit: float = Field(description="of the quantity that was swept")
    bound: float = Field(description="no plan within the limit has a smaller predicted error")
    gap: float
    status: str


class Front(Record):
    """What ``compress sweep`` finds: a plan for every value of the quantity that was swept."""

    over: str
    sensitivity: str
    float_totals: dict[str, float]
    points: tuple[FrontPoint, ...]
    notes: tuple[str, ...] = ()
