"""The graph in hand as a program that PyTorch's exporter to ONNX takes, without tracing it once more.

``torch.export`` runs a model twice on symbolic shapes, and taking operators apart for ONNX does so again: two thirds of
an export. The graph went through that when the model was traced, and mostly calls what has an ONNX form. All that is
missing is tensors as inputs, a signature, and the shapes of what was changed since: one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from compress.graph.traced import TracedModel, export_program

__all__ = ["to_program"]

_aten = torch.ops.aten
_CONTIGUOUS = {"memory_format": torch.contiguous_format}


class _Settled(ExportedProgram):
    """A program that stays as it is where the exporter has an ONNX form of everything in it."""

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, **settings: Any
    ) -> ExportedProgram:
        """This program, or what ``decomp_table`` makes of it where it calls something that is in there."""
        targets = {node.target for node in self.graph.nodes if node.op == "call_function"}
        if decomp_table is not None and not any(each in decomp_table or _comes_apart(each) for each in targets):
            return self
        return super().run_decompositions(decomp_table, **settings)

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        """Without checks of shapes, which read the inputs by names of the user's module."""
        return super().module(check_guards=False)


def to_program(traced: TracedModel) -> ExportedProgram:
    """What ``torch.export`` makes of ``traced.module``; a graph that was read from a file is traced for that.

    Raises:
        InputError: as :func:`compress.graph.traced.trace`.
    """
    inputs = traced.inputs()
    mode = detect_fake_mode([node.meta.get("val") for node in inputs])
    parameters = dict(traced.module.named_parameters(remove_duplicate=False))
    state = parameters | dict(traced.module.named_buffers(remove_duplicate=False))
    if mode is None or any(node.op == "get_attr" and node.target not in state for node in traced.graph.nodes):
        return export_program(traced.module, traced.example, traced.dynamic_batch, traced.dynamic_length)
    graph, specs = fx.Graph(), []
    known: dict[str, fx.Node] = {}
    for name in sorted(_by_module(state), key=lambda name: name not in parameters):
        kind, persistent = (InputKind.PARAMETER, None) if name in parameters else (InputKind.BUFFER, True)
        node = known[name] = graph.placeholder(f"{kind.name[0].lower()}_{name.replace('.', '_')}")
        node.meta["val"] = mode.from_tensor(state[name], static_shapes=True)
        specs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
    copied = {node: known[str(node.target)] for node in traced.graph.nodes if node.op == "get_attr"}
    result = graph.graph_copy(traced.graph, copied)
    results = result if isinstance(result, tuple | list) else (result,)
    graph.output(tuple(results))
    for node in inputs:
        copied[node].name = str(node.target)  # as the module calls it, where fx has added a number
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copied[node].name), None))
    _settle(graph, mode)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    call = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((tuple(traced.example), {})),
        out_spec=pytree.tree_structure(result),
        forward_arg_names=[str(node.target) for node in inputs],
    )
    return _Settled(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=(traced.example, {}),
    )


def _by_module(names: Iterable[str]) -> list[str]:
    """``names`` of tensors as torch lists those of modules that came into being one by one, to have what is named."""
    tree = torch.nn.Module()
    for name in names:
        owner = tree
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
    places = {name: place for place, (name, _) in enumerate(tree.named_modules())}
    return sorted(names, key=lambda name: places[name.rpartition(".")[0]])


def _settle(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Write down every value's shape and type; rewrite, as ``torch.export`` does, what has no ONNX form of its own."""
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target == _aten.__and__.Tensor:
                node.target = _aten.bitwise_and.Tensor
            elif node.target == _aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
                node.target, node.args = _aten.mean.dim, (node.args[0], [-1, -2], True)
            elif node.target == _aten.reshape.default and _is_view(node):
                node.target = _aten.view.default
            elif node.target == _aten.reshape.default:
                with graph.inserting_before(node):
                    copied = graph.create_node("call_function", _aten.clone.default, (node.args[0],), _CONTIGUOUS)
                copied.meta = {**node.meta, "val": copied.target(node.args[0].meta["val"], **_CONTIGUOUS)}
                node.target, node.args = _aten._unsafe_view.default, (copied, *node.args[1:])
            node.meta["val"] = _value(node)


def _value(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    return node.target(*args, **kwargs)


def _is_view(reshape: fx.Node) -> bool:
    """Whether the value lies in memory in such a way that its reshaped form is a view of it."""
    source, shape = fx.map_arg(reshape.args, lambda node: node.meta["val"])
    try:
        source.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _comes_apart(target: Any) -> bool:
    """Whether torch takes an operator apart whatever it is asked to keep: one of others, that may return its input."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._can_decompose()
        and any(each.alias_info is not None for each in target._schema.arguments)
    )
