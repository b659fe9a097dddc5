"""Run a graph over all samples a stretch at a time, keeping only what the rest of the graph still needs.

Layer-wise calibration needs every layer's input over all samples, with the layers before it already changed. Running
the model anew for each layer costs the square of its depth; a frontier moves through the graph once and holds, on disk,
just the values that cross it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from compress.calib.spill import SpilledSamples
from compress.graph.traced import TracedModel

__all__ = ["Frontier"]


class Frontier:
    """A position in a traced graph and the values, over all samples, that later nodes read.

    Args:
        traced: the graph; edits after the position take effect when it is passed.
        inputs: the samples, one tensor [N, ...] a graph input.
        scratch: folder for the values on disk.
        batch_size: samples a step.
    """

    def __init__(self, traced: TracedModel, inputs: tuple[Tensor, ...], scratch: Path, batch_size: int = 64) -> None:
        self._traced = traced
        self._inputs = inputs
        self._scratch = scratch
        self._batch_size = batch_size
        self._done: set[str] = set()
        self._values: dict[str, SpilledSamples] = {}
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
        stored = [node.name for node in nodes if node.name in needed and _is_samples(node)]
        fresh = {name: SpilledSamples(self._scratch / f"{name}.samples") for name in stored}
        for index in self._batches():
            known = self._run(nodes, index)
            for name, samples in fresh.items():
                samples.append(known[name])
            for name, look in (watch or {}).items():
                look(known[name])
        self._done.update(node.name for node in nodes)
        self._values.update(fresh)
        self.release(keep)

    def peek(self, name: str, look: Callable[[Tensor], None]) -> None:
        """Move up to the node called ``name``, not past it, and show ``look`` its value, batch by batch.

        The node runs again when the frontier passes it, so that an edit made after the look takes effect.
        """
        segment = self._segment(name)
        if len(segment) > 1:
            self.advance(segment[-2].name)
        for index in self._batches():
            look(self._run(segment[-1:], index)[name])

    def samples(self, name: str) -> SpilledSamples:
        """All samples of the value called ``name``, kept or still needed."""
        return self._values[name]

    def release(self, keep: tuple[str, ...] = ()) -> None:
        """Delete the values that no node after the position reads, but for those in ``keep``."""
        needed = self._needed_after([]) | set(keep)
        for name in [name for name in self._values if name not in needed]:
            self._values.pop(name).close()

    def close(self) -> None:
        """Delete everything on disk."""
        for samples in self._values.values():
            samples.close()
        self._values.clear()

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

    def _run(self, nodes: list[fx.Node], index: Tensor) -> dict[str, Any]:
        known: dict[str, Any] = {}
        placeholders = {node.name: position for position, node in enumerate(self._traced.inputs())}

        def value(node: fx.Node) -> Any:
            if node.name not in known:
                if node.op == "get_attr":
                    known[node.name] = self._traced.tensor(str(node.target))
                elif node.name in placeholders:
                    known[node.name] = self._inputs[placeholders[node.name]][index[0] : index[-1] + 1]
                elif node.name in self._values:
                    known[node.name] = self._values[node.name].take(index)
                else:  # a batch-dependent size: cheap, and not worth a file
                    known[node.name] = compute(node)
            return known[node.name]

        def compute(node: fx.Node) -> Any:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            return node.target(*args, **kwargs)

        with torch.no_grad():
            for node in nodes:
                known[node.name] = value(node) if node.op == "placeholder" else compute(node)
        return known


def _is_samples(node: fx.Node) -> bool:
    return node.op != "placeholder" and isinstance(node.meta.get("val"), Tensor)
