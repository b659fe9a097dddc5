"""Which float model an artifact was made of, and how its tensors came into the graph: what deltas to it need.

``base.safetensors`` lies in the artifact's folder. Its ``__metadata__`` has ``compress.base``: a SHA-256 over what
follows and all tensors (as in compress/sparse/deltafile.py), a space, and JSON:

- ``of``: SHA-256 of the artifact's tensors, so that neither is taken for another's;
- ``hashes``: SHA-256 of each of the float model's tensors by name, as compress/sparse/base.py takes them;
- ``kept``: names of those that are in the float graph unchanged; other names with factors are scaled;
- ``called``: names that tensors have there, where those are others: of a tied tensor tracing may take another name.

BatchNorm is folded into rows of weights, equalization and SmoothQuant multiply rows and columns. A weight W [O, I, ...]
becomes diag(rows) W diag(columns), and so does a difference to it. The file has, float32:

- ``rows/NAME`` [O] and ``columns/NAME`` [I] of a weight that was scaled;
- ``entries/NAME`` [...] of a bias or any other tensor, of its shape; NaN where nothing tells (the tensor is 0 there).

Factors are found by comparing the two tensors, not by following each transform: what does not come out as such a
product to within rounding (a layer that was split, norms that were folded away) has none, and takes no delta.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from compress.errors import InputError
from compress.files.known_folders import BASE_FILE
from compress.graph.traced import TracedModel
from compress.sparse.base import base_tensors, tensor_hashes
from compress.sparse.deltafile import content_digest

__all__ = ["FloatBase", "compare_base", "read_base", "write_base"]

_HEADER = "compress.base"
_ROUNDING = 1e-4  # of the largest weight: transforms work in float32, several one after another


@dataclass(frozen=True, eq=False)
class FloatBase:
    """A float model as deltas see it.

    Attributes:
        hashes: SHA-256 by tensor.
        kept: names of tensors that the graph has unchanged.
        called: what the graph calls a tensor, by name, where that is something else.
        rows, columns: factors of weights by name, float32 [O] and [I].
        entries: factors of other tensors by name, float32 of their shapes.
    """

    hashes: dict[str, str]
    kept: frozenset[str]
    called: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, Tensor] = field(default_factory=dict)

    def factor(self, name: str, shape: tuple[int, ...], index: Tensor) -> Tensor | None:
        """By what differences to entries [n] at flat ``index`` of tensor ``name`` are multiplied, float64 [n].

        None: the graph has no such tensor.
        """
        if name in self.kept:
            return torch.ones(len(index), dtype=torch.float64)
        if name in self.rows:
            behind = math.prod(shape[2:])
            row, column = index // (shape[1] * behind), index // behind % shape[1]
            return self.rows[name].double()[row] * self.columns[name].double()[column]
        return self.entries[name].double().reshape(-1)[index] if name in self.entries else None


def compare_base(module: nn.Module, graph: TracedModel) -> FloatBase:
    """What deltas need to know of ``module``, whose float ``graph`` has been folded and transformed."""
    there = {**dict(graph.module.named_parameters()), **dict(graph.module.named_buffers())}
    tensors = base_tensors(module)
    places = _places(module, tensors, there)
    pairs = {name: (tensors[name].detach().cpu(), there[place]) for name, place in places.items()}
    pairs = {name: pair for name, pair in pairs.items() if pair[0].shape == pair[1].shape}
    # A tensor of zeros is the same whatever it is multiplied with; where nothing was scaled it was not either.
    same = {name for name, (before, after) in pairs.items() if torch.equal(before, after)}
    silent = {name for name in same if not bool(pairs[name][0].any())} if len(same) < len(tensors) else set()
    called = {name: place for name, place in places.items() if place not in (name, f"{name}.weight")}
    found = FloatBase(tensor_hashes(tensors), frozenset(same - silent), called)
    for name, pair in pairs.items():
        before, after = (each.double() for each in pair)
        if name in found.kept or not tensors[name].is_floating_point() or name.endswith("bias"):
            continue
        if before.dim() < 2:
            found.entries[name] = _ratio(before, after)
        elif (factors := _scaled(before, after)) is not None:
            found.rows[name], found.columns[name] = factors
    for name, pair in pairs.items():
        if name.endswith("bias") and (name not in found.kept or name.removesuffix("bias") + "weight" in found.rows):
            found.entries[name] = _bias_factor(found, name, *(each.double() for each in pair))
    return replace(found, kept=found.kept - found.entries.keys())


def write_base(base: FloatBase, folder: Path, of: str) -> None:
    """Write ``base`` into an artifact's ``folder``; ``of``: SHA-256 of the artifact's tensors."""
    parts = {"rows": base.rows, "columns": base.columns, "entries": base.entries}
    tensors = {f"{part}/{name}": each.float().contiguous() for part, by in parts.items() for name, each in by.items()}
    header = json.dumps({"of": of, "hashes": base.hashes, "kept": sorted(base.kept), "called": base.called})
    (folder / BASE_FILE).write_bytes(save(tensors, {_HEADER: f"{content_digest(header, tensors)} {header}"}))


def read_base(folder: Path, of: str) -> FloatBase:
    """What :func:`write_base` has written into ``folder``.

    Raises:
        InputError: it is missing, damaged, changed, or another artifact's.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {BASE_FILE}, which says what deltas are added to; compress the model again"
        )
    parts: dict[str, dict[str, Tensor]] = {"rows": {}, "columns": {}, "entries": {}}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            digest, _, text = (file.metadata() or {})[_HEADER].partition(" ")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        if content_digest(text, tensors) != digest:
            raise ValueError("its SHA-256 differs")
        header = json.loads(text)
        if header["of"] != of:
            raise ValueError("it is another artifact's")
        for key, each in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = each
        hashes = {str(name): str(found) for name, found in header["hashes"].items()}
        called = {str(name): str(place) for name, place in header["called"].items()}
        return FloatBase(hashes, frozenset(header["kept"]), called, **parts)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); compress the model again") from error


def _places(module: nn.Module, tensors: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> dict[str, str]:
    """What the graph calls the module's ``tensors``, by name, where it has them.

    A tied parameter goes by one of its names; a bare one that a layer multiplies with is a weight there.
    """
    names: dict[int, list[str]] = {}
    for name, each in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    found = {}
    for name, each in tensors.items():
        possible = [name, *names.get(id(each), ()), f"{name}.weight"]
        place = next((one for one in possible if one in there), None)
        if place is not None:
            found[name] = place
    return found


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    return torch.where(before != 0, after / before, math.nan)


def _bias_factor(found: FloatBase, name: str, before: Tensor, after: Tensor) -> Tensor:
    """By what a layer's bias was multiplied, as its weight says; what was added to it is nothing to a difference."""
    weight = name.removesuffix("bias") + "weight"
    if weight in found.kept:
        return torch.ones_like(before)
    if weight in found.entries and found.entries[weight].shape == before.shape:
        return found.entries[weight]
    ratio = _ratio(before, after)
    if weight not in found.rows or found.rows[weight].shape != before.shape:
        return ratio
    rows, columns = found.rows[weight], found.columns[weight]
    if len(columns) == 1 or len(rows) == 1:  # of a depthwise convolution, say: what scales rows scales columns too
        known = torch.allclose(ratio, rows, rtol=_ROUNDING)
        return rows if known else torch.full_like(before, math.nan)
    if bool((columns == 1).all()) or bool((rows == 1).all()):
        return rows
    # Of both only the product is known: the bias says how it is shared out, if nothing was added to it.
    share = (ratio / rows)[ratio.isfinite()]
    known = len(share) > 0 and bool(((share - share[0]).abs() <= _ROUNDING * share[0].abs()).all())
    return rows * share[0] if known else torch.full_like(before, math.nan)


def _scaled(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors of rows [O] and columns [I], ones where one of them is enough; None where ``after`` is no such product.

    They are NaN for rows and columns of zeros.
    """
    w, target = (each.reshape(*each.shape[:2], -1) for each in (before, after))

    def fits(rows: Tensor, columns: Tensor) -> bool:
        product = (w * rows[:, None, None] * columns[None, :, None]).nan_to_num(0.0)
        return bool((product - target).abs().max() <= _ROUNDING * target.abs().max())

    rows, columns = _fit(target, w, (1, 2)), w.new_ones(w.shape[1])
    if fits(rows, columns):
        return rows, columns
    rows, columns = w.new_ones(w.shape[0]), _fit(target, w, (0, 2))
    if fits(rows, columns):
        return rows, columns
    pivot = int((w != 0).any(2).sum(1).argmax())  # one row's ratios are the columns' factors but for a number
    rows = _fit(target, w * _fit(target[pivot], w[pivot], 1).nan_to_num(0.0)[None, :, None], (1, 2))
    columns = _fit(target, w * rows.nan_to_num(0.0)[:, None, None], (0, 2))
    return (rows, columns) if fits(rows, columns) else None


def _fit(target: Tensor, given: Tensor, dims: int | tuple[int, int]) -> Tensor:
    """The factors f with the least squares of target - f * given, summed over ``dims``; NaN where given is 0."""
    return (target * given).sum(dims) / (given * given).sum(dims)
