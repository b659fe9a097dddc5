"""From a plan to a proven folder: quantize, export, gate, measure, write."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from compress.calib.output_loss import output_loss
from compress.calib.resume import open_store
from compress.data.samples import Samples
from compress.exporters.build import build_onnx, write_onnx
from compress.files.digests import file_digests
from compress.files.known_folders import ONNX_FILE, PLAN_FILE, REPORT_FILE
from compress.files.outputs import new_folder
from compress.graph.traced import TracedModel
from compress.intake.job import Work
from compress.intake.model import Intake
from compress.lowrank.ranks import layers_of
from compress.options import Options
from compress.pipeline.apply_plan import apply_plan, plan_fingerprint, plan_parts
from compress.pipeline.floats import float_note
from compress.pipeline.report import build_report, measure_latency, measure_metric
from compress.plans.budgets import format_value
from compress.plans.plan_file import save_plan
from compress.progress import Progress, Tally, silent
from compress.proof.float_distance import float_distance
from compress.proof.gate import noise_distance, verify, verify_or_raise
from compress.proof.gate_inputs import GATE_SAMPLES, gate_inputs, gives_classes
from compress.quant.targets import find_target
from compress.records.plan import Plan
from compress.records.report import ExportCheck, Report
from compress.runtime.artifact import save_artifact, tensors_digest
from compress.runtime.base import compare_base, write_base

__all__ = ["Progress", "Result", "realize", "realize_work"]

_ASK = "give samples with --calib or --eval"
_UNTIMED = "latency was not measured: --no-bench"


@dataclass(frozen=True)
class Result:
    """What a plan came to: the report, the folder it was written to (None: none asked for), and the module itself."""

    report: Report
    folder: Path | None
    module: torch.nn.Module


@dataclass(frozen=True)
class _Exported:
    """ONNX files of the model before and after, and what is in the second one."""

    float: Path
    compressed: Path
    content: ir.Model


def realize(
    intake: Intake,
    plan: Plan,
    samples: Samples | None,
    labelled: Samples | None,
    folder: Path | None,
    *,
    overwrite: bool,
    notes: tuple[str, ...] = (),
    threads: int = 1,
    batch: int = 1,
    bench: bool = True,
    progress: Progress,
) -> Result:
    """Carry out ``plan`` and write ``folder``, if there is one, whole or not at all.

    Args:
        intake: the model; it is left as it is.
        samples: calibration data; None for a plan that needs none.
        labelled: data for the metric before and after.
        notes: for the report, before those of the run itself.
        threads, batch: what the latency in the report is measured at.
        bench: whether it is measured.

    Raises:
        GateError: the exported file does not compute or run what was calibrated.
        InputError: the plan asks for what the model or its formats do not have.
    """
    started = time.monotonic()
    work = folder.with_name(f".{folder.name}.work") if folder is not None else None
    tally = Tally(progress, len(plan.choices))
    with open_store(work, plan_fingerprint(plan), plan_parts(plan), restart=overwrite) as store:
        found = sum(store.has(choice.layer) for choice in plan.choices)
        continued = [f"continued: {found} layers were finished by an earlier run"] if found else []
        float_graph = intake.traced.copy()
        compressed = apply_plan(float_graph, plan, samples.inputs if samples else None, store, tally.add, tally.say)
        calibrated = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="compress-") as scratch:
            tally.finish("exporting")
            files = _export(intake.traced, compressed.model, Path(scratch))
            provider = find_target(plan.target).provider
            judged = gate_inputs(compressed.model, plan.seed, samples, labelled, intake=intake, ask=_ASK)
            check = verify(
                compressed.model,
                files.compressed,
                judged.inputs,
                judged.source,
                provider,
                notes=judged.notes,
                classes=gives_classes(intake, samples, labelled),
            )
            noise = noise_distance(compressed.model, files.compressed, plan.seed, provider)
            check = check.model_copy(update={"relative_l2_noise": noise})
            verify_or_raise(check, folder / ONNX_FILE if folder is not None else files.compressed)
            tally.finish("measuring")
            quality = judged if labelled is None else gate_inputs(compressed.model, plan.seed, labelled, ask=_ASK)
            distance = float_distance(intake, files.compressed, quality.inputs, quality.source, provider)
            metric = None
            if labelled is not None:
                metric = measure_metric(intake, compressed.model, files.compressed, labelled, provider)
            latency = None
            if bench:
                latency = measure_latency(
                    files.float, files.compressed, provider, threads=threads, batch=batch, length=intake.traced.length
                )
            layers = layers_of(intake.layers, plan.splits)
            gate_notes = [f"gate: {note}" for note in check.notes]
            report = build_report(
                plan=plan,
                layers=layers,
                results=compressed.layers,
                model=compressed.model,
                float_file=files.float,
                compressed_file=files.compressed,
                export_check=check,
                float_distance=distance,
                latency=latency,
                metric=metric,
                measured_error=_whole_error(intake.traced, compressed.model, plan, samples),
                calibration_seconds=calibrated - started,
                notes=[
                    float_note(plan, layers, intake.others),
                    *notes,
                    *compressed.notes,
                    *continued,
                    *gate_notes,
                    *([] if bench else [_UNTIMED]),
                ],
            )
            report = report.model_copy(update={"notes": (*report.notes, *_missed(report))})
            if folder is not None:
                with new_folder(folder, overwrite) as partial:
                    write_onnx(files.content, partial / ONNX_FILE, _metadata(plan, check, report))
                    save_artifact(partial, compressed.model)
                    save_plan(plan, partial / PLAN_FILE)
                    write_base(compare_base(intake.original, float_graph), partial, tensors_digest(partial))
                    report = report.model_copy(update={"files": file_digests(partial)})
                    (partial / REPORT_FILE).write_text(report.model_dump_json(indent=2))
    return Result(report, folder, compressed.model.module)


def realize_work(
    work: Work,
    plan: Plan,
    options: Options,
    folder: Path | None,
    overwrite: bool,
    progress: Progress | None,
    notes: tuple[str, ...] = (),
) -> Result:
    """:func:`realize` with what a verb has in hand; how the latency is measured is the options', or the plan's."""
    return realize(
        work.intake,
        plan,
        work.samples,
        work.labelled,
        folder,
        overwrite=overwrite,
        notes=(*work.notes, *notes),
        threads=_given(options.search.threads, plan.allocation.threads if plan.allocation else 1),
        batch=_given(options.search.batch, plan.allocation.batch if plan.allocation else 1),
        bench=options.bench,
        progress=progress or silent,
    )


def _given(asked: int, planned: int) -> int:
    """What was asked for, or where that is the default of one what the plan's latency was measured at."""
    return asked if asked != 1 else planned


def _export(float_model: TracedModel, model: TracedModel, folder: Path) -> _Exported:
    float_file, file = folder / "float.onnx", folder / ONNX_FILE
    write_onnx(build_onnx(float_model), float_file, {})
    content = build_onnx(model)
    write_onnx(content, file, {})
    return _Exported(float_file, file, content)


def _whole_error(float_model: TracedModel, model: TracedModel, plan: Plan, samples: Samples | None) -> float | None:
    """What the plan's sensitivity measures, of the whole model; None for one that knows single layers only."""
    measure = plan.allocation.sensitivity if plan.allocation else None
    if samples is None or measure not in ("kl", "loss", "output"):
        return None
    last = tuple(x[-GATE_SAMPLES:] for x in samples.inputs)
    labels = samples.labels[-GATE_SAMPLES:] if samples.labels is not None else None
    return output_loss(float_model, model, last, labels, measure)


def _missed(report: Report) -> list[str]:
    """A sentence for each budget that the finished file does not keep."""
    allocation = report.plan.allocation
    found = []
    for budget in allocation.budgets if allocation else ():
        assert allocation is not None
        if budget.quantity == "latency" and allocation.machine is not None:
            found.append(f"the latency budget is for {allocation.machine}: time the file there")
            continue
        limit = budget.limit * (allocation.float_totals.get(budget.quantity, 1.0) if budget.relative else 1.0)
        value = report.measured.get(budget.quantity)
        if value is not None and value > limit:
            said = (format_value(budget.quantity, each) for each in (value, limit))
            found.append("BUDGET MISSED: {} of {}, allowed {}".format(budget.quantity, *said))
    return found


def _metadata(plan: Plan, check: ExportCheck, report: Report) -> dict[str, str]:
    return {
        "plan_sha256": plan_fingerprint(plan),
        "target": plan.target,
        "export_check_relative_l2": f"{check.relative_l2_optimized:.3g}",
        "onnxruntime_version": report.environment.onnxruntime or "",
        "torch_version": report.environment.torch or "",
    }
