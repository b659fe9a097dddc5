"""``compress verify``: the gate, again, on a finished folder; or proof, from its codes, for anybody's ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.inputs import Mean, Size, Std, numbers


def verify(
    path: Annotated[Path, typer.Argument(help="A folder that quantize wrote, or any ONNX file")],
    data: Annotated[
        str | None, typer.Option(help="Samples to compare a folder on, as for --calib  [default: noise]")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Compare the ONNX file in a folder with the PyTorch graph beside it, and look at what ONNX Runtime fused.

    Its tensors are to be those of the graph, value by value, and its distance what the folder's report says. Of a
    folder that stream wrote the files are compared with their hashes.

    Of any quantized ONNX file: which layers are exact on which processors, judged from their codes.

    Example: [bold]compress verify model-w4a8 --data test.npz[/]

    Example: [bold]compress verify quantized.onnx[/]
    """
    from rich.console import Console

    from compress import api
    from compress.cli.tables import export_check_text, mending, proof_table, proof_text
    from compress.errors import GateError
    from compress.records.report import Proof, StreamReport

    found = api.verify(path, data=data, mean=numbers(mean, "--mean"), std=numbers(std, "--std"), size=size)
    if json:
        print(found.model_dump_json(indent=2))
    if isinstance(found, Proof):
        if found.layers and not json:
            Console(emoji=False).print(proof_table(found))
        if found.failures:
            more = f"; and {len(found.failures) - 1} more" if len(found.failures) > 1 else ""
            raise GateError(f"{path} is not proven: {found.failures[0]}{more}. {mending(found)}")
        if not json:
            Console(emoji=False).print(f"{path}: {proof_text(found)}", highlight=False)
        return
    if isinstance(found, StreamReport):
        if not json:
            Console(emoji=False).print(
                f"{path}: {len(found.files)} files are those that `compress stream` wrote (hashes find damage, not "
                "forgery); its weights have no graph beside them to be compared with",
                highlight=False,
            )
        return
    if found.failures:
        raise GateError(f"{path} did not pass the gate: " + "; ".join(found.failures))
    if not json:
        console = Console(emoji=False)
        console.print(f"{path} passed: {export_check_text(found)}", highlight=False)
        for note in found.notes:
            console.print(f"- {note}", highlight=False)
