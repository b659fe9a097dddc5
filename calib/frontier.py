"""Run a graph over all samples a stretch at a time, keeping only what the rest of the graph still needs.

Layer-wise calibration needs every layer's input over all samples, with the layers before it already changed. Running
the model anew for each layer costs the square of its depth; a frontier moves through the graph once and holds, on disk,
just the values that cross it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from compress.calib.spill import SpilledSamples
from compress.calib.tokens import RealTokens, blank_padding, real_tokens, select_real
from compress.graph.traced import TracedModel

__all__ = ["Frontier"]

_BATCH = 64


class Frontier:
    """A position in a traced graph and the values, over all samples, that later nodes read.

    Args:
        traced: the graph; edits after the position take effect when it is passed.
        inputs: the samples, one tensor [N, ...] a graph input.
        scratch: folder for the values on disk.
        batch_size: samples a step; by default 64, or what the graph's batch is fixed to.
        given: values [N, ...] of nodes or inputs that are to be these, by name.
    """

    def __init__(
        self,
        traced: TracedModel,
        inputs: tuple[Tensor, ...],
        scratch: Path,
        batch_size: int | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._traced = traced
        self._inputs = inputs
        self._scratch = scratch
        self._given = dict(given or {})
        self._mask = real_tokens(traced, inputs)
        self._batch_size = batch_size or (_BATCH if traced.dynamic_batch else len(traced.example[0]))
        self._done: set[str] = set()
        self._values: dict[str, SpilledSamples] = {}
        self._batch_dims: dict[str, int] = {}
        self._held: tuple[set[str], dict[str, SpilledSamples]] | None = None
        scratch.mkdir(parents=True, exist_ok=True)

    def advance(
        self, until: str, keep: tuple[str, ...] = (), watch: dict[str, Callable[[Tensor], None]] | None = None
    ) -> None:
        """Run every node up to and including the one named ``until`` that has not run yet.

        Values named in ``keep`` stay readable by :meth:`samples` even if no later node reads them; ``watch`` maps a
        node's name to a function that is shown its value, batch by batch.
        """
        nodes = self._segment(until)
        if not nodes:
            return
        needed = self._needed_after(nodes) | set(keep)
        varying = self._varying()
        stored = [node for node in nodes if node.name in needed and node.name in varying and _is_tensor(node)]
        fresh = {node.name: SpilledSamples(self._scratch / f"{node.name}.samples") for node in stored}
        self._batch_dims.update({node.name: self._traced.batch_dim(node) or 0 for node in stored})
        for index in self._batches():
            known = self._run(nodes, index)
            for name, samples in fresh.items():
                samples.append(known[name].movedim(self._batch_dims[name], 0))
            for name, look in (watch or {}).items():
                look(self._real(known[name], index))
        self._done.update(node.name for node in nodes)
        self._values.update(fresh)
        self.release(keep)

    def show(self, name: str, look: Callable[[Tensor], None]) -> None:
        """Show ``look`` the value of the node called ``name``, batch by batch; move past it where it is still ahead."""
        if self.passed(name):
            node = next(node for node in self._traced.graph.nodes if node.name == name)
            for index in self._batches():
                look(self._real(self._value(node, {}, index), index))
        else:
            self.advance(name, watch={name: look})

    def peek(self, name: str, look: Callable[[Tensor], None]) -> None:
        """Move up to the node called ``name``, not past it, and show ``look`` its value, batch by batch.

        The node runs again when the frontier passes it, so that an edit made after the look takes effect.
        """
        segment = self._segment(name)
        if len(segment) > 1:
            self.advance(segment[-2].name)
        for index in self._batches():
            look(self._real(self._run(segment[-1:], index)[name], index))

    def finish(self, instead: Mapping[str, Callable[[Tensor], Tensor]], index: Tensor) -> Any:
        """What the graph returns for the samples at ``index``, from the position on; the frontier stays where it is.

        Args:
            instead: functions of a layer's input that take the place of the calls of these names.
            index: consecutive samples, [n] int64.
        """
        known: dict[str, Any] = {}
        with torch.no_grad():
            for node in self._traced.graph.nodes:
                if node.op == "output":
                    return fx.map_arg(node.args[0], lambda source: self._value(source, known, index))
                if node.op == "get_attr" or node.name in self._done or node.name in known:
                    continue
                if node.name in instead:
                    source = node.args[0]
                    assert isinstance(source, fx.Node)
                    known[node.name] = instead[node.name](self._value(source, known, index))
                elif node.op != "placeholder":
                    known[node.name] = self._compute(node, known, index)
        raise AssertionError("a graph ends with its output")

    def mark(self, keep: tuple[str, ...] = ()) -> None:
        """Remember the position, for :meth:`turn_back`; values that it needs stay until the next mark.

        ``keep`` are values of before that stay as well.
        """
        self._held = None
        self.release(keep)
        self._held = (set(self._done), dict(self._values))

    def turn_back(self) -> None:
        """Return to the position that was marked: what has run since runs again, as the graph is by then."""
        assert self._held is not None
        done, values = self._held
        for name in [name for name in self._values if name not in values]:
            self._values.pop(name).close()
        self._done, self._values = set(done), dict(values)

    def through(
        self, until: str, index: Tensor, instead: Mapping[str, Callable[..., Tensor]], given: Mapping[str, Tensor]
    ) -> Tensor:
        """The value of the node called ``until`` for the samples at ``index``, computed from the position on.

        Gradients pass where they are enabled, and the frontier stays where it is.

        Args:
            instead: functions of a node's arguments that take its operator's place, by node.
            given: values of before that are to be these.
        """
        known: dict[str, Any] = dict(given)
        for node in self._segment(until):
            if node.op == "placeholder":
                self._value(node, known, index)
                continue
            function = instead.get(node.name, node.target)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._value(source, known, index))
            known[node.name] = function(*args, **kwargs)
        return self._value(next(n for n in self._traced.graph.nodes if n.name == until), known, index)

    def value(self, name: str, index: Tensor) -> Tensor:
        """The kept value called ``name`` of the samples at ``index``, in the shape that the graph gives it."""
        return self._stored(name, index)

    def holds(self, name: str) -> bool:
        """Whether :meth:`value` has it: it is kept, or something after the position reads it."""
        return name in self._values

    def real(self, value: Tensor, index: Tensor) -> Tensor:
        """Of a value of the samples at ``index`` what belongs to real tokens; all of it without padding."""
        return self._real(value, index)

    def blank(self, value: Tensor, index: Tensor) -> Tensor:
        """A value of the samples at ``index`` with zeros at padding; as it is without padding."""
        return value if self._mask is None else blank_padding(value, self._mask[index])

    def samples(self, name: str) -> SpilledSamples | RealTokens:
        """All samples of the value called ``name``, kept or still needed, along the first dimension.

        A value that holds a sample's windows or positions as rows has that many rows a sample. Of padded samples only
        the real tokens are there.
        """
        values = self._values[name]
        mask = self._mask
        if mask is None or len(values) != len(mask) or len(values.shape) != 2 or values.shape[0] != mask.shape[1]:
            return values
        return RealTokens(values, mask.flatten().nonzero()[:, 0])

    def passed(self, name: str) -> bool:
        """Whether the node called ``name`` has run: edits of it have no effect any more."""
        return name in self._done

    def release(self, keep: tuple[str, ...] = ()) -> None:
        """Delete the values that no node after the position reads, but for those in ``keep``."""
        needed = self._needed_after([]) | set(keep)
        held = self._held[1] if self._held is not None else {}
        for name in [name for name in self._values if name not in needed]:
            values = self._values.pop(name)
            if name not in held:
                values.close()

    def close(self) -> None:
        """Delete everything on disk."""
        held = self._held[1] if self._held is not None else {}
        for samples in (*self._values.values(), *held.values()):
            samples.close()
        self._values.clear()
        self._held = None

    def _real(self, value: Tensor, index: Tensor) -> Tensor:
        return value if self._mask is None else select_real(value, self._mask[index])

    def _batches(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self._inputs[0])).split(self._batch_size)

    def _segment(self, until: str) -> list[fx.Node]:
        nodes = []
        for node in self._traced.graph.nodes:
            if node.op not in ("get_attr", "output") and node.name not in self._done:
                nodes.append(node)
            if node.name == until:
                return nodes
        raise KeyError(f"no node called {until}")

    def _needed_after(self, segment: list[fx.Node]) -> set[str]:
        """Names of the values that nodes neither done nor in ``segment`` read."""
        passed = self._done | {node.name for node in segment}
        return {
            source.name
            for node in self._traced.graph.nodes
            if node.name not in passed and node.op not in ("get_attr", "placeholder")
            for source in node.all_input_nodes
        }

    def _varying(self) -> set[str]:
        """Names of the values that differ from sample to sample."""
        varying: set[str] = set()
        for node in self._traced.graph.nodes:
            if node.op == "placeholder" or (
                any(source.name in varying for source in node.all_input_nodes) and not self._is_of_any_batch(node)
            ):
                varying.add(node.name)
        return varying

    def _is_of_any_batch(self, node: fx.Node) -> bool:
        """Whether ``node``'s value has no dimension that grows with the batch: positions along a sequence have not."""
        return self._traced.dynamic_batch and _is_tensor(node) and self._traced.batch_dim(node) is None

    def _stored(self, name: str, index: Tensor) -> Tensor:
        rows = len(self._values[name]) // len(self._inputs[0])  # a sample
        found = self._values[name].take((index[:, None] * rows + torch.arange(rows)).flatten())
        return found.movedim(0, self._batch_dims[name]).contiguous()

    def _run(self, nodes: list[fx.Node], index: Tensor) -> dict[str, Any]:
        known: dict[str, Any] = {}
        with torch.no_grad():
            for node in nodes:
                at_hand = node.op == "placeholder" or node.name in self._given
                known[node.name] = self._value(node, known, index) if at_hand else self._compute(node, known, index)
        return known

    # Methods, not closures: two functions that call each other are a cycle, and would keep every batch's values alive
    # until the garbage collector happens to run.
    def _value(self, node: fx.Node, known: dict[str, Any], index: Tensor) -> Any:
        if node.name not in known:
            if node.op == "get_attr":
                known[node.name] = self._traced.tensor(str(node.target))
            elif node.name in self._given:
                known[node.name] = self._given[node.name][_slice(index)]
            elif node.op == "placeholder":
                position = self._traced.inputs().index(node)
                known[node.name] = self._inputs[position][_slice(index)]
            elif node.name in self._values:
                known[node.name] = self._stored(node.name, index)
            else:  # a size, or the same for every sample: cheap, and not worth a file
                known[node.name] = self._compute(node, known, index)
        return known[node.name]

    def _compute(self, node: fx.Node, known: dict[str, Any], index: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._value(source, known, index))
        return node.target(*args, **kwargs)


def _slice(index: Tensor) -> Tensor | slice:
    """Consecutive samples without a copy."""
    first = int(index[0])
    consecutive = torch.equal(index, torch.arange(first, first + len(index)))
    return slice(first, first + len(index)) if consecutive else index


def _is_tensor(node: fx.Node) -> bool:
    return node.op != "placeholder" and isinstance(node.meta.get("val"), Tensor)
