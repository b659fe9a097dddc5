"""The ways each layer can be done: every legal pair of widths, format and method, and staying float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.allocation.eligibility import ends, find_format_for, ignored, slow_on_integers, table_option
from compress.calib.sensitivity import Trial
from compress.errors import InputError
from compress.formats import FORMATS
from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel
from compress.options import Options
from compress.packing import packed_bytes
from compress.records import Choice, LayerSpec, QuantOption, Skip
from compress.targets import Target

__all__ = ["Space", "Way", "list_space"]

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Way:
    """One way to do a layer; ``option`` None leaves it float."""

    method: str | None
    option: QuantOption | None
    format: str

    @property
    def kind(self) -> str:
        """What it runs on, in the words of compress/latency/model.py."""
        if self.option is None or FORMATS[self.format].inputs == "float":
            return "float"
        return "narrow" if (self.option.act_bits or 8) < 8 else "integer"

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

    def stored_bytes(self, layer: LayerSpec) -> int:
        """Bytes of the layer's codes, scales and zero points, or of its float weights."""
        if self.option is None:
            return 4 * layer.parameters
        scales = layer.weight_shape[0]
        zero_points = 0 if self.option.symmetric else scales
        if self.option.group_size:
            scales *= -(-layer.weight_shape[1] // self.option.group_size)
            zero_points = packed_bytes(scales, self.option.bits)  # beside codes that stay packed
        return packed_bytes(layer.parameters, self.option.bits) + 4 * scales + zero_points

    def bops(self, layer: LayerSpec) -> int:
        """Bit operations a sample: MACs times the widths of weight and activation."""
        return layer.macs * self.widths[0] * self.widths[1]

    def trial(self) -> Trial:
        """What has to be measured for it."""
        assert self.method is not None
        assert self.option is not None
        return Trial(self.method, self.option)

    def choice(self, layer: str) -> Choice:
        """Its entry in a plan."""
        assert self.method is not None
        assert self.option is not None
        return Choice(layer=layer, method=self.method, option=self.option, format=self.format)


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
        ways = [way for way in self.ways[layer] if way.option is not None]
        if self.separable:
            ways = [way for way in ways if way in (self.weights_alone(way, ways), self.input_alone(way, ways))]
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
            else for the target's rule.

    Raises:
        InputError: widths out of range, or nothing is left to choose.
    """
    search = options.search
    activations = _activations(options, with_data)
    kept, leading, outer = ignored(layers, options.ignore), slow_on_integers(layers, target), ends(layers)
    ways: dict[str, tuple[Way, ...]] = {}
    skipped = []
    for layer in layers:
        found: list[Way] = []
        reason = "named by --ignore" if layer.name in kept else layer.refusal
        if layer.kind == "embedding" and reason is None:
            table = _table_ways(layer, search.weight_widths, target)
            if isinstance(table, str):
                skipped.append(Skip(layer=layer.name, reason=table))
            else:
                ways[layer.name] = (*table, *((FLOAT,) if search.floats else ()))
            continue
        widths = [
            bits
            for bits in sorted(search.weight_widths)
            if layer.name not in outer or options.first_last_bits is None or bits >= options.first_last_bits
        ]
        for bits in widths:
            inputs: list[int | None] = [bits] if search.tied and with_data else list(activations)
            if with_data and not timed and layer.name in leading:
                inputs = [None]
            elif with_data and timed:
                inputs.append(None)
            for act_bits in inputs:
                option = QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)
                for name in target.formats:
                    fits = FORMATS[name].inputs == option.inputs
                    if fits and FORMATS[name].refusal(layer, option) is None:
                        found += [Way(method, option, name) for method in methods]
        if reason is None and not found:
            reason = f"target {target.name} has no format for it"
        if reason is not None:
            skipped.append(Skip(layer=layer.name, reason=reason))
        else:
            ways[layer.name] = (*found, *((FLOAT,) if search.floats else ()))
    if not ways:
        reasons = "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:3])
        raise InputError(f"nothing to compress: {reasons or 'the model has no layer with weights'}")
    separable = with_data and not search.tied and len(activations) > 1
    return Space(ways, _units(traced, ways, search.grouped), tuple(skipped), separable)


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


def _activations(options: Options, with_data: bool) -> tuple[int | None, ...]:
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
