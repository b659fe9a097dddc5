"""Tables and lines a person reads at the end of a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from compress.cli.plans import allocation_lines
from compress.lowrank.ranks import layers_of
from compress.records.layers import LayerSpec
from compress.records.plan import Plan
from compress.records.report import ExportCheck, FloatDistance, LayerProof, Metric, Proof, Report

__all__ = [
    "export_check_text",
    "float_distance_lines",
    "inspection_table",
    "layer_table",
    "mending",
    "plan_table",
    "proof_table",
    "proof_text",
    "summary_lines",
]


_NAMED = 3


def layer_table(report: Report) -> Table:
    """Layer by layer: width, size, error beside rounding to nearest."""
    table = Table(title="Layers", title_justify="left")
    for name, justify in (
        ("layer", "left"),
        ("option", "left"),
        ("weights", "right"),
        ("bytes", "right"),
        ("error", "right"),
        ("rounding", "right"),
    ):
        # Names differ at their ends: cut off they would all look alike.
        table.add_column(name, justify=justify, overflow="fold" if name == "layer" else "ellipsis")  # type: ignore[arg-type]
    for row in report.layers:
        error, nearest = row.output_error, row.nearest_error
        if error is None:
            error = row.weight_error
        table.add_row(
            row.name, row.option, f"{row.parameters:,}", f"{row.weight_bytes:,}", _percent(error), _percent(nearest)
        )
    table.caption = (
        "error: squared, relative to the float layer's output on calibration samples, beside plain rounding"
        if any(row.output_error is not None for row in report.layers)
        else "error: squared, relative to the float weights"
    )
    return table


def plan_table(plan: Plan, layers: Sequence[LayerSpec]) -> Table:
    """What a plan does to each layer."""
    table = Table(title=f"Plan for {plan.target}", title_justify="left")
    for name in ("layer", "kind", "weights", "does", "method", "runs as"):
        table.add_column(name, justify="right" if name == "weights" else "left", overflow="fold")
    reasons = {skip.layer: skip.reason for skip in plan.skipped}
    for layer in layers_of(layers, plan.splits):
        choice = plan.choice(layer.name)
        does = ("float", "", reasons.get(layer.name, ""))
        if choice:
            runs = f"{choice.format}: {choice.reason}" if choice.reason else choice.format
            does = (str(choice.option), choice.method, runs)
        table.add_row(layer.name, layer.kind, f"{layer.parameters:,}", *does)
    return table


def inspection_table(layers: Sequence[LayerSpec]) -> Table:
    """What a model is made of."""
    table = Table(title="Layers", title_justify="left")
    for name in ("layer", "kind", "weight shape", "weights", "MACs", "feeds", "compressible"):
        table.add_column(name, justify="right" if name in ("weights", "MACs") else "left", overflow="fold")
    for layer in layers:
        kind = f"{layer.kind} x{layer.calls}" if layer.calls > 1 else layer.kind
        if layer.groups > 1:
            kind += f", {layer.groups} groups"
        table.add_row(
            layer.name, kind, "x".join(map(str, layer.weight_shape)), f"{layer.parameters:,}", f"{layer.macs:,}",
            layer.activation or "", f"no: {layer.refusal}" if layer.refusal else "yes",
        )  # fmt: skip
    return table


def summary_lines(report: Report) -> list[str]:
    """The model as a whole: size, latency, quality, export check, what stayed float, notes."""
    size = report.size
    lines = [
        f"Size: {size.float_bytes / 1e3:,.1f} kB float, {size.compressed_bytes / 1e3:,.1f} kB compressed "
        f"({size.compressed_bytes / size.float_bytes:.2f}x the float file)"
    ]
    if latency := report.latency:
        lines.append(
            f"Latency (batch {latency.batch}, {f'{latency.length} tokens, ' if latency.length else ''}"
            f"{latency.threads} thread{'s' * (latency.threads > 1)}): "
            f"{latency.float_ms:.3f} ms float, "
            f"{latency.compressed_ms:.3f} ms compressed "
            f"({latency.compressed_ms / latency.float_ms:.2f}x the float model's time)"
        )
    if report.float_distance:
        lines += float_distance_lines(report.float_distance)
    if report.metric:
        lines.append(_metric_line(report.metric))
    lines += allocation_lines(report.plan.allocation, report.measured)
    lines.append(f"Export check, file against quantized graph: {export_check_text(report.export_check)}")
    if report.export_check.proof and report.export_check.proof.layers:
        lines.append(f"On every processor: {proof_text(report.export_check.proof)}")
    if report.plan.skipped:
        lines.append(
            f"Left float: {len(report.plan.skipped)} layers: "
            + "; ".join(f"{skip.layer} ({skip.reason})" for skip in report.plan.skipped)
        )
    lines.append(
        f"Calibration: {report.calibration_seconds:.1f} s, peak memory {report.peak_memory_bytes / 1e6:,.0f} MB"
    )
    return lines + [f"- {note}" for note in report.notes] + _layer_notes(report)


def _layer_notes(report: Report) -> list[str]:
    """What was done to layers other than asked for, each sentence once with the layers it is about."""
    layers: dict[str, list[str]] = {}
    skipped = {skip.layer for skip in report.plan.skipped}  # a line of their own
    for row in report.layers:
        if row.note and row.name not in skipped:
            layers.setdefault(row.note, []).append(row.name)
    return [
        f"- {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}: {note}"
        for note, names in layers.items()
    ]


def export_check_text(check: ExportCheck) -> str:
    """How far the file is from the quantized graph, and what its layers run as."""
    islands = ", ".join(f"{count} {kind}" for kind, count in check.float_operators.items())
    same = "" if check.agreement_optimized is None else f", same class on {check.agreement_optimized:.1%}"
    return (
        f"relative L2 {_distance(check.relative_l2_unoptimized)} unoptimised, "
        f"{_distance(check.relative_l2_optimized)} optimised{same}, on {check.samples} samples ({check.source})"
        f"{_worst_texts(check)}; "
        f"{check.integer_layers} layers run on integers and "
        f"{check.float_layers} on floats"
        + (f", {check.block_layers} on packed weights" if check.block_layers else "")
        + (f"; ONNX Runtime leaves on floats: {islands}" if islands else "")
    )


def float_distance_lines(found: FloatDistance) -> list[str]:
    """A line for each output: how far the file is from the float model, on samples that need no labels."""
    lines = []
    for row in found.outputs:
        which = f", output {row.name}" if len(found.outputs) > 1 else ""
        text = f"relative L2 {_distance(row.relative_l2)}, cosine {row.cosine:.6f}"
        if row.worst_sample is not None:
            text += f", furthest on sample {row.worst_sample} ({_distance(row.worst_relative_l2 or 0.0)})"
        if row.worst_operand is not None:
            text += f"; of its parts {row.worst_operand} ({_distance(row.worst_operand_relative_l2 or 0.0)})"
        lines.append(f"Distance from the float model{which}: {text}, on {found.samples} samples ({found.source})")
    return lines


def proof_table(proof: Proof) -> Table:
    """Layer by layer: what its codes add up to, of what may be, and where it is not proven to be exact."""
    table = Table(title="Layers on integers", title_justify="left")
    for name in ("layer", "operator", "inputs x weights", "pair sum", "channel", "codes", "lowest", "not proven on"):
        justify: Literal["left", "right"] = "right" if name in ("pair sum", "channel", "lowest") else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for row in proof.layers:
        table.add_row(
            row.name, row.operator, f"{row.inputs or '?'} x {row.weights or '?'}", _sum(row),
            "" if row.channel is None else str(row.channel),
            ", ".join(f"{code} at {place}" for code, place in zip(row.codes, row.pair, strict=True)),
            "" if row.lowest is None else str(row.lowest),
            ", ".join(row.unproven) + (f": {row.reason}" if row.reason else ""),
        )  # fmt: skip
    table.caption = (
        "pair sum: the largest of neighbouring codes, and where they stand in their channel, in the order in which "
        f"ONNX Runtime {proof.onnxruntime} adds on CPUs"
    )
    return table


def proof_text(proof: Proof) -> str:
    """Where the sums of a file are exact, and how near they come to where they would not be."""
    if not proof.layers:
        return "no layer computes on integers, so there is nothing to prove"
    where = ", ".join(proof.proven) or "no instruction set"
    bounded = [row for row in proof.layers if row.limit and row.worst is not None]
    nearest = max(bounded, key=lambda row: (row.worst or 0) / (row.limit or 1), default=None)
    closest = f", at most {_sum(nearest)} ({nearest.name})" if nearest else ""
    return f"the sums of {len(proof.layers)} integer layers are exact in ONNX Runtime on {where}{closest}"


def mending(proof: Proof) -> str:
    """What to do about a file that is not proven."""
    if not any(row.reason is None and row.unproven for row in proof.layers):
        return "Codes that are computed as the model runs are exact if they are uint8"
    cures = ["export again with `compress quantize`"]
    if any(row.limit is not None and row.worst is not None and row.worst > row.limit for row in proof.layers):
        cures.append("quantize with reduce_range=True, 7-bit weights")
        cures.append("set session.x64quantprecision=1 in every session on x86 (slower; not every file loads with it)")
    return f"To mend it: {', or '.join(cures)}"


def _sum(row: LayerProof) -> str:
    if row.worst is None:
        return ""
    return f"{row.worst} of {row.limit}" if row.limit is not None else f"{row.worst}, any"


def _worst_texts(check: ExportCheck) -> str:
    """The furthest sample, samples one at a time, and the furthest layer; nothing of what was not measured."""
    text = ""
    if check.worst_sample is not None and check.worst_relative_l2:
        text += f", furthest on sample {check.worst_sample} ({_distance(check.worst_relative_l2)})"
    if check.relative_l2_one_row is not None:
        text += f", {_distance(check.relative_l2_one_row)} one sample at a time"
    if check.layers:
        worst = max(check.layers, key=lambda row: row.steps / row.allowed_steps)
        text += f"; each layer alone within {worst.steps:.2g} steps of its output's grid"
    return text


def _metric_line(metric: Metric) -> str:
    if metric.name != "accuracy":
        return (
            f"Mean squared error on {metric.samples:,} samples: {metric.float_model:.4g} float, "
            f"{metric.compressed_onnx:.4g} compressed"
        )
    return (
        f"Accuracy on {metric.samples:,} samples: {metric.float_model:.2%} float, {metric.compressed_onnx:.2%} "
        f"compressed in ONNX Runtime ({metric.compressed_torch:.2%} in PyTorch); {metric.lost} samples lost, "
        f"{metric.won} won, same class on {metric.agreement:.2%}"
    )


def _distance(value: float) -> str:
    """0.42%, or 2e-07 where a percentage would read as nothing."""
    return f"{value:.2%}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.3%}"
