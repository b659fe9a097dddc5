"""A plan and a folded float graph become the compressed graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from compress.calib.calibrate import LayerResult, calibrate, quantize_table
from compress.calib.distill_bias import tune_biases
from compress.calib.resume import ResumeStore
from compress.calib.statistics import tune_statistics
from compress.errors import InputError
from compress.files.cache import digest
from compress.graph.layers import layer_calls, list_layers, table_calls
from compress.graph.quantizers import quantize_inputs
from compress.graph.rewrite import absorb_activations, store_biases
from compress.graph.shared_grids import coarse_parts
from compress.graph.traced import TracedModel
from compress.kernels.table import register_operators
from compress.quant.formats import find_format
from compress.quant.targets import find_target
from compress.records.plan import Plan
from compress.transform.split import split_layers
from compress.transform.table import apply_transform

__all__ = ["Compressed", "apply_plan", "plan_fingerprint", "plan_parts", "transform_model"]

BIAS_TUNING_STEPS = 300
_CONTRACT_BATCH = 64


@dataclass(frozen=True)
class Compressed:
    """The finished graph, what each layer came to, and sentences for the report."""

    model: TracedModel
    layers: list[LayerResult]
    notes: list[str]


def plan_fingerprint(plan: Plan) -> str:
    """Hash of everything that determines the result: the plan (model and data are hashed in it) and our version.

    Why the plan was chosen, by which times, and how long that took, is not part of it.
    """
    decided = plan.model_dump(mode="json", exclude={"allocation", "latency_sha256"})
    content = json.dumps([decided, version("compress-toolchain"), torch.__version__])
    return hashlib.sha256(content.encode()).hexdigest()


def plan_parts(plan: Plan) -> dict[str, str]:
    """What makes a run another one, as a person would say it."""
    steps = [name for name, asked in plan.steps if asked]
    layers = {choice.layer: f"{choice.option} {choice.method} {choice.format}" for choice in plan.choices}
    return {
        "the model": plan.model_fingerprint[:12],
        "the calibration data": (plan.data_fingerprint or "none")[:12],
        "samples": str(plan.samples),
        "seed": str(plan.seed),
        "iterations": str(plan.iterations),
        "observer": plan.observer,
        "target": plan.target,
        "steps": " ".join(steps) or "none",
        "low rank": f"{len(plan.splits)} layers, {digest(list(map(str, plan.splits)))}" if plan.splits else "none",
        "what is done to the layers": f"{len(layers)} of them, {digest(layers)}",
        "versions": f"compress {version('compress-toolchain')}, torch {torch.__version__}",
    }


def apply_plan(
    float_model: TracedModel,
    plan: Plan,
    inputs: tuple[Tensor, ...] | None,
    store: ResumeStore,
    progress: Callable[[str], None],
    say: Callable[[str], None] = lambda what: None,
) -> Compressed:
    """Transform, split, place quantizers, quantize every layer, tune; ``float_model`` is edited by the first two only.

    Args:
        float_model: simplified and folded.
        inputs: calibration samples, one tensor [N, ...] a graph input; None for weights only.
        progress: called with the name of each layer when it is done; ``say`` with what goes on in between.

    Raises:
        InputError: the plan names a layer the model does not have, or asks of a layer what its format cannot do.
    """
    register_operators()
    _check(float_model, plan)
    if inputs is not None and not float_model.dynamic_batch:
        whole = len(inputs[0]) // len(float_model.example[0]) * len(float_model.example[0])
        inputs = tuple(x[:whole] for x in inputs)
    notes = transform_model(float_model, plan, inputs)
    reference, sentences = split_layers(float_model, plan, inputs, store.fresh_scratch())
    notes += sentences
    computes = {choice.layer: find_format(choice.format).compute for choice in plan.choices}
    model = float_model.copy()
    quantizers = quantize_inputs(model, plan.choices, find_target(plan.target))
    # A tied table among them: what the walk sees is then computed from the codes that its linear will have.
    tables = [
        quantize_table(model, choice, computes[choice.layer])
        for choice in plan.choices
        if choice.layer in table_calls(model)
    ]
    layers = calibrate(reference, model, quantizers, plan, computes, inputs, store, progress, say)
    if plan.steps.statistics_tuning and inputs is not None:
        changed = tune_statistics(reference, model, list(computes), inputs, store.fresh_scratch())
        notes.append(f"statistics tuning: mean and deviation restored in {len(changed)} layers")
        progress("statistics tuning")
    if plan.steps.bias_tuning and inputs is not None:
        biases = [
            str(calls[0].args[2].target)
            for name, calls in layer_calls(model).items()
            if name in computes and len(calls[0].args) > 2 and calls[0].args[2] is not None
        ]
        before, after = tune_biases(reference, model, biases, inputs, BIAS_TUNING_STEPS, plan.seed, progress)
        notes.append(f"bias tuning: distillation loss on held-back samples {before:.4g} -> {after:.4g}")
        progress("bias tuning")
    notes += coarse_parts(model)
    store_biases(model)
    absorb_activations(model)
    walked = {result.layer for result in layers}
    return Compressed(model, [*(table for table in tables if table.layer not in walked), *layers], notes)


def transform_model(float_model: TracedModel, plan: Plan, inputs: tuple[Tensor, ...] | None) -> list[str]:
    """Rewrite ``float_model`` in place as the plan's steps ask; it computes the same. Sentences for the report."""
    notes = []
    batch = _contract_batch(float_model, inputs) if inputs is not None else None
    if plan.steps.equalize:
        notes += apply_transform("equalize", float_model, batch)
    options = {choice.layer: choice.option for choice in plan.choices}
    for name in ("smoothquant", "awq"):
        if getattr(plan.steps, name) and inputs is not None:
            notes += apply_transform(name, float_model, batch, samples=inputs, options=options)
    return notes


def _contract_batch(model: TracedModel, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a transform must not change the outputs on."""
    return tuple(x[: _CONTRACT_BATCH if model.dynamic_batch else len(model.example[0])] for x in inputs)


def _check(model: TracedModel, plan: Plan) -> None:
    specs = {layer.name: layer for layer in list_layers(model)}
    for split in plan.splits:
        reason = split.refusal(specs[split.layer]) if split.layer in specs else "the model does not have it"
        if reason:
            raise InputError(f"the plan splits layer {split.layer!r}: {reason}")
    known = layer_calls(model).keys() | table_calls(model).keys()
    known |= {part for split in plan.splits for part in split.parts}
    for choice in plan.choices:
        if choice.layer not in known:
            raise InputError(
                f"the plan names layer {choice.layer!r}, which the model does not have; "
                "`compress inspect` lists its layers"
            )
