"""The gate after every export: does the file compute what was calibrated, and does it run the way it was planned?

Three answers are compared on the same samples: the compressed PyTorch graph, ONNX Runtime without optimisation, and
with all of it, in batches and one sample at a time. Integer kernels round their requantisation differently from the
simulation, so the limits leave room for single steps of the activation grids; a float file has to agree to float
rounding. Each layer's kernel is also run alone (compress/proof/layer_check.py): that names the one at fault, and finds
faults that the whole file's answers hide.
"""

from __future__ import annotations

import math
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
from compress.intake.model import noise
from compress.proof.distance import relative_l2, worst_sample
from compress.proof.gate_inputs import NOISE, NOISE_SAMPLES
from compress.proof.layer_check import check_layers, guilty_layers, innocent_layers, unseen_layers
from compress.proof.rounding_noise import moved_outputs
from compress.records.report import ExportCheck

__all__ = ["Limits", "fewest_alike", "noise_distance", "verify", "verify_or_raise"]

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
_CHANCE = 0.01
# A finished file is to be as near to its graph as its report says, up to a factor, and up to what other processors'
# kernels make of floats, and of blocks of 8-bit inputs beside packed weights.
_SAME_NOISE, _OTHER_SAMPLES = 2.0, 4.0
_LEAST_FLOAT, _LEAST_INTEGER, _LEAST_PACKED = 1e-5, 1e-3, 1e-2
_FLOAT_LIMITS = Limits(unoptimized=1e-3, optimized=1e-3, agreement=0.99)


def verify(
    traced: TracedModel,
    path: Path,
    inputs: tuple[Tensor, ...],
    source: str,
    provider: str = "CPUExecutionProvider",
    notes: tuple[str, ...] = (),
    classes: bool = False,
    recorded: ExportCheck | None = None,
) -> ExportCheck:
    """Compare ``path`` with ``traced`` on ``inputs`` ([N, ...] each); failures are listed, not raised.

    Args:
        source: what the samples are, for the report.
        notes: what they cannot show, for the report.
        classes: whether the first output's largest value is the model's answer; of other outputs it says nothing.
        recorded: what the file's report says: distances may not be much larger than they were.
    """
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    # A graph with a fixed batch takes whole batches only.
    count = len(inputs[0]) if traced.dynamic_batch else len(inputs[0]) // size * size
    inputs = tuple(x[:count] for x in inputs)
    wanted = _run(traced, _batches(inputs, size))
    plain = run_session(open_session(path, "ORT_DISABLE_ALL", provider=provider), _batches(inputs, size))
    session, graph = open_optimized(path, provider)
    optimized = run_session(session, _batches(inputs, size))
    worst, worst_distance = worst_sample(optimized, wanted)
    computes = layer_computes(traced)
    limits = _limits(traced, computes)
    if recorded is not None:
        limits = _as_recorded(limits, recorded, source)
    check = ExportCheck(
        samples=count,
        source=source,
        relative_l2_unoptimized=_farthest(plain, wanted),
        relative_l2_optimized=_farthest(optimized, wanted),
        relative_l2_one_row=_one_by_one(traced, session, _some(inputs, worst)) if traced.dynamic_batch else None,
        worst_sample=worst,
        worst_relative_l2=worst_distance,
        agreement_unoptimized=_agreement(plain[0], wanted[0]) if classes else None,
        agreement_optimized=_agreement(optimized[0], wanted[0]) if classes else None,
        integer_layers=sum(compute in ("integer", "dynamic") for compute in computes.values()),
        float_layers=sum(compute == "float" for compute in computes.values()),
        block_layers=sum(compute.startswith("blocks") for compute in computes.values()),
        layers=check_layers(traced, lone_layers(path, graph, provider), _layer_batches(traced, inputs, worst)),
        notes=notes,
    )
    if unseen := unseen_layers(check.layers, computes):
        check = check.model_copy(update={"notes": (*notes, unseen)})
    failures = _over(check, limits)
    if failures:
        moved = _farthest(moved_outputs(traced, _batches(inputs, size)), wanted)
        check = check.model_copy(update={"rounding_noise": moved})
        failures = _over(check, limits.at_least(_NOISE_FACTOR * moved))
    if guilty := guilty_layers(check.layers):
        failures.append(guilty)
    elif failures:
        failures.append(innocent_layers(check.layers))
    operators = operators_by_layer(graph.nodes)
    failures += misplaced_layers(operators, computes)
    if {"integer", "dynamic"} & set(computes.values()):
        kinds = Counter(kind for kinds in operators.values() for kind in kinds if kind in FLOAT_ISLANDS)
        check = check.model_copy(update={"float_operators": dict(kinds)})
    proof = prove(path, provider)
    failures += proof.failures
    return check.model_copy(update={"proof": proof, "failures": tuple(failures)})


def verify_or_raise(check: ExportCheck, path: Path) -> None:
    """Raise :class:`~compress.errors.GateError` with every failure of ``check``."""
    if check.failures:
        raise GateError(f"{path} did not pass the gate: " + "; ".join(check.failures))


def _limits(traced: TracedModel, computes: dict[str, str]) -> Limits:
    if set(computes.values()) <= {"float"}:
        return _FLOAT_LIMITS
    grids = traced.graph.find_nodes(op="call_function", target=torch.ops.compress.fake_quantize.default)
    return _NARROW_LIMITS if any(grid.args[3] < 8 for grid in grids) else _INTEGER_LIMITS


def noise_distance(traced: TracedModel, path: Path, seed: int, provider: str) -> float:
    """The larger distance of the file from the graph, with and without optimisation, on the noise of ``seed``.

    It is kept in the report for whoever verifies the file later and has no samples: on that noise it is the same.
    """
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    batches = list(_batches(noise(traced, NOISE_SAMPLES, seed), size))
    wanted = _run(traced, iter(batches))
    sessions = (open_session(path, level, provider=provider) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"))
    return max(_farthest(run_session(session, batches), wanted) for session in sessions)


def _as_recorded(limits: Limits, recorded: ExportCheck, source: str) -> Limits:
    """No more than some times what was measured when the file was written, nor than was allowed then.

    On the same noise twice that much, as other processors round floats in another order; on other samples more.
    """
    if source == NOISE and recorded.relative_l2_noise is not None:
        measured, factor = (recorded.relative_l2_noise,) * 2, _SAME_NOISE
    else:
        measured, factor = (recorded.relative_l2_unoptimized, recorded.relative_l2_optimized), _OTHER_SAMPLES
    least = _LEAST_PACKED if recorded.block_layers else _LEAST_FLOAT if limits is _FLOAT_LIMITS else _LEAST_INTEGER
    plain, optimized = (factor * (each + least) for each in measured)
    return Limits(min(plain, limits.unoptimized), min(optimized, limits.optimized), limits.agreement)


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
    return max(map(relative_l2, got, wanted), key=lambda distance: (distance != distance, distance))


def _agreement(got: Tensor, wanted: Tensor) -> float | None:
    """Fraction of samples with the same largest output; None for outputs that are not class scores."""
    if wanted.dim() != 2 or wanted.shape[1] < 2:
        return None
    return float((got.argmax(1) == wanted.argmax(1)).float().mean())


def fewest_alike(count: int, share: float) -> int:
    """How many of ``count`` samples must have the same class, where ``share`` of all are to.

    Fewer come about by chance in one case of a hundred at most: of 16 samples one may differ, whatever the share.
    """
    chance = 0.0
    for same in range(count + 1):
        chance += math.comb(count, same) * share**same * (1 - share) ** (count - same)
        if chance >= _CHANCE:
            return same
    return count


def _over(check: ExportCheck, limits: Limits) -> list[str]:
    worst = ""
    if check.worst_sample is not None:
        worst = f", furthest on sample {check.worst_sample} ({check.worst_relative_l2:.2%})"
    found = []
    for how, distance, limit, agreement in (
        ("without optimisation", check.relative_l2_unoptimized, limits.unoptimized, check.agreement_unoptimized),
        ("with all optimisations", check.relative_l2_optimized, limits.optimized, check.agreement_optimized),
        ("with all optimisations, one sample at a time,", check.relative_l2_one_row, limits.optimized, None),
    ):
        if distance is not None and not distance <= limit:
            found.append(
                f"ONNX Runtime {how} is {distance:.2%} (relative L2) from the PyTorch graph; allowed {limit:.2%}"
                + (worst if how == "with all optimisations" else "")
            )
        needed = fewest_alike(check.samples, limits.agreement)
        if agreement is not None and (same := round(agreement * check.samples)) < needed:
            found.append(
                f"ONNX Runtime {how} gives the same class on {same} of {check.samples} samples; needed {needed}, where "
                f"{limits.agreement:.0%} are to be alike"
            )
    return found
