"""Groups of options that several verbs share, and how they become the keywords of compress.api.

A group is a function that is never called: its parameters are the options. ``takes`` gives a verb the parameters of
groups; the verb receives them as ``**given`` and hands them on through :func:`settings_of`.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.inputs import (
    Allow,
    Classes,
    Delta,
    Factory,
    For,
    InputShape,
    Length,
    Mean,
    Seed,
    Size,
    Std,
    numbers,
    shape,
)
from compress.errors import InputError

__all__ = [
    "Calib",
    "Eval",
    "benching",
    "no_data",
    "planning",
    "reading",
    "searching",
    "settings_of",
    "takes",
    "timing",
    "writing",
]

_BUDGETS = "Budgets"
_PLAN = "What is done to every layer"


def no_data(calib: str | None) -> str | None:
    """``none`` is as good as leaving ``--calib`` out; a file of that name is ``./none``."""
    return None if calib == "none" else calib


Calib = Annotated[
    str | None,
    typer.Option(
        callback=no_data,
        help="Calibration samples: .npz, .npy, .pt, .safetensors, a folder of images, text (.txt, .tsv, .csv), or "
        "package.module:function; synthetic, for noise made to fit the model's BatchNorm statistics; none, like "
        "leaving it out, quantizes the weights alone",
    ),
]
Eval = Annotated[str | None, typer.Option("--eval", help="Labelled samples: adds the metric before and after")]


def reading(
    samples: Annotated[int, typer.Option(help="Calibration samples to use, at most")] = 1024,
    seed: Seed = 0,
    factory: Factory = None,
    allow: Allow = None,
    classes: Classes = None,
    delta: Delta = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    length: Length = None,
) -> None:
    """How the model and the samples are read."""


def planning(
    act_bits: Annotated[
        int | None,
        typer.Option(help="Bits an activation, 2 to 8  [default: 8 with --calib]", rich_help_panel=_PLAN),
    ] = None,
    dynamic: Annotated[
        bool | None,
        typer.Option(
            "--dynamic/--static",
            help="Ranges of linears' inputs measured as the model runs  [default: where --act-bits 8 comes without "
            "--calib]",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights only: so many of a linear's row share a grid, 16 to 256  [default: the row]",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a linear in a call (tokens times batch): measure which format is fastest, and choose it",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="minmax, mse, hqq, gptq, adaquant, adaquant-parallel; by blocks: adaround, brecq, qdrop, genie, "
            "metaaug; or auto, which chooses by widths, samples and --minutes  "
            "[default: adaquant with --calib, mse without; with --group-size gptq and hqq]",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Optimisation steps a layer, or a block  [default: 300 a layer, 1000 a block]", rich_help_panel=_PLAN
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="With --method auto: how long calibration may take", rich_help_panel=_PLAN),
    ] = None,
    first_last_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the first and the last layer, if more than --bits  [default: 8, or what budgets allow]",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(
            help="Activation ranges: minmax, percentile, mse, histogram  [default: mse; minmax for transformers at 8 "
            "bits]",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layer to leave float; a pattern, or re:REGEX; several times", rich_help_panel=_PLAN),
    ] = None,
    equalize: Annotated[bool, typer.Option(help="Cross-layer equalisation first", rich_help_panel=_PLAN)] = False,
    smoothquant: Annotated[
        bool | None,
        typer.Option(
            help="Move ranges of linears' inputs into weights first  [default: with quantized inputs]",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    awq: Annotated[
        bool, typer.Option("--awq", help="Scale up weights that meet large inputs first", rich_help_panel=_PLAN)
    ] = False,
    bias_correction: Annotated[
        bool | None,
        typer.Option(
            help="Correct each bias by the mean error  [default: unless the method learns it]", rich_help_panel=_PLAN
        ),
    ] = None,
    statistics_tuning: Annotated[
        bool, typer.Option(help="Restore each channel's mean and deviation afterwards", rich_help_panel=_PLAN)
    ] = False,
    bias_tuning: Annotated[
        bool, typer.Option(help="Learn all biases from the float model's outputs afterwards", rich_help_panel=_PLAN)
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="onnx-cpu (any x86-64, U8S8) or onnx-arm (S8S8)  [default: that of --for]", rich_help_panel=_PLAN
        ),
    ] = None,
    machine: For = "any",
) -> None:
    """What holds for all layers."""


def searching(
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUANTITY=LIMIT",
            help="size=2MB, size=0.15x, latency=3ms, latency=0.5x, drop=0.5 (points; needs --eval), bops=0.1x; x is a "
            "multiple of the float model's; several times, or separated by commas",
            rich_help_panel=_BUDGETS,
        ),
    ] = None,
    minimize: Annotated[
        str | None,
        typer.Option(help="With a drop budget: size, latency or bops  [default: size]", rich_help_panel=_BUDGETS),
    ] = None,
    weight_widths: Annotated[
        str, typer.Option(metavar="B,B,...", help="Widths a weight may have", rich_help_panel=_BUDGETS)
    ] = "2,3,4,5,6,8",
    act_widths: Annotated[
        str | None,
        typer.Option(
            metavar="B,B,...",
            help="Widths a layer's input may have  [default: --act-bits, or 8]",
            rich_help_panel=_BUDGETS,
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...",
            help="Low rank: shares of a layer's MACs at which two thin layers may do it; none for never  [default: "
            "0.25,0.5 where latency or bops matter]",
            rich_help_panel=_BUDGETS,
        ),
    ] = None,
    tied: Annotated[
        bool, typer.Option("--tied", help="A layer's input has its weight's width", rich_help_panel=_BUDGETS)
    ] = False,
    floats: Annotated[
        bool | None,
        typer.Option(
            help="Whether layers may stay float  [default: where latency matters, or without --calib]",
            rich_help_panel=_BUDGETS,
        ),
    ] = None,
    grouped: Annotated[
        bool,
        typer.Option("--grouped", help="Layers that read the same value get the same choice", rich_help_panel=_BUDGETS),
    ] = False,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help="What a choice's error is: output, kl, loss (labels in --calib), gram, weight  "
            "[default: output with --calib, weight without]",
            rich_help_panel=_BUDGETS,
        ),
    ] = None,
    sensitivity_samples: Annotated[int, typer.Option(help="Samples it is measured on", rich_help_panel=_BUDGETS)] = 512,
    sensitivity_iterations: Annotated[
        int, typer.Option(help="Optimisation steps for it", rich_help_panel=_BUDGETS)
    ] = 60,
    solver: Annotated[str, typer.Option(help="highs or cbc", rich_help_panel=_BUDGETS)] = "highs",
    gap: Annotated[
        float, typer.Option(help="Relative gap to stop at; 0 proves the optimum", rich_help_panel=_BUDGETS)
    ] = 0.0,
    time_limit: Annotated[
        float, typer.Option(help="Seconds for one call of the solver", rich_help_panel=_BUDGETS)
    ] = 60.0,
    top: Annotated[
        int, typer.Option(help="Best plans to time whole where latency matters", rich_help_panel=_BUDGETS)
    ] = 3,
    latency_table: Annotated[
        str | None,
        typer.Option(help="File of measured operators  [default: in the user's cache]", rich_help_panel=_BUDGETS),
    ] = None,
) -> None:
    """How budgets are met."""


def timing(
    threads: Annotated[int, typer.Option(help="Threads that latency is measured with")] = 1,
    batch: Annotated[int, typer.Option(help="Batch that latency is measured at")] = 1,
) -> None:
    """What latency is measured at."""


def benching(
    bench: Annotated[
        bool,
        typer.Option(help="Time the finished file beside the float one, for the report; --no-bench saves a second"),
    ] = True,
) -> None:
    """Whether what was made is timed."""


def writing(
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table")] = False,
) -> None:
    """What every verb that writes can be told."""


def takes(*groups: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb that ends in ``**given`` the options of ``groups`` as well."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [each for each in inspect.signature(verb).parameters.values() if each.kind is not each.VAR_KEYWORD]
        shared = [each for group in groups for each in inspect.signature(group).parameters.values()]
        hints = {name: hint for each in (verb, *groups) for name, hint in _hints(each).items()}

        @functools.wraps(verb)
        def run(**values: Any) -> None:
            verb(**values)

        # typer reads both.
        parameters = [each.replace(kind=each.KEYWORD_ONLY, annotation=hints[each.name]) for each in (*own, *shared)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__
        return run

    return decorate


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of compress.api for the options of all groups but ``writing``."""
    found = {name: value for name, value in given.items() if name not in ("overwrite", "json", "quiet")}
    if "factory" in found:
        found["model_factory"] = found.pop("factory")
        found["allow"], found["deltas"] = found["allow"] or (), tuple(found.pop("delta") or ())
        found["input_shape"] = shape(found["input_shape"])
        found["mean"], found["std"] = numbers(found["mean"], "--mean"), numbers(found["std"], "--std")
    if "ignore" in found:
        found["ignore"] = tuple(found["ignore"] or ())
    if "budget" in found:
        found["budgets"] = tuple(found.pop("budget") or ())
        for name in ("weight_widths", "act_widths"):
            found[name] = _listed(found[name], f"--{name.replace('_', '-')}", int, "whole numbers", "2,4,8")
        found["ranks"] = (
            () if found["ranks"] == "none" else _listed(found["ranks"], "--ranks", float, "shares", "0.25,0.5")
        )
    return found


def _hints(function: Callable[..., None]) -> dict[str, Any]:
    found = typing.get_type_hints(function, {**function.__globals__, "Path": Path}, include_extras=True)
    found.pop("return", None)
    return found


def _listed(
    text: str | None, option: str, kind: Callable[[str], Any], what: str, example: str
) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text!r}: {what} separated by commas are needed, as in {example}") from error
