"""``compress inspect``: what a model is made of."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.inputs import Allow, Factory, InputShape, shape


def inspect(
    model: Annotated[str, typer.Argument(help="Model file: .pt, .pth, .th (torch.save), .pt2, .safetensors")],
    factory: Factory = None,
    allow: Allow = None,
    input_shape: InputShape = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List a model's layers, shapes and multiply-accumulates, what can be compressed, and why not the rest.

    Example: [bold]compress inspect model.pt[/]
    """
    from compress import api

    found = api.inspect(model, model_factory=factory, allow=allow or (), input_shape=shape(input_shape))
    if json:
        import json as encoder

        layers = [layer.model_dump() for layer in found.layers]
        print(encoder.dumps({"layers": layers, "others": found.others, "notes": found.notes}, indent=2))
        return
    from rich.console import Console

    from compress.cli.tables import inspection_table

    console = Console(emoji=False)
    console.print(inspection_table(found.layers))
    parameters = sum(layer.parameters for layer in found.layers)
    macs = sum(layer.macs for layer in found.layers)
    rest = sum(found.others.values())
    console.print(
        f"{len(found.layers)} layers, {parameters:,} weights, {rest:,} other numbers (biases, norms and the like), "
        f"{macs:,} MACs a sample",
        highlight=False,
    )
    for note in found.notes:
        console.print(f"- {note}", highlight=False)
