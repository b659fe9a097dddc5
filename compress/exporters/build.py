"""Write a traced model as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from compress.errors import InputError
from compress.exporters.program import to_program, traced_program
from compress.exporters.tidy import LAYER_SCOPE, tidy
from compress.exporters.translation import translate
from compress.files.outputs import new_file
from compress.graph.layers import LAYER_KINDS, is_stored
from compress.graph.traced import TracedModel

__all__ = ["build_onnx", "write_onnx"]


def build_onnx(traced: TracedModel) -> ir.Model:
    """The ONNX model that computes what ``traced`` computes, batch dynamic where the graph's is.

    Raises:
        InputError: an operator has no ONNX form; the message names it.
    """
    try:
        try:
            model = _translate(to_program(traced), traced)
        except torch.onnx.errors.OnnxExporterError:  # of the graph as it is; traced once more it may have one
            model = _translate(traced_program(traced), traced)
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise InputError(f"the model cannot be written as ONNX: {reason}") from error
    tidy(model)
    _name_sizes(model.graph)
    model.producer_name = "compress"
    model.producer_version = version("compress-toolchain")
    return model


def _translate(program: torch.export.ExportedProgram, traced: TracedModel) -> ir.Model:
    _mark_layers(program)
    return translate(program, traced.input_names, traced.output_names)


def _name_sizes(graph: ir.Graph) -> None:
    """Call the dynamic sizes of inputs and outputs ``batch`` and ``sequence`` instead of the exporter's symbols."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for size, name in zip(value.shape or (), ("batch", "sequence"), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, name)
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value in names:
                value.shape[axis] = ir.SymbolicDim(names[size.value])


def _mark_layers(program: torch.export.ExportedProgram) -> None:
    """Note every layer's name where the exporter keeps it, as if it were one more module around the call.

    Names of nodes would not do: the exporter takes other operators apart (recurrent ones into linears) and numbers
    anew. Parameters are inputs of an exported graph, with names in its signature.
    """
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.target in LAYER_KINDS:
            weight = node.args[1].args[0] if is_stored(node.args[1]) else node.args[1]
            if weight.name in targets:
                name = targets[weight.name].removesuffix(".weight").removesuffix(".weight_packed")
                node.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {}) | {LAYER_SCOPE: (name, LAYER_SCOPE)}


def write_onnx(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Write ``model`` with ``metadata`` (keys get the prefix ``compress.``) to ``path``, whole or not at all."""
    for key, value in metadata.items():
        model.metadata_props[f"compress.{key}"] = value
    with new_file(path) as temporary:
        ir.save(model, temporary)
