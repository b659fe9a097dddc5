"""The report: what was done to each layer, what it cost and what it gained; ``report.json``, schema version 3.

Units are in the names: ``_bytes``, ``_ms``, ``_seconds``. Errors are relative squared errors (0 is exact, 1 is as large
as the signal). ``None`` means not measured, and ``notes`` say why where it is not obvious.
"""

from __future__ import annotations

from pydantic import Field

from compress.files.digests import FIRST_WITH_HASHES, REPORT_VERSION
from compress.records.environment import Environment
from compress.records.layers import Record
from compress.records.plan import Plan

__all__ = [
    "WARNING",
    "ExportCheck",
    "FloatDistance",
    "Latency",
    "LayerCheck",
    "LayerProof",
    "LayerRow",
    "Metric",
    "OutputDistance",
    "Proof",
    "Report",
    "Size",
    "StreamReport",
    "StreamedLayer",
]

WARNING = "WARNING: "
"""What a note begins with that is to be seen by whoever reads no notes."""


class LayerRow(Record):
    """One layer."""

    name: str
    kind: str
    option: str = Field(description="W4A8, or float")
    method: str | None = None
    parameters: int
    weight_bytes: int = Field(description="weights as they stand in the file: packed codes and scales")
    float_bytes: int
    weight_error: float | None = None
    output_error: float | None = Field(None, description="relative to the float layer's output, on calibration samples")
    input_error: float | None = Field(
        None, description="what a block kernel adds by rounding the layer's input to int8, relative and squared"
    )
    nearest_error: float | None = Field(None, description="the same with weights rounded to nearest")
    note: str | None = None


class Size(Record):
    """The exported files, as they lie on disk."""

    float_bytes: int
    compressed_bytes: int


class Latency(Record):
    """Medians of interleaved runs in one process."""

    threads: int
    batch: int = 1
    length: int | None = Field(None, description="tokens a sample; None for inputs of other kinds")
    float_ms: float
    compressed_ms: float


class Metric(Record):
    """The model's metric on the evaluation data."""

    name: str = Field(description="accuracy (a fraction), or mse")
    samples: int
    float_model: float
    compressed_torch: float
    compressed_onnx: float
    agreement: float | None = Field(None, description="fraction of samples with the float model's class")
    lost: int | None = Field(None, description="samples the float model had right and the compressed one has not")
    won: int | None = Field(None, description="samples only the compressed model has right")


class LayerProof(Record):
    """What the codes of one layer on integers say about it; ``worst`` of ``limit`` is "124 of 128"."""

    name: str
    operator: str = Field(description="what ONNX Runtime runs it with")
    inputs: str = Field(description="uint8 or int8, on x86; empty where not known")
    weights: str
    worst: int | None = Field(
        None, description="largest sum of codes of one sign that stand side by side; of a depthwise layer, of one code"
    )
    limit: int | None = Field(
        None, description="up to which two products fit in 16 bits; None where nothing is added in 16 bits"
    )
    channel: int | None = Field(None, description="output channel of the largest sum")
    pair: tuple[int, ...] = Field((), description="where it stands there, in the order of the kernel's sums")
    codes: tuple[int, ...] = Field((), description="the codes there")
    lowest: int | None = Field(None, description="lowest code of the layer")
    unproven: tuple[str, ...] = Field((), description="instruction sets on which it is not proven to be exact")
    reason: str | None = Field(None, description="why it cannot be judged from its codes")


class Proof(Record):
    """Where an ONNX file's integer sums are exact, for the order in which ONNX Runtime's CPU kernels add."""

    onnxruntime: str = Field(description="version whose optimised graph was judged")
    layers: tuple[LayerProof, ...] = Field(description="those that compute on integers")
    instruction_sets: dict[str, bool] = Field(description="whether every layer is proven to be exact there")
    failures: tuple[str, ...] = ()

    @property
    def proven(self) -> tuple[str, ...]:
        """Instruction sets on which every layer is exact."""
        return tuple(name for name, exact in self.instruction_sets.items() if exact)


class LayerCheck(Record):
    """One layer's kernel in ONNX Runtime, run alone on what the PyTorch graph feeds the layer."""

    name: str
    operator: str = Field(description="what ONNX Runtime's optimiser made of the layer")
    relative_l2: float
    steps: float = Field(
        description="the largest difference, in steps of the grid of its output; of a float output, in 255ths of its "
        "range"
    )
    allowed_steps: float = Field(description="what rounding explains")
    beyond_one_step: int = Field(description="values that are off by more than one step")
    values: int


class ExportCheck(Record):
    """The file in ONNX Runtime against the quantized PyTorch graph, on the same samples."""

    samples: int
    source: str = Field(description="what the samples are")
    relative_l2_unoptimized: float = Field(description="at ORT_DISABLE_ALL")
    relative_l2_optimized: float = Field(description="at ORT_ENABLE_ALL")
    agreement_unoptimized: float | None
    agreement_optimized: float | None
    integer_layers: int
    float_layers: int
    block_layers: int = Field(0, description="those whose weights stay packed at run time (MatMulNBits)")
    float_operators: dict[str, int] = Field(
        default_factory=dict, description="adds, pools and concatenations that an integer plan left on floats, by kind"
    )
    rounding_noise: float | None = Field(
        None, description="how far the graph is from itself with float tensors a millionth away; where it was asked for"
    )
    relative_l2_one_row: float | None = Field(
        None, description="at ORT_ENABLE_ALL, samples one at a time; None where the batch is fixed, or not measured"
    )
    relative_l2_noise: float | None = Field(
        None, description="the larger one on seeded noise, for whoever verifies without samples; None in older reports"
    )
    worst_sample: int | None = Field(None, description="the sample that is furthest off at ORT_ENABLE_ALL, from 0")
    worst_relative_l2: float | None = Field(None, description="of that sample alone")
    layers: tuple[LayerCheck, ...] = Field((), description="each layer alone, in order")
    notes: tuple[str, ...] = Field((), description="what the samples cannot show, as sentences")
    proof: Proof | None = Field(None, description="that integer sums are exact; None in reports from before it")
    failures: tuple[str, ...] = ()


class OutputDistance(Record):
    """One output of the file, in ONNX Runtime with all optimisations, against the float model's."""

    name: str
    relative_l2: float
    cosine: float
    worst_sample: int | None = Field(description="the sample that is furthest off, from 0; None: not one row a sample")
    worst_relative_l2: float | None = Field(description="of that sample alone")
    worst_operand: str | None = Field(
        None, description="of an output that is a concatenation: the part that is furthest off, and its place"
    )
    worst_operand_relative_l2: float | None = Field(None, description="of that part alone")


class FloatDistance(Record):
    """The finished file against the float model: what quantization costs, without labels."""

    samples: int
    source: str = Field(description="what the samples are")
    outputs: tuple[OutputDistance, ...]


class Report(Record):
    """Everything about one run of `compress quantize`."""

    schema_version: int = REPORT_VERSION
    plan: Plan
    layers: tuple[LayerRow, ...]
    size: Size
    float_distance: FloatDistance | None = Field(None, description="None in reports from before it")
    export_check: ExportCheck
    latency: Latency | None = None
    metric: Metric | None = None
    measured: dict[str, float] = Field(
        default_factory=dict,
        description="of a plan with budgets: size (bytes), latency (microseconds), error and drop (points) of the "
        "finished model, beside what plan.allocation predicted; empty for others",
    )
    calibration_seconds: float
    peak_memory_bytes: int
    files: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of what lies beside report.json, but for the plan: it finds damage"
    )
    notes: tuple[str, ...] = ()
    environment: Environment

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes that are to be seen whatever was asked to be printed."""
        return tuple(note for note in self.notes if note.startswith(WARNING))


class StreamedLayer(Record):
    """One linear of a model that was quantized block by block; errors are relative squared ones."""

    name: str
    weight_error: float
    output_error: float | None = Field(description="of the gram matrix of its input; None without data")
    nearest_error: float | None = Field(description="the same with weights rounded to nearest")
    note: str | None


class StreamReport(Record):
    """Everything about one run of `compress stream`; version 2 has ``files``."""

    schema_version: int = FIRST_WITH_HASHES
    model: str
    option: str
    method: str
    blocks: int
    continued: int = Field(description="blocks that an earlier run had finished")
    layers: tuple[StreamedLayer, ...] = Field(description="of the blocks done in this run")
    seconds_a_block: float | None
    seconds: float
    peak_memory_bytes: int
    files: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of what lies beside report.json, but for the plan: it finds damage"
    )
    notes: tuple[str, ...]
    environment: Environment
