"""``compress quantize``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.inputs import Allow, Factory, InputShape, Mean, Size, Std, numbers, shape

if TYPE_CHECKING:
    from compress.api import Preview
    from compress.report.schema import Report


def quantize(
    model: Annotated[str, typer.Argument(help="Model file: .pt, .pth, .th (torch.save), .pt2, .safetensors")],
    bits: Annotated[int, typer.Option("--bits", "-b", help="Bits a weight, 2 to 8")] = 4,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration samples: .npz, .npy, .pt, .safetensors, a folder of images, or package.module:function"
        ),
    ] = None,
    act_bits: Annotated[int | None, typer.Option(help="Bits an activation, 4 to 8  [default: 8 with --calib]")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="Labelled samples: adds the metric before and after")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write  [default: MODEL-wXaY]")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="minmax, mse, adaquant, adaquant-parallel  [default: adaquant with --calib, mse without]"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples to use, at most")] = 1024,
    iterations: Annotated[int, typer.Option(help="Optimisation steps a layer")] = 300,
    first_last_bits: Annotated[int, typer.Option(help="Bits of the first and the last layer, if more than --bits")] = 8,
    observer: Annotated[str, typer.Option(help="Activation ranges: minmax, percentile, mse, histogram")] = "mse",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layer to leave float; a pattern, or re:REGEX; several times")
    ] = None,
    equalize: Annotated[bool, typer.Option(help="Cross-layer equalisation first")] = False,
    bias_correction: Annotated[
        bool | None, typer.Option(help="Correct each bias by the mean error  [default: unless the method learns it]")
    ] = None,
    statistics_tuning: Annotated[
        bool, typer.Option(help="Restore each channel's mean and deviation afterwards")
    ] = False,
    bias_tuning: Annotated[
        bool, typer.Option(help="Learn all biases from the float model's outputs afterwards")
    ] = False,
    target: Annotated[str, typer.Option(help="onnx-cpu (x86, U8S8) or onnx-arm (S8S8)")] = "onnx-cpu",
    factory: Factory = None,
    allow: Allow = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output folder")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and an estimate of time and memory, and stop")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report (with --dry-run: the plan) as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table")] = False,
) -> None:
    """Quantize a model, export it to ONNX, prove that the file computes the same, and report.

    Example: [bold]compress quantize model.pt --bits 4 --calib calib.npz --eval test.npz[/]

    Without --calib only the weights are quantized; no data is needed, and the file is never slower than the float one.
    """
    from compress import api
    from compress.cli.progress import ProgressBar

    options = api.Options(
        bits=bits,
        act_bits=act_bits,
        method=method,
        samples=samples,
        first_last_bits=first_last_bits,
        target=target,
        observer=observer,
        iterations=iterations,
        ignore=tuple(ignore or ()),
        equalize=equalize,
        bias_correction=bias_correction,
        statistics_tuning=statistics_tuning,
        bias_tuning=bias_tuning,
        seed=seed,
    )
    source: dict[str, Any] = {"model_factory": factory, "allow": allow or (), "input_shape": shape(input_shape)}
    images: dict[str, Any] = {"mean": numbers(mean, "--mean"), "std": numbers(std, "--std"), "size": size}
    if dry_run:
        _print_preview(api.preview(model, calib=calib, options=options, **source, **images), json)
        return
    width = act_bits if act_bits is not None else (8 if calib else None)
    folder = out or Path(f"{Path(model).stem}-w{bits}" + (f"a{width}" if width else ""))
    with ProgressBar(enabled=not quiet) as bar:
        result = api.quantize(
            model,
            calib=calib,
            eval_data=evaluate,
            out=folder,
            overwrite=overwrite,
            options=options,
            progress=bar.update,
            **source,
            **images,
        )
    if json:
        print(result.report.model_dump_json(indent=2))
    elif not quiet:
        _print_report(result.report, folder)


def _print_preview(preview: Preview, as_json: bool) -> None:
    if as_json:
        print(preview.plan.model_dump_json(indent=2))
        return
    from rich.console import Console

    from compress.cli.tables import plan_table

    console = Console()
    console.print(plan_table(preview.plan, preview.layers))
    for note in preview.notes:
        console.print(f"- {note}", highlight=False)
    console.print(
        f"Estimated: {preview.estimate.seconds:.0f} s, {preview.estimate.memory_bytes / 1e6:.0f} MB beyond the "
        "program itself (within a factor of two). Nothing was written.",
        highlight=False,
    )


def _print_report(report: Report, folder: Path) -> None:
    from rich.console import Console

    from compress.cli.tables import layer_table, summary_lines

    console = Console()
    console.print(layer_table(report))
    for line in summary_lines(report):
        console.print(line, highlight=False)
    console.print(f"Written to {folder}/ (model.onnx is the file to deploy).", highlight=False)
