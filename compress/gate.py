"""The gate after every export: does the file compute what was calibrated, and does it run the way it was planned?

Three answers are compared on the same samples: the compressed PyTorch graph, ONNX Runtime without optimisation, and
with all of it, in batches and one sample at a time. Integer kernels round their requantisation differently from the
simulation, so the limits leave room for single steps of the activation grids; a float file has to agree to float
rounding. Each layer's kernel is also run alone (compress/layer_check.py): that names the one at fault, and finds faults
that the whole file's answers hide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compress.errors import GateError
from compress.exporters.fusion import FLOAT_ISLANDS, misplaced_layers, open_optimized, operators_by_layer
from compress.exporters.lone_layer import lone_layers
from compress.exporters.saturation import prove
from compress.exporters.session import open_session, run_session
from compress.graph.layers import layer_computes
from compress.graph.traced import TracedModel
from compress.layer_check import check_layers, guilty_layers, innocent_layers, unseen_layers
from compress.report.schema import Parity

__all__ = ["Limits", "rounding_noise", "verify", "verify_or_raise"]

_BATCH = 32
_SOME = 16  # samples that are also run one at a time, and that single layers are looked at on


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
    traced: TracedModel,
    path: Path,
    inputs: tuple[Tensor, ...],
    source: str,
    provider: str = "CPUExecutionProvider",
    notes: tuple[str, ...] = (),
) -> Parity:
    """Compare ``path`` with ``traced`` on ``inputs`` ([N, ...] each); failures are listed, not raised.

    Args:
        source: what the samples are, for the report.
        notes: what they cannot show, for the report.
    """
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    # A graph with a fixed batch takes whole batches only.
    count = len(inputs[0]) if traced.dynamic_batch else len(inputs[0]) // size * size
    inputs = tuple(x[:count] for x in inputs)
    wanted = _run(traced, _batches(inputs, size))
    plain = run_session(open_session(path, "ORT_DISABLE_ALL", provider=provider), _batches(inputs, size))
    session, graph = open_optimized(path, provider)
    optimized = run_session(session, _batches(inputs, size))
    worst, worst_distance = _worst_sample(optimized, wanted)
    computes = layer_computes(traced)
    limits = _limits(traced, computes)
    parity = Parity(
        samples=count,
        source=source,
        relative_l2_unoptimized=_farthest(plain, wanted),
        relative_l2_optimized=_farthest(optimized, wanted),
        relative_l2_one_row=_one_by_one(traced, session, _some(inputs, worst)) if traced.dynamic_batch else None,
        worst_sample=worst,
        worst_relative_l2=worst_distance,
        agreement_unoptimized=_agreement(plain[0], wanted[0]),
        agreement_optimized=_agreement(optimized[0], wanted[0]),
        integer_layers=sum(compute in ("integer", "dynamic") for compute in computes.values()),
        float_layers=sum(compute == "float" for compute in computes.values()),
        block_layers=sum(compute.startswith("blocks") for compute in computes.values()),
        layers=check_layers(traced, lone_layers(path, graph, provider), _layer_batches(traced, inputs, worst)),
        notes=notes,
    )
    if unseen := unseen_layers(parity.layers, computes):
        parity = parity.model_copy(update={"notes": (*notes, unseen)})
    failures = _over(parity, limits)
    if failures and limits is not _FLOAT_LIMITS:
        noise = rounding_noise(traced, inputs, wanted)
        parity = parity.model_copy(update={"rounding_noise": noise})
        failures = _over(parity, limits.at_least(_NOISE_FACTOR * noise))
    if guilty := guilty_layers(parity.layers):
        failures.append(guilty)
    elif failures:
        failures.append(innocent_layers(parity.layers))
    operators = operators_by_layer(graph.nodes)
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


def _layer_batches(traced: TracedModel, inputs: tuple[Tensor, ...], worst: int | None) -> list[tuple[Tensor, ...]]:
    """What layers are looked at on: one batch, and one row where any number may come, the worst sample in both."""
    if not traced.dynamic_batch:
        return [next(_batches(inputs, len(traced.example[0])))]
    some = _some(inputs, worst)
    return [some, tuple(x[-1:] for x in some)]


def _some(inputs: tuple[Tensor, ...], worst: int | None) -> tuple[Tensor, ...]:
    """A few of the samples: the first ones, and the worst one behind them."""
    first = list(range(min(_SOME, len(inputs[0]))))
    if worst is not None:
        first = [*[place for place in first if place != worst][: _SOME - 1], worst]
    return tuple(x[first] for x in inputs)


def _one_by_one(traced: TracedModel, session: ort.InferenceSession, inputs: tuple[Tensor, ...]) -> float:
    """The distance where graph and file both get a sample a call: some kernels are others then, and dynamic grids."""
    return _farthest(run_session(session, _batches(inputs, 1)), _run(traced, _batches(inputs, 1)))


def _worst_sample(got: list[Tensor], wanted: list[Tensor]) -> tuple[int | None, float | None]:
    """The sample that is furthest from what is wanted, and how far; None where outputs are not one a sample.

    A sample whose own outputs nearly vanish is measured by what the others have.
    """
    count = len(wanted[0])
    distances = []
    for one, other in zip(got, wanted, strict=False):
        if one.shape == other.shape and len(other) == count:
            difference, size = ((each.double().reshape(count, -1)).norm(dim=1) for each in (one - other, other))
            distances.append(difference / size.clamp(min=1e-3 * float(size.mean()) + 1e-30))
    if not distances:
        return None, None
    furthest = torch.stack(distances).nan_to_num(nan=torch.inf).amax(0)
    worst = int(furthest.argmax())
    return worst, float(furthest[worst])


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
    worst = ""
    if parity.worst_sample is not None:
        worst = f", furthest on sample {parity.worst_sample} ({parity.worst_relative_l2:.2%})"
    found = []
    for how, distance, limit, agreement in (
        ("without optimisation", parity.relative_l2_unoptimized, limits.unoptimized, parity.agreement_unoptimized),
        ("with all optimisations", parity.relative_l2_optimized, limits.optimized, parity.agreement_optimized),
        ("with all optimisations, one sample at a time,", parity.relative_l2_one_row, limits.optimized, None),
    ):
        if distance is not None and not distance <= limit:
            found.append(
                f"ONNX Runtime {how} is {distance:.2%} (relative L2) from the PyTorch graph; allowed {limit:.2%}"
                + (worst if how == "with all optimisations" else "")
            )
        if agreement is not None and agreement < limits.agreement:
            found.append(
                f"ONNX Runtime {how} gives the same class on {agreement:.1%} of the samples; "
                f"needed {limits.agreement:.0%}"
            )
    return found
