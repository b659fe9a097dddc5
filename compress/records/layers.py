"""A model's layers: what each is, what may be done to it, and where a run stands."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SCHEMA_VERSION", "LayerRun", "LayerSpec", "QuantOption", "Record", "Split"]


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
