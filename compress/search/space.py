"""The ways each layer can be done: every legal pair of widths, format and method, and staying float."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.calib.factors import BRANCH_BITS
from compress.calib.trials import Trial
from compress.errors import InputError
from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel
from compress.lowrank.ranks import layers_of, thin_ranks
from compress.measure.latency_model import thin_kind
from compress.options import Options
from compress.plans.eligibility import ends, find_format_for, ignored, slow_on_integers, table_option
from compress.quant.formats import FORMATS
from compress.quant.instruction_sets import sets_of
from compress.quant.packing import packed_bytes
from compress.quant.targets import Target
from compress.records.layers import LayerSpec, QuantOption, Split
from compress.records.plan import Choice, Skip

__all__ = ["Space", "Way", "input_widths", "list_space"]

_FLOAT_BITS = 32
# A branch beside a layer of few bits does little of its work.
BRANCH_SHARE = 1 / 16


@dataclass(frozen=True)
class Way:
    """One way to do a layer; ``option`` None leaves it float, ``rank`` None leaves it one layer."""

    method: str | None
    option: QuantOption | None
    format: str
    rank: int | None = None
    form: Literal["factors", "branch"] = "factors"

    @property
    def kind(self) -> str:
        """What it runs on, in the words of compress/measure/latency_model.py."""
        if self.option is None or FORMATS[self.format].inputs == "float":
            return "float"
        return "narrow" if (self.option.act_bits or 8) < 8 else "integer"

    @property
    def run(self) -> str:
        """What its time is filed under in compress/measure/latency_model.py."""
        return self.kind if self.rank is None else thin_kind(self.kind, self.rank, self.form)

    @property
    def untouched(self) -> bool:
        """Whether the layer stays as it is."""
        return self.option is None and self.rank is None

    @property
    def storage(self) -> str:
        """Either "float", "plain" (int8), "packed" (unpacked by a function that the file pays for) or "blocks"."""
        if self.option is None:
            return "float"
        if self.option.group_size is not None:
            return "blocks"
        return "plain" if self.option.bits == 8 else "packed"

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of the weight and of the input, 32 where they are float."""
        if self.option is None:
            return _FLOAT_BITS, _FLOAT_BITS
        return self.option.bits, self.option.act_bits or _FLOAT_BITS

    @property
    def part_options(self) -> tuple[QuantOption | None, ...]:
        """What is done to each layer that there will be, in execution order."""
        if self.rank is None:
            return (self.option,)
        if self.form == "factors":
            return (self.option, self.option)
        assert self.option is not None
        fine = self.option.model_copy(update={"bits": BRANCH_BITS})
        return (fine, self.option, fine)

    def parts(self, layer: LayerSpec) -> tuple[tuple[LayerSpec, QuantOption | None], ...]:
        """The layers that ``layer`` becomes, in execution order, and what is done to each."""
        split = self.split(layer.name)
        return tuple(zip(layers_of((layer,), (split,) if split else ()), self.part_options, strict=True))

    def stored_bytes(self, layer: LayerSpec) -> int:
        """Bytes of the layer's codes, scales and zero points, or of its float weights."""
        return sum(_bytes(part, option) for part, option in self.parts(layer))

    def macs(self, layer: LayerSpec) -> int:
        """Multiply-accumulates a sample."""
        return sum(part.macs for part, _ in self.parts(layer))

    def bops(self, layer: LayerSpec) -> int:
        """Bit operations a sample: MACs times the widths of weight and activation."""
        parts = self.parts(layer)
        bits = ((option.bits, option.act_bits or _FLOAT_BITS) if option else (_FLOAT_BITS,) * 2 for _, option in parts)
        return sum(part.macs * weight * act for (part, _), (weight, act) in zip(parts, bits, strict=True))

    def trial(self) -> Trial:
        """What has to be measured for it."""
        return Trial(self.method or "", self.option, self.rank, self.form)

    def split(self, layer: str) -> Split | None:
        """What is done to the layer first; None: nothing."""
        return None if self.rank is None else Split(layer=layer, rank=self.rank, form=self.form)

    def names(self, layer: str) -> tuple[str, ...]:
        """The layers that there will be instead of ``layer``."""
        split = self.split(layer)
        return split.parts if split else (layer,)

    def choices(self, layer: str) -> tuple[Choice, ...]:
        """Its entries in a plan, one a layer that there will be; none where those stay float."""
        method = self.method
        return tuple(
            Choice(layer=name, method=method, option=option, format=self.format)
            for name, option in zip(self.names(layer), self.part_options, strict=True)
            if option is not None and method is not None
        )


FLOAT = Way(None, None, "float")


@dataclass(frozen=True)
class Space:
    """All ways of all layers.

    Attributes:
        ways: by layer, in execution order; layers that must stay float are not in it.
        units: layers that get the same way; every layer is in exactly one.
        skipped: layers that stay float whatever the budget, with the reason.
        separable: whether a layer's error is measured for weights and activations apart, and added.
    """

    ways: dict[str, tuple[Way, ...]]
    units: tuple[tuple[str, ...], ...]
    skipped: tuple[Skip, ...]
    separable: bool

    def trials(self, layer: str) -> tuple[Trial, ...]:
        """What has to be measured of ``layer``, each once."""
        ways = [way for way in self.ways[layer] if not way.untouched]
        if self.separable:
            whole = [way for way in ways if way.rank is None]
            ways = [
                way
                for way in ways
                if way.rank is not None or way in (self.weights_alone(way, whole), self.input_alone(way, whole))
            ]
        return tuple(dict.fromkeys(way.trial() for way in ways))

    @staticmethod
    def weights_alone(way: Way, ways: Sequence[Way]) -> Way:
        """The way with ``way``'s weight and the widest input."""
        return max((other for other in ways if _like(other, way, "bits")), key=lambda other: other.widths[1])

    @staticmethod
    def input_alone(way: Way, ways: Sequence[Way]) -> Way:
        """The way with ``way``'s input and the widest weight."""
        return max((other for other in ways if _like(other, way, "act_bits")), key=lambda other: other.widths[0])


def list_space(
    traced: TracedModel,
    layers: Sequence[LayerSpec],
    options: Options,
    methods: Sequence[str],
    target: Target,
    *,
    with_data: bool,
    timed: bool,
) -> Space:
    """Everything the options allow.

    Args:
        methods: names from the table; each is a way of its own.
        with_data: whether inputs can be quantized.
        timed: whether latency matters; if so, what runs on floats and what on integers is for the table to say,
            else for the shipped figures (compress/quant/instruction_sets.py).

    Raises:
        InputError: widths out of range, or nothing is left to choose.
    """
    activations = input_widths(options, with_data)
    kept, outer = ignored(layers, options.ignore), ends(layers)
    slow = slow_on_integers(layers, sets_of(options.machine, target.name))
    offer = _Offer(options, methods, target, activations, with_data, timed, frozenset(slow), frozenset(outer))
    ways: dict[str, tuple[Way, ...]] = {}
    skipped = []
    for layer in layers:
        found = "named by --ignore" if layer.name in kept else offer.ways(layer)
        if isinstance(found, str):
            skipped.append(Skip(layer=layer.name, reason=found))
        else:
            ways[layer.name] = found
    if not ways:
        reasons = "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:3])
        raise InputError(f"nothing to compress: {reasons or 'the model has no layer with weights'}")
    separable = with_data and not options.search.tied and len(activations) > 1
    return Space(ways, _units(traced, ways, options.search.grouped), tuple(skipped), separable)


@dataclass(frozen=True)
class _Offer:
    """What there is to choose from; ``slow`` layers run faster on floats, ``outer`` are the first and the last."""

    options: Options
    methods: Sequence[str]
    target: Target
    activations: tuple[int | None, ...]
    with_data: bool
    timed: bool
    slow: frozenset[str]
    outer: frozenset[str]

    def ways(self, layer: LayerSpec) -> tuple[Way, ...] | str:
        """All of a layer, staying float last, or why it has to stay float."""
        search = self.options.search
        if layer.refusal is not None:
            return layer.refusal
        if layer.kind == "embedding":
            table = _table_ways(layer, search.weight_widths, self.target)
            return table if isinstance(table, str) else (*table, *((FLOAT,) if search.floats else ()))
        ranks = thin_ranks(layer, search.ranks or ())
        found = tuple(self._quantized(layer, ranks))
        if not found:
            return f"target {self.target.name} has no format for it"
        thin = tuple(Way(None, None, "float", rank) for rank in ranks)
        return (*found, *((FLOAT, *thin) if search.floats else ()))

    def _quantized(self, layer: LayerSpec, ranks: Sequence[int]) -> Iterator[Way]:
        branch = thin_ranks(layer, (BRANCH_SHARE,)) if ranks and layer.kind == "linear" else ()
        widths = self._widths(layer)
        for option, name in self._formats(layer, widths):
            yield from (Way(method, option, name) for method in self.methods)
            if option.act_bits not in (None, 8):
                continue
            # The value between two factors has a grid of its own: on few bits it loses what it saves.
            if option.bits in (4, max(widths)):
                yield from (Way(method, option, name, rank) for method in self.methods for rank in ranks)
            if option.bits <= 4:
                yield from (Way(method, option, name, rank, "branch") for method in self.methods for rank in branch)

    def _formats(self, layer: LayerSpec, widths: Sequence[int]) -> Iterator[tuple[QuantOption, str]]:
        """Every pair of widths with each format that takes it."""
        for bits in widths:
            for act_bits in self._inputs(layer, bits):
                option = QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)
                for name in self.target.formats:
                    if FORMATS[name].inputs == option.inputs and FORMATS[name].refusal(layer, option) is None:
                        yield option, name

    def _widths(self, layer: LayerSpec) -> list[int]:
        """Of the weight, the narrowest first."""
        least = self.options.first_last_bits
        return [
            bits
            for bits in sorted(self.options.search.weight_widths)
            if layer.name not in self.outer or least is None or bits >= least
        ]

    def _inputs(self, layer: LayerSpec, bits: int) -> Sequence[int | None]:
        """Widths of the input beside a weight of ``bits``; None: float."""
        if self.with_data and not self.timed and layer.name in self.slow:
            return (None,)
        given = (bits,) if self.options.search.tied and self.with_data else self.activations
        return (*given, None) if self.with_data and self.timed else given


def _bytes(layer: LayerSpec, option: QuantOption | None) -> int:
    if option is None:
        return 4 * layer.parameters
    scales = layer.weight_shape[0]
    zero_points = 0 if option.symmetric else scales
    if option.group_size:
        scales *= -(-layer.weight_shape[1] // option.group_size)
        zero_points = packed_bytes(scales, option.bits)  # beside codes that stay packed
    return packed_bytes(layer.parameters, option.bits) + 4 * scales + zero_points


def _table_ways(layer: LayerSpec, widths: Sequence[int], target: Target) -> tuple[Way, ...] | str:
    """Every width that an embedding's table may be stored at, or why it stays float."""
    found = []
    reason: str | None = None
    for bits in sorted(widths):
        option = table_option(layer, bits)
        if isinstance(option, str):
            return option
        name, refusal = find_format_for(layer, option, target)
        reason = reason or refusal
        if refusal is None:
            found.append(Way("mse", option, name))
    return tuple(found) or f"left float: {reason}"


def input_widths(options: Options, with_data: bool) -> tuple[int | None, ...]:
    """Widths that a layer's input may have, None for floats.

    Raises:
        InputError: a width that there is none of, or that needs data.
    """
    search = options.search
    for name, widths in (("--weight-widths", search.weight_widths), ("--act-widths", search.act_widths)):
        for width in widths or ():
            if not (isinstance(width, int) and 2 <= width <= 8):
                raise InputError(f"{name} {width}: allowed are 2 to 8")
    if not search.weight_widths:
        raise InputError("--weight-widths is empty; give at least one width from 2 to 8")
    if not with_data:
        if search.act_widths or search.tied:
            raise InputError("widths of activations need calibration data: give --calib")
        return (None,)
    if search.act_widths and options.act_bits is not None:
        raise InputError("give either --act-bits, one width for all layers, or --act-widths, widths to choose from")
    return tuple(sorted(search.act_widths)) if search.act_widths else (options.act_bits or 8,)


def _units(traced: TracedModel, ways: dict[str, tuple[Way, ...]], grouped: bool) -> tuple[tuple[str, ...], ...]:
    if not grouped:
        return tuple((name,) for name in ways)
    calls = layer_calls(traced)
    found: dict[tuple[object, tuple[Way, ...]], list[str]] = {}
    for name in ways:
        found.setdefault((calls[name][0].args[0], ways[name]), []).append(name)
    return tuple(tuple(names) for names in found.values())


def _like(other: Way, way: Way, field: str) -> bool:
    assert other.option is not None
    assert way.option is not None
    same = (other.method, other.format) == (way.method, way.format)
    return same and getattr(other.option, field) == getattr(way.option, field)
