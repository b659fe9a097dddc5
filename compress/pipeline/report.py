"""Measure the finished model and write down what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.calibrate import LayerResult
from compress.data.samples import Samples
from compress.exporters.session import open_session, run_session
from compress.graph.traced import TracedModel, call_module, first_output
from compress.intake.model import Intake
from compress.measure.bench import bench
from compress.measure.isolated import peak_bytes
from compress.measure.machine import describe_environment
from compress.records.layers import LayerSpec
from compress.records.plan import Plan
from compress.records.report import ExportCheck, FloatDistance, Latency, LayerRow, Metric, Report, Size

__all__ = ["build_report", "measure_latency", "measure_metric"]

_BATCH = 64


def build_report(
    *,
    plan: Plan,
    layers: Sequence[LayerSpec],
    results: Sequence[LayerResult],
    model: TracedModel,
    float_file: Path,
    compressed_file: Path,
    export_check: ExportCheck,
    float_distance: FloatDistance,
    latency: Latency | None,
    metric: Metric | None,
    measured_error: float | None,
    calibration_seconds: float,
    notes: Sequence[str],
) -> Report:
    """Put the pieces together; ``calibration_seconds`` covers everything between the plan and the export.

    Args:
        measured_error: of the whole model, in the unit of the plan's sensitivity; None where there is none.
    """
    size = Size(float_bytes=float_file.stat().st_size, compressed_bytes=compressed_file.stat().st_size)
    by_layer = {result.layer: result for result in results}
    return Report(
        plan=plan,
        layers=tuple(_row(layer, plan, by_layer.get(layer.name), model) for layer in layers),
        size=size,
        export_check=export_check,
        float_distance=float_distance,
        latency=latency,
        metric=metric,
        # A latency of this machine says nothing about a plan for another one.
        measured=_measured(size, None if plan.allocation.machine else latency, metric, measured_error)
        if plan.allocation
        else {},
        calibration_seconds=round(calibration_seconds, 3),
        peak_memory_bytes=peak_bytes(),
        notes=tuple(notes),
        environment=describe_environment(),
    )


def _measured(
    size: Size, latency: Latency | None, metric: Metric | None, measured_error: float | None
) -> dict[str, float]:
    """The finished model in the quantities that budgets limit."""
    found = {"size": float(size.compressed_bytes)}
    if latency is not None:
        found["latency"] = latency.compressed_ms * 1e3
    if measured_error is not None:
        found["error"] = measured_error
    if metric is not None and metric.name == "accuracy":
        found["drop"] = 100 * (metric.float_model - metric.compressed_onnx)
    return found


def measure_latency(
    float_file: Path, compressed_file: Path, provider: str, *, threads: int = 1, batch: int = 1, length: int | None
) -> Latency:
    """Both files, interleaved; medians. ``length`` is the number of tokens a sample, None for other inputs."""
    rows = bench(
        [float_file, compressed_file],
        provider=provider,
        threads=threads,
        batch_sizes=(batch,),
        dims={"sequence": length} if length else {},
        memory=False,
    ).rows
    return Latency(threads=threads, batch=batch, length=length, float_ms=rows[0].p50_ms, compressed_ms=rows[1].p50_ms)


def measure_metric(
    intake: Intake, model: TracedModel, compressed_file: Path, samples: Samples, provider: str
) -> Metric:
    """Accuracy for whole-number labels, mean squared error for others, of all three models on the same samples."""
    assert samples.labels is not None
    size = _BATCH if model.dynamic_batch else len(model.example[0])
    count = len(samples) // size * size if not model.dynamic_batch else len(samples)
    inputs, labels = tuple(x[:count] for x in samples.inputs), samples.labels[:count]
    parts = list(zip(*(x.split(size) for x in inputs), strict=True))
    with torch.no_grad():
        float_outputs = torch.cat([first_output(call_module(intake.original, part, intake.names)) for part in parts])
    torch_outputs = model.run(iter(parts))
    onnx_outputs = run_session(open_session(compressed_file, "ORT_ENABLE_ALL", provider=provider), parts)[0]
    if labels.is_floating_point():
        values = [
            float((out.flatten() - labels.flatten()).square().mean())
            for out in (float_outputs, torch_outputs, onnx_outputs)
        ]
        return Metric(
            name="mse", samples=count, float_model=values[0], compressed_torch=values[1], compressed_onnx=values[2]
        )
    right = [_classes(out) == labels for out in (float_outputs, torch_outputs, onnx_outputs)]
    return Metric(
        name="accuracy",
        samples=count,
        float_model=float(right[0].float().mean()),
        compressed_torch=float(right[1].float().mean()),
        compressed_onnx=float(right[2].float().mean()),
        agreement=float((_classes(float_outputs) == _classes(onnx_outputs)).float().mean()),
        lost=int((right[0] & ~right[2]).sum()),
        won=int((~right[0] & right[2]).sum()),
    )


def _classes(outputs: Tensor) -> Tensor:
    return outputs.argmax(1)


def _row(layer: LayerSpec, plan: Plan, result: LayerResult | None, model: TracedModel) -> LayerRow:
    choice = plan.choice(layer.name)
    skip = next((skip.reason for skip in plan.skipped if skip.layer == layer.name), None)
    notes = "; ".join(
        each for each in (result.note if result else None, choice.reason if choice else None, skip) if each
    )
    float_bytes = layer.parameters * 4
    weight_bytes = float_bytes
    if choice is not None:
        stored = (model.tensor(f"{layer.name}.weight_{part}") for part in ("packed", "scale"))
        weight_bytes = sum(tensor.nbytes for tensor in stored)
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        option=str(choice.option) if choice else "float",
        method=choice.method if choice else None,
        parameters=layer.parameters,
        weight_bytes=weight_bytes,
        float_bytes=float_bytes,
        weight_error=result.weight_error if result else None,
        output_error=result.output_error if result else None,
        nearest_error=result.nearest_error if result else None,
        input_error=result.input_error if result else None,
        note=notes or None,
    )
