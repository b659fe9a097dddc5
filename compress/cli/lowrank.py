"""``compress lowrank``: train ordered factors, truncate a trained model, cut any size out of the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.inputs import Allow, Factory
from compress.cli.progress import ProgressBar
from compress.errors import InputError

if TYPE_CHECKING:
    from compress.training.family import Family, FamilyMember

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Low rank: two thin layers instead of one, ordered by importance")

Model = Annotated[str, typer.Argument(help="The model's file")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write")]
Test = Annotated[str | None, typer.Option(help="Labelled samples: every size's metric is measured on them")]
Ignore = Annotated[list[str] | None, typer.Option(help="Layer to leave dense; a pattern; several times")]
KeepFirst = Annotated[int, typer.Option(help="Leave so many leading layers dense")]
KeepLast = Annotated[bool, typer.Option(help="Leave the last layer dense")]
Smallest = Annotated[float, typer.Option(help="Smallest size, as a share of the dense model's MACs")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only")]


@app.command(no_args_is_help=True)
def train(
    model: Model,
    data: Annotated[str, typer.Option(help="Labelled training samples: .npz with x and y, or package.module:function")],
    out: Out,
    test: Test = None,
    epochs: Annotated[int, typer.Option(help="Times through the data")] = 30,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate at the start")] = 0.05,
    batch: Annotated[int, typer.Option(help="Samples a step")] = 128,
    schedule: Annotated[str, typer.Option(help="cosine, steps or constant")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Also shrinks ranks: hold it when --penalty is swept")] = 1e-4,
    penalty: Annotated[float, typer.Option(help="Hierarchical group lasso; the larger, the smaller the ranks")] = 1e-3,
    threshold: Annotated[float, typer.Option(help="Components below this share of the first's importance go")] = 1e-3,
    sampler: Annotated[str, typer.Option(help="pair, independent, shared or full")] = "pair",
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
    ignore: Ignore = None,
    keep_first: KeepFirst = 0,
    keep_last: KeepLast = False,
    smallest: Smallest = 0.1,
    factory: Factory = None,
    allow: Allow = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a model with ordered factors (Maestro) from where it stands; ranks shrink as it goes.

    Example: [bold]compress lowrank train model.pt --data train.npz --test test.npz -o small[/]
    """
    from compress.training.loop import Recipe
    from compress.training.lowrank import LowRankOptions, train_lowrank

    with ProgressBar(enabled=not quiet) as bar:
        result = train_lowrank(
            model, data, out, test=test,
            recipe=Recipe(epochs=epochs, batch=batch, rate=lr, schedule=schedule, weight_decay=weight_decay, seed=seed),
            options=LowRankOptions(tuple(ignore or ()), keep_first, keep_last, smallest),
            penalty=penalty, threshold=threshold, sampler=sampler, factory=factory, allow=allow or (),
            overwrite=overwrite, progress=bar.update,
        )  # fmt: skip
    if not quiet:
        _report(result.family, out)


@app.command(no_args_is_help=True)
def truncate(
    model: Model,
    calib: Annotated[str, typer.Option(help="Samples; with labels sizes are chosen by their loss")],
    out: Out,
    test: Test = None,
    weighted: Annotated[
        bool, typer.Option("--data-aware/--plain", help="Order by outputs on the samples, or by singular values")
    ] = True,
    unrolling: Annotated[
        str, typer.Option(help="Of convolutions: best (of the two, by layer), channel, spatial")
    ] = "best",
    energy: Annotated[float | None, typer.Option(help="No search: ranks that hold this share of the energy")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="No search: components this share of their layer's first, or more")
    ] = None,
    ignore: Ignore = None,
    keep_first: KeepFirst = 0,
    keep_last: KeepLast = False,
    smallest: Smallest = 0.1,
    factory: Factory = None,
    allow: Allow = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Decompose a trained model, ordered by what each component does to its outputs; no training.

    Example: [bold]compress lowrank truncate model.pt --calib calib.npz --test test.npz -o small[/]
    """
    from compress.training.lowrank import LowRankOptions
    from compress.training.lowrank import truncate as truncate_model

    with ProgressBar(enabled=not quiet) as bar:
        result = truncate_model(
            model, calib, out, test=test, weighted=weighted, unrolling=unrolling, energy=energy, threshold=threshold,
            overwrite=overwrite, factory=factory, allow=allow or (),
            options=LowRankOptions(tuple(ignore or ()), keep_first, keep_last, smallest), progress=bar.update,
        )  # fmt: skip
    if not quiet:
        _report(result.family, out)


@app.command(no_args_is_help=True)
def extract(
    folder: Annotated[Path, typer.Argument(help="A folder that train or truncate wrote")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model file to write, of ordinary layers")],
    macs: Annotated[str | None, typer.Option(help="At most so many: 0.5x of the dense model's, or a number")] = None,
    weights: Annotated[str | None, typer.Option(help="At most so many: 0.5x, or a number")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut one size out of a family; no data, no training.

    Example: [bold]compress lowrank extract small --macs 0.5x -o half.pt[/]
    """
    from rich.console import Console

    from compress.training.family import choose_member, cut, read_family, save_module

    module, family = read_family(folder)
    limits = [_limit(macs, "--macs", family.dense_macs), _limit(weights, "--weights", family.dense_weights)]
    if limits == [None, None]:
        raise InputError("give --macs or --weights, as 0.5x of the dense model's or as a number")
    member = choose_member(family, macs=limits[0], size=limits[1])
    cut(folder, module, family, member)
    save_module(module, out, overwrite=overwrite)
    metric = f", {family.metric_name} {member.metric:.4f}" if member.metric is not None else ""
    Console().print(
        f"Written to {out}: {member.macs:,} MACs ({member.macs / family.dense_macs:.2f}x), {member.weights:,} weights "
        f"({member.weights / family.dense_weights:.2f}x), {family.loss_name} {member.loss:.4g}{metric}.",
        highlight=False,
    )


def _limit(text: str | None, option: str, whole: int) -> float | None:
    if text is None:
        return None
    try:
        value = float(text[:-1]) * whole if text.endswith("x") else float(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r}: write 0.5x, of the dense model's, or a number") from error
    if not value > 0:
        raise InputError(f"{option} {text}: a limit above 0 is needed")
    return value


def _report(family: Family, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Sizes", title_justify="left")
    for name in ("MACs", "of dense", "weights", "of dense", family.loss_name, *filter(None, [family.metric_name])):
        table.add_column(name, justify="right")
    for member in _shown(family):
        metric = [f"{member.metric:.4f}"] if member.metric is not None else []
        table.add_row(
            f"{member.macs:,}", f"{member.macs / family.dense_macs:.2f}x", f"{member.weights:,}",
            f"{member.weights / family.dense_weights:.2f}x", f"{member.loss:.4g}", *metric,
        )  # fmt: skip
    console = Console()
    console.print(table)
    if family.dense_metric is not None:
        console.print(f"Dense model: {family.metric_name} {family.dense_metric:.4f}", highlight=False)
    for name, reason in family.dense.items():
        console.print(f"Left dense: {name} ({reason})", highlight=False)
    for note in family.notes:
        console.print(f"- {note}", highlight=False)
    console.print(
        f"Written to {out}/ (model.pt is the largest size). Cut another: compress lowrank extract {out} --macs 0.5x -o "
        "half.pt",
        highlight=False,
    )


def _shown(family: Family) -> list[FamilyMember]:
    """About one member for every twentieth of the dense model's MACs."""
    found, last = [], 10.0
    for member in family.members:
        share = member.macs / family.dense_macs
        if share <= last - 0.05 or member is family.members[-1]:
            found.append(member)
            last = share
    return found
