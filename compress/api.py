"""One function a verb; :func:`quantize` is the road from model to proven file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.allocate.uniform import uniform_choices
from compress.apply import apply_plan, plan_fingerprint
from compress.artifact import (
    ONNX_FILE,
    REPORT_FILE,
    check_folder,
    check_free,
    load_artifact,
    load_plan,
    new_folder,
    save_artifact,
)
from compress.calib.observers import OBSERVERS
from compress.calib.resume import open_store
from compress.calib.samples import Samples, load_samples
from compress.errors import InputError
from compress.estimate import Estimate, estimate
from compress.exporters.onnx import build_onnx, write_onnx
from compress.gate import verify as verify_file
from compress.gate import verify_or_raise
from compress.graph.traced import TracedModel
from compress.intake import Intake, ModelLike, check_fits, noise, take_in
from compress.kernels.table import register_operators
from compress.methods import METHODS
from compress.records import LayerSpec, Plan, Steps
from compress.registry import resolve
from compress.report.build import build_report, check_metric, measure_latency, measure_metric
from compress.report.schema import Parity, Report
from compress.targets import find_target

__all__ = ["Options", "Preview", "Result", "export", "inspect", "load", "preview", "quantize", "verify"]

_GATE_SAMPLES = 256


@dataclass(frozen=True)
class Options:
    """Everything :func:`quantize` may be told; None means that the tool decides, and says what it chose.

    Attributes:
        bits: width of the weights, 2..8.
        act_bits: width of the activations, 4..8; needs calibration data. None: 8 with data, float without.
        method: a name from compress/methods.py. None: ``adaquant`` with data, ``mse`` without.
        samples: how many calibration samples to use.
        first_last_bits: width of the first and the last layer, where that is more than ``bits``.
        target: a name from compress/targets.py.
        observer: how activation ranges are chosen (compress/calib/observers.py).
        iterations: optimisation steps a layer.
        ignore: layers to leave float, by shell pattern or ``re:`` regular expression.
        equalize, bias_correction, statistics_tuning, bias_tuning: the steps of compress.records.Steps.
        seed: of everything random.
    """

    bits: int = 4
    act_bits: int | None = None
    method: str | None = None
    samples: int = 1024
    first_last_bits: int = 8
    target: str = "onnx-cpu"
    observer: str = "mse"
    iterations: int = 300
    ignore: tuple[str, ...] = ()
    equalize: bool = False
    bias_correction: bool | None = None
    statistics_tuning: bool = False
    bias_tuning: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What :func:`quantize` returns: the report, the folder it wrote (None: none asked for), and the module itself."""

    report: Report
    folder: Path | None
    module: torch.nn.Module


@dataclass(frozen=True)
class Preview:
    """What :func:`quantize` would do, and for how long."""

    plan: Plan
    layers: list[LayerSpec]
    notes: list[str]
    estimate: Estimate


def quantize(
    model: ModelLike,
    *,
    calib: object | None = None,
    eval_data: object | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    options: Options | None = None,
    model_factory: str | None = None,
    allow: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: object,
) -> Result:
    """Quantize ``model``, export it, prove it, and write the folder ``out``.

    Args:
        model: a path (see compress.checkpoint.load_model) or a module.
        calib: calibration samples (see compress.calib.samples.load_samples); None quantizes the weights only.
        eval_data: labelled samples for the metric before and after.
        out: folder to write; None leaves nothing on disk.
        options: or its fields as keywords: ``quantize(model, bits=4, act_bits=8)``.
        model_factory: ``package.module:factory``, for files that hold weights only.
        mean, std, size: how images given as bytes or files are normalised and cropped.
        progress: called with a label, steps done and steps in all.

    Raises:
        InputError: the model, the data or an option cannot be used.
        GateError: the exported file does not compute or run what was calibrated.
    """
    options = _options(options, settings)
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, overwrite)
    report_progress = progress or _silent
    images = {"mean": mean, "std": std, "size": size}
    samples = load_samples(calib, limit=options.samples, seed=options.seed, **images) if calib is not None else None  # type: ignore[arg-type]
    labelled = load_samples(eval_data, labelled=True, **images) if eval_data is not None else None  # type: ignore[arg-type]
    intake = take_in(model, factory=model_factory, allow=allow, input_shape=input_shape, samples=samples)
    plan = make_plan(intake, options, samples)
    if labelled is not None:
        check_metric(intake, labelled)

    started = time.monotonic()
    work = folder.with_name(f".{folder.name}.work") if folder is not None else None
    with open_store(work, plan_fingerprint(plan)) as store:
        done = 0
        continued = [f"continued: {store.found} layers were finished by an earlier run"] if store.found else []

        def layer_done(label: str) -> None:
            nonlocal done
            done += 1
            report_progress(label, min(done, len(plan.choices)), len(plan.choices))

        float_model = intake.traced.copy()
        compressed = apply_plan(float_model, plan, samples.inputs if samples else None, store, layer_done)
        calibrated = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="compress-") as scratch:
            staging = Path(scratch)
            report_progress("exporting", len(plan.choices), len(plan.choices))
            float_file, file = staging / "float.onnx", staging / ONNX_FILE
            write_onnx(build_onnx(intake.traced), float_file, {})
            onnx_model = build_onnx(compressed.model)
            write_onnx(onnx_model, file, {})
            target = find_target(plan.target)
            parity = verify_file(
                compressed.model, file, *_gate_inputs(compressed.model, samples, plan.seed), target.provider
            )
            verify_or_raise(parity, folder / ONNX_FILE if folder is not None else file)
            report_progress("measuring", len(plan.choices), len(plan.choices))
            report = build_report(
                plan=plan,
                layers=intake.layers,
                results=compressed.layers,
                model=compressed.model,
                float_file=float_file,
                compressed_file=file,
                parity=parity,
                latency=measure_latency(float_file, file, target.provider),
                metric=measure_metric(intake.original, compressed.model, file, labelled, target.provider)
                if labelled
                else None,
                calibration_seconds=calibrated - started,
                notes=[
                    *intake.notes,
                    *(samples.notes if samples else ()),
                    *_evaluation_notes(labelled),
                    *compressed.notes,
                    *continued,
                ],
            )
            if folder is not None:
                with new_folder(folder, overwrite) as partial:
                    write_onnx(onnx_model, partial / ONNX_FILE, _metadata(plan, parity, report))
                    save_artifact(partial, compressed.model, plan)
                    (partial / REPORT_FILE).write_text(report.model_dump_json(indent=2))
        return Result(report, folder, compressed.model.module)


def preview(
    model: ModelLike,
    *,
    calib: object | None = None,
    options: Options | None = None,
    model_factory: str | None = None,
    allow: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Preview:
    """The plan that :func:`quantize` would follow and an estimate of time and memory; nothing is quantized."""
    options = options or Options()
    samples = None
    if calib is not None:
        samples = load_samples(calib, limit=options.samples, seed=options.seed, mean=mean, std=std, size=size)
    intake = take_in(model, factory=model_factory, allow=allow, input_shape=input_shape, samples=samples)
    plan = make_plan(intake, options, samples)
    notes = [*intake.notes, *(samples.notes if samples else ())]
    return Preview(plan, intake.layers, notes, estimate(intake.traced, plan, len(samples) if samples else 0))


def make_plan(intake: Intake, options: Options, samples: Samples | None) -> Plan:
    """Decide what the options leave open.

    Raises:
        InputError: options that do not go together.
    """
    act_bits = options.act_bits if options.act_bits is not None else (8 if samples is not None else None)
    if options.act_bits is not None and samples is None:
        raise InputError(
            "--act-bits needs calibration data: give --calib, or leave it out to quantize the weights only"
        )
    for name, value, low in (
        ("--bits", options.bits, 2),
        ("--act-bits", act_bits, 4),
        ("--first-last-bits", options.first_last_bits, 2),
    ):
        if value is not None and not (isinstance(value, int) and low <= value <= 8):
            raise InputError(f"{name} {value}: allowed are {low} to 8")
    if options.iterations < 0:
        raise InputError(f"--iterations {options.iterations}: allowed are 0 (round only) and more")
    resolve(OBSERVERS, options.observer, "observer")
    method = options.method or ("adaquant" if samples is not None else "mse")
    needs_data = resolve(METHODS, method, "method").needs_data
    if needs_data and samples is None:
        raise InputError(f"--method {method} needs calibration data: give --calib, or choose --method mse")
    correction = options.bias_correction if options.bias_correction is not None else not needs_data
    steps = Steps(
        equalize=options.equalize,
        bias_correction=correction and samples is not None,
        statistics_tuning=options.statistics_tuning,
        bias_tuning=options.bias_tuning,
    )
    if samples is None and (options.statistics_tuning or options.bias_tuning or options.bias_correction):
        raise InputError("bias correction, statistics tuning and bias tuning need calibration data: give --calib")
    choices, skipped = uniform_choices(
        intake.layers,
        bits=options.bits,
        act_bits=act_bits,
        first_last_bits=options.first_last_bits,
        method=method,
        target=find_target(options.target),
        ignore=options.ignore,
    )
    return Plan(
        choices=tuple(choices),
        skipped=tuple(skipped),
        target=options.target,
        observer=options.observer,
        steps=steps,
        iterations=options.iterations,
        seed=options.seed,
        samples=len(samples) if samples is not None else 0,
        model_fingerprint=intake.fingerprint,
        data_fingerprint=samples.fingerprint if samples is not None else None,
    )


def inspect(
    model: ModelLike,
    *,
    model_factory: str | None = None,
    allow: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
) -> Intake:
    """The model's layers, shapes and MACs, and what can be compressed; see :class:`~compress.intake.Intake`."""
    return take_in(model, factory=model_factory, allow=allow, input_shape=input_shape)


def load(folder: str | Path) -> torch.nn.Module:
    """The compressed model in ``folder`` as a PyTorch module that computes the same.

    Raises:
        InputError: the folder is not a finished artifact.
    """
    return load_artifact(Path(folder)).module


def export(
    model: ModelLike,
    out: str | Path,
    *,
    overwrite: bool = False,
    model_factory: str | None = None,
    allow: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
) -> Path:
    """Write ``model`` (a folder that :func:`quantize` wrote, a float model's file, or a module) as one ONNX file.

    Raises:
        InputError: the model cannot be used, or ``out`` exists.
        GateError: the file does not compute what the graph does.
    """
    path = Path(out)
    check_free(path, overwrite)
    traced = _traced(model, model_factory, allow, input_shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".compress-") as folder:
        staged = Path(folder) / path.name
        write_onnx(build_onnx(traced), staged, {})
        parity = verify_file(traced, staged, noise(traced, 32, seed=0), "noise")
        verify_or_raise(parity, path)
        staged.replace(path)
    return path


def verify(
    folder: str | Path,
    *,
    data: object | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Parity:
    """Compare the ONNX file in ``folder`` with the PyTorch graph beside it, on ``data`` or on noise.

    Raises:
        InputError: the folder is not a finished artifact, or the data cannot be used.
    """
    path = Path(folder)
    traced = load_artifact(path)
    plan = load_plan(path)
    samples = (
        load_samples(data, limit=_GATE_SAMPLES, seed=plan.seed, mean=mean, std=std, size=size)
        if data is not None
        else None
    )
    return verify_file(
        traced, path / ONNX_FILE, *_gate_inputs(traced, samples, plan.seed), find_target(plan.target).provider
    )


def _traced(
    model: ModelLike, factory: str | None, allow: Sequence[str], input_shape: Sequence[int] | None
) -> TracedModel:
    register_operators()
    if not isinstance(model, torch.nn.Module) and Path(model).is_dir():
        return load_artifact(Path(model))
    return take_in(model, factory=factory, allow=allow, input_shape=input_shape).traced


def _gate_inputs(traced: TracedModel, samples: Samples | None, seed: int) -> tuple[tuple[torch.Tensor, ...], str]:
    if samples is None:
        return noise(traced, 32, seed), "noise"
    check_fits(samples, traced)
    return tuple(x[:_GATE_SAMPLES] for x in samples.inputs), samples.source


def _metadata(plan: Plan, parity: Parity, report: Report) -> dict[str, str]:
    return {
        "plan_sha256": plan_fingerprint(plan),
        "target": plan.target,
        "parity_relative_l2": f"{parity.relative_l2_optimized:.3g}",
        "onnxruntime_version": report.environment.onnxruntime or "",
        "torch_version": report.environment.torch or "",
    }


def _options(options: Options | None, settings: dict[str, object]) -> Options:
    if options is not None and settings:
        raise InputError(f"give either options or keywords, not both ({', '.join(settings)})")
    try:
        return options or Options(**settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"quantize: {error}; the options are the fields of compress.api.Options") from error


def _evaluation_notes(labelled: Samples | None) -> list[str]:
    return [f"evaluation data: {note}" for note in labelled.notes] if labelled is not None else []


def _silent(label: str, done: int, total: int) -> None:
    """No progress asked for."""
