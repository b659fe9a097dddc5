"""One function a verb; :func:`quantize` is the road from model to proven file.

Every verb takes the fields of :class:`~compress.options.Options`, :class:`~compress.options.Search` and
:class:`~compress.options.Source` as keywords: ``quantize("model.pt", calib="calib.npz", bits=4, std=(0.5,))``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import torch

from compress.data.text import check_length
from compress.errors import GateError, InputError
from compress.files.cache import remembered
from compress.files.known_folders import FAMILY_FILE
from compress.files.outputs import check_folder, check_free, claims
from compress.intake.job import Work, open_work
from compress.intake.model import Intake, ModelLike, read_model, take_in
from compress.lowrank.ranks import layers_of
from compress.options import Options, Settings, Source, check_unused, gather
from compress.pipeline.apply_plan import plan_fingerprint
from compress.pipeline.export import export_shared, export_whole, prove_file
from compress.pipeline.floats import float_note
from compress.pipeline.run import Result, realize_work
from compress.pipeline.verification import verify_folder
from compress.plans.auto import settle_method
from compress.plans.diff import PlanDiff, diff_plans
from compress.plans.estimate import Estimate, estimate
from compress.plans.frame import check_options, make_plan
from compress.plans.plan_file import load_plan, save_plan
from compress.plans.review import review_plan
from compress.progress import Progress, silent
from compress.records.allocation import Front
from compress.records.layers import LayerSpec
from compress.records.plan import Plan
from compress.records.report import ExportCheck, Proof, StreamReport
from compress.runtime.device import check_device
from compress.runtime.load import load_on
from compress.search.find import find_plan
from compress.search.front import check_points, sweep_front
from compress.search.front_folder import FRONT, write_front
from compress.search.prepare import check_search, prepare
from compress.sparse.deltas import add_deltas, doubts, open_deltas
from compress.streaming.run import stream
from compress.training.lowrank.elastic import load_elastic

__all__ = [
    "Preview",
    "allocate",
    "apply",
    "diff",
    "export",
    "inspect",
    "load",
    "preview",
    "quantize",
    "stream",
    "sweep",
    "verify",
]


@dataclass(frozen=True)
class Preview:
    """What :func:`quantize` would do, and for how long."""

    plan: Plan
    layers: list[LayerSpec]
    notes: list[str]
    estimate: Estimate


@claims("out")
def quantize(
    model: ModelLike,
    *,
    calib: object | None = None,
    eval_data: object | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Quantize ``model``, export it, prove it, and write the folder ``out``.

    Args:
        model: a path (see compress.models.checkpoint.load_model) or a module.
        calib: calibration samples (see compress.data.samples.load_samples), or ``synthetic``: made of noise that fits
            the model's BatchNorm statistics (compress/data/synthetic.py); None quantizes the weights only.
        eval_data: labelled samples for the metric before and after.
        out: folder to write; None leaves nothing on disk.
        progress: called with a label, steps done and steps in all.

    Raises:
        InputError: the model, the data or an option cannot be used.
        GateError: the exported file does not compute or run what was calibrated.
    """
    options, source = _settings(settings, calib, eval_data)
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, overwrite)
    work = open_work(model, calib, eval_data, options, source, progress or silent)
    pending = folder.with_name(f".{folder.name}.plan.json") if folder is not None else None
    plan, notes = _make_plan(work, options, progress or silent, pending)
    try:
        result = realize_work(work, plan, options, folder, overwrite, progress, notes)
    except GateError:  # the next run is not to meet the same plan again
        if pending is not None:
            pending.unlink(missing_ok=True)
        raise
    if pending is not None:
        pending.unlink(missing_ok=True)
    return result


@claims("out")
def allocate(
    model: ModelLike,
    *,
    calib: object | None = None,
    eval_data: object | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Plan:
    """The plan that :func:`quantize` would follow, found and written to the file ``out``, but not carried out.

    Only ``drop`` among the ``budgets`` takes calibrations, of the plans that are tried.

    Raises:
        InputError: the model, the data or an option cannot be used.
        InfeasibleBudget: no plan fits; the message has the smallest reachable value of each budget.
    """
    options, source = _settings(settings, calib, eval_data)
    path = Path(out) if out is not None else None
    if path is not None:
        check_free(path, overwrite)
    work = open_work(model, calib, eval_data, options, source, progress or silent)
    plan, _ = _make_plan(work, options, progress or silent)
    if path is not None:
        save_plan(plan, path)
    return plan


@claims("out")
def apply(
    plan: Plan | str | Path,
    model: ModelLike,
    *,
    calib: object | None = None,
    eval_data: object | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Carry out ``plan``: one of :func:`allocate` or :func:`sweep`, of a finished folder, or edited by hand.

    Of the options only how to read model and data, how many samples, and bench, threads and batch of the timing are
    used; the rest is in the plan.

    Raises:
        InputError: the plan is for another model, or asks for what cannot be done; every such choice is named.
        GateError: the exported file does not compute or run what was calibrated.
    """
    options, source = gather(settings)
    check_length(source.length, calib, eval_data)
    found = plan if isinstance(plan, Plan) else load_plan(Path(plan))
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, overwrite)
    work = open_work(model, calib, eval_data, options, source, progress or silent)
    samples = work.samples
    reviewed, notes = review_plan(
        found,
        work.intake.layers,
        work.intake.fingerprint,
        samples.fingerprint if samples else None,
        len(samples) if samples else 0,
    )
    return realize_work(work, reviewed, options, folder, overwrite, progress, tuple(notes))


@claims("out")
def sweep(
    model: ModelLike,
    *,
    calib: object | None = None,
    eval_data: object | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    over: str = "size",
    points: int = 12,
    measure: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> tuple[Front, list[Plan]]:
    """The best plans from the smallest ``over`` on, and the folder ``out`` with each of them, a table and a plot.

    Args:
        over: ``size``, ``latency`` or ``bops``.
        measure: carry out every plan too, for its real error and, with ``eval_data``, accuracy.

    Raises:
        InputError: the model, the data or an option cannot be used.
        InfeasibleBudget: other budgets that were given cannot be kept.
    """
    options, source = _settings(settings, calib, eval_data, searched=True)
    check_points(points)
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, overwrite, *FRONT)
    work = open_work(model, calib, eval_data, options, source, progress or silent)
    options, _ = settle_method(work.intake, options, work.samples)
    report_progress = progress or silent
    prepared = prepare(work.intake, options, work.samples, report_progress, also_timed=over == "latency")

    def carry_out(plan: Plan) -> dict[str, float]:
        report = realize_work(work, plan, options, None, False, progress).report
        accuracy = {"accuracy": report.metric.compressed_onnx} if report.metric else {}
        return {**report.measured, **accuracy}

    front, plans = sweep_front(prepared, over, points, report_progress, carry_out if measure else None)
    if folder is not None:
        write_front(folder, front, plans, overwrite)
    return front, plans


def diff(first: str | Path, second: str | Path) -> PlanDiff:
    """Two plans, from files or finished folders, side by side.

    Raises:
        InputError: one of them is not a plan.
    """
    return diff_plans(load_plan(Path(first)), load_plan(Path(second)))


def preview(
    model: ModelLike,
    *,
    calib: object | None = None,
    eval_data: object | None = None,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Preview:
    """The plan that :func:`quantize` would follow and an estimate of time and memory; nothing is written.

    A ``drop`` among the budgets is searched for, with ``eval_data``, by carrying plans out.
    """
    options, source = _settings(settings, calib, eval_data)
    work = open_work(model, calib, eval_data, options, source, progress or silent)
    plan, reasons = _make_plan(work, options, progress or silent)
    count = len(work.samples) if work.samples else 0
    layers = layers_of(work.intake.layers, plan.splits)
    notes = [float_note(plan, layers, work.intake.others), *work.notes, *reasons]
    return Preview(plan, work.intake.layers, notes, estimate(work.intake.traced, plan, count))


def inspect(model: ModelLike, **settings: Unpack[Settings]) -> Intake:
    """The model's layers, shapes and MACs, and what can be compressed; see :class:`~compress.intake.model.Intake`."""
    _, source = gather(settings)
    loaded = read_model(model, factory=source.model_factory, allow=source.allow, classes=source.classes)
    return take_in(add_deltas(loaded, source.deltas), input_shape=source.input_shape)


def load(
    folder: str | Path, *, deltas: str | Path | Sequence[str | Path] = (), weights: Sequence[float] | None = None,
    head: str | None = None, heads: bool = True, any_base: bool = False, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None, allow: Sequence[str] = (),
) -> torch.nn.Module:  # fmt: skip
    """The compressed model in ``folder`` as a PyTorch module that computes the same.

    On a GPU linears keep their weights packed, in the layout of our Triton kernels, and other layers run on floats.
    Files are checked and the model has run once, on the CPU, before anything is put on a GPU. A family of ``compress
    lowrank`` gives an :class:`~compress.training.lowrank.elastic.ElasticModel`: its size is set by call.

    Args:
        deltas: delta files of ``compress sparse`` to the float model that was compressed. Linears keep their codes and
            multiply with the differences, in float32, beside them; other weights that a delta changes become floats.
        weights, head, heads, any_base: see :func:`~compress.sparse.application.apply_deltas`.
        device: ``cpu``, ``cuda`` or ``cuda:1``; where the module then is, and takes its inputs.
        dtype: on a GPU, torch.float16 or torch.bfloat16: what packed linears multiply in; None: as the artifact does.
        allow: classes of your own, ``package.module.Class``, that a low-rank family may hold.

    A delta that names no base, as those of the published code, cannot be checked: a UserWarning says so, and another
    one where deltas have more than a fifth of the smallest one's entries in common.

    Raises:
        InputError: the folder, a delta or the device is not to be had, or they do not go together.
    """
    path = Path(folder)
    files = open_deltas([deltas] if isinstance(deltas, str | Path) else deltas)
    if (path / FAMILY_FILE).is_file():
        if files:
            raise InputError(f"{path} is a low-rank family, which takes no deltas; truncate a model with them merged")
        if dtype is not None:
            raise InputError(f"{path} is a low-rank family; it is converted as any module: load(folder).to(dtype)")
        return load_elastic(path, allow).to(check_device(device))
    loaded = load_on(path, device, dtype, files, weights=weights, head=head, heads=heads, any_base=any_base)
    for sentence in doubts(files, any_base=any_base):
        warnings.warn(sentence, stacklevel=2)
    return loaded.module


@claims("out")
def export(
    model: ModelLike,
    out: str | Path,
    *,
    share: str | None = None,
    overwrite: bool = False,
    **settings: Unpack[Settings],
) -> Path:
    """Write ``model`` (a folder that :func:`quantize` wrote, a float model's file, or a module) as one ONNX file.

    Args:
        share: the name of a file beside ``out`` for the tensors of the model without ``deltas``, which several tasks'
            files read; see compress/exporters/shared.py.

    Raises:
        InputError: the model cannot be used, or a file is in the way.
        GateError: the file does not compute what the graph does.
    """
    _, source = gather(settings)
    path = Path(out)
    check_free(path, overwrite)
    if share is None:
        export_whole(model, source, path)
    else:
        export_shared(model, source, path, share, overwrite)
    return path


def verify(
    path: str | Path, *, data: object | None = None, **settings: Unpack[Settings]
) -> ExportCheck | Proof | StreamReport:
    """Compare a folder's ONNX file with the graph beside it, on ``data`` or noise; or judge the codes of any ONNX file.

    The file's tensors are to be those that the graph is exported with, and the distance what its report says. Of a
    folder of ``compress stream`` the files are compared with their hashes, and its report is returned.

    Raises:
        InputError: it is neither a finished artifact nor a file that ONNX Runtime loads, or the data cannot be used.
    """
    _, source = gather(settings)
    path = Path(path)
    if path.is_file() or path.suffix == ".onnx":
        return prove_file(path, data)
    return verify_folder(path, data, source)


def _settings(
    settings: Settings, calib: object | None, eval_data: object | None, *, searched: bool = False
) -> tuple[Options, Source]:
    """A verb's keywords, checked before a file is read or a folder looked at."""
    options, source = gather(settings)
    searched = searched or bool(options.budgets)
    check_options(options, with_data=calib is not None, searched=searched)
    check_length(source.length, calib, eval_data)
    if searched:
        check_search(options, with_data=calib is not None)
    else:
        check_unused(options)
    return options, source


def _make_plan(
    work: Work, options: Options, progress: Progress, pending: Path | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The uniform plan, or the one that the budgets lead to; and notes on how it was found."""
    options, why = settle_method(work.intake, options, work.samples)
    reasons = (why,) if why else ()
    if not options.budgets:
        return make_plan(work.intake, options, work.samples, progress), reasons

    labels = work.labelled.labels if work.labelled is not None else None
    classes = labels is not None and not labels.is_floating_point()
    untimed = replace(options, bench=False)

    def drop_of(plan: Plan) -> float:
        assert work.labelled is not None
        key = [plan_fingerprint(plan), work.labelled.fingerprint, version("onnxruntime")]
        return remembered(
            "drop", key, lambda: realize_work(work, plan, untimed, None, False, progress).report.measured["drop"]
        )

    evaluation = work.labelled.fingerprint if work.labelled is not None else None
    judge = drop_of if classes else None
    plan, notes = find_plan(work.intake, options, work.samples, judge, progress, pending, evaluation)
    return plan, (*reasons, *notes)
