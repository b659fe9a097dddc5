"""The traced model: one graph of aten operators from module to export.

``torch.export`` without decompositions keeps convolutions, linears and pools whole, makes in-place operators
functional and records the module every node came from. What is calibrated is this graph, with quantizers inserted as
our own operators; what is exported is this graph again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.export import Dim

from compress.errors import InputError

__all__ = ["ChannelStatistics", "TracedModel", "example_batch", "export_program", "first_output", "trace"]

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
        statistics: per folded convolution, by layer name.
        notes: sentences for the report (a static batch, a module left unfolded).
    """

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    dynamic_batch: bool
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    def copy(self) -> TracedModel:
        """An independent copy, node names and tensors included."""
        with _no_copy_warning():
            module = copy.deepcopy(self.module)
        return TracedModel(module, self.example, self.dynamic_batch, dict(self.statistics), list(self.notes))

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

    def attribute(self, name: str, before: fx.Node) -> fx.Node:
        """A node that reads the tensor called ``name``, inserted before ``before``."""
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.tensor(name)
        return node

    def inputs(self) -> list[fx.Node]:
        """The graph's input nodes, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

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
    """The tensor itself, or the first of a tuple, list or dict of tensors."""
    while not isinstance(result, Tensor):
        if isinstance(result, dict):
            result = next(iter(result.values()))
        elif isinstance(result, tuple | list) and result:
            result = result[0]
        else:
            raise InputError(
                f"the model returns {type(result).__name__}; a tensor, or a tuple, list or dict of tensors, is needed"
            )
    return result


def example_batch(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``inputs`` cut or repeated to a batch of two: a batch of one would be frozen into the graph."""
    return tuple(torch.cat([x, x])[:_EXAMPLE_BATCH].contiguous() for x in inputs)


def trace(module: torch.nn.Module, inputs: tuple[Tensor, ...], *, fixed: bool = False) -> TracedModel:
    """Export ``module`` in eval mode with a dynamic batch; ``inputs`` is a batch of one sample or more.

    With ``fixed`` the graph takes batches of just the size that ``inputs`` has.

    Raises:
        InputError: the module does not run on ``inputs``, or torch.export cannot follow it; the message names the
            first line of the user's code at fault.
    """
    if not isinstance(module, fx.GraphModule):  # an exported one has no modes, and refuses
        module = module.eval()
    example, dynamic = (inputs, False) if fixed else (example_batch(inputs), True)
    try:
        _check_runs(module, example)
        program = export_program(module, example, dynamic)
    except InputError as error:
        if fixed:
            raise
        # A model that fixes its batch can still be traced: for one sample, or for as many as came with it.
        example, program, dynamic = *_fixed_batch(module, inputs, error), False
    with _no_copy_warning():
        traced = TracedModel(program.run_decompositions({}).module(check_guards=False), example, dynamic)
    if not dynamic:
        traced.notes.append(f"the model fixes its batch size to {len(example[0])}, and so does the exported file")
    return traced


def _fixed_batch(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], first: InputError
) -> tuple[tuple[Tensor, ...], torch.export.ExportedProgram]:
    for example in (tuple(x[:1].contiguous() for x in inputs), inputs):
        try:
            _check_runs(module, example)
            return example, export_program(module, example, dynamic=False)
        except InputError:
            continue
    raise first


def _check_runs(module: torch.nn.Module, example: tuple[Tensor, ...]) -> None:
    try:
        with torch.no_grad():
            first_output(module(*example))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in example)
        raise InputError(f"the model does not run on an input of shape {shapes}: {_first_line(error)}") from error


def export_program(module: torch.nn.Module, example: tuple[Tensor, ...], dynamic: bool) -> torch.export.ExportedProgram:
    """``torch.export`` of ``module`` with or without a dynamic batch.

    Raises:
        InputError: as :func:`trace`.
    """
    shapes = tuple({0: Dim.DYNAMIC} for _ in example) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _quiet_torch():
                return torch.export.export(module, example, dynamic_shapes=shapes)
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
