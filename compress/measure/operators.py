"""Time exported operators: every distinct layer of a model, on floats and on integers, or in given formats.

All layers become branches of one small graph a format, exported by the project's own exporter and timed by
compress/measure/operator_timing.py, which says how.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from compress.errors import InputError
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.fusion import LAYER_OPERATORS
from compress.exporters.skeleton import write_skeleton
from compress.graph.layers import LAYER_KINDS, activation_of
from compress.graph.simplify import simplify
from compress.graph.traced import trace
from compress.kernels.table import register_operators
from compress.measure import operator_timing
from compress.measure.latency_table import Operator
from compress.progress import Progress
from compress.quant.targets import Target
from compress.records.layers import QuantOption
from compress.records.plan import Choice

__all__ = ["Shape", "Variant", "default_variants", "export_operators", "shape_of", "time_operators"]

_ROUNDS = operator_timing.ROUNDS


@dataclass(frozen=True)
class Shape:
    """What an exported layer's time depends on; equal layers are timed once.

    Attributes:
        kind: conv1d, conv2d or linear.
        weight: shape of the weight.
        rest: the operator's arguments behind the bias (stride, padding, dilation, groups).
        bias: whether it has one.
        activation: relu, relu6 or None: what is fused into it.
        input: shape of the input, batch included.
    """

    kind: str
    weight: tuple[int, ...]
    rest: tuple[object, ...]
    bias: bool
    activation: str | None
    input: tuple[int, ...]

    @property
    def signature(self) -> str:
        """As one line, for the table."""
        sizes = ("x".join(map(str, each)) for each in (self.weight, self.input))
        rest = " ".join(str(each).replace(" ", "") for each in self.rest)
        extras = "".join((" bias" if self.bias else "", f" {self.activation}" if self.activation else ""))
        return f"{self.kind} {' on '.join(sizes)} {rest}{extras}".replace("  ", " ")


def shape_of(call: fx.Node, batch: int) -> Shape:
    """The shape of the layer that ``call`` runs on ``batch`` samples."""
    value = call.args[0].meta["val"]
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else int(size) for size in value.shape]
    return Shape(
        kind=LAYER_KINDS[call.target],
        weight=tuple(call.args[1].meta["val"].shape),
        rest=tuple(tuple(each) if isinstance(each, list | tuple) else each for each in call.args[3:]),
        bias=len(call.args) > 2 and call.args[2] is not None,
        activation=activation_of(call)[0],
        input=(batch, *sizes[1:]),
    )


@dataclass(frozen=True)
class Variant:
    """One way to run a layer: ``option`` in ``format``."""

    option: QuantOption
    format: str

    @property
    def compute(self) -> str:
        """What its time is filed under: everything that the time depends on besides the shape."""
        if self.format == "float-weights":
            return "float"  # unpacked when the file is loaded
        return str(self.option) if self.format == "matmul-nbits" else self.format


_FLOAT = Variant(QuantOption(bits=8, symmetric=False), "float-weights")
_INTEGER = Variant(QuantOption(bits=8, act_bits=8), "integer")


def time_operators(
    shapes: Sequence[Shape],
    target: Target,
    threads: int,
    progress: Progress,
    variants: Sequence[Variant] = (),
) -> list[Operator]:
    """One row a shape and variant; by default on floats, and on integers where ``target`` has a format for it.

    Raises:
        InputError: ONNX Runtime cannot run an exported layer.
    """
    variants = variants or default_variants(target)
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        files = export_operators(shapes, variants, target, Path(folder), progress)
        measured = operator_timing.time_operators(
            files, sorted(LAYER_OPERATORS), threads=threads, provider=target.provider, rounds=_ROUNDS, say=progress
        )
    rows = []
    for variant, branches in zip(variants, measured, strict=True):
        for shape, times in zip(shapes, branches, strict=True):
            if times is None:
                raise InputError(
                    f"ONNX Runtime's optimised graph has no node for {shape.signature}, {variant.compute}, so its "
                    "time is not known; leave out what needs it"
                )
            layer, enter, leave = times
            rows.append(
                Operator(
                    signature=shape.signature,
                    compute=variant.compute,
                    layer_us=layer,
                    enter_us=enter,
                    leave_us=leave,
                )
            )
    return rows


def default_variants(target: Target) -> list[Variant]:
    """Floats, and integers where ``target`` has a format for them."""
    return [_FLOAT, *([_INTEGER] if "integer" in target.formats else [])]


def export_operators(
    shapes: Sequence[Shape], variants: Sequence[Variant], target: Target, folder: Path, progress: Progress
) -> list[Path]:
    """One file a variant, with a branch a shape."""
    register_operators()
    files: list[Path] = []
    for variant in variants:
        progress(f"exporting {len(shapes)} operators, {variant.compute}", len(files), len(variants))
        files.append(_export(shapes, variant, target, folder / f"{variant.compute}.onnx"))
    return files


class _Branches(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_module(shape) for shape in shapes)
        self.activations = [shape.activation for shape in shapes]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for layer, activation, x in zip(self.layers, self.activations, inputs, strict=True):
            y = layer(x)
            if activation is not None:
                y = torch.relu(y) if activation == "relu" else nn.functional.relu6(y)
            outputs.append(y)
        return tuple(outputs)


def _module(shape: Shape) -> nn.Module:
    if shape.kind == "linear":
        return nn.Linear(shape.weight[1], shape.weight[0], bias=shape.bias)
    stride, padding, dilation, groups = (*shape.rest, *((1,), (0,), (1,), 1)[len(shape.rest) :])
    build = nn.Conv1d if shape.kind == "conv1d" else nn.Conv2d
    return build(
        shape.weight[1] * groups, shape.weight[0], shape.weight[2:], _size(stride), _size(padding), _size(dilation),
        groups, shape.bias,
    )  # fmt: skip


def _size(value: object) -> object:
    """torch writes a size that all dimensions share once."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _export(shapes: Sequence[Shape], variant: Variant, target: Target, path: Path) -> Path:
    """Write the branches to ``path``; inputs are called x0, x1 ..., layers 0, 1 ..."""
    # The batch is fixed: it belongs to the shape.
    example = tuple(torch.zeros(shape.input) for shape in shapes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Branches(shapes).eval()
    traced = trace(module, example, fixed=True)
    simplify(traced)
    if variant.compute == "float":
        write_onnx(build_onnx(traced), path, {})
    else:
        names = [f"layers.{position}" for position in range(len(shapes))]
        choices = [Choice(layer=name, method="minmax", option=variant.option, format=variant.format) for name in names]
        write_skeleton(traced, choices, target, path)
    return path
