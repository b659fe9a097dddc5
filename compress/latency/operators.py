"""Time exported operators: every distinct layer of a model, on floats and on integers, or in given formats.

All layers become branches of one small graph a format, exported by the project's own exporter and run by ONNX
Runtime with its profiler on, the graphs in turn. The profile gives the time of each kernel; what stands before and
after a layer in its branch is what a change of the kind of numbers costs there. A runtime's own work for a node is not
in its profile: the same graphs are also run without it, and the difference is shared by the nodes.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn

from compress.benchmark import time_models
from compress.errors import InputError
from compress.exporters.fusion import LAYER_OPERATORS, optimized_nodes
from compress.exporters.onnx import build_onnx, write_onnx
from compress.exporters.session import open_session
from compress.graph.layers import LAYER_KINDS, activation_of
from compress.graph.simplify import simplify
from compress.graph.traced import trace
from compress.kernels.table import register_operators
from compress.latency.table import Operator
from compress.progress import Progress
from compress.records import Choice, QuantOption
from compress.skeleton import write_skeleton
from compress.targets import Target

__all__ = ["Shape", "Variant", "shape_of", "time_operators"]

_ROUNDS = 150
_KEPT = 0.8  # the slowest fifth of a kernel's runs are other programs'
_TRUNCATED_US = 0.5  # the profiler counts whole microseconds, rounding down


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
    register_operators()
    variants = variants or [_FLOAT, *([_INTEGER] if "integer" in target.formats else [])]
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        files: list[Path] = []
        for variant in variants:
            progress(f"exporting {len(shapes)} operators, {variant.compute}", len(files), len(variants))
            files.append(_export(shapes, variant, target, Path(folder) / f"{variant.compute}.onnx"))
        feeds = {
            f"x{position}": np.random.default_rng(position).standard_normal(shape.input, dtype=np.float32)
            for position, shape in enumerate(shapes)
        }
        profiles = _profile(files, feeds, target, threads, Path(folder), progress)
        rows = []
        for variant, file, (kernels_us, total_us) in zip(variants, files, profiles, strict=True):
            parts = _parts(file, target.provider)
            if missing := [shape for position, shape in enumerate(shapes) if str(position) not in parts]:
                raise InputError(
                    f"ONNX Runtime's optimised graph has no node for {missing[0].signature}, {variant.compute}, so its "
                    "time is not known; leave out what needs it"
                )
            idle_us = max(total_us - sum(kernels_us.values()), 0.0) / max(len(kernels_us), 1)
            for position, shape in enumerate(shapes):
                layer, enter, leave = (
                    sum(kernels_us.get(name, 0.0) + idle_us for name in names) for names in parts[str(position)]
                )
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


def _profile(
    files: Sequence[Path],
    feeds: dict[str, np.ndarray],
    target: Target,
    threads: int,
    folder: Path,
    progress: Progress,
) -> list[tuple[dict[str, float], float]]:
    """For every file: microseconds of each node by name, and of a whole run without the profiler."""
    plain, profiled = [], []
    for file in files:
        plain.append(open_session(file, "ORT_ENABLE_ALL", threads=threads, provider=target.provider))
        prefix = folder / f"profile-{file.stem}"
        profiled.append(open_session(file, "ORT_ENABLE_ALL", threads=threads, provider=target.provider, profile=prefix))
    sessions = [*plain, *profiled]
    calls = [_call(session, feeds) for session in sessions]

    def timing(done: int, total: int) -> None:
        progress("timing operators", done, total)

    times_ms = time_models(calls, rounds=_ROUNDS, progress=timing)
    totals_us = np.median(times_ms[:, : len(plain)], axis=0) * 1e3
    found = []
    for session, total_us in zip(profiled, totals_us, strict=True):
        events = json.loads(Path(session.end_profiling()).read_text())
        runs: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                runs[event["name"].removesuffix("_kernel_time")].append(event["dur"])
        found.append(({name: _typical(values) for name, values in runs.items()}, float(total_us)))
    return found


def _call(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    names = [each.name for each in session.get_inputs()]
    given = dict(zip(names, feeds.values(), strict=True))
    return lambda: session.run(None, given)


def _typical(values: Sequence[float]) -> float:
    kept = np.sort(np.array(values))[: max(int(len(values) * _KEPT), 1)]
    return float(kept.mean()) + _TRUNCATED_US


def _parts(file: Path, provider: str) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """By branch: names of the nodes that are the layer, that stand before it, and that stand behind it."""
    nodes = optimized_nodes(file, provider)
    makers = {value: node.name for node, _ in nodes for value in node.output}
    reads = {node.name: [makers[value] for value in node.input if value in makers] for node, _ in nodes}
    found = {}
    for node, name in nodes:
        if node.op_type in LAYER_OPERATORS:
            before = _reached(node.name, reads)
            behind = [other for other in reads if node.name in _reached(other, reads)]
            found[name.removeprefix("layers.")] = ([node.name], sorted(before), behind)
    return found


def _reached(name: str, reads: dict[str, list[str]]) -> set[str]:
    """All nodes that ``name`` depends on."""
    seen: set[str] = set()
    waiting = list(reads[name])
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += reads[current]
    return seen
