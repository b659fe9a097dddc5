"""``compress stream``: models larger than memory, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.inputs import Length, Seed
from compress.cli.options import no_data

if TYPE_CHECKING:
    from compress.records.report import StreamReport


def stream(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and safetensors")],
    bits: Annotated[int, typer.Option("--bits", "-b", help="Bits a weight: 2, 3, 4, 5, 6 or 8")] = 4,
    calib: Annotated[
        str | None,
        typer.Option(
            callback=no_data, help="Text (.txt, .tsv, .csv) or token ids (.npz with input_ids)  [default: none needed]"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write  [default: MODEL-wX]")] = None,
    group_size: Annotated[int, typer.Option(help="Weights of a row that share a grid; 0: the whole row")] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Grids around zero, which every runtime reads")
    ] = True,
    method: Annotated[
        str | None, typer.Option(help="minmax, mse, hqq, gptq  [default: gptq with --calib, mse without]")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples to use, at most")] = 128,
    length: Length = None,
    seed: Seed = 0,
    blocks: Annotated[
        int | None, typer.Option(help="Stop after so many blocks, for a trial; a further run continues there")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table")] = False,
) -> None:
    """Quantize the weights of a model larger than memory, one block after another.

    Example: [bold]compress stream llama/ --bits 4 --calib text.txt[/]

    Writes a folder in the format of compressed-tensors (pack-quantized), which transformers and vLLM load. For an ONNX
    file use [bold]compress quantize[/], which takes the whole model into memory.
    """
    from compress.cli.progress import ProgressBar

    bar = ProgressBar(enabled=not quiet)
    from compress import api

    folder = out or Path(f"{model.name}-w{bits}")
    with bar:
        report = api.stream(
            model,
            folder,
            calib=calib,
            bits=bits,
            group_size=group_size or None,
            symmetric=symmetric,
            method=method,
            samples=samples,
            length=length,
            seed=seed,
            blocks=blocks,
            overwrite=overwrite,
            progress=bar.update,
        )
    if json:
        print(report.model_dump_json(indent=2))
    elif not quiet:
        _print(report, folder)


def _print(report: StreamReport, folder: Path) -> None:
    from rich.console import Console

    console = Console(emoji=False)
    for line in _lines(report, folder):
        console.print(line, highlight=False)


def _lines(report: StreamReport, folder: Path) -> list[str]:
    count = len({layer.name for layer in report.layers})
    lines = [f"{count} linears quantized: {report.option}, {report.method}."]
    judged = [layer for layer in report.layers if layer.output_error is not None and layer.nearest_error]
    if judged:
        mean = sum(layer.output_error or 0.0 for layer in judged) / len(judged)
        nearest = sum(layer.nearest_error or 0.0 for layer in judged) / len(judged)
        lines.append(f"Error of their outputs (relative, squared): {mean:.4f}; rounded to nearest {nearest:.4f}.")
    if report.continued:
        lines.append(f"{report.continued} blocks were finished by an earlier run.")
    if report.seconds_a_block is not None:
        lines.append(
            f"{report.seconds_a_block:.1f} s a block, about {report.seconds_a_block * report.blocks / 60:.1f} minutes "
            f"for all {report.blocks}; peak memory {report.peak_memory_bytes / 1e9:.2f} GB."
        )
    lines += [f"- {note}" for note in report.notes]
    lines += [f"- {layer.name}: {layer.note}" for layer in report.layers if layer.note]
    if folder.exists():
        lines.append(f"Written to {folder}/ (compressed-tensors, pack-quantized).")
    else:
        lines.append("Stopped where --blocks said; the same command without it continues.")
    return lines
