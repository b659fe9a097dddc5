"""Quantize one block after another, each on what the quantized blocks before it hand on.

Of every block there are in memory its weights, the gram matrices of its linears' inputs, and one batch. What goes from
block to block lies on disk, a folder of batches; with it a killed run continues at the block it was in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from compress.calib.gram import Gram
from compress.calib.resume import ResumeStore
from compress.calib.tokens import select_real
from compress.calib.walk import TensorRows
from compress.files.outputs import writing
from compress.quant.methods import METHODS
from compress.quant.problem import Effort, LayerProblem, Method, Solution
from compress.records.layers import QuantOption
from compress.records.registry import resolve
from compress.streaming.blocks import BlockModel
from compress.streaming.packed import packed_tensors

__all__ = ["BlockWalk", "LayerOutcome"]

_ROWS = 1024


@dataclass(frozen=True)
class LayerOutcome:
    """What came of one linear; the errors are relative squared ones, ``nearest_error`` that of rounding to nearest."""

    name: str
    weight_error: float
    output_error: float | None
    nearest_error: float | None
    note: str | None


@dataclass
class _Seen:
    """What was seen of the value that some linears read."""

    gram: Gram = field(default_factory=Gram)
    rows: list[Tensor] = field(default_factory=list)
    kept: int = 0


class BlockWalk:
    """A position in the list of blocks.

    Args:
        batches: calibration batches by input name; None for methods that need none.
    """

    def __init__(
        self,
        model: BlockModel,
        option: QuantOption,
        method: str,
        batches: list[dict[str, Tensor]] | None,
        store: ResumeStore,
        seed: int,
    ) -> None:
        self.model, self.option, self.store, self.seed = model, option, store, seed
        self.method: Method = resolve(METHODS, method, "method")
        self.method_name = method
        self.batches = batches
        self.kwargs: list[dict[str, Any]] = []

    def begin(self) -> int:
        """Run what stands before the blocks; the number of the first block that is still to be done."""
        done = 0
        while done < self.model.count and self.store.has(f"block{done}"):
            done += 1
        if self.batches is None or done == self.model.count:
            return done
        self.model.load_others()
        first = done == 0
        with _folder(self._hidden(0)) as folder:
            for number, (hidden, kwargs) in enumerate(self.model.first_inputs(iter(self.batches))):
                same = self.kwargs[-1] if self.kwargs and _equal(self.kwargs[-1], kwargs) else kwargs
                self.kwargs.append(same)
                if first:
                    _save(folder / f"{number}.safetensors", hidden)
        if not first:
            shutil.rmtree(self._hidden(0))
        return done

    def quantize_block(self, number: int, progress: Callable[[str], None]) -> list[LayerOutcome]:
        """Do block ``number`` and store it; the skeleton's block is then the quantized one."""
        model = self.model
        dtype = model.load(number)
        start = model.block_name(number)
        seen = self._watch(number) if self.batches is not None and self.method.needs_data else {}
        tensors = model.shards.read(model.tensors(number))
        outcomes = []
        for name, linear in model.linears().items():
            problem = self._problem(f"{start}{name}", linear, seen.get(name))
            solution = self.method.solve(problem, self.option, Effort(0, self.seed))
            # The scales as they are stored.
            weight = replace(solution.weight, scale=solution.weight.scale.to(dtype).float())
            solution = replace(solution, weight=weight)
            outcomes.append(self._outcome(problem, solution))
            linear.weight.data = solution.weight.dequantize()
            del tensors[f"{start}{name}.weight"]
            tensors |= {f"{start}{name}.{part}": each for part, each in packed_tensors(solution.weight, dtype).items()}
            progress(f"{start}{name}")
        if self.batches is not None:
            with _folder(self._hidden(number + 1)) as folder:
                for position, hidden in self._hiddens(number):
                    result = model.run(hidden, self.kwargs[position])
                    _save(folder / f"{position}.safetensors", result)
        # What the next block reads is there before this one counts as done.
        self.store.save(f"block{number}", tensors, {})
        shutil.rmtree(self._hidden(number), ignore_errors=True)
        return outcomes

    def _watch(self, number: int) -> dict[str, _Seen]:
        """Gram matrix and some rows of every linear's input; linears that read the same share them."""
        by_value: dict[str, _Seen] = {}
        owner: dict[str, str] = {}
        current: list[tuple[Tensor, str]] = []
        mask: Tensor | None = None
        keep = max(_ROWS // max(len(self.kwargs), 1), 1)

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                value = args[0]
                shared = next((first for other, first in current if other is value), None)
                owner[name] = shared or name
                if shared is not None:
                    return
                current.append((value, name))
                rows = value if mask is None else select_real(value, mask)
                rows = rows.reshape(-1, rows.shape[-1])
                seen = by_value.setdefault(name, _Seen())
                seen.gram.update(rows[None])
                spread = torch.linspace(0, len(rows) - 1, min(keep, len(rows))).round().long()
                seen.rows.append(rows[spread].clone())

            return look

        handles = [part.register_forward_pre_hook(hook(name)) for name, part in self.model.linears().items()]
        try:
            for position, hidden in self._hiddens(number):
                current.clear()
                mask = self._mask(position)
                self.model.run(hidden, self.kwargs[position])
        finally:
            for handle in handles:
                handle.remove()
        return {name: by_value[first] for name, first in owner.items()}

    def _mask(self, position: int) -> Tensor | None:
        assert self.batches is not None
        mask = self.batches[position].get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    def _problem(self, name: str, linear: nn.Linear, seen: _Seen | None) -> LayerProblem:
        weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        rows = targets = gram = None
        if seen is not None:
            rows, gram = torch.cat(seen.rows), seen.gram.matrix()[0]
            targets = functional.linear(rows, weight, bias)
        return LayerProblem(
            name=name,
            weight=weight,
            bias=bias,
            forward=functional.linear,
            inputs=None if rows is None else TensorRows(rows),
            targets=None if targets is None else TensorRows(targets),
            gram=gram,
        )

    def _outcome(self, problem: LayerProblem, solution: Solution) -> LayerOutcome:
        rounded = solution.weight.dequantize()
        difference = rounded - problem.weight
        weight_error = float(difference.square().sum() / problem.weight.square().sum().clamp(min=1e-30))
        output_error = nearest_error = None
        if problem.gram is not None:
            nearest = resolve(METHODS, "mse", "method").solve(problem, self.option, Effort(0, 0)).weight.dequantize()
            whole = _energy(problem.weight, problem.gram)
            output_error = _energy(difference, problem.gram) / whole
            nearest_error = _energy(nearest - problem.weight, problem.gram) / whole
        return LayerOutcome(problem.name, weight_error, output_error, nearest_error, solution.note)

    def _hidden(self, number: int) -> Path:
        return self.store.folder / f"hidden-{number}"

    def _hiddens(self, number: int) -> Iterator[tuple[int, Tensor]]:
        for position in range(len(self.kwargs)):
            yield position, load_file(self._hidden(number) / f"{position}.safetensors")["hidden"]


class _folder:
    """A folder that takes its name when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self.partial, self.path)


def _save(path: Path, hidden: Tensor) -> None:
    with writing(path):
        save_file({"hidden": hidden.contiguous()}, path)


def _energy(weight: Tensor, gram: Tensor) -> float:
    return max(float(((weight @ gram) * weight).sum()), 1e-30)


def _equal(first: object, second: object) -> bool:
    """Whether two calls' further arguments are the same, so that they are kept once."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first is second or (isinstance(first, bool | int | float | str) and first == second)
