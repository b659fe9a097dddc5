"""``compress allocate``: find a plan and write it, to be read, edited, and carried out by ``compress apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import Calib, Eval, planning, reading, searching, settings_of, takes, timing, writing
from compress.errors import InputError


@takes(searching, planning, timing, reading, writing)
def allocate(
    model: Annotated[str, typer.Argument(help="Model file: .pt, .pth, .th (torch.save), .pt2, .safetensors")],
    calib: Calib = None,
    evaluate: Eval = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write  [default: MODEL-plan.json]")] = None,
    **given: Any,
) -> None:
    """Find the best plan inside budgets, with proof of how good it is, and write it as JSON.

    Example: [bold]compress allocate model.pt --budget size=0.15x --calib calib.npz -o plan.json[/]
    """
    from compress.cli.progress import ProgressBar

    bar = ProgressBar(enabled=not given["quiet"])
    from compress import api

    settings = settings_of(given)
    if not settings["budgets"]:
        raise InputError("allocate needs at least one --budget, as in --budget size=0.15x")
    path = out or Path(f"{Path(model).stem}-plan.json")
    with bar:
        plan = api.allocate(
            model,
            calib=calib,
            eval_data=evaluate,
            out=path,
            overwrite=given["overwrite"],
            progress=bar.update,
            **settings,
        )
    if given["json"]:
        print(plan.model_dump_json(indent=2))
    elif not given["quiet"]:
        from rich.console import Console

        from compress.cli.plans import allocation_lines, allocation_table

        console = Console(emoji=False)
        assert plan.allocation is not None
        console.print(allocation_table(plan.allocation))
        for line in allocation_lines(plan.allocation, {}):
            console.print(line, highlight=False)
        console.print(f"Written to {path}; carry it out with `compress apply {path} {model} ...`.", highlight=False)
