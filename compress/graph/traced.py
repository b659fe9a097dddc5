"""The traced model: one graph of aten operators from module to export.

``torch.export`` without decompositions keeps convolutions, linears and pools whole, makes in-place operators
functional and records the module every node came from. What is calibrated is this graph, with quantizers inserted as
our own operators; what is exported is this graph again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import Dim

from compress.errors import InputError
from compress.graph.composites import make_functional
from compress.graph.names import check_module_names

__all__ = [
    "ChannelStatistics",
    "TracedModel",
    "call_module",
    "example_batch",
    "export_program",
    "first_output",
    "is_tokens",
    "node_sizes",
    "tensors_in",
    "trace",
]

_EXAMPLE_BATCH = 2


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and deviation per output channel that the folded BatchNorm stood for, float32 [O] each."""

    mean: Tensor
    deviation: Tensor


@dataclass
class TracedModel:
    """A graph module over aten and ``compress::`` operators, and what was learned while making it.

    Attributes:
        module: the graph; parameters and buffers keep the names they had in the user's module.
        example: one example batch, the inputs the graph is traced with.
        dynamic_batch: whether the first dimension of every input may vary.
        dynamic_length: whether the second dimension of token inputs (whole numbers [N, L]) may vary too.
        statistics: per folded convolution, by layer name.
        notes: sentences for the report (a static batch, a module left unfolded).
        output_names: the keys of a module that returns a dictionary (or a named record); () for others.
    """

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    dynamic_batch: bool
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dynamic_length: bool = False
    output_names: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    def copy(self) -> TracedModel:
        """An independent copy, node names and tensors included."""
        with _no_copy_warning():
            module = copy.deepcopy(self.module)
        return replace(self, module=module, statistics=dict(self.statistics), notes=list(self.notes))

    def finish(self) -> None:
        """Drop dead nodes and rebuild the module's code after an edit of the graph."""
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self._delete_unused_tensors()
        self.graph.lint()
        self.module.recompile()

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer called ``name``."""
        owner, _, leaf = name.rpartition(".")
        found = getattr(self.module.get_submodule(owner), leaf)
        assert isinstance(found, Tensor)
        return found.detach()

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Store ``value`` as the buffer called ``name``, replacing what was there."""
        owner_name, _, leaf = name.rpartition(".")
        owner: torch.nn.Module = self.module
        for part in owner_name.split(".") if owner_name else ():
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        owner.register_buffer(leaf, value.detach().clone())

    def free_name(self, name: str) -> str:
        """``name``, or where a tensor is called so already, ``name`` with a number."""
        taken = {each for each, _ in (*self.module.named_parameters(), *self.module.named_buffers())}
        return next(
            each for each in itertools.chain([name], (f"{name}_{n}" for n in itertools.count(1))) if each not in taken
        )

    def attribute(self, name: str, before: fx.Node) -> fx.Node:
        """A node that reads the tensor called ``name``, inserted before ``before``."""
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.tensor(name)
        return node

    def insert(
        self,
        target: Any,
        args: tuple[Any, ...],
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """A call of ``target`` right before or after a node, with the value that it would have for the example."""
        where = self.graph.inserting_before(before) if before is not None else self.graph.inserting_after(after)
        with where:
            node = self.graph.create_node("call_function", target, args, name=name)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        # Within the mode that the graph was traced in: a dynamic size is not to become a number.
        with detect_fake_mode([each.meta.get("val") for each in self.inputs()]) or contextlib.nullcontext():
            node.meta["val"] = target(*values)
        return node

    def batch_dim(self, node: fx.Node) -> int | None:
        """The first dimension of ``node``'s value that grows with the batch; None where there is none."""
        batch = {name for each in self.inputs() for name in _symbols(each.meta["val"].shape[0])}
        return next((d for d, size in enumerate(node.meta["val"].shape) if batch & _symbols(size)), None)

    def inputs(self) -> list[fx.Node]:
        """The graph's input nodes, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the inputs are called: the parameters of the module's ``forward``."""
        return tuple(node.name for node in self.inputs())

    @property
    def length(self) -> int | None:
        """Tokens of a sample in the example, where they may be any number; else None."""
        return next(x.shape[1] for x in self.example if is_tokens(x)) if self.dynamic_length else None

    def outputs(self) -> list[fx.Node]:
        """The nodes that the graph returns."""
        (output,) = self.graph.find_nodes(op="output")
        return list(output.all_input_nodes)

    def run(self, batches: Iterator[tuple[Tensor, ...]]) -> Tensor:
        """First output of the model over all ``batches``, concatenated, without gradients."""
        with torch.no_grad():
            return torch.cat([first_output(self.module(*batch)) for batch in batches])

    def _delete_unused_tensors(self) -> None:
        read = {node.target for node in self.graph.find_nodes(op="get_attr")}
        for name, _ in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if name not in read:
                owner, _, leaf = name.rpartition(".")
                delattr(self.module.get_submodule(owner), leaf)


def first_output(result: object) -> Tensor:
    """The tensor itself, or the first one in a tuple, list or dict, whatever stands before it."""
    found = next(tensors_in(result), None)
    if found is None:
        raise InputError(
            f"the model returns {type(result).__name__}; a tensor, or a tuple, list or dict of tensors, is needed"
        )
    return found


def tensors_in(result: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict | list | tuple):
        for part in result.values() if isinstance(result, dict) else result:
            yield from tensors_in(part)


def example_batch(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``inputs`` cut or repeated to a batch of two: a batch of one would be frozen into the graph."""
    return tuple(torch.cat([x, x])[:_EXAMPLE_BATCH].contiguous() for x in inputs)


def call_module(module: torch.nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...] = ()) -> Any:
    """What ``module`` returns for ``inputs``, handed over by ``names`` where there are any, else by position."""
    return module(**dict(zip(names, inputs, strict=True))) if names else module(*inputs)


def trace(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], *, names: tuple[str, ...] = (), fixed: bool = False
) -> TracedModel:
    """Export ``module`` in eval mode with a dynamic batch, and a dynamic length where it takes token ids [N, L].

    Whatever structure the module gives its results, the graph returns one tensor or a flat tuple of them; it takes its
    inputs by position.

    Args:
        inputs: a batch of one sample or more.
        names: parameters of the module's ``forward`` to hand them over by; () for by position.
        fixed: let the graph take batches of just the size that ``inputs`` has.

    Raises:
        InputError: the module does not run on ``inputs``, or torch.export cannot follow it; the message names the
            first line of the user's code at fault. Or a name in it is none that could be pasted into source.
    """
    check_module_names(module)
    if not isinstance(module, fx.GraphModule):  # an exported one has no modes, and refuses
        module = module.eval()
    tokens = any(map(is_tokens, inputs))
    first: InputError | None = None
    # The freest form first. A model that fixes its batch can still be traced: for one sample, or for as many as came.
    for example, batch, length in (
        *(((example_batch(inputs), True, True),) if tokens and not fixed else ()),
        *(((example_batch(inputs), True, False),) if not fixed else ()),
        *(((tuple(x[:1].contiguous() for x in inputs), False, False),) if not fixed else ()),
        (inputs, False, False),
    ):
        try:
            _check_runs(module, example, names)
            program = export_program(module, example, batch, length, names)
            break
        except InputError as error:
            first = first or error
    else:
        assert first is not None
        raise first
    with _no_copy_warning():
        graph, names_out, dropped = _flat(make_functional(program).module(check_guards=False), _output_names(program))
    traced = TracedModel(graph, example, batch, dynamic_length=length, output_names=names_out)
    if dropped:
        traced.notes.append(f"of what the model returns {', '.join(dropped)} is left out: only tensors are kept")
    if not batch and not fixed:
        traced.notes.append(f"the model fixes its batch size to {len(example[0])}, and so does the exported file")
    if tokens and not length and not fixed:
        traced.notes.append(f"the model fixes its sequence length to {example[0].shape[1]}, and so does the file")
    return traced


def _symbols(size: int | torch.SymInt) -> set[str]:
    """Names of the dynamic sizes that ``size`` is computed from."""
    return {str(symbol) for symbol in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()


def is_tokens(x: Tensor) -> bool:
    """Whether an input is token ids or the like: whole numbers [N, L]."""
    return x.dim() == 2 and not x.is_floating_point()


def node_sizes(node: fx.Node) -> tuple[int, ...]:
    """The node's shape for the example batch; ``int`` of a symbolic size would fix the batch in the whole graph."""
    return tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape)


def _output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    spec = program.call_spec.out_spec
    keys = (
        spec.context if spec is not None else None
    )  # a list of keys for dictionaries and what is registered like them
    if isinstance(keys, list) and len(keys) == spec.num_leaves and all(isinstance(key, str) for key in keys):
        return tuple(keys)
    return ()


def _flat(module: fx.GraphModule, names: tuple[str, ...]) -> tuple[fx.GraphModule, tuple[str, ...], list[str]]:
    """Inputs by position, and one tensor or a flat tuple out: no trees of the user's classes in between.

    A module of its own, without torch's checks of how it is called; its outputs' ``names``; and what was left out.
    """
    (output,) = module.graph.find_nodes(op="output")
    labels = names or tuple(f"output {place}" for place in range(len(output.args[0])))
    results, dropped = {}, []
    for label, value in zip(labels, output.args[0], strict=True):
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor):
            results[label] = value
        else:
            what = type(value.meta["val"]).__name__ if isinstance(value, fx.Node) else repr(value)
            dropped.append(f"{label} ({what})")
    flat = tuple(results.values())
    output.args = (flat[0] if len(flat) == 1 else flat,)
    module.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, module.graph), tuple(results) if names else (), dropped


def _check_runs(module: torch.nn.Module, example: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
    try:
        with torch.no_grad():
            output = first_output(call_module(module, example, names))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in example)
        more = " Give arrays called like the parameters." if "required positional argument" in str(error) else ""
        raise InputError(f"the model does not run on an input of shape {shapes}: {_first_line(error)}{more}") from error
    if not output.dim():
        raise InputError(
            "the model's first output is one number for the whole batch, as a loss is; one with a row a sample is "
            "needed: return that first, or wrap the model in a module that does"
        )


def export_program(
    module: torch.nn.Module,
    example: tuple[Tensor, ...],
    dynamic_batch: bool,
    dynamic_length: bool = False,
    names: tuple[str, ...] = (),
) -> torch.export.ExportedProgram:
    """``torch.export`` of ``module`` with or without a dynamic batch and token length.

    Raises:
        InputError: as :func:`trace`.
    """
    sizes = [{0: Dim.DYNAMIC} | ({1: Dim.DYNAMIC} if dynamic_length and is_tokens(x) else {}) for x in example]
    args, kwargs = ((), dict(zip(names, example, strict=True))) if names else (example, {})
    shapes: Any = None
    if dynamic_batch:
        shapes = dict(zip(names, sizes, strict=True)) if names else tuple(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _quiet_torch():
                return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            raise InputError(
                f"torch.export cannot trace the model{_offending_line(error)}: {_first_line(error)} "
                "Control flow that depends on tensor values has to be rewritten (torch.where, torch.cond)."
            ) from error


@contextlib.contextmanager
def _no_copy_warning() -> Iterator[None]:
    """torch's own records of a graph's inputs warn when they are copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch logs and prints the graph it failed on; the sentence that is raised says what a user can use of it."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith((".", "!", "?")) else text + "."


def _offending_line(error: BaseException) -> str:
    """`` at file:line (source)`` of the first frame outside of torch, from the traceback or torch's own report."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/compress/" not in frame.filename
    ]
    if frames:
        last = frames[-1]
        return f" at {last.filename}:{last.lineno} ({last.line})"
    for line in str(error).splitlines():
        if 'File "' in line and "/torch/" not in line:
            return f" at {line.strip()}"
    return ""
