"""The folder a run leaves: tensors in safetensors, everything else in JSON.

======================  =============================================================================================
``model.onnx``          for ONNX Runtime
``model.safetensors``   every tensor of the compressed graph; packed weight codes in compress.packing's layout
``graph.json``          the graph itself (compress/graph/serial.py), and the SHA-256 of ``model.safetensors`` and of
                        itself without that
``base.safetensors``    which float model it was made of, for deltas to that (compress/runtime/base.py)
``plan.json``           what was decided (compress.records.Plan)
``plan.latency.json``   the times that decided, where any did (compress.latency.table.LatencyTable)
``report.json``         what came of it (compress.report.schema.Report)
======================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from compress.digests import REPORT_VERSION, check_digests
from compress.errors import InputError
from compress.factory import one_line
from compress.graph.serial import check_version, graph_to_json, json_to_graph
from compress.graph.traced import TracedModel
from compress.kernels.table import register_operators
from compress.lookalike import lookalike
from compress.publication import new_file
from compress.records import SCHEMA_VERSION, Plan

__all__ = [
    "ONNX_FILE",
    "REPORT_FILE",
    "load_artifact",
    "load_plan",
    "save_artifact",
    "save_plan",
    "sum_tensor_bytes",
    "tensors_digest",
]

ONNX_FILE = "model.onnx"
REPORT_FILE = "report.json"
_TENSORS = "model.safetensors"
_GRAPH = "graph.json"
_PLAN = "plan.json"
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


def save_artifact(folder: Path, traced: TracedModel, plan: Plan) -> None:
    """Write tensors, graph and plan into ``folder``."""
    register_operators()
    tensors = {
        node.target: traced.tensor(str(node.target)).contiguous() for node in traced.graph.find_nodes(op="get_attr")
    }
    # Through Python's own file, whose errors are OSErrors that say why.
    content = save({str(name): tensor for name, tensor in tensors.items()}, {"format": "pt"})
    (folder / _TENSORS).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    graph = graph_to_json(traced) | {_DIGEST: digest, "report": REPORT_VERSION}
    (folder / _GRAPH).write_text(json.dumps(graph | {_GRAPH_DIGEST: _graph_digest(graph)}))
    save_plan(plan, folder / _PLAN)


def load_artifact(folder: Path) -> TracedModel:
    """The compressed graph stored in ``folder``, ready to run on the CPU, where it has run once.

    Raises:
        InputError: a file is missing, damaged, of another version or not the one that was written with the others, or
            refers to what is not there.
    """
    register_operators()
    stored = _read_json(folder, _GRAPH)
    check_version(stored)
    # Folders from before graphs were hashed load as they did.
    if _GRAPH_DIGEST in stored and (digest := _graph_digest(stored)) != stored[_GRAPH_DIGEST]:
        raise InputError(
            f"{folder / _GRAPH} is damaged, or was edited: its SHA-256 is {digest[:12]}, not "
            f"{str(stored[_GRAPH_DIGEST])[:12]}; compress the model again"
        )
    with open(_existing(folder, _TENSORS), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != stored.get(_DIGEST):
        raise InputError(
            f"{folder / _TENSORS} is damaged, or not the file that {_GRAPH} was written with: its SHA-256 is "
            f"{digest[:12]}, not {str(stored.get(_DIGEST))[:12]}; compress the model again"
        )
    check_digests(folder, "report" in stored)
    try:
        tensors: dict[str, Tensor] = load_file(_existing(folder, _TENSORS))
    except SafetensorError as error:
        raise InputError(f"{folder / _TENSORS} is damaged ({error}); compress the model again") from error
    try:
        traced = json_to_graph(stored, tensors)
        with torch.no_grad():
            _remember_shapes(traced)
    except _DAMAGE as error:
        raise InputError(
            f"{folder / _GRAPH} and {_TENSORS} do not fit together ({one_line(error)}); compress the model again"
        ) from error
    return traced


def tensors_digest(folder: Path) -> str:
    """SHA-256 of the tensors in ``folder``, as its graph names it; :func:`load_artifact` compares the two."""
    return str(_read_json(folder, _GRAPH).get(_DIGEST))


def save_plan(plan: Plan, path: Path) -> None:
    """Write ``plan`` to the file ``path``, whole or not at all, and the times that decided beside it."""
    times = _times_of(path)
    times.unlink(missing_ok=True)  # of a plan that is replaced: either can be carried out without
    with new_file(path) as temporary:
        temporary.write_text(plan.model_dump_json(indent=2))
    if plan.latency_table is not None:
        with new_file(times) as temporary:
            temporary.write_text(plan.latency_table)


def _times_of(path: Path) -> Path:
    return path.with_suffix(".latency.json")


def load_plan(path: Path) -> Plan:
    """The plan in ``path``: a JSON file, or a folder with a ``plan.json``.

    Raises:
        InputError: it is missing or not a plan of this version.
    """
    file = path / _PLAN if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; `compress allocate` writes a plan, and so does `compress quantize`")
    content = _read_json(file.parent, file.name)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{file} has version {content.get('schema_version')!r}; this program reads {SCHEMA_VERSION}")
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    times = _times_of(file)
    if plan.latency_sha256 is None or not times.is_file():
        return plan  # a plan without its table can be carried out as well
    text = times.read_text(encoding="utf-8", errors="replace")
    if hashlib.sha256(text.encode()).hexdigest() != plan.latency_sha256:
        raise InputError(
            f"{times} is damaged, or not the table that {file.name} was made by: its SHA-256 is not "
            f"{plan.latency_sha256[:12]}; put the right one there, or take it away"
        )
    return plan.model_copy(update={"latency_table": text})


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


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        mistaken = None if (folder / _GRAPH).is_file() else lookalike(folder)
        raise InputError(mistaken or f"{folder} holds no {name}; give a folder that `compress quantize` has written")
    return folder / name


def _read_json(folder: Path, name: str) -> dict[str, object]:
    try:
        content = json.loads(_existing(folder, name).read_text())
    except ValueError as error:
        raise InputError(
            f"{folder / name} is not JSON ({error}); write it again with the command that made it"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{folder / name} is not a JSON object; compress the model again")
    return content


def _graph_digest(graph: dict[str, object]) -> str:
    """SHA-256 of what a graph's file says, in any spacing, but for this hash itself."""
    said = {name: value for name, value in graph.items() if name != _GRAPH_DIGEST}
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
