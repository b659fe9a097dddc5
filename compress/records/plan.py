"""``Plan`` says what is to be done, enough to do it again; ``plan.json``.

``Allocation``, inside it, says why just that, and ``Report`` (compress/records/report.py) what came out.
"""

from __future__ import annotations

from pydantic import Field

from compress.records.allocation import Allocation
from compress.records.layers import SCHEMA_VERSION, QuantOption, Record, Split

__all__ = ["Choice", "Plan", "Skip", "Steps"]


class Choice(Record):
    """What the plan does to one layer: ``method`` produces the numbers, ``format`` says how they are stored and run."""

    layer: str
    method: str
    option: QuantOption
    format: str
    reason: str | None = Field(default=None, description="why not what was asked for; None when it is")


class Skip(Record):
    """A layer left in floating point, and why."""

    layer: str
    reason: str


class Steps(Record):
    """What happens besides the layers' own methods, in this order; None where data decide it is not possible."""

    equalize: bool = False
    smoothquant: bool = False
    awq: bool = False
    bias_correction: bool = False
    statistics_tuning: bool = False
    bias_tuning: bool = False


class Plan(Record):
    """Everything that determines the artifact, given the model file and the data."""

    schema_version: int = SCHEMA_VERSION
    choices: tuple[Choice, ...]
    splits: tuple[Split, ...] = Field((), description="done first; choices name the thin layers that come of them")
    skipped: tuple[Skip, ...] = ()
    target: str
    observer: str = Field(description="how activation ranges are chosen")
    steps: Steps = Steps()
    iterations: int = Field(description="optimisation steps a layer, for methods that take any")
    seed: int = 0
    samples: int = Field(0, description="calibration samples used; 0 without data")
    model_fingerprint: str
    data_fingerprint: str | None = None
    allocation: Allocation | None = Field(None, description="None for a uniform plan, or one edited since")
    latency_sha256: str | None = Field(None, description="of the table of times that decided, kept beside the plan")
    latency_table: str | None = Field(None, exclude=True, repr=False, description="that table, where it is at hand")

    def choice(self, layer: str) -> Choice | None:
        """The choice for ``layer``, None when it stays float."""
        return next((choice for choice in self.choices if choice.layer == layer), None)
