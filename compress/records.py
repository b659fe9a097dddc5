"""The small frozen records that pass between stages; each is a JSON file on request.

``Plan`` says what is to be done, enough to do it again, and ``Allocation``, inside it, why just that; ``Report``
(compress/report/schema.py) says what came out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "SCHEMA_VERSION",
    "Allocation",
    "Budget",
    "Candidate",
    "Choice",
    "Cost",
    "LayerRun",
    "LayerSpec",
    "Plan",
    "QuantOption",
    "Record",
    "Skip",
    "Split",
    "Steps",
]

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Base of every record: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerSpec(Record):
    """One compressible layer of the traced graph, or one that is not and why."""

    name: str
    kind: str = Field(description="conv1d, conv2d, linear, or the operator's name for what cannot be compressed")
    weight_shape: tuple[int, ...]
    groups: int = 1
    macs: int = Field(description="multiply-accumulates per sample, all calls together")
    rows: int = Field(description="output positions per sample (1 for a linear on a vector), all calls together")
    calls: int = Field(1, description="how often the graph calls it; more than one for a shared module")
    activation: str | None = Field(None, description="relu or relu6 when the output feeds nothing else")
    block: str = Field("", description="path of the module that holds it")
    refusal: str | None = Field(None, description="why it cannot be compressed; None when it can")
    weights: int | None = Field(None, description="numbers in all of its weights, where it has several")

    @property
    def parameters(self) -> int:
        """Number of weights, the bias not counted."""
        if self.weights is not None:
            return self.weights
        count = 1
        for size in self.weight_shape:
            count *= size
        return count


class QuantOption(Record):
    """How one layer is to be quantized. ``act_bits`` None keeps its input in floating point."""

    bits: int = Field(ge=2, le=8)
    act_bits: int | None = Field(None, ge=2, le=8)
    dynamic: bool = Field(False, description="the input's grid is measured as the model runs; 8 bits, linears only")
    symmetric: bool = True
    group_size: int | None = Field(None, ge=2, description="weights of a row that share a grid; None: the whole row")

    @property
    def inputs(self) -> str:
        """What the layer reads: "float", "static" (on a calibrated grid) or "dynamic"."""
        if self.act_bits is None:
            return "float"
        return "dynamic" if self.dynamic else "static"

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        dynamic = "d" if self.dynamic else ""
        return f"W{self.bits}{group}" + (f"A{self.act_bits}{dynamic}" if self.act_bits else "")


class Choice(Record):
    """What the plan does to one layer: ``method`` produces the numbers, ``format`` says how they are stored and run."""

    layer: str
    method: str
    option: QuantOption
    format: str
    reason: str | None = Field(default=None, description="why not what was asked for; None when it is")


class Split(Record):
    """A layer done by two thin ones, ``<layer>.down`` and ``<layer>.up``, which are then layers like any other.

    ``factors`` take the layer's place; a ``branch`` corrects what quantization does to it, and is added to its output.
    """

    layer: str
    rank: int = Field(ge=1)
    form: Literal["factors", "branch"] = "factors"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the layers that there are instead, in execution order."""
        thin = (f"{self.layer}.down", f"{self.layer}.up")
        return thin if self.form == "factors" else (thin[0], self.layer, thin[1])

    def refusal(self, layer: LayerSpec) -> str | None:
        """Why ``layer`` cannot be done so; None when it can."""
        if layer.refusal:
            return layer.refusal
        if layer.kind not in ("conv1d", "conv2d", "linear"):
            return f"{layer.kind} has no matrix that would be cut"
        if layer.groups != 1:
            return f"a convolution of {layer.groups} groups has no matrix that would be cut"
        if layer.calls != 1:
            return f"it is called {layer.calls} times, and is cut for one"
        most = min(layer.weight_shape[0], layer.parameters // layer.weight_shape[0])
        if self.rank > most:
            return f"rank {self.rank}: allowed are 1 to {most}"
        if self.form == "branch" and layer.kind != "linear":
            return f"only a linear has a branch beside it, not a {layer.kind}"
        return None

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.form == "factors" else f"+ rank {self.rank}"


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


class LayerRun(Record):
    """One call of a layer, and what runs it."""

    layer: str
    operator: str = Field(description="as the graph calls it: packed_linear, linear, conv2d, ...")
    kernel: str = Field(description="a row of the kernel table, reference (plain PyTorch) or torch (its own operator)")
    rows: int = Field(description="of the product: samples times tokens, of a convolution output positions")
    inputs: int
    outputs: int
    bits: int | None = Field(description="of a weight in codes; None: floats")
    group_size: int | None = Field(description="inputs that share a grid; None: floats")
    rank: int = Field(description="of a low-rank weight or branch; 0 without")
    refused: tuple[str, ...] = Field(description="kernel: why it does not take the call")
