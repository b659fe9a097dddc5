"""``compress bench``: latency, load time and memory of ONNX files and finished folders, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.inputs import Allow, Factory, For, InputShape, Seed, shape
from compress.cli.progress import ProgressBar
from compress.errors import InputError
from compress.files.outputs import new_file
from compress.options import Source
from compress.quant.targets import choose_target, find_target

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from compress.measure.bench import BenchReport, BenchRow, Explanation
    from compress.records.layers import LayerRun

# One file opened twice and compared with itself came out at 0.97 to 1.02, each time with a narrow interval: where a
# session's memory happens to lie is the same for all of its runs, and no number of runs averages it out.
_SAME_FILE_SPREAD = 0.03
_KIT = "A kit for another machine"


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="ONNX files, or folders of quantize, run in PyTorch; compared with the first one. With --kit one "
            "model, as quantize takes it"
        ),
    ],
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size; may be given several times; 1 where left out")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads inside an operator")] = 1,
    runs: Annotated[
        int | None, typer.Option(help="Timed runs of each model; by default about a second's worth, 30 to 2000")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Untimed runs of each model before")] = 5,
    dim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Size of a dynamic dimension, by name or INPUT:AXIS, as in seq=128"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where folders run: cpu, cuda, cuda:1")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Folders on a GPU: packed linears multiply in float16 or bfloat16")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Folders: which kernel runs each layer, and why not the others")
    ] = False,
    capability: Annotated[
        str | None, typer.Option(metavar="X.Y", help="With --explain: of a GPU that is not here, as in 9.0")
    ] = None,
    provider: Annotated[str, typer.Option(help="ONNX Runtime execution provider")] = "CPUExecutionProvider",
    level: Annotated[str, typer.Option(help="Graph optimisation: all, extended, basic, disabled")] = "all",
    seed: Seed = 0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory and load time in a process for each model")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file, or - for stdout")] = None,
    kit: Annotated[
        Path | None,
        typer.Option(
            help="Write this folder instead of timing anything: the model's layers as ONNX files and a measure.py, "
            "which times them on another machine for --latency-table",
            rich_help_panel=_KIT,
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Linears at so many rows, too, for --rows", rich_help_panel=_KIT)
    ] = None,
    machine: For = "any",
    factory: Factory = None,
    allow: Allow = None,
    input_shape: InputShape = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing kit", rich_help_panel=_KIT)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar")] = False,
) -> None:
    """Measure models side by side: latency, load time, peak memory.

    Example: [bold]compress bench model-fp32.onnx model-w4a8/model.onnx --batch 1 --batch 32[/]

    A folder is timed in PyTorch, as compress.load gives it: [bold]compress bench model-w4a8 --device cuda --explain[/]

    The models run in turn in one process, on generated inputs, so that disturbances meet them alike; the comparison
    with the first model comes with a 95 % interval.

    A plan for another machine's latency: [bold]compress bench model.pt --kit kit[/] here, [bold]python measure.py[/]
    in the folder there, and [bold]--latency-table latency.json[/] here again.
    """
    if kit is not None:
        if len(models) != 1 or len(batch or [1]) != 1:
            raise InputError("--kit is of one model at one --batch")
        source = Source(model_factory=factory, allow=allow or (), input_shape=shape(input_shape))
        _write_kit(models[0], kit, source, machine, threads, (batch or [1])[0], rows, overwrite, quiet)
        return
    if rows is not None or machine != "any" or overwrite or factory or allow or input_shape:
        raise InputError("--rows, --for, --overwrite, --model, --allow and --input-shape go with --kit; leave them out")
    to_stdout = json is not None and str(json) == "-"
    if json is not None and not to_stdout and not json.absolute().parent.is_dir():
        # Known before the first run, not after the last.
        raise InputError(f"--json {json}: the folder {json.absolute().parent} does not exist")
    dims = parse_dims(dim or [])
    found = parse_capability(capability) if capability is not None else None

    bar = ProgressBar(enabled=not quiet and not to_stdout)
    from rich.console import Console

    from compress.measure import bench as measuring

    with bar:
        report = measuring.bench(
            models,
            batch_sizes=batch or [1],
            threads=threads,
            runs=runs,
            warmup=warmup,
            provider=provider,
            level=level,
            dims=dims,
            seed=seed,
            memory=memory,
            device=device,
            dtype=dtype,
            explain=explain,
            capability=found,
            progress=bar.update if bar.enabled else None,
        )
    text = report.model_dump_json(indent=2)
    if to_stdout:
        print(text)
        return
    print_report(report, Console(emoji=False))
    if json is not None:
        with new_file(json, "name another file in --json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _write_kit(
    model: Path, folder: Path, source: Source, machine: str, threads: int, batch: int, rows: int | None,
    overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    target = find_target(choose_target(None, machine))
    bar = ProgressBar(enabled=not quiet)
    from compress.measure.kit import write_kit

    with bar:
        write_kit(
            model, folder, source=source, target=target, threads=threads, batch=batch, rows=rows, overwrite=overwrite,
            progress=bar.update,
        )  # fmt: skip
    if not quiet:
        print(
            f"Written to {folder}/. There: pip install numpy onnxruntime=={_runtime()}, then python measure.py in that "
            "folder; here: --latency-table latency.json."
        )


def _runtime() -> str:
    from importlib.metadata import version

    return version("onnxruntime")


def parse_dims(texts: list[str]) -> dict[str, int]:
    """``["seq=128", "ids:1=16"]`` -> sizes by name; raises InputError where one is not NAME=VALUE or comes twice."""
    dims: dict[str, int] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name or not value.isdecimal():
            raise InputError(f"--dim {text}: expected NAME=VALUE with a whole number, as in --dim seq=128")
        if name in dims:
            raise InputError(f"--dim {text}: {name} has the value {dims[name]} already")
        dims[name] = int(value)
    return dims


def parse_capability(text: str) -> tuple[int, int]:
    """``"9.0"`` -> ``(9, 0)``; raises InputError where it is not two numbers."""
    major, _, minor = text.partition(".")
    if not major.isdecimal() or not minor.isdecimal():
        raise InputError(f"--capability {text}: expected a GPU's compute capability, as in 8.0 or 9.0")
    return int(major), int(minor)


def print_report(report: BenchReport, console: Console) -> None:
    """One table for each batch size, models side by side, then the comparisons as sentences."""
    labels = model_labels(report)
    for batch in dict.fromkeys(row.batch for row in report.rows):
        rows = [row for row in report.rows if row.batch == batch]
        console.print(_table(rows, labels, f"batch {batch}, {rows[0].runs} runs each"))
        for row in rows[1:]:
            console.print(comparison(row, labels[row.model], labels[rows[0].model]), highlight=False, markup=False)
        for explanation in report.explanations:
            if explanation.batch == batch:
                console.print(layer_table(explanation, labels[explanation.model]))
        console.print()
    environment = report.environment
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    console.print(
        f"{environment.cpu} ({', '.join(environment.cpu_flags) or environment.architecture}), {threads}, "
        f"onnxruntime {environment.onnxruntime}, {report.provider}, graph optimisation {report.level}",
        highlight=False,
        markup=False,
    )
    if any(Path(row.model).is_dir() for row in report.rows):
        multiplied = f", packed linears in {report.dtype}" if report.dtype else ""
        where = f"{report.device} ({report.gpu})" if report.gpu else report.device
        console.print(f"Folders: torch {environment.torch} on {where}{multiplied}.", highlight=False)
    if any(row.runs < 1000 for row in report.rows):
        console.print("P99.9 of fewer than 1000 runs is next to the maximum.", highlight=False)


def model_labels(report: BenchReport) -> dict[str, str]:
    """File name of each model, or its whole path where two files share a name."""
    paths = list(dict.fromkeys(row.model for row in report.rows))
    names = [Path(path).name for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def comparison(row: BenchRow, name: str, baseline: str) -> str:
    """A sentence on ``row.ratio``: faster, slower, or no difference that these runs can tell."""
    ratio = row.ratio
    if ratio is None:
        return f"{name} is the baseline."
    spread = _SAME_FILE_SPREAD
    if ratio.low <= 1 <= ratio.high:
        verdict = "no difference that these runs can tell"
    elif ratio.low <= 1 + spread and ratio.high >= 1 - spread:
        verdict = f"no difference that can be told from one file opened twice ({spread:.0%})"
    elif ratio.value < 1:
        verdict = f"{1 / ratio.value:.2f} times as fast"
    else:
        verdict = f"{ratio.value:.2f} times as slow"
    interval = f"95 % interval {_ratio(ratio.low)} to {_ratio(ratio.high)}"
    return f"{name} takes {_ratio(ratio.value)} of the time of {baseline} ({interval}): {verdict}."


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def _table(rows: list[BenchRow], labels: dict[str, str], title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", title=title, title_justify="left")
    for row in rows:
        table.add_column(escape(labels[row.model]), justify="right", overflow="fold")
    times = {"mean": "mean_ms", "min": "min_ms", "P50": "p50_ms", "P90": "p90_ms", "P95": "p95_ms", "P99": "p99_ms"}
    times |= {"P99.9": "p99_9_ms", "max": "max_ms"}
    for name, field in times.items():
        table.add_row(f"{name}, ms", *(_three_digits(getattr(row, field)) for row in rows))
    table.add_section()
    table.add_row("load, ms", *(_three_digits(row.load_ms) for row in rows))
    if any(row.peak_memory_bytes is not None for row in rows):
        peaks = [row.peak_memory_bytes for row in rows]
        table.add_row("peak memory, MB", *("" if peak is None else _three_digits(peak / 1e6) for peak in peaks))
    if any(row.device_memory_bytes is not None for row in rows):
        on_device = [row.device_memory_bytes for row in rows]
        table.add_row("GPU memory, MB", *("" if peak is None else _three_digits(peak / 1e6) for peak in on_device))
    if len(rows) > 1:
        ratios = [row.ratio for row in rows]
        table.add_row("P50 to the first's", *("1" if ratio is None else _ratio(ratio.value) for ratio in ratios))
    return table


def layer_table(explanation: Explanation, name: str) -> Table:
    """What runs each layer of the model called ``name``, a row each; kernels with one reason in one line."""
    from rich.markup import escape
    from rich.table import Table

    what = "what runs each layer"
    if explanation.capability is not None:
        what = "what would run each layer on compute capability {}.{}".format(*explanation.capability)
    table = Table(title=f"{escape(name)}, batch {explanation.batch}: {what}", title_justify="left")
    for heading in ("layer", "operator", "run by", "rows x inputs x outputs", "weight", "why no other kernel"):
        table.add_column(heading, overflow="fold")
    for layer in explanation.layers:
        shape = f"{layer.rows} x {layer.inputs} x {layer.outputs}"
        kernel = "PyTorch" if layer.kernel in ("torch", "reference") else layer.kernel
        reasons = escape("\n".join(_together(layer.refused)))
        table.add_row(escape(layer.layer), layer.operator, kernel, shape, _weight(layer), reasons)
    return table


def _weight(layer: LayerRun) -> str:
    """``4 bits, groups of 32``, and what stands beside it."""
    if layer.bits is None:
        return f"factors of rank {layer.rank}" if layer.rank else "floats"
    table = layer.operator == "embedding"
    if layer.group_size == (layer.outputs if table else layer.inputs):
        scales = "one scale a row" if table else "one scale an output"
    else:
        scales = f"groups of {layer.group_size}"
    said = f"{layer.bits} bits, {scales}"
    return f"{said}, and a branch of rank {layer.rank}" if layer.rank else said


def _together(refused: tuple[str, ...]) -> list[str]:
    """``kernel: why`` of several kernels, those with the same reason in one line."""
    kernels: dict[str, list[str]] = {}
    for sentence in refused:
        name, _, why = sentence.partition(": ")
        kernels.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}" if why else names[0] for why, names in kernels.items()]


def _three_digits(value: float) -> str:
    """0.0124, 3.14, 27.1, 1234: three digits that mean something, and never an exponent."""
    for least, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if value >= least:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"
