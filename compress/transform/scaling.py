"""Move ranges between a linear's input and its weight: SmoothQuant, and AWQ's scaling.

``(x / s) (W s)^T = x W^T`` for any positive ``s`` [I]. With a grid for a whole input tensor, channels of it that are
much larger than the rest (transformers have a few) leave those no codes; with a grid for many weights, the weights that
meet large inputs deserve smaller steps. Each value that linears read gets one ``s``, shared by its readers (q, k, v):

    smoothquant    s_j = max|x_j|^a / max|W_j|^(1-a)              Xiao et al. 2022 (arXiv 2211.10438, equation 4)
    awq            s_j = mean|x_j|^a / sqrt(max s * min s)        Lin et al. 2023 (arXiv 2306.00978, section 3.2)

The exponent is searched on real rows: the one whose quantized layers err least, ``s = 1`` among them. ``1 / s`` goes
into what makes the value (a norm's weight, a linear's rows, through attention to the value projection); where that is
not possible, because others read the value too, SmoothQuant multiplies by it and AWQ leaves the value alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from compress.calib.observers import activation_grid
from compress.calib.tokens import real_tokens, select_real
from compress.errors import InputError
from compress.graph.layers import layer_calls
from compress.graph.quantizers import fake_quantize_op
from compress.graph.traced import TracedModel
from compress.kernels.table import register_operators
from compress.quant.methods import METHODS
from compress.quant.problem import Effort, LayerProblem
from compress.records.layers import QuantOption
from compress.records.registry import resolve
from compress.transform.absorb import count_readers, find_sources

__all__ = ["awq", "smoothquant"]

_BATCH = 32
_ROWS = 512
# An explicit product costs time, so it has to be worth something.
_LEAST_GAIN = 0.1
_SMALL = 1e-5


@dataclass
class _Value:
    """What linears read: its node, and what was seen of it (channels last)."""

    node: fx.Node
    readers: list[str]
    largest: Tensor
    smallest: Tensor
    mean: Tensor
    rows: Tensor


# (value, largest weight of each column [C], exponent) -> s [C]
_Formula = Callable[[_Value, Tensor, float], Tensor]


def smoothquant(
    traced: TracedModel, *, samples: tuple[Tensor, ...], options: Mapping[str, QuantOption], calls: int = 10
) -> list[str]:
    """SmoothQuant in place, for layers whose inputs are quantized.

    Args:
        traced: a folded graph with float weights.
        samples: for calibration, one tensor [N, ...] a graph input.
        options: how each layer will be quantized; others are left alone.
        calls: exponents to try, evenly from 0 to 1.

    Returns:
        A sentence for the report.
    """

    def formula(value: _Value, weights: Tensor, exponent: float) -> Tensor:
        reach = torch.maximum(value.largest, -value.smallest).clamp(min=_SMALL)
        return reach**exponent / weights.clamp(min=_SMALL) ** (1 - exponent)

    chosen = {name: option for name, option in options.items() if option.inputs != "float"}
    return _scale(traced, samples, chosen, formula, calls, explicit=True)


def awq(
    traced: TracedModel, *, samples: tuple[Tensor, ...], options: Mapping[str, QuantOption], calls: int = 20
) -> list[str]:
    """AWQ's scaling in place, for layers whose weights alone are quantized; see :func:`smoothquant`."""

    def formula(value: _Value, weights: Tensor, exponent: float) -> Tensor:
        s = value.mean.clamp(min=_SMALL) ** exponent
        return s / (s.max() * s.min()).sqrt()

    chosen = {name: option for name, option in options.items() if option.inputs == "float"}
    return _scale(traced, samples, chosen, formula, calls, explicit=False)


def _scale(
    traced: TracedModel,
    inputs: tuple[Tensor, ...],
    options: Mapping[str, QuantOption],
    formula: _Formula,
    calls: int,
    explicit: bool,
) -> list[str]:
    register_operators()
    values = _watch(traced, inputs, _readers(traced, options))
    multiplied = alone = 0
    gains = []
    for value in values:
        sources = find_sources(traced, value.node, value.readers)
        if not sources and not explicit:
            alone += 1
            continue
        s, gain = _search(traced, value, options, formula, calls)
        if gain <= (0.0 if sources else _LEAST_GAIN):
            continue
        gains.append(gain)
        for name in value.readers:
            traced.set_tensor(f"{name}.weight", traced.tensor(f"{name}.weight") * s)
        for source in sources:
            tensor = traced.tensor(source)
            traced.set_tensor(source, tensor / s.reshape(-1, *[1] * (tensor.dim() - 1)))
        if not sources:
            multiplied += 1
            _multiply(traced, value, 1.0 / s)
    traced.finish()
    sentence = f"{len(gains)} of {len(values)} inputs of linears scaled"
    if gains:
        sentence += f", their layers' error {sum(gains) / len(gains):.0%} smaller on average"
    if multiplied:
        sentence += f"; {multiplied} by a product of its own, since others read the value too"
    if alone:
        sentence += f"; {alone} left alone, since nothing before them can take the factor"
    return [sentence]


def _readers(traced: TracedModel, options: Mapping[str, QuantOption]) -> dict[fx.Node, list[str]]:
    """Values read by linears whose weights nothing else reads, with those linears, in execution order."""
    found: dict[fx.Node, list[str]] = defaultdict(list)
    counts = count_readers(traced)
    for name, calls in layer_calls(traced).items():
        if name in options and counts[f"{name}.weight"] == 1 and calls[0].target is torch.ops.aten.linear.default:
            found[calls[0].args[0]].append(name)
    return {node: names for node, names in found.items() if node.op != "placeholder"}


def _watch(traced: TracedModel, inputs: tuple[Tensor, ...], readers: Mapping[fx.Node, list[str]]) -> list[_Value]:
    """Run all samples once and note what ``readers`` read, padding left out."""
    mask = real_tokens(traced, inputs)
    seen: dict[str, _Value] = {}
    totals: dict[str, float] = defaultdict(float)
    by_name = {node.name: node for node in readers}
    keep = max(_ROWS * _BATCH // max(len(inputs[0]), 1), 1)
    generator = torch.Generator().manual_seed(0)

    def note(node: fx.Node, found: Tensor) -> None:
        rows = found.reshape(-1, found.shape[-1])
        some = rows[torch.randperm(len(rows), generator=generator)[:keep]].clone()
        high, low, mean = rows.amax(0), rows.amin(0), rows.abs().mean(0)
        if node.name not in seen:
            seen[node.name] = _Value(node, readers[node], high, low, mean, some)
        else:
            value, before = seen[node.name], totals[node.name]
            value.largest, value.smallest = torch.maximum(value.largest, high), torch.minimum(value.smallest, low)
            value.mean = (value.mean * before + mean * len(rows)) / (before + len(rows))
            value.rows = torch.cat([value.rows, some])
        totals[node.name] += len(rows)

    class _Watcher(fx.Interpreter):
        part: Tensor | None = None

        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name in by_name and isinstance(result, Tensor):
                note(by_name[n.name], result if self.part is None else select_real(result, self.part))
            return result

    watcher = _Watcher(traced.module)
    size = _BATCH if traced.dynamic_batch else len(traced.example[0])
    with torch.no_grad():
        for index in torch.arange(len(inputs[0])).split(size):
            watcher.part = None if mask is None else mask[index]
            watcher.run(*(x[index] for x in inputs))
    return list(seen.values())


def _search(
    traced: TracedModel, value: _Value, options: Mapping[str, QuantOption], formula: _Formula, calls: int
) -> tuple[Tensor, float]:
    """The best ``s`` [C], and the share of the error that it takes away."""
    weights = {name: traced.tensor(f"{name}.weight") for name in value.readers}
    largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
    plain = torch.ones_like(value.mean)
    best, start = plain, _error(value, weights, options, plain)
    best_error = start
    for step in range(calls):
        s = formula(value, largest, (step + 1) / calls if calls > 1 else 0.5)
        s = s.clamp(min=_SMALL)
        error = _error(value, weights, options, s)
        if error < best_error:
            best, best_error = s, error
    return best, 1.0 - best_error / start if start > 0 else 0.0


def _error(value: _Value, weights: Mapping[str, Tensor], options: Mapping[str, QuantOption], s: Tensor) -> float:
    """Relative squared error of the readers' outputs on the rows kept, with weights and input on their grids."""
    total = 0.0
    for name, weight in weights.items():
        option = options[name]
        x = value.rows / s
        if option.act_bits is not None:
            low, high = float((value.smallest / s).min()), float((value.largest / s).max())
            if not math.isfinite(high - low):
                raise InputError(f"layer {name} reads values that are not finite: the model's weights or data hold NaN")
            scale, zero_point = activation_grid(low, high, option.act_bits, torch.uint8)
            x = fake_quantize_op()(x, scale, zero_point, option.act_bits)
        problem = LayerProblem(name, weight * s, None, forward=lambda x, *_: x)
        rounded = resolve(METHODS, "mse", "method").solve(problem, option, Effort(0, 0)).weight.dequantize()
        wanted = value.rows @ weight.T
        total += float((x @ rounded.T - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
    return total


def _multiply(traced: TracedModel, value: _Value, factor: Tensor) -> None:
    """Let the readers read ``value * factor``."""
    name = f"{value.node.name}_factor"
    traced.set_tensor(name, factor)
    with traced.graph.inserting_after(value.node):
        stored = traced.graph.get_attr(name)
    stored.meta["val"] = traced.tensor(name)
    product = traced.insert(torch.ops.aten.mul.Tensor, (value.node, stored), after=stored)
    for reader in value.readers:
        layer_calls(traced)[reader][0].update_arg(0, product)
