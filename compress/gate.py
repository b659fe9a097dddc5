"""The gate after every export: does the file compute what was calibrated, and does it run the way it was planned?

Three answers are compared on the same samples: the compressed PyTorch graph, ONNX Runtime without optimisation, and
with all of it. Integer kernels round their requantisation differently from the simulation, so the limits leave
room for single steps of the activation grids; a float file has to agree to float rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from compress.errors import GateError
from compress.exporters.fusion import FLOAT_ISLANDS, fused_operators, misplaced_layers
from compress.exporters.saturation import prove
from compress.exporters.session import open_session, run_session
from compress.graph.layers import LAYER_KINDS, layer_computes, layer_name
from compress.graph.traced import TracedModel, first_output
from compress.report.schema import Parity

__all__ = ["Limits", "layer_differences", "rounding_noise", "verify", "verify_or_raise"]

_BATCH = 32


@dataclass(frozen=True)
class Limits:
    """What the gate lets pass: relative L2 of the outputs, and the fraction of samples with the same class."""

    unoptimized: float
    optimized: float
    agreement: float

    def at_least(self, distance: float) -> Limits:
        """These limits, no distance smaller than ``distance``, which counts up to ``_LARGEST_NOISE``."""
        distance = min(distance, _LARGEST_NOISE)
        return Limits(max(self.unoptimized, distance), max(self.optimized, distance), self.agreement)


_INTEGER_LIMITS = Limits(unoptimized=0.05, optimized=0.08, agreement=0.95)
# One step of a 4-bit grid is a fifteenth of its range: a flipped rounding is rare but travels far in a deep network.
_NARROW_LIMITS = Limits(unoptimized=0.15, optimized=0.2, agreement=0.93)
# A graph that amplifies rounding may be twice as far from its file as from itself a millionth away, up to this.
_NOISE_FACTOR = 2.0
_LARGEST_NOISE = 0.25
_FLOAT_LIMITS = Limits(unoptimized=1e-3, optimized=1e-3, agreement=0.99)


def verify(
    traced: TracedModel, path: Path, inputs: tuple[Tensor, ...], source: str, provider: str = "CPUExecutionProvider"
) -> Parity:
    """Compare ``path`` with ``traced`` on ``inputs`` ([N, ...] each); failures are listed, not raised.

    Args:
        source: what the samples are, for the report.
    """
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    # A graph with a fixed batch takes whole batches only.
    count = len(inputs[0]) if traced.dynamic_batch else len(inputs[0]) // size * size
    inputs = tuple(x[:count] for x in inputs)
    wanted = _run(traced, _batches(inputs, size))
    plain, optimized = (
        run_session(open_session(path, level, provider=provider), _batches(inputs, size))
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
    )
    computes = layer_computes(traced)
    limits = _limits(traced, computes)
    parity = Parity(
        samples=count,
        source=source,
        relative_l2_unoptimized=_farthest(plain, wanted),
        relative_l2_optimized=_farthest(optimized, wanted),
        agreement_unoptimized=_agreement(plain[0], wanted[0]),
        agreement_optimized=_agreement(optimized[0], wanted[0]),
        integer_layers=sum(compute in ("integer", "dynamic") for compute in computes.values()),
        float_layers=sum(compute == "float" for compute in computes.values()),
        block_layers=sum(compute.startswith("blocks") for compute in computes.values()),
    )
    failures = _over(parity, limits)
    if failures and limits is not _FLOAT_LIMITS:
        noise = rounding_noise(traced, inputs, wanted)
        parity = parity.model_copy(update={"rounding_noise": noise})
        failures = _over(parity, limits.at_least(_NOISE_FACTOR * noise))
    if failures:
        layer, difference = max(layer_differences(traced, path, inputs, provider), key=lambda pair: pair[1])
        failures.append(
            f"the largest step away from the PyTorch graph is at layer {layer}: relative L2 {difference:.2%}"
        )
    operators = fused_operators(path, provider)
    failures += misplaced_layers(operators, computes)
    if {"integer", "dynamic"} & set(computes.values()):
        kinds = Counter(kind for kinds in operators.values() for kind in kinds if kind in FLOAT_ISLANDS)
        parity = parity.model_copy(update={"float_operators": dict(kinds)})
    proof = prove(path, provider)
    failures += proof.failures
    return parity.model_copy(update={"proof": proof, "failures": tuple(failures)})


def verify_or_raise(parity: Parity, path: Path) -> None:
    """Raise :class:`~compress.errors.GateError` with every failure of ``parity``."""
    if parity.failures:
        raise GateError(f"{path} did not pass the gate: " + "; ".join(parity.failures))


def _limits(traced: TracedModel, computes: dict[str, str]) -> Limits:
    if set(computes.values()) <= {"float"}:
        return _FLOAT_LIMITS
    grids = traced.graph.find_nodes(op="call_function", target=torch.ops.compress.fake_quantize.default)
    return _NARROW_LIMITS if any(grid.args[3] < 8 for grid in grids) else _INTEGER_LIMITS


def rounding_noise(traced: TracedModel, inputs: tuple[Tensor, ...], wanted: list[Tensor]) -> float:
    """How far the graph moves when its float tensors change by a millionth, as sums in another order change them.

    On coarse grids a small difference flips codes, and a deep transformer makes much of little: two correct programs
    are then as far apart as this.

    Args:
        wanted: what the graph gives for ``inputs``.
    """
    moved = traced.copy()
    generator = torch.Generator().manual_seed(0)
    for node in moved.graph.find_nodes(op="get_attr"):
        value = moved.tensor(str(node.target))
        if value.is_floating_point() and not str(node.target).endswith("scale"):
            moved.set_tensor(str(node.target), value * (1 + 1e-6 * torch.randn(value.shape, generator=generator)))
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    return _farthest(_run(moved, _batches(inputs, size)), wanted)


def layer_differences(
    traced: TracedModel, path: Path, inputs: tuple[Tensor, ...], provider: str
) -> list[tuple[str, float]]:
    """How much each layer adds to the difference between graph and file: relative L2 of its output less its input's.

    Runs without optimisation, where the file still has a value for every layer's output.
    """
    batch = next(_batches(inputs, len(traced.example[0]) if not traced.dynamic_batch else _BATCH))
    recorded = _record_layers(traced, batch)
    model = onnx.load(path)
    bias_of = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Add"}
    names = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "MatMulNBits", "MatMulIntegerToFloat") and node.name in recorded:
            names.append(node.name)
            # A linear on more than two dimensions is a MatMul and an Add.
            output = bias_of.get(node.output[0], node.output[0]) if node.op_type == "MatMul" else node.output[0]
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = open_session(model.SerializeToString(), "ORT_DISABLE_ALL", provider=provider)
    outputs = run_session(session, [batch])[-len(names) :] if names else []
    differences, before = [], 0.0
    for name, got in zip(names, outputs, strict=True):
        now = _relative_l2(got, recorded[name])
        differences.append((name, now - before))
        before = now
    return differences or [("(none)", 0.0)]


def _record_layers(traced: TracedModel, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every layer's output, by the name of the ONNX node that computes it (compress/exporters/tidy.py)."""
    recorded: dict[str, Tensor] = {}

    class _Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and n.target in LAYER_KINDS:
                calls = sum(name.partition("#")[0] == layer_name(n) for name in recorded)
                recorded[layer_name(n) + (f"#{calls}" if calls else "")] = first_output(value)
            return value

    with torch.no_grad():
        _Recorder(traced.module).run(*batch)
    return recorded


def _run(traced: TracedModel, batches: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
    """Every output over all ``batches``, concatenated, in the order of the file's outputs."""
    with torch.no_grad():
        results = [tree_leaves(traced.module(*batch)) for batch in batches]
    # Beside the first there may be one number a batch, as a loss is.
    return [torch.cat([torch.atleast_1d(part) for part in parts]) for parts in zip(*results, strict=True)]


def _batches(inputs: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(size) for x in inputs), strict=True)


def _farthest(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative L2 of any output; infinite where the outputs are not as many."""
    if [each.shape for each in got] != [each.shape for each in wanted]:
        return float("inf")
    return max(map(_relative_l2, got, wanted), key=lambda distance: (distance != distance, distance))


def _relative_l2(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _agreement(got: Tensor, wanted: Tensor) -> float | None:
    """Fraction of samples with the same largest output; None for outputs that are not class scores."""
    if wanted.dim() != 2 or wanted.shape[1] < 2:
        return None
    return float((got.argmax(1) == wanted.argmax(1)).float().mean())


def _over(parity: Parity, limits: Limits) -> list[str]:
    found = []
    for level, distance, limit, agreement in (
        ("without optimisation", parity.relative_l2_unoptimized, limits.unoptimized, parity.agreement_unoptimized),
        ("with all optimisations", parity.relative_l2_optimized, limits.optimized, parity.agreement_optimized),
    ):
        if not distance <= limit:
            found.append(
                f"ONNX Runtime {level} is {distance:.2%} (relative L2) from the PyTorch graph; allowed {limit:.2%}"
            )
        if agreement is not None and agreement < limits.agreement:
            found.append(
                f"ONNX Runtime {level} gives the same class on {agreement:.1%} of the samples; "
                f"needed {limits.agreement:.0%}"
            )
    return found
