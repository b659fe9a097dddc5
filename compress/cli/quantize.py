"""``compress quantize``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import (
    Calib,
    Eval,
    benching,
    planning,
    reading,
    searching,
    settings_of,
    takes,
    timing,
    writing,
)

if TYPE_CHECKING:
    from compress.api import Preview
    from compress.records.report import Report


@takes(planning, searching, timing, benching, reading, writing)
def quantize(
    model: Annotated[str, typer.Argument(help="Model: .pt, .pth, .th, .pt2, .safetensors, or a Hugging Face folder")],
    bits: Annotated[
        int | None, typer.Option("--bits", "-b", help="Bits a weight, 2 to 8  [default: 4, or what budgets allow]")
    ] = None,
    calib: Calib = None,
    evaluate: Eval = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write  [default: MODEL-wXaY, or MODEL-budget]")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and an estimate of time and memory, and stop")] = False,
    **given: Any,
) -> None:
    """Quantize a model, export it to ONNX, prove that the file computes the same, and report.

    Example: [bold]compress quantize model.pt --bits 4 --calib calib.npz --eval test.npz[/]

    With budgets the widths are chosen layer by layer: [bold]compress quantize model.pt --budget size=0.15x --calib
    calib.npz[/]. Without --calib only the weights are quantized, which takes no data; layers then compute in floats, as
    in the float file.
    """
    from compress.cli.progress import ProgressBar

    bar = ProgressBar(enabled=not given["quiet"])
    from compress import api

    settings = settings_of(given)
    if dry_run:
        with bar:
            preview = api.preview(model, calib=calib, eval_data=evaluate, progress=bar.update, bits=bits, **settings)
        _print_preview(preview, given["json"])
        return
    name = "budget" if settings["budgets"] else _widths_name(bits, given["act_bits"], calib)
    folder = out or Path(f"{Path(model).stem}-{name}")
    with bar:
        result = api.quantize(
            model,
            calib=calib,
            eval_data=evaluate,
            out=folder,
            overwrite=given["overwrite"],
            progress=bar.update,
            bits=bits,
            **settings,
        )
    print_result(result.report, folder, as_json=given["json"], quiet=given["quiet"])


def print_result(report: Report, folder: Path, *, as_json: bool, quiet: bool) -> None:
    """What a run that wrote ``folder`` came to; warnings go to standard error where notes are not printed."""
    if as_json or quiet:
        for warning in report.warnings:
            typer.echo(warning, err=True)
    if as_json:
        print(report.model_dump_json(indent=2))
    elif not quiet:
        from rich.console import Console

        from compress.cli.tables import layer_table, summary_lines

        console = Console(emoji=False)
        console.print(layer_table(report))
        for line in summary_lines(report):
            console.print(line, highlight=False)
        console.print(f"Written to {folder}/ (model.onnx is the file to deploy).", highlight=False)


def _widths_name(bits: int | None, act_bits: int | None, calib: str | None) -> str:
    width = act_bits if act_bits is not None else (8 if calib else None)
    return f"w{4 if bits is None else bits}" + (f"a{width}" if width else "")


def _print_preview(preview: Preview, as_json: bool) -> None:
    if as_json:
        print(preview.plan.model_dump_json(indent=2))
        return
    from rich.console import Console

    from compress.cli.plans import allocation_lines
    from compress.cli.tables import plan_table

    console = Console(emoji=False)
    console.print(plan_table(preview.plan, preview.layers))
    for line in allocation_lines(preview.plan.allocation, {}):
        console.print(line, highlight=False)
    for note in preview.notes:
        console.print(f"- {note}", highlight=False)
    console.print(
        f"Estimated: {preview.estimate.seconds:.0f} s, {preview.estimate.memory_bytes / 1e6:.0f} MB beyond the "
        "program itself (within a factor of two). Nothing was written.",
        highlight=False,
    )
