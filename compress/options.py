"""Everything a user may tell the toolchain, in one place: command line and Python share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from compress.errors import InputError

__all__ = ["Options", "Search", "Settings", "Source", "check_unused", "gather"]


@dataclass(frozen=True)
class Source:
    """How the model's file and the samples are to be read.

    Attributes:
        model_factory: ``package.module:factory``, for files that hold weights only.
        allow: classes a model file may use besides torch.nn's own.
        classes: a new, untrained head with so many outputs (1: a number) is put on a Hugging Face folder's encoder,
            for deltas that bring theirs to what is made of it.
        deltas: delta files that are added to the model first, of one base and with one head at most.
        input_shape: shape of one input, where neither file nor data tell.
        mean, std, size: how images given as bytes or files are normalised and cropped.
        length: tokens of a sample, at most, where text is given; None: 128, or what the model takes.
    """

    model_factory: str | None = None
    allow: Sequence[str] = ()
    classes: int | None = None
    deltas: Sequence[str] = ()
    input_shape: Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Search:
    """How a plan is found within budgets; used only where ``Options.budgets`` are given (and by ``sweep``).

    Attributes:
        weight_widths: widths a weight may have.
        act_widths: widths a layer's input may have; None: ``Options.act_bits``, or 8. Of no use where ``tied``.
        ranks: shares of a layer's MACs at which two thin layers may do it, in (0, 1). None: a quarter and a half where
            latency or bit operations matter, else none; () for none.
        tied: a layer's input has its weight's width (the paper's W = A).
        floats: whether a layer may stay float. None: where latency matters, which prices what a float layer among
            integer ones costs, or without data.
        sensitivity: what a candidate's error is (compress/calib/sensitivity.py). None: ``output`` with data,
            ``weight`` without.
        sensitivity_samples: calibration samples it is measured on.
        sensitivity_iterations: optimisation steps a candidate, for methods that take any.
        grouped: layers that read the same value (q, k, v) get the same choice.
        minimize: what to minimise within the budgets; None: the error, or the size where the drop is budgeted.
        solver: ``highs`` or ``cbc``.
        gap: relative gap at which the solver may stop; 0 proves the optimum.
        time_limit: seconds for one call of the solver.
        top: how many of the best plans are timed whole where latency matters; the best that holds is kept.
        threads, batch: what latency is measured at.
        latency_table: file of measured operators; None: one for this machine in the user's cache.
    """

    weight_widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    act_widths: tuple[int, ...] | None = None
    ranks: tuple[float, ...] | None = None
    tied: bool = False
    floats: bool | None = None
    sensitivity: str | None = None
    sensitivity_samples: int = 512
    sensitivity_iterations: int = 60
    grouped: bool = False
    minimize: str | None = None
    solver: str = "highs"
    gap: float = 0.0
    time_limit: float = 60.0
    top: int = 3
    threads: int = 1
    batch: int = 1
    latency_table: str | None = None


@dataclass(frozen=True)
class Options:
    """Everything :func:`compress.quantize` may be told; None means that the tool decides, and says what it chose.

    Attributes:
        bits: width of the weights, 2..8. None: 4, or whatever the budgets allow.
        act_bits: width of the activations, 2..8; needs calibration data. None: 8 with data, float without.
        dynamic: measure the ranges of linears' inputs as the model runs, at 8 bits. None: where ``act_bits`` is given
            without calibration data.
        group_size: weights of a linear's row that share a grid (``--group-size``); None: the whole row.
        rows: rows that a linear has in a call (tokens times batch): the fastest format for each is measured and chosen.
        budgets: limits such as ``size=0.15x``, ``latency=3ms``, ``drop=0.5`` (compress/plans/budgets.py); with
            them the widths are chosen layer by layer.
        method: a name from compress/quant/methods.py, or ``auto`` (compress/plans/auto.py). None: ``adaquant`` with
            data, ``mse`` without.
        samples: how many calibration samples to use.
        minutes: with the method ``auto``: how long calibration may take.
        first_last_bits: width of the first and the last layer, where that is more than ``bits``. None: 8, or whatever
            the budgets allow.
        target: a name from compress/quant/targets.py. None: the one of ``machine``, ``onnx-cpu`` for any.
        machine: the instruction set that the file is for (``--for``, compress/quant/instruction_sets.py): avx2, vnni,
            arm, or any: layers that were slower than float on one that was measured stay float.
        observer: how activation ranges are chosen (compress/calib/observers.py). None: ``mse``, or ``minmax`` for a
            transformer's 8-bit inputs, whose outliers carry what the model knows.
        iterations: optimisation steps a layer, or a block. None: what the method takes by default.
        ignore: layers to leave float, by shell pattern or ``re:`` regular expression.
        smoothquant: whether SmoothQuant comes first. None: where linears of a transformer get quantized inputs.
        equalize, awq, bias_correction, statistics_tuning, bias_tuning: the steps of compress.records.plan.Steps.
        seed: of everything random.
        bench: whether the finished file is timed beside the float one, for the report.
        search: how budgets are met.
    """

    bits: int | None = None
    act_bits: int | None = None
    dynamic: bool | None = None
    group_size: int | None = None
    rows: int | None = None
    budgets: tuple[str, ...] = ()
    method: str | None = None
    samples: int = 1024
    minutes: float | None = None
    first_last_bits: int | None = None
    target: str | None = None
    machine: str = "any"
    observer: str | None = None
    iterations: int | None = None
    ignore: tuple[str, ...] = ()
    equalize: bool = False
    smoothquant: bool | None = None
    awq: bool = False
    bias_correction: bool | None = None
    statistics_tuning: bool = False
    bias_tuning: bool = False
    seed: int = 0
    bench: bool = True
    search: Search = field(default_factory=Search)


class Settings(TypedDict, total=False):
    """The fields of :class:`Options`, :class:`Search` and :class:`Source` as keywords of every verb."""

    options: Options | None
    bits: int | None
    act_bits: int | None
    dynamic: bool | None
    group_size: int | None
    rows: int | None
    budgets: str | Sequence[str]
    method: str | None
    samples: int
    minutes: float | None
    first_last_bits: int | None
    target: str | None
    machine: str
    observer: str | None
    iterations: int | None
    ignore: tuple[str, ...]
    equalize: bool
    smoothquant: bool | None
    awq: bool
    bias_correction: bool | None
    statistics_tuning: bool
    bias_tuning: bool
    seed: int
    bench: bool
    search: Search
    weight_widths: tuple[int, ...]
    act_widths: tuple[int, ...] | None
    ranks: tuple[float, ...] | None
    tied: bool
    floats: bool | None
    sensitivity: str | None
    sensitivity_samples: int
    sensitivity_iterations: int
    grouped: bool
    minimize: str | None
    solver: str
    gap: float
    time_limit: float
    top: int
    threads: int
    batch: int
    latency_table: str | None
    model_factory: str | None
    allow: Sequence[str]
    classes: int | None
    deltas: Sequence[str]
    input_shape: Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    size: int | None
    length: int | None


def gather(settings: Mapping[str, Any]) -> tuple[Options, Source]:
    """Sort a verb's keywords: whole ``options`` or single ones, and how to read model and data.

    Raises:
        InputError: whole and single options are given together, or a keyword is nobody's field.
    """
    rest = dict(settings)
    source = Source(**_take(rest, Source))
    options = rest.pop("options", None)
    if options is not None:
        if rest:
            raise InputError(f"give either options or keywords, not both ({', '.join(rest)})")
        return options, source
    searching = _take(rest, Search)
    if searching:
        if "search" in rest:
            raise InputError(f"give either search or its fields, not both ({', '.join(searching)})")
        rest["search"] = Search(**searching)
    if isinstance(budgets := rest.get("budgets", ()), str):
        rest["budgets"] = tuple(budgets.split(","))
    try:
        return Options(**rest), source
    except TypeError as error:
        raise InputError(
            f"{str(error).rpartition('__init__() ')[2]}; the options are the fields of compress.Options, "
            "compress.Search and compress.Source"
        ) from error


def check_unused(options: Options) -> None:
    """Refuse fields of ``search`` that say how a plan is found, where there are no budgets to find one for.

    Raises:
        InputError: naming them.
    """
    plain = Search(threads=options.search.threads, batch=options.search.batch)
    if options.rows is not None:
        plain = replace(plain, latency_table=options.search.latency_table)
    given = [each.name for each in fields(Search) if getattr(options.search, each.name) != getattr(plain, each.name)]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{names}: only a search for a plan uses that; add a --budget, or leave it out")


def _take(settings: dict[str, Any], record: type) -> dict[str, Any]:
    """Remove the fields of ``record`` from ``settings`` and return them."""
    return {each.name: settings.pop(each.name) for each in fields(record) if each.name in settings}
