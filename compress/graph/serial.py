"""A traced graph as JSON: the part of an artifact that is not tensors.

Only calls of ``aten``, ``compress`` and a few plain operators can be written or read, so that reading a graph can run
nothing else; and names that torch.fx pastes into source only where they are names (compress/graph/names.py). Tensors
are referred to by name and live in the safetensors file beside it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from compress.errors import InputError
from compress.graph.names import is_identifier, is_tensor_name, shown
from compress.graph.traced import TracedModel

__all__ = ["GRAPH_VERSION", "check_version", "graph_to_json", "json_to_graph"]

GRAPH_VERSION = 3
_NAMESPACES = ("aten", "compress")
_PLAIN = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "le", "lt", "ge", "gt")
}
_KINDS = ("placeholder", "get_attr", "call_function", "output")
_CONSTANTS = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


def graph_to_json(traced: TracedModel) -> dict[str, Any]:
    """The graph as JSON-able values.

    Raises:
        InputError: it calls something that cannot be stored.
    """
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": _encode(node.args),
            "kwargs": _encode(dict(node.kwargs)),
        }
        for node in traced.graph.nodes
    ]
    return {
        "version": GRAPH_VERSION,
        "dynamic_batch": traced.dynamic_batch,
        "dynamic_length": traced.dynamic_length,
        "output_names": list(traced.output_names),
        "inputs": [{"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")} for x in traced.example],
        "example_batch": len(traced.example[0]),
        "nodes": nodes,
    }


def check_version(stored: dict[str, Any]) -> None:
    """Refuse what another version of the program has stored.

    Raises:
        InputError: it has another version than :data:`GRAPH_VERSION`.
    """
    if stored.get("version") != GRAPH_VERSION:
        raise InputError(
            f"graph.json has version {stored.get('version')!r}; this program reads {GRAPH_VERSION}; "
            "compress the model again"
        )


def json_to_graph(stored: dict[str, Any], tensors: dict[str, Tensor]) -> TracedModel:
    """The traced model that :func:`graph_to_json` stored, reading ``tensors`` by name.

    Raises:
        InputError: another version, a name that is none, an operator that is not allowed or not known, or a tensor
            that is missing.
    """
    check_version(stored)
    _check_names(stored)
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    batch = stored["example_batch"]
    example = tuple(
        torch.zeros((batch, *each["shape"]), dtype=_constant("dtype", each["dtype"])) for each in stored["inputs"]
    )
    traced = TracedModel(
        fx.GraphModule(torch.nn.Module(), graph),
        example,
        stored["dynamic_batch"],
        dynamic_length=stored["dynamic_length"],
        output_names=tuple(stored["output_names"]),
    )
    for entry in stored["nodes"]:
        target: Any = entry["target"]
        if entry["op"] == "call_function":
            target = _find_target(target)
        elif entry["op"] == "get_attr":
            if target not in tensors:
                raise InputError(f"graph.json reads tensor {target!r}, which model.safetensors does not hold")
            traced.set_tensor(target, tensors[target])
        args, kwargs = _decode(entry["args"], known), _decode(entry["kwargs"], known)
        known[entry["name"]] = traced.graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
    traced.graph.lint()
    traced.module.recompile()
    return traced


def _check_names(stored: dict[str, Any]) -> None:
    """Every string of ``stored`` that becomes source, before any does.

    Raises:
        InputError: naming the field and its value.
    """
    for place, name in enumerate(stored["output_names"]):
        _check(isinstance(name, str), f"output_names[{place}]", name, "a string")
    for place, entry in enumerate(stored["nodes"]):
        field = f"nodes[{place}]"
        _check(is_identifier(entry["name"]), f"{field}.name", entry["name"], "an identifier")
        op, target = entry["op"], entry["target"]
        _check(op in _KINDS, f"{field}.op", op, f"one of {', '.join(_KINDS)}")
        if op == "placeholder":
            _check(is_identifier(target), f"{field}.target", target, "an identifier")
        elif op == "get_attr":
            _check(is_tensor_name(target), f"{field}.target", target, "a tensor's dotted name")
        elif op == "output":
            _check(target == op, f"{field}.target", target, "'output'")
        _check_keys(entry["args"], f"{field}.args")
        _check(
            isinstance(entry["kwargs"], dict) and entry["kwargs"].keys() == {"dict"},
            f"{field}.kwargs",
            entry["kwargs"],
            "a dict",
        )
        _check_keys(entry["kwargs"], f"{field}.kwargs")


def _check_keys(value: Any, field: str) -> None:
    """The names of arguments in ``value``, as :func:`_encode` wrote it."""
    if isinstance(value, list):
        for place, each in enumerate(value):
            _check_keys(each, f"{field}[{place}]")
    elif isinstance(value, dict):
        for key, each in value.get("dict", {}).items():
            _check(is_identifier(key), f"{field}, a key", key, "an identifier")
            _check_keys(each, f"{field}.{key}")


def _check(fits: bool, field: str, value: object, allowed: str) -> None:
    if not fits:
        raise InputError(
            f"graph.json: {field} is {shown(value)}; allowed is {allowed}, as names become code; the file was changed: "
            "compress the model again"
        )


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _NAMESPACES:
        return str(node.target)
    for name, function in _PLAIN.items():
        if node.target is function:
            return name
    raise InputError(f"the graph calls {node.target}, which an artifact cannot store")


def _find_target(name: str) -> Any:
    if name in _PLAIN:
        return _PLAIN[name]
    namespace, _, rest = name.partition(".")
    operator_name, _, overload = rest.partition(".")
    if namespace in _NAMESPACES and operator_name.replace("_", "").isalnum() and overload.replace("_", "").isalnum():
        packet = getattr(getattr(torch.ops, namespace), operator_name, None)
        found = getattr(packet, overload, None)
        # A few aten operators reach out of the program: aten.from_file maps, and even creates, any file.
        if isinstance(found, torch._ops.OpOverload) and all(
            each.name != "filename" for each in found._schema.arguments
        ):
            return found
    raise InputError(f"graph.json calls {name!r}, which is not an operator this program knows")


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list | fx.immutable_collections.immutable_list):
        return [_encode(each) for each in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(each) for key, each in value.items()}}
    for kind, name in _CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"the graph holds a {type(value).__name__} ({value}), which an artifact cannot store")


def _decode(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(each, known) for each in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        if content not in known:
            raise InputError(f"graph.json reads node {content!r} before it is made")
        return known[content]
    if kind == "dict":
        return {key: _decode(each, known) for key, each in content.items()}
    if kind == "device":
        return torch.device(content)
    return _constant(kind, content)


def _constant(kind: str, name: str) -> Any:
    """torch's constant called ``name``, a dtype, layout or memory format as ``kind`` says."""
    found = getattr(torch, name, None) if is_identifier(name) else None
    if _CONSTANTS.get(type(found)) != kind:
        raise InputError(f"graph.json holds an unknown constant {shown(kind)} {shown(name)}; compress the model again")
    return found
