"""What each way costs in accuracy: sensitivities measured once for a model and its data, kept and reused."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version

import torch

from compress.calib.calibrate import calibrate
from compress.calib.resume import ResumeStore
from compress.calib.sensitivity import FLOAT as FLOAT_LOSS
from compress.calib.sensitivity import MEASURES, measure_sensitivity, stored_losses
from compress.data.samples import Samples
from compress.errors import InputError
from compress.files.cache import cache_folder, digest
from compress.graph.quantizers import quantize_inputs
from compress.graph.traced import TracedModel
from compress.intake.model import Intake
from compress.kernels.table import register_operators
from compress.options import Options
from compress.pipeline.apply_plan import transform_model
from compress.plans.frame import make_plan
from compress.progress import Progress, Tally
from compress.quant.formats import find_format
from compress.quant.targets import find_target
from compress.records.plan import Plan, Steps
from compress.search.space import Space, Way
from compress.transform.table import TRANSFORMS

__all__ = ["SMALLEST_ERROR", "check_measure", "decide_measure", "measure_errors", "transformed"]

SMALLEST_ERROR = 1e-6
"""No quantized layer counts as less harmful than this: a loss that happened to fall is noise the program would buy."""

# Changed with what a sensitivity means, so that older ones are measured again.
_RULE = "against the layer float, all others at 8 bits"


def check_measure(options: Options, with_data: bool) -> None:
    """Refuse a sensitivity that is unknown, or needs data where there will be none.

    Raises:
        InputError: with what is known.
    """
    measure = options.search.sensitivity
    if measure is None:
        return
    if measure not in MEASURES:
        raise InputError(f"unknown sensitivity {measure!r}; known: {', '.join(MEASURES)}")
    if measure != "weight" and not with_data:
        raise InputError(f"--sensitivity {measure} needs calibration data: give --calib, or choose weight")


def decide_measure(options: Options, samples: Samples | None) -> str:
    """The sensitivity asked for, or the one that fits.

    Raises:
        InputError: it is unknown, or needs data or labels that are not there.
    """
    check_measure(options, samples is not None)
    measure = options.search.sensitivity
    if measure is None:
        return "weight" if samples is None else "output"
    if measure == "loss" and (samples is None or samples.labels is None or samples.labels.is_floating_point()):
        raise InputError("--sensitivity loss needs calibration data with classes as labels; choose kl to do without")
    return measure


def measure_errors(
    intake: Intake,
    options: Options,
    frame: Plan,
    space: Space,
    measure: str,
    samples: Samples | None,
    progress: Progress,
) -> tuple[dict[str, dict[Way, float]], str]:
    """Error of every way of every layer, and a sentence that says where it comes from."""
    register_operators()
    trials = {layer: space.trials(layer) for layer in space.ways}
    total = sum(map(len, trials.values()))
    store = _store(intake, options, frame, measure, samples)
    known = {layer: stored_losses(store, layer) for layer in trials}
    missing = {layer: [trial for trial in wanted if trial.key not in known[layer]] for layer, wanted in trials.items()}
    count = sum(map(len, missing.values()))
    if count:
        tally = Tally(progress, count)
        tally.say("sensitivities: the model at 8 bits")
        part = samples.take(min(options.search.sensitivity_samples, len(samples))) if samples else None
        try:
            known |= measure_sensitivity(
                intake.traced,
                _base(intake, options, part, store),
                {layer: wanted for layer, wanted in missing.items() if wanted},
                measure,
                part.inputs if part else None,
                part.labels if part else None,
                observer=frame.observer,
                iterations=options.search.sensitivity_iterations,
                seed=options.seed,
                store=store,
                progress=lambda label: tally.add(f"sensitivity of {label}"),
            )
        finally:
            store.leave()
    rest = ", the rest kept from earlier ones" if count < total else ""
    note = f"sensitivity {measure}: {count} of {total} measured in this run{rest}"
    return {layer: _errors(space, layer, known[layer]) for layer in space.ways}, note


def _errors(space: Space, layer: str, losses: dict[str, float]) -> dict[Way, float]:
    def single(way: Way) -> float:
        return max(losses[way.trial().key] - losses[FLOAT_LOSS], SMALLEST_ERROR)

    quantized = [way for way in space.ways[layer] if way.option is not None and way.rank is None]
    errors = {}
    for way in space.ways[layer]:
        if way.untouched:
            errors[way] = 0.0
        elif not space.separable or way.rank is not None:
            errors[way] = single(way)
        else:
            weights, inputs = space.weights_alone(way, quantized), space.input_alone(way, quantized)
            widest = space.weights_alone(inputs, quantized)
            errors[way] = max(single(weights) + single(inputs) - single(widest), SMALLEST_ERROR)
    return errors


def transformed(intake: Intake, options: Options, frame: Plan, samples: Samples | None) -> Intake:
    """``intake`` with the graph as ``frame``'s steps will rewrite it: what is to be priced, measured and quantized."""
    steps = {name: getattr(frame.steps, name) for name in TRANSFORMS}
    if samples is None or not any(steps.values()):
        return intake
    plan = _at_8_bits(intake, options, samples)
    traced = intake.traced.copy()
    transform_model(traced, plan.model_copy(update={"steps": Steps(**steps)}), samples.inputs)
    return replace(intake, traced=traced)


def _at_8_bits(intake: Intake, options: Options, samples: Samples) -> Plan:
    plain = Options(
        bits=8, method="mse", observer=options.observer, target=options.target, machine=options.machine,
        ignore=options.ignore,
    )  # fmt: skip
    return make_plan(intake, plain, samples)


def _base(intake: Intake, options: Options, samples: Samples | None, store: ResumeStore) -> TracedModel:
    """The model with every layer at 8 bits, rounded to nearest; the float one without data."""
    base = intake.traced.copy()
    if samples is None:
        return base
    plan = _at_8_bits(intake, options, samples)
    quantizers = quantize_inputs(base, plan.choices, find_target(plan.target))
    computes = {choice.layer: find_format(choice.format).compute for choice in plan.choices}
    unsaved = ResumeStore(store.fresh_scratch() / "base", "base")
    calibrate(intake.traced, base, quantizers, plan, computes, samples.inputs, unsaved, lambda layer: None)
    return base


def _store(intake: Intake, options: Options, frame: Plan, measure: str, samples: Samples | None) -> ResumeStore:
    """Where the sensitivities of this model, data and way of measuring are kept."""
    transforms = [name for name in TRANSFORMS if getattr(frame.steps, name)]
    content = {
        "model": intake.fingerprint,
        "data": frame.data_fingerprint if measure != "weight" or transforms else None,
        "transforms": transforms,
        "samples": min(options.search.sensitivity_samples, len(samples)) if samples else 0,
        "measure": measure,
        "rule": _RULE,
        "observer": frame.observer,
        "target": frame.target,
        "machine": options.machine,
        "ignore": list(options.ignore),
        "iterations": options.search.sensitivity_iterations,
        "seed": options.seed,
        "versions": [version("compress-toolchain"), torch.__version__],
    }
    return ResumeStore(cache_folder() / f"sensitivity-{digest(content)}", json.dumps(content, sort_keys=True))
