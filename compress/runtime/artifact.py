"""The folder a run leaves: tensors in safetensors, everything else in JSON.

======================  =============================================================================================
``model.onnx``          for ONNX Runtime
``model.safetensors``   every tensor of the compressed graph; packed weight codes in compress.quant.packing's layout
``graph.json``          the graph itself (compress/graph/serial.py), and the SHA-256 of ``model.safetensors`` and of
                        itself without that
``base.safetensors``    which float model it was made of, for deltas to that (compress/runtime/base.py)
``plan.json``           what was decided (compress.records.plan.Plan)
``plan.latency.json``   the times that decided, where any did (compress.measure.latency_table.LatencyTable)
``report.json``         what came of it (compress.records.report.Report)
======================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from compress.errors import InputError, one_line
from compress.files.digests import REPORT_VERSION, check_digests
from compress.files.known_folders import GRAPH_FILE, TENSORS_FILE, existing_file, read_json
from compress.graph.serial import check_version, graph_to_json, json_to_graph
from compress.graph.traced import TracedModel
from compress.kernels.table import register_operators

__all__ = ["load_artifact", "save_artifact", "sum_tensor_bytes", "tensors_digest"]

_DIGEST = "tensors_sha256"
_GRAPH_DIGEST = "graph_sha256"
# What a graph that was edited by hand may come to, in reading it or in running it once.
_DAMAGE = (
    LookupError,
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    SyntaxError,
    MemoryError,
)


def save_artifact(folder: Path, traced: TracedModel) -> None:
    """Write tensors and graph into ``folder``."""
    register_operators()
    tensors = {
        node.target: traced.tensor(str(node.target)).contiguous() for node in traced.graph.find_nodes(op="get_attr")
    }
    # Through Python's own file, whose errors are OSErrors that say why.
    content = save({str(name): tensor for name, tensor in tensors.items()}, {"format": "pt"})
    (folder / TENSORS_FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    graph = graph_to_json(traced) | {_DIGEST: digest, "report": REPORT_VERSION}
    (folder / GRAPH_FILE).write_text(json.dumps(graph | {_GRAPH_DIGEST: _graph_digest(graph)}))


def load_artifact(folder: Path) -> TracedModel:
    """The compressed graph stored in ``folder``, ready to run on the CPU, where it has run once.

    Raises:
        InputError: a file is missing, damaged, of another version or not the one that was written with the others, or
            refers to what is not there.
    """
    register_operators()
    stored = read_json(folder, GRAPH_FILE)
    check_version(stored)
    # Folders from before graphs were hashed load as they did.
    if _GRAPH_DIGEST in stored and (digest := _graph_digest(stored)) != stored[_GRAPH_DIGEST]:
        raise InputError(
            f"{folder / GRAPH_FILE} is damaged, or was edited: its SHA-256 is {digest[:12]}, not "
            f"{str(stored[_GRAPH_DIGEST])[:12]}; compress the model again"
        )
    with open(existing_file(folder, TENSORS_FILE), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != stored.get(_DIGEST):
        raise InputError(
            f"{folder / TENSORS_FILE} is damaged, or not the file that {GRAPH_FILE} was written with: its SHA-256 is "
            f"{digest[:12]}, not {str(stored.get(_DIGEST))[:12]}; compress the model again"
        )
    check_digests(folder, "report" in stored)
    try:
        tensors: dict[str, Tensor] = load_file(existing_file(folder, TENSORS_FILE))
    except SafetensorError as error:
        raise InputError(f"{folder / TENSORS_FILE} is damaged ({error}); compress the model again") from error
    try:
        traced = json_to_graph(stored, tensors)
        with torch.no_grad():
            _remember_shapes(traced)
    except _DAMAGE as error:
        raise InputError(
            f"{folder / GRAPH_FILE} and {TENSORS_FILE} do not fit together ({one_line(error)}); compress the model "
            "again"
        ) from error
    return traced


def tensors_digest(folder: Path) -> str:
    """SHA-256 of the tensors in ``folder``, as its graph names it; :func:`load_artifact` compares the two."""
    return str(read_json(folder, GRAPH_FILE).get(_DIGEST))


def sum_tensor_bytes(traced: TracedModel) -> int:
    """Bytes of all tensors the graph reads."""
    names = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
    return sum(traced.tensor(name).nbytes for name in names)


def _remember_shapes(traced: TracedModel) -> None:
    """Run the example once and note every node's value, as tracing does: passes over the graph read the shapes."""

    class _Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    recorder = _Recorder(traced.module)
    recorder.extra_traceback = False  # an error's own sentence is enough
    recorder.run(*traced.example)


def _graph_digest(graph: dict[str, object]) -> str:
    """SHA-256 of what a graph's file says, in any spacing, but for this hash itself."""
    said = {name: value for name, value in graph.items() if name != _GRAPH_DIGEST}
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
