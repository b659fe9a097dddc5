"""ONNX files: a graph's, written, proven against the graph and only then put in its place; anybody's, judged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from compress.errors import InputError
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.saturation import prove
from compress.exporters.shared import Shares, check_name, write_shared
from compress.files.outputs import check_free, new_files
from compress.graph.traced import TracedModel
from compress.intake.model import Intake, ModelLike, read_model, take_in
from compress.kernels.table import register_operators
from compress.models.huggingface import is_pretrained
from compress.options import Source
from compress.proof.gate import verify, verify_or_raise
from compress.proof.gate_inputs import gate_inputs
from compress.records.report import Proof
from compress.runtime.artifact import load_artifact
from compress.sparse.deltas import add_deltas

__all__ = ["export_shared", "export_whole", "prove_file"]


def _graph_of(model: ModelLike, source: Source) -> tuple[TracedModel, Intake | None]:
    """The graph of a compressed folder, or of a float model with the deltas of ``source`` added; that model.

    Raises:
        InputError: the model cannot be used, or is compressed and there are deltas.
    """
    register_operators()
    if not isinstance(model, torch.nn.Module) and Path(model).is_dir() and not is_pretrained(Path(model)):
        if source.deltas:
            raise InputError(
                f"{model} is compressed already; add deltas to the float model: compress quantize --delta; in PyTorch "
                "compress.load(folder, deltas=...) adds them to this one"
            )
        return load_artifact(Path(model)), None
    loaded = read_model(model, factory=source.model_factory, allow=source.allow, classes=source.classes)
    intake = take_in(add_deltas(loaded, source.deltas), input_shape=source.input_shape)
    return intake.traced, intake


def export_whole(model: ModelLike, source: Source, path: Path) -> None:
    """Write a compressed folder, or a float model with the deltas of ``source``, to ``path``, as one file.

    Raises:
        InputError: the model cannot be used, or is compressed and there are deltas.
        GateError: the file does not compute what the graph does.
    """
    traced, intake = _graph_of(model, source)
    with new_files(path) as folder:
        staged = folder / path.name
        write_onnx(build_onnx(traced), staged, {})
        _prove(traced, intake, staged, path)


def export_shared(model: ModelLike, source: Source, path: Path, shared: str, overwrite: bool) -> Shares:
    """Write a model with deltas to ``path``, what it has in common with that without in the file ``shared`` beside it.

    Raises:
        InputError: see :func:`export_whole` and :func:`~compress.exporters.shared.write_shared`; or a file is in the
            way.
        GateError: the files do not compute what the graph does.
    """
    data = path.with_name(f"{path.name}.data")
    check_name(shared, path)
    check_free(data, overwrite)
    traced, intake = _graph_of(model, source)
    built = build_onnx(traced)
    base = build_onnx(_graph_of(model, replace(source, deltas=()))[0]) if source.deltas else built
    with new_files(path) as folder:
        staged = folder / path.name
        there, linked = path.with_name(shared), staged.with_name(shared)
        if there.is_file():
            # A copy: ONNX Runtime reads no data outside the model's folder, and onnx none that has two names.
            shutil.copyfile(there, linked)
        shares = write_shared(built, base, staged, shared)
        _prove(traced, intake, staged, path)
        if there.exists():
            linked.unlink()
        staged.with_name(data.name).touch()  # none of its own: an older one is to go
    return shares


def prove_file(path: Path, data: object | None = None) -> Proof:
    """Where the integer sums of the ONNX file ``path``, whoever wrote it, are exact.

    Raises:
        InputError: it is no file that ONNX Runtime loads; or there is ``data``, and no graph to compare the file with.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}; check the path.")
    if data is not None:
        raise InputError(
            f"{path} is a file, with no PyTorch graph beside it to compare it with on data; leave --data out, and its "
            "codes alone are judged, or give the folder that `compress quantize` has written"
        )
    try:
        return prove(path)
    except InputError as error:
        raise InputError(
            f"{error}; `compress verify` takes an ONNX file, or a folder that `compress quantize` has written"
        ) from error


def _prove(traced: TracedModel, intake: Intake | None, staged: Path, path: Path) -> None:
    judged = gate_inputs(traced, 0, intake=intake, ask="compress verify --data takes samples")
    verify_or_raise(verify(traced, staged, judged.inputs, judged.source), path)
