"""Whether a plan, maybe edited by hand or made elsewhere, can be carried out on this model with these data."""

from __future__ import annotations

from collections.abc import Sequence

from compress.calib.observers import OBSERVERS
from compress.errors import InputError
from compress.files.cache import digest
from compress.lowrank.ranks import layers_of
from compress.plans.eligibility import find_format_for
from compress.quant.formats import find_format
from compress.quant.methods import METHODS
from compress.quant.targets import Target, find_target
from compress.records.allocation import Allocation
from compress.records.layers import LayerSpec
from compress.records.plan import Choice, Plan, Skip
from compress.records.registry import resolve

__all__ = ["review_plan", "settings_digest"]

_STEPS_WITH_DATA = ("bias_correction", "statistics_tuning", "bias_tuning")


def review_plan(
    plan: Plan, layers: Sequence[LayerSpec], model_fingerprint: str, data_fingerprint: str | None, samples: int
) -> tuple[Plan, list[str]]:
    """The plan as it will be carried out, and sentences on what differs from what was planned.

    Args:
        layers: the model's.
        data_fingerprint: of the calibration data; None without.
        samples: how many there are.

    Raises:
        InputError: it is for another model, or asks for what a layer, format, method or target cannot do; all such
            choices are named.
    """
    _check_model(plan, model_fingerprint, data_fingerprint)
    target = find_target(plan.target)
    resolve(OBSERVERS, plan.observer, "observer")
    problems = [*_split_problems(plan, layers), *_choice_problems(plan, layers, target, data_fingerprint is not None)]
    if problems:
        raise InputError("the plan cannot be carried out: " + "; ".join(problems))
    notes = []
    if plan.data_fingerprint is not None and plan.data_fingerprint != data_fingerprint:
        notes.append("the plan was made with other calibration data than it is carried out with")
    allocation = plan.allocation
    if allocation is not None and not _as_found(plan, allocation):
        allocation = None
        notes.append("the plan was edited since it was found: its predictions and its certificate no longer hold")
    stamped = {
        "skipped": _skipped(plan, layers),
        "allocation": allocation,
        "data_fingerprint": data_fingerprint,
        "samples": samples,
    }
    return plan.model_copy(update=stamped), notes


def _check_model(plan: Plan, model_fingerprint: str, data_fingerprint: str | None) -> None:
    if plan.model_fingerprint == model_fingerprint:
        return
    remedy = "make one for this model with `compress allocate`"
    if plan.data_fingerprint is not None and data_fingerprint is None:
        remedy = "it was made with calibration data, which set the input shape: give them as --calib"
    raise InputError(
        f"the plan was made for another model (fingerprint {plan.model_fingerprint[:12]}, this model's is "
        f"{model_fingerprint[:12]}); {remedy}"
    )


def _skipped(plan: Plan, layers: Sequence[LayerSpec]) -> tuple[Skip, ...]:
    """Layers that stay float, for the plan's reason where it has one."""
    chosen = {choice.layer for choice in plan.choices}
    told = [skip for skip in plan.skipped if skip.layer not in chosen]
    listed = chosen | {skip.layer for skip in told}
    names = dict.fromkeys(layer.name for layer in layers_of(layers, plan.splits))
    return (*told, *(Skip(layer=name, reason="not in the plan") for name in names if name not in listed))


def _as_found(plan: Plan, allocation: Allocation) -> bool:
    """Whether ``plan`` still is what its ``allocation`` was found for."""
    planned = {
        (name, each.method, each.option, each.format)
        for each in allocation.chosen
        if each.option
        for name in (each.split.parts if each.split else (each.layer,))
    }
    chosen = {(each.layer, each.method, each.option, each.format) for each in plan.choices}
    cut = {each.split for each in allocation.chosen if each.split}
    return planned == chosen and cut == set(plan.splits) and allocation.settings == settings_digest(plan)


def settings_digest(plan: Plan) -> str:
    """A short name for everything in ``plan`` that decides its result, besides choices, model and data."""
    return digest(plan.model_dump(mode="json", include={"target", "observer", "steps", "iterations", "seed"}))


def _split_problems(plan: Plan, layers: Sequence[LayerSpec]) -> list[str]:
    known = {layer.name: layer for layer in layers}
    names = [split.layer for split in plan.splits]
    found = [f"layer {name} is split twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for split in plan.splits:
        layer = known.get(split.layer)
        reason = split.refusal(layer) if layer else "the model has no layer of that name; `compress inspect` lists them"
        if reason:
            found.append(f"layer {split.layer} cannot be split: {reason}")
    return found


def _choice_problems(plan: Plan, layers: Sequence[LayerSpec], target: Target, with_data: bool) -> list[str]:
    known = {layer.name: layer for layer in layers_of(layers, plan.splits)}
    names = [choice.layer for choice in plan.choices]
    found = [f"layer {name} is chosen twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for choice in plan.choices:
        problem = _problem(choice, known.get(choice.layer), target, with_data)
        if problem:
            found.append(f"layer {choice.layer}: {problem}")
    if plan.iterations < 0:
        found.append(f"iterations is {plan.iterations}: allowed are 0 (round only) and more")
    if not with_data:
        steps = [name for name in _STEPS_WITH_DATA if getattr(plan.steps, name)]
        found += [f"step {name} needs calibration data: give --calib" for name in steps]
    if not plan.choices and not plan.splits:
        found.append("it chooses nothing for any layer")
    return found


def _problem(choice: Choice, layer: LayerSpec | None, target: Target, with_data: bool) -> str | None:
    """Why ``choice`` cannot be honoured; None when it can."""
    if layer is None:
        return "the model has no layer of that name; `compress inspect` lists them"
    if choice.format not in target.formats:
        return f"target {target.name} has no format {choice.format!r}; it has {', '.join(target.formats)}"
    if find_format(choice.format).inputs != choice.option.inputs:
        right, _ = find_format_for(layer, choice.option, target)
        return f"format {choice.format} does not run {choice.option}; {right or 'no format'} does"
    if refusal := find_format(choice.format).refusal(layer, choice.option):
        return refusal
    if choice.option.inputs == "static" and not with_data:
        return "quantized activations need calibration data: give --calib"
    if choice.method not in METHODS:
        return f"unknown method {choice.method!r}; known: {', '.join(METHODS)}"
    if resolve(METHODS, choice.method, "method").needs_data and not with_data:
        return f"method {choice.method} needs calibration data: give --calib"
    return None
