"""``compress sweep``: the Pareto front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import Calib, Eval, planning, reading, searching, settings_of, takes, timing, writing


@takes(searching, planning, timing, reading, writing)
def sweep(
    model: Annotated[str, typer.Argument(help="Model file: .pt, .pth, .th (torch.save), .pt2, .safetensors")],
    calib: Calib = None,
    evaluate: Eval = None,
    over: Annotated[str, typer.Option(help="What is swept: size, latency or bops")] = "size",
    points: Annotated[int, typer.Option(help="How many plans, from the smallest reachable on")] = 12,
    measure: Annotated[bool, typer.Option("--measure", help="Carry out every plan too; takes long")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write  [default: MODEL-front]")] = None,
    **given: Any,
) -> None:
    """Find the best plan for a range of sizes or latencies; write a table, a plot and every plan.

    Example: [bold]compress sweep model.pt --calib calib.npz --points 12[/]

    Each plan can be carried out by `compress apply`. Other budgets hold at every point.
    """
    from compress.cli.progress import ProgressBar

    bar = ProgressBar(enabled=not given["quiet"])
    from compress import api

    folder = out or Path(f"{Path(model).stem}-front")
    with bar:
        front, _ = api.sweep(
            model,
            calib=calib,
            eval_data=evaluate,
            out=folder,
            overwrite=given["overwrite"],
            over=over,
            points=points,
            measure=measure,
            progress=bar.update,
            **settings_of(given),
        )
    if given["json"]:
        print(front.model_dump_json(indent=2))
    elif not given["quiet"]:
        from rich.console import Console

        from compress.cli.plans import front_table

        console = Console(emoji=False)
        console.print(front_table(front))
        for note in front.notes:
            console.print(f"- {note}", highlight=False)
        console.print(f"Written to {folder}/ (front.csv, front.json, front.png, front.svg, plans).", highlight=False)
