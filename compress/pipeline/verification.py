"""A finished folder against itself: files and hashes, ONNX file and graph, now and when it was written."""

from __future__ import annotations

from pathlib import Path

from compress.errors import InputError
from compress.files.digests import check_digests
from compress.files.known_folders import GRAPH_FILE, ONNX_FILE, REPORT_FILE
from compress.intake.job import read_samples
from compress.options import Source
from compress.plans.plan_file import load_plan
from compress.proof.file_tensors import changed_tensors
from compress.proof.gate import verify
from compress.proof.gate_inputs import GATE_SAMPLES, gate_inputs
from compress.quant.targets import find_target
from compress.records.reading import read_report, read_stream_report
from compress.records.report import ExportCheck, StreamReport
from compress.runtime.artifact import load_artifact

__all__ = ["verify_folder"]

_ASK = "give samples with --data"


def verify_folder(folder: Path, data: object | None, source: Source) -> ExportCheck | StreamReport:
    """The gate again, on ``data`` or noise: the file's tensors are those of the graph, its distance that of the report.

    A folder of ``compress stream`` has no graph: its files are compared with their hashes, and its report is returned.

    Raises:
        InputError: the folder is none of ours, damaged, or the data cannot be used.
    """
    if not (folder / GRAPH_FILE).is_file() and (streamed := read_stream_report(folder / REPORT_FILE)) is not None:
        if data is not None:
            raise InputError(
                f"{folder} is what `compress stream` has written, whose files alone can be verified; leave --data out"
            )
        check_digests(folder, False)
        return streamed
    traced = load_artifact(folder)
    plan = load_plan(folder)
    samples = None
    if data is not None:
        samples = read_samples(data, source, traced.input_names, limit=GATE_SAMPLES, seed=plan.seed)
    judged = gate_inputs(traced, plan.seed, samples, ask=_ASK)
    report = read_report(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
    recorded = report.export_check if report is not None else None
    labels = samples.labels if samples is not None else None
    check = verify(
        traced,
        folder / ONNX_FILE,
        judged.inputs,
        judged.source,
        find_target(plan.target).provider,
        notes=judged.notes,
        classes=(recorded is not None and recorded.agreement_optimized is not None)
        or (labels is not None and not labels.is_floating_point()),
        recorded=recorded,
    )
    changed, notes = changed_tensors(traced, folder / ONNX_FILE)
    return check.model_copy(update={"failures": (*changed, *check.failures), "notes": (*check.notes, *notes)})
