"""``compress export``: a model or an artifact as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.inputs import Allow, Classes, Delta, Factory, InputShape, shape


def export(
    model: Annotated[str, typer.Argument(help="A folder that quantize wrote, or a float model's file")],
    out: Annotated[Path, typer.Option("--out", "-o", help="ONNX file to write")],
    factory: Factory = None,
    allow: Allow = None,
    classes: Classes = None,
    delta: Delta = None,
    input_shape: InputShape = None,
    share: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="File beside --out for the tensors of the model without deltas, for several"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file")] = False,
) -> None:
    """Write a model as ONNX and check that ONNX Runtime computes the same.

    Example: [bold]compress export model.pt --out model-fp32.onnx[/]
    """
    from rich.console import Console

    from compress import api

    path = api.export(
        model, out, overwrite=overwrite, model_factory=factory, allow=allow or (), classes=classes,
        deltas=tuple(delta or ()), input_shape=shape(input_shape), share=share,
    )  # fmt: skip
    own = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (own.stat().st_size if share and own.exists() else 0)
    beside = f" beside {share}" if share else ""
    Console(emoji=False).print(
        f"Written to {path} ({size / 1e3:,.1f} kB{beside}), checked against PyTorch.", highlight=False
    )
