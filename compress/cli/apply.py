"""``compress apply``: carry out a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import Calib, Eval, benching, reading, settings_of, takes, timing, writing
from compress.cli.quantize import print_result


@takes(timing, benching, reading, writing)
def apply(
    plan: Annotated[str, typer.Argument(help="Plan file, or a folder that `compress quantize` wrote")],
    model: Annotated[str, typer.Argument(help="The float model's file that the plan was made for")],
    calib: Calib = None,
    evaluate: Eval = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write  [default: MODEL-PLAN]")] = None,
    **given: Any,
) -> None:
    """Carry out a plan: quantize as it says, export, prove, report. The plan may have been edited by hand.

    Example: [bold]compress apply plan.json model.pt --calib calib.npz --eval test.npz[/]
    """
    from compress.cli.progress import ProgressBar

    bar = ProgressBar(enabled=not given["quiet"])
    from compress import api

    folder = out or Path(f"{Path(model).stem}-{Path(plan).stem}")
    with bar:
        result = api.apply(
            plan,
            model,
            calib=calib,
            eval_data=evaluate,
            out=folder,
            overwrite=given["overwrite"],
            progress=bar.update,
            **settings_of(given),
        )
    print_result(result.report, folder, as_json=given["json"], quiet=given["quiet"])
