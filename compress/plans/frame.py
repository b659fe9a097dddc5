"""Decide what the options leave open: the frame of every plan, and the uniform one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from compress.calib.metaaug.site import check_transformable
from compress.calib.observers import OBSERVERS
from compress.data.samples import Samples
from compress.errors import InputError
from compress.intake.model import Intake
from compress.measure.fastest_format import find_fastest
from compress.measure.latency_table import LatencyTable
from compress.options import Options
from compress.plans.auto import AUTO, check_method
from compress.plans.eligibility import ends as ends_of
from compress.plans.uniform import uniform_choices
from compress.progress import Progress, silent
from compress.quant.instruction_sets import sets_of
from compress.quant.methods import METHODS
from compress.quant.targets import choose_target, find_target
from compress.records.plan import Choice, Plan, Steps
from compress.records.registry import resolve

__all__ = ["begin_plan", "check_options", "choose_methods", "choose_observer", "make_plan", "with_times"]

_SEVERAL = "--method {}: several are to choose from; that takes a --budget"


def make_plan(
    intake: Intake,
    options: Options,
    samples: Samples | None,
    progress: Progress = silent,
) -> Plan:
    """The uniform plan: ``options.bits`` for every layer but the first and the last.

    With ``options.rows`` each linear gets the format that runs it fastest.

    Raises:
        InputError: options that do not go together.
    """
    bits = 4 if options.bits is None else options.bits
    ends = 8 if options.first_last_bits is None else options.first_last_bits
    frame = begin_plan(intake, options, samples)
    methods = choose_methods(options, samples is not None)
    if len(methods) > 1:
        raise InputError(_SEVERAL.format(options.method))
    target = find_target(choose_target(options.target, options.machine))
    fastest: dict[str, Choice] = {}
    if options.rows is not None:
        outer = ends_of(intake.layers)
        fastest, table = find_fastest(
            intake.traced,
            intake.layers,
            {layer.name: max(bits, ends) if layer.name in outer else bits for layer in intake.layers},
            method=methods[0],
            rows=options.rows,
            with_data=samples is not None,
            target=target,
            threads=options.search.threads,
            table_file=Path(options.search.latency_table) if options.search.latency_table else None,
            progress=progress,
        )
        frame = with_times(frame, table)
    choices, skipped = uniform_choices(
        intake.layers,
        bits=bits,
        act_bits=_act_bits(options, samples),
        dynamic=is_dynamic(options, samples is not None),
        group_size=options.group_size,
        first_last_bits=ends,
        method=methods[0],
        target=target,
        sets=sets_of(options.machine, target.name),
        ignore=options.ignore,
        fastest=fastest,
    )
    return frame.model_copy(update={"choices": tuple(choices), "skipped": tuple(skipped)})


def with_times(plan: Plan, table: LatencyTable) -> Plan:
    """``plan`` with the times that decided it."""
    text = table.text()
    return plan.model_copy(update={"latency_table": text, "latency_sha256": hashlib.sha256(text.encode()).hexdigest()})


def begin_plan(intake: Intake, options: Options, samples: Samples | None) -> Plan:
    """A plan without choices: everything that holds for all layers, checked.

    Raises:
        InputError: options that do not go together.
    """
    check_options(options, with_data=samples is not None)
    names = choose_methods(options, samples is not None)
    methods = [resolve(METHODS, name, "method") for name in names]
    iterations = max(method.iterations for method in methods) if options.iterations is None else options.iterations
    if samples is not None:
        check_transformable(names, intake.traced, samples.inputs)
    observer = choose_observer(intake, options, samples)
    correction = options.bias_correction
    if correction is None:
        correction = not any(method.needs_data for method in methods)
    return Plan(
        choices=(),
        target=find_target(choose_target(options.target, options.machine)).name,
        observer=observer,
        steps=Steps(
            equalize=options.equalize,
            smoothquant=_has_outliers(intake, options, samples) if options.smoothquant is None else options.smoothquant,
            awq=options.awq,
            bias_correction=correction and samples is not None,
            statistics_tuning=options.statistics_tuning,
            bias_tuning=options.bias_tuning,
        ),
        iterations=iterations,
        seed=options.seed,
        samples=len(samples) if samples is not None else 0,
        model_fingerprint=intake.fingerprint,
        data_fingerprint=samples.fingerprint if samples is not None else None,
    )


def check_options(options: Options, *, with_data: bool, searched: bool = True) -> None:
    """Refuse options that go with no model and no data, before either is read.

    Args:
        with_data: there will be calibration samples.
        searched: a plan is searched for, among several methods maybe.

    Raises:
        InputError: naming the option.
    """
    _check_rows(options)
    if is_dynamic(options, with_data):
        _check_dynamic(options)
    _check_widths(options)
    _check_groups(options)
    check_method(options)
    if options.method != AUTO and len(choose_methods(options, with_data)) > 1 and not searched:
        raise InputError(_SEVERAL.format(options.method))
    if options.iterations is not None and options.iterations < 0:
        raise InputError(f"--iterations {options.iterations}: allowed are 0 (round only) and more")
    if options.samples < 1:
        raise InputError(f"--samples {options.samples}: at least 1")
    if options.observer is not None:
        resolve(OBSERVERS, options.observer, "observer")
    if not with_data:
        _check_without_data(options)
    choose_target(options.target, options.machine)


def _check_rows(options: Options) -> None:
    if options.rows is None:
        return
    if options.act_bits is not None or options.dynamic is not None or options.group_size is not None:
        raise InputError(
            "--rows chooses how inputs and groups are stored: leave out --act-bits, --dynamic and --group-size"
        )
    if options.budgets:
        raise InputError("--rows chooses a uniform plan's formats: with --budget leave it out")


def _check_dynamic(options: Options) -> None:
    if options.budgets:
        raise InputError("--budget chooses among calibrated grids: give --calib and leave out --dynamic")
    if options.act_bits not in (None, 8):
        raise InputError(
            f"--act-bits {options.act_bits}: ranges measured as the model runs (--dynamic, or no --calib data) are "
            "for 8 bits; give --calib samples, or leave --act-bits out, and the weights alone are quantized"
        )


def _check_widths(options: Options) -> None:
    for name, bits in (
        ("--bits", options.bits),
        ("--act-bits", options.act_bits),
        ("--first-last-bits", options.first_last_bits),
    ):
        if bits is not None and not (isinstance(bits, int) and 2 <= bits <= 8):
            raise InputError(f"{name} {bits}: allowed are 2 to 8")


def _check_groups(options: Options) -> None:
    if options.group_size is None:
        return
    if options.act_bits is not None or options.dynamic:
        raise InputError(
            "--group-size quantizes weights alone: integer kernels take one scale a row; drop --act-bits and --dynamic"
        )
    if not (isinstance(options.group_size, int) and options.group_size >= 2):
        raise InputError(f"--group-size {options.group_size}: allowed are 2 and more; matmul-nbits runs 16 to 256")


def _check_without_data(options: Options) -> None:
    learned = (
        options.statistics_tuning, options.bias_tuning, options.bias_correction, options.smoothquant, options.awq,
    )  # fmt: skip
    if any(learned):
        raise InputError(
            "SmoothQuant, AWQ, bias correction, statistics tuning and bias tuning need calibration data: give --calib"
        )


def choose_methods(options: Options, with_data: bool) -> tuple[str, ...]:
    """The methods asked for, several separated by commas, or the best there is for the data.

    Raises:
        InputError: one is unknown, or needs data that are not there.
    """
    grouped = options.group_size is not None or options.rows is not None
    best = ("gptq" if grouped else "adaquant") if with_data else ("hqq" if grouped else "mse")
    names = tuple((options.method or best).split(","))
    for name in names:
        method = resolve(METHODS, name, "method")
        if method.needs_data and not with_data:
            raise InputError(f"--method {name} needs calibration data: give --calib, or choose --method mse")
        if grouped and not method.grouped:
            able = ", ".join(each for each in METHODS if resolve(METHODS, each, "method").grouped)
            raise InputError(f"--method {name} gives a whole row one grid; with --group-size or --rows choose {able}")
    return names


def is_dynamic(options: Options, with_data: bool) -> bool:
    """Whether the ranges of inputs are measured as the model runs."""
    return options.dynamic if options.dynamic is not None else options.act_bits is not None and not with_data


def choose_observer(intake: Intake, options: Options, samples: Samples | None) -> str:
    """The observer asked for, or the best for the model."""
    return options.observer or ("minmax" if _has_outliers(intake, options, samples) else "mse")


def _has_outliers(intake: Intake, options: Options, samples: Samples | None) -> bool:
    """Whether values along a sequence get 8-bit grids: transformers have channels far beyond the rest."""
    sequences = any(
        layer.kind == "linear" and layer.rows > layer.calls and not layer.refusal for layer in intake.layers
    )
    return sequences and samples is not None and _act_bits(options, samples) == 8


def _act_bits(options: Options, samples: Samples | None) -> int | None:
    if is_dynamic(options, samples is not None):
        return 8
    if options.act_bits is not None or samples is None or options.group_size is not None:
        return options.act_bits
    return 8
