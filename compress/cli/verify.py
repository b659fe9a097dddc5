"""``compress verify``: the gate, again, on a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.inputs import Mean, Size, Std, numbers


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that quantize wrote")],
    data: Annotated[str | None, typer.Option(help="Samples to compare on, as for --calib  [default: noise]")] = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Compare the ONNX file in a folder with the PyTorch graph beside it, and look at what ONNX Runtime fused.

    Example: [bold]compress verify model-w4a8 --data test.npz[/]
    """
    from compress import api
    from compress.errors import GateError

    parity = api.verify(folder, data=data, mean=numbers(mean, "--mean"), std=numbers(std, "--std"), size=size)
    if json:
        print(parity.model_dump_json(indent=2))
    if parity.failures:
        raise GateError(f"{folder} did not pass the gate: " + "; ".join(parity.failures))
    if not json:
        from rich.console import Console

        from compress.cli.tables import parity_text

        console = Console()
        console.print(f"{folder} passed: {parity_text(parity)}", highlight=False)
        for note in parity.notes:
            console.print(f"- {note}", highlight=False)
