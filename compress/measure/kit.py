"""Everything that times a model's layers on another machine, as a folder that needs no compress there.

A kit holds small ONNX files of the model's distinct layers, a file for each kind of numbers; the whole model on floats
and on integers, without calibration; and compress/measure/operator_timing.py, which times them and writes
``latency.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from compress.errors import InputError
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.fusion import LAYER_OPERATORS
from compress.exporters.skeleton import write_skeleton
from compress.files.cache import digest
from compress.files.outputs import check_folder, claims, new_folder
from compress.intake.model import Intake, ModelLike, read_model, take_in
from compress.lowrank.ranks import SHARES, thin_ranks
from compress.measure import operator_timing
from compress.measure.fastest_format import linear_shapes, linear_variants
from compress.measure.latency_model import LayerPlace, layer_places, thin_shapes
from compress.measure.machine import TELLING_FLAGS
from compress.measure.operators import Shape, Variant, default_variants, export_operators
from compress.options import Source
from compress.progress import Progress, silent
from compress.quant.formats import FORMATS
from compress.quant.targets import Target
from compress.records.layers import LayerSpec, QuantOption
from compress.records.plan import Choice
from compress.sparse.deltas import add_deltas

__all__ = ["base_kinds", "layers_digest", "operator_shapes", "write_kit"]

# A branch beside a layer of few bits, too (compress/search/space.py).
_SHARES = (*SHARES, 1 / 16)
_WIDTHS = (2, 4, 8)  # that a kernel unpacks; others run as floats, whose times are there
_INTEGER = QuantOption(bits=8, act_bits=8)
_VERB = "compress bench --kit"


@claims("folder")
def write_kit(
    model: ModelLike,
    folder: Path,
    *,
    source: Source,
    target: Target,
    threads: int,
    batch: int,
    rows: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write ``folder``: what a budget on latency asks for at ``batch``, and with ``rows`` what ``--rows`` asks for.

    Args:
        source: how the model is read.
        threads: that it is to be timed with.

    Raises:
        InputError: the model cannot be read, the folder is in the way, or a layer cannot be exported.
    """
    for name, value in (("threads", threads), ("batch", batch), ("rows", rows)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: it must be at least 1")
    check_folder(folder, overwrite, operator_timing.KIT_FILE, _VERB)
    loaded = read_model(model, factory=source.model_factory, allow=source.allow, classes=source.classes)
    intake = take_in(add_deltas(loaded, source.deltas), input_shape=source.input_shape)
    own_batch = len(intake.traced.example[0])
    if batch != own_batch and not intake.traced.dynamic_batch:
        raise InputError(f"--batch {batch}: the model fixes its batch to {own_batch}")
    places = layer_places(intake.traced, batch)
    specs = {layer.name: layer for layer in intake.layers}
    ranks = {name: thin_ranks(specs[name], _SHARES) for name in places if name in specs and not specs[name].refusal}
    wanted: dict[Variant, dict[str, Shape]] = {
        variant: operator_shapes(places, ranks) for variant in default_variants(target)
    }
    for variant, shape in _at_rows(intake, target, rows) if rows is not None else ():
        same = next((each for each in wanted if each.compute == variant.compute), variant)
        wanted.setdefault(same, {})[shape.signature] = shape
    with new_folder(folder, overwrite, operator_timing.KIT_FILE, _VERB) as partial:
        operators = []
        for variant, shapes in wanted.items():
            (file,) = export_operators([*shapes.values()], [variant], target, partial, progress)
            operators.append({**_described(file), "compute": variant.compute, "signatures": [*shapes]})
        models = [
            {**_described(_whole(intake, kind, target, partial)), "kind": kind}
            for kind in ("float", *(["integer"] if "integer" in target.formats else []))
        ]
        length = intake.traced.length
        kit = {
            "onnxruntime": version("onnxruntime"),
            "provider": target.provider,
            "threads": threads,
            "rounds": operator_timing.ROUNDS,
            "layer_operators": sorted(LAYER_OPERATORS),
            "telling_flags": TELLING_FLAGS,
            "layers": layers_digest(places),
            "dims": {"batch": batch, **({"sequence": length} if length else {})},
            "operators": operators,
            "models": models,
        }
        (partial / operator_timing.KIT_FILE).write_text(json.dumps(kit, indent=1) + "\n")
        shutil.copyfile(operator_timing.__file__, partial / "measure.py")
    return folder


def operator_shapes(places: Mapping[str, LayerPlace], ranks: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """Every distinct layer by its signature, and the thin ones that may do it at ``ranks``."""
    return {
        shape.signature: shape
        for name, place in places.items()
        for shape in (*place.shapes, *(each for rank in ranks.get(name, ()) for each in thin_shapes(place, rank)))
    }


def layers_digest(places: Mapping[str, LayerPlace]) -> str:
    """What a whole model's time is kept by."""
    return digest([shape.signature for place in places.values() for shape in place.shapes])


def base_kinds(layers: Sequence[LayerSpec], kind: str) -> dict[str, str]:
    """What each convolution and linear runs on in a kit's whole model of ``kind``."""
    integer = FORMATS["integer"]
    able = {layer.name for layer in layers if kind == "integer" and integer.refusal(layer, _INTEGER) is None}
    return {layer.name: "integer" if layer.name in able else "float" for layer in layers if layer.kind in integer.kinds}


def _at_rows(intake: Intake, target: Target, rows: int) -> list[tuple[Variant, Shape]]:
    _, shapes = linear_shapes(intake.traced, intake.layers, rows)
    specs = {layer.name: layer for layer in intake.layers}
    return [
        (variant, shape)
        for name, shape in shapes.items()
        for bits in _WIDTHS
        for variant in linear_variants(specs[name], bits, True, target)
    ]


def _whole(intake: Intake, kind: str, target: Target, folder: Path) -> Path:
    path = folder / f"model-{kind}.onnx"
    names = [name for name, runs in base_kinds(intake.layers, kind).items() if runs == "integer"]
    if names:
        choices = [Choice(layer=name, method="minmax", option=_INTEGER, format="integer") for name in names]
        write_skeleton(intake.traced, choices, target, path)
    else:
        write_onnx(build_onnx(intake.traced), path, {})
    return path


def _described(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": operator_timing.sha256(file)}
