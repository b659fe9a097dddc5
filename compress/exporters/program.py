"""The graph in hand as a program that PyTorch's exporter to ONNX takes, without tracing it once more.

``torch.export`` runs a model twice on symbolic shapes, and taking operators apart for ONNX does so again: most of an
export. The graph went through that when the model was traced, and mostly calls what has an ONNX form. Missing are
tensors as inputs, a signature, and the names that nodes would be given: outputs are called after them.
"""

from __future__ import annotations

import operator
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

__all__ = ["to_program", "traced_program"]

_aten = torch.ops.aten


class _Settled(ExportedProgram):
    """A program that stays as it is where the exporter has an ONNX form of everything in it."""

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, **settings: Any
    ) -> ExportedProgram:
        """This program, or what ``decomp_table`` makes of it where it calls something that is taken apart."""
        targets = {node.target for node in self.graph.nodes if node.op == "call_function"}
        if decomp_table is not None and not any(each in decomp_table or _comes_apart(each) for each in targets):
            return self
        return super().run_decompositions(decomp_table, **settings)

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        """Without checks of shapes, which read the inputs by names of the user's module."""
        return super().module(check_guards=False)


def traced_program(traced: TracedModel) -> ExportedProgram:
    """What ``torch.export`` makes of ``traced.module``.

    Raises:
        InputError: as :func:`compress.graph.traced.trace`.
    """
    return export_program(traced.module, traced.example, traced.dynamic_batch, traced.dynamic_length)


def to_program(traced: TracedModel) -> ExportedProgram:
    """The same as :func:`traced_program`, which is called for graphs that were read from a file and the like.

    Raises:
        InputError: as :func:`compress.graph.traced.trace`.
    """
    mode = detect_fake_mode([node.meta.get("val") for node in traced.inputs()])
    parameters = dict(traced.module.named_parameters(remove_duplicate=False))
    state = parameters | dict(traced.module.named_buffers(remove_duplicate=False))
    unknown = any(node.op == "get_attr" and node.target not in state for node in traced.graph.nodes)
    # Tracing counts the parts of a result that nobody reads, too, when it numbers them.
    if mode is None or unknown or any(node.target is operator.getitem for node in traced.outputs()):
        return traced_program(traced)
    graph, specs = fx.Graph(), []
    lifted: dict[str, fx.Node] = {}
    for name in sorted(_by_module(state), key=lambda name: name not in parameters):
        kind, persistent = (InputKind.PARAMETER, None) if name in parameters else (InputKind.BUFFER, True)
        node = lifted[name] = graph.placeholder(f"{kind.name[0].lower()}_{name.replace('.', '_')}")
        node.target = node.name  # which fx has made an identifier; the target is pasted into source as it stands
        node.meta["val"] = mode.from_tensor(state[name], static_shapes=True)
        specs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
    try:
        result = _copy(traced.graph, graph, lifted, mode)
    except (RuntimeError, ValueError):  # an edit has left values behind that are none any more
        return traced_program(traced)
    results = result if isinstance(result, tuple | list) else (result,)
    graph.output(tuple(results))
    names = [str(node.target) for node in traced.inputs()]
    call = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((tuple(traced.example), {})),
        out_spec=pytree.tree_structure(result),
        forward_arg_names=names,
    )
    return _Settled(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(
            [*specs, *(InputSpec(InputKind.USER_INPUT, TensorArgument(name), None) for name in names)],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
        ),
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


def _copy(source: fx.Graph, graph: fx.Graph, lifted: dict[str, fx.Node], mode: FakeTensorMode) -> Any:
    """Append ``source`` to ``graph``, tensors read from ``lifted``; return what it returns.

    What has no ONNX form of its own is rewritten as ``torch.export`` does.
    """
    copied: dict[fx.Node, fx.Node] = {}
    with mode, torch.no_grad():
        for node in source.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
            if node.op == "get_attr":
                copied[node] = lifted[str(node.target)]
            elif node.op == "placeholder":
                copied[node] = graph.placeholder(str(node.target))
                copied[node].name = str(node.target)  # which fx takes for one of Python's own: input
                copied[node].meta = dict(node.meta)
            elif node.op == "output":
                return args[0]
            else:
                copied[node] = _call(graph, *_rewritten(graph, node, args), kwargs, node.meta)
    raise AssertionError("the graph has no output")


def _rewritten(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """What to call in the place of ``node``, and with which arguments; ``args`` are its own, copied."""
    target: Any = node.target
    if target == _aten.__and__.Tensor:
        return _aten.bitwise_and.Tensor, args
    if target == _aten.adaptive_avg_pool2d.default and list(args[1]) == [1, 1]:
        return _aten.mean.dim, (args[0], [-1, -2], True)
    if target == _aten.flatten.using_ints:
        sizes = [_size(graph, size) for size in node.meta["val"].shape]
        if None not in sizes:
            target, args = _aten.reshape.default, (args[0], sizes)
    if target == _aten.reshape.default:
        try:
            _aten.view.default(*_values(args))
        except (RuntimeError, ValueError):  # the value does not lie in memory as it has to
            how = {"memory_format": torch.contiguous_format}
            return _aten._unsafe_view.default, (_call(graph, _aten.clone.default, args[:1], how, node.meta), *args[1:])
        return _aten.view.default, args
    return target, args


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: dict[str, Any]) -> fx.Node:
    """A call with its value, named as tracing names it."""
    overloaded = isinstance(target, torch._ops.OpOverload)
    name = target.overloadpacket.__name__ if overloaded else None
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta = dict(meta)
    # An operator that is made of others may fix a size that was to vary: what is known of it stays.
    if "val" not in meta or not (overloaded and target._can_decompose()):
        arguments, named = _values((args, kwargs))
        node.meta["val"] = target(*arguments, **named)
    return node


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda node: node.meta["val"])


def _size(graph: fx.Graph, size: int | torch.SymInt) -> int | fx.Node | None:
    """``size``, or a node that reads it from an input, made where there is none; None where no input has it."""
    if not isinstance(size, torch.SymInt):
        return size
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        for axis, found in enumerate(node.meta["val"].shape):
            if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
                read = (user for user in node.users if user.target == _aten.sym_size.int and user.args[1] == axis)
                with graph.inserting_after(inputs[-1]):
                    return next(read, None) or _call(graph, _aten.sym_size.int, (node, axis), {}, {})
    return None


def _comes_apart(target: Any) -> bool:
    """Whether torch takes an operator apart whatever it is asked to keep: one of others, that may return its input."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._can_decompose()
        and any(each.alias_info is not None for each in target._schema.arguments)
    )
