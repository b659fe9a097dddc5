"""``compress diff``: two plans side by side."""

from __future__ import annotations

from typing import Annotated

import typer


def diff(
    first: Annotated[str, typer.Argument(help="Plan file, or a folder that `compress quantize` wrote")],
    second: Annotated[str, typer.Argument(help="The other one")],
    all_layers: Annotated[bool, typer.Option("--all", help="List equal layers too")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Compare two plans layer by layer.

    Example: [bold]compress diff plan-a.json plan-b.json[/]
    """
    from compress import api

    found = api.diff(first, second)
    if json:
        print(found.model_dump_json(indent=2))
        return
    from rich.console import Console

    from compress.cli.plans import diff_lines, diff_table

    console = Console(emoji=False)
    changed = [row for row in found.layers if row.changed]
    if changed or all_layers:
        console.print(diff_table(found.layers if all_layers else changed, first, second))
    for line in diff_lines(found):
        console.print(line, highlight=False)
