"""PyTorch's exporter to ONNX, with its table of operators built once a process.

``torch.onnx.export`` builds that table anew at every call, which reads the sources of hundreds of functions. The
function behind it takes a table that is there already. It is not public: where this version of torch has no such
function the public one is called. The files are the same, each export takes a second longer, and a warning says so.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from compress.exporters.functions import OPSET
from compress.exporters.lowering import translations
from compress.exporters.promotion import kept_values
from compress.graph.composites import composites_listed_once
from compress.kernels.table import register_operators

__all__ = ["operator_table", "translate"]


def translate(program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> ir.Model:
    """The ONNX model of ``program``, as onnxscript has folded and simplified it.

    Args:
        output_names: () leaves the names to the exporter.

    Raises:
        torch.onnx.errors.OnnxExporterError: an operator has no ONNX form.
    """
    table = operator_table()
    settings: dict[str, Any] = {
        "input_names": list(input_names),
        "output_names": list(output_names) or None,
        "opset_version": OPSET,
        "optimize": True,
        "verbose": False,
    }
    with _quiet_exporter(), composites_listed_once(program), kept_values():
        if table is not None:
            exported = _exporter().export(program, registry=table, **settings)
        else:
            exported = torch.onnx.export(program, dynamo=True, custom_translation_table=translations(), **settings)
    assert exported is not None
    return exported.model


@functools.cache
def operator_table() -> Any | None:
    """The exporter's table of what ONNX operators are made of, ours included; None where torch takes none.

    An export only reads it.
    """
    register_operators()
    own = translations()
    try:
        exporter = _exporter()
        if "registry" not in inspect.signature(exporter.export).parameters:
            raise TypeError("its exporter takes none")
        with _quiet_exporter():
            table = exporter._registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
            for operator, translation in own.items():
                table.register_op(operator, translation)
    except (AttributeError, ImportError, TypeError) as error:
        warnings.warn(
            f"torch {torch.__version__} keeps its table of ONNX operators to itself ({error}): every export builds it "
            "anew, which takes a second; compress is made for torch 2.13",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return table


def _exporter() -> Any:
    from torch.onnx._internal.exporter import _core

    return _core


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """It tells of what it does not fold, of packages it could have used, and warns of its own ways."""
    for each in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(each).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
