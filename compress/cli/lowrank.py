"""``compress lowrank``: train ordered factors, truncate a trained model, cut any size out of the result, plot it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.inputs import Allow, Factory, Length, Seed
from compress.cli.options import takes, timing
from compress.cli.progress import ProgressBar

if TYPE_CHECKING:
    from compress.training.lowrank.family import Family, FamilyMember
    from compress.training.lowrank.members import LowRankOptions

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Low rank: two thin layers instead of one, ordered by importance")

Model = Annotated[str, typer.Argument(help="The model's file")]
Folder = Annotated[Path, typer.Argument(help="A folder that train or truncate wrote")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write")]
Test = Annotated[str | None, typer.Option(help="Labelled samples: every size's metric is measured on them")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only")]


def cutting(
    ignore: Annotated[list[str] | None, typer.Option(help="Layer to leave dense; a pattern; several times")] = None,
    keep_first: Annotated[int, typer.Option(help="Leave so many leading layers dense")] = 0,
    keep_last: Annotated[bool, typer.Option(help="Leave the last layer dense")] = False,
    smallest: Annotated[float, typer.Option(help="Smallest size, as a share of the dense model's MACs")] = 0.1,
    search: Annotated[
        str, typer.Option(help="greedy, or program: plans of an integer program too, the better of both at every size")
    ] = "greedy",
    factory: Factory = None,
    allow: Allow = None,
    length: Length = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there")] = False,
) -> None:
    """What training and truncation share: fields of :class:`compress.training.lowrank.members.LowRankOptions`."""


@app.command(no_args_is_help=True)
@takes(cutting)
def train(
    model: Model,
    data: Annotated[str, typer.Option(help="Labelled training samples: .npz with x and y, or package.module:function")],
    out: Out,
    test: Test = None,
    epochs: Annotated[int, typer.Option(help="Times through the data")] = 30,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate at the start")] = 0.05,
    batch: Annotated[int, typer.Option(help="Samples a step")] = 128,
    schedule: Annotated[str, typer.Option(help="cosine, linear, steps or constant")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Also shrinks ranks: hold it when --penalty is swept")] = 1e-4,
    penalty: Annotated[float, typer.Option(help="Hierarchical group lasso; the larger, the smaller the ranks")] = 1e-3,
    threshold: Annotated[float, typer.Option(help="Components below this share of the first's importance go")] = 1e-3,
    sampler: Annotated[str, typer.Option(help="pair, independent, shared or full")] = "pair",
    seed: Seed = 0,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Train a model with ordered factors (Maestro) from where it stands; ranks shrink as it goes.

    Example: [bold]compress lowrank train model.pt --data train.npz --test test.npz -o small[/]
    """
    bar = ProgressBar(enabled=not quiet)
    from compress.training.loop import Recipe
    from compress.training.lowrank.job import train_lowrank

    with bar:
        result = train_lowrank(
            model, data, out, test=test, options=_options(given), penalty=penalty, threshold=threshold, sampler=sampler,
            recipe=Recipe(epochs=epochs, batch=batch, rate=lr, schedule=schedule, weight_decay=weight_decay, seed=seed),
            progress=bar.update,
        )  # fmt: skip
    if not quiet:
        _report(result.family, out)


@app.command(no_args_is_help=True)
@takes(cutting)
def truncate(
    model: Model,
    calib: Annotated[
        str,
        typer.Option(
            help="Samples; with labels sizes are chosen by their loss; or synthetic: noise made to fit the model's "
            "BatchNorm statistics"
        ),
    ],
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
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Decompose a trained model, ordered by what each component does to its outputs; no training.

    Example: [bold]compress lowrank truncate model.pt --calib calib.npz --test test.npz -o small[/]
    """
    bar = ProgressBar(enabled=not quiet)
    from compress.training.lowrank.job import truncate as truncate_model

    with bar:
        result = truncate_model(
            model, calib, out, test=test, weighted=weighted, unrolling=unrolling, energy=energy, threshold=threshold,
            options=_options(given), progress=bar.update,
        )  # fmt: skip
    if not quiet:
        _report(result.family, out)


@app.command(no_args_is_help=True)
@takes(timing)
def extract(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Model file to write, of ordinary layers")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUANTITY=LIMIT",
            help="size=2MB, macs=0.5x, latency=2ms, latency=0.5x, drop=0.5 (points; the smallest size that keeps it); "
            "x is a multiple of the dense model's; several times, or separated by commas",
        ),
    ] = None,
    allow: Allow = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there")] = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Cut one size out of a family; no data, no training.

    Example: [bold]compress lowrank extract small --budget latency=0.5x -o half.pt[/]

    Latency is measured here: members are exported and timed beside the dense model until the budget is met, and kept in
    the folder's latency.json for the next time.
    """
    bar = ProgressBar(enabled=not quiet)
    from rich.console import Console

    from compress.files.outputs import claim
    from compress.plans.budgets import format_value
    from compress.training.lowrank.choice import WEIGHT_BYTES, choose_member, family_budgets
    from compress.training.lowrank.family import check_file, cut, read_family, save_module
    from compress.training.lowrank.timing import MemberTimer

    check_file(out, overwrite=overwrite)
    module, family = read_family(folder, allow or ())
    budgets = family_budgets(budget or (), family)
    with claim(out), bar:
        timer = MemberTimer(folder, module, family, progress=bar.update, **given)
        member = choose_member(family, budgets, timer)
        number = family.members.index(member)
        timed = any(each.quantity == "latency" for each in budgets)
        spent = timer.times([number])[number] if timed else None
        done = cut(folder, module, family, member)
        save_module(module, out, overwrite=overwrite)
    if quiet:
        return
    console = Console(emoji=False)
    size = format_value("size", member.weights * WEIGHT_BYTES)
    sentence = f"Written to {out}: {member.macs:,} MACs ({member.macs / family.dense_macs:.2f}x), {size} of "
    sentence += f"weights ({member.weights / family.dense_weights:.2f}x), {family.loss_name} {member.loss:.4g}"
    if member.metric is not None:
        sentence += f", {family.metric_name} {member.metric:.4f}"
    if spent is not None:
        sentence += f", {spent / 1e3:.3f} ms ({spent / timer.dense_us:.2f}x)"
    console.print(f"{sentence}.", highlight=False)
    whole = [name for name, what in done.items() if what.startswith("dense")]
    if whole:
        console.print(f"One layer again, as two would cost more: {', '.join(whole)}", highlight=False)


@app.command(no_args_is_help=True)
@takes(timing)
def plot(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Image  [default: FOLDER/latency.png]")] = None,
    allow: Allow = None,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Draw a family's accuracy (or loss) against its latency on this machine; no data, no training.

    Example: [bold]compress lowrank plot small --threads 2[/]

    Every member is exported and timed beside the dense model, unless latency.json in the folder has its time already.
    """
    bar = ProgressBar(enabled=not quiet)
    from rich.console import Console

    from compress.training.lowrank.family import check_picture, read_family
    from compress.training.lowrank.family import plot as draw
    from compress.training.lowrank.timing import MemberTimer

    path = out or folder / "latency.png"
    check_picture(path)
    module, family = read_family(folder, allow or ())
    with bar:
        timer = MemberTimer(folder, module, family, progress=bar.update, **given)
        times = timer.times(range(len(family.members)))
    axis = f"ms a call (batch {timer.batch}, threads: {timer.threads})"
    draw(family, path, [value / 1e3 for value in times.values()], axis, dense=timer.dense_us / 1e3)
    if not quiet:
        least = min(times.values())
        Console(emoji=False).print(
            f"Written to {path}: {len(times)} sizes, {timer.measured} of them timed now; the fastest takes "
            f"{least / 1e3:.3f} ms, the dense model {timer.dense_us / 1e3:.3f} ms.",
            highlight=False,
        )


def _options(given: dict[str, Any]) -> LowRankOptions:
    from compress.training.lowrank.members import LowRankOptions

    return LowRankOptions(**given | {name: tuple(given[name] or ()) for name in ("ignore", "allow")})


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
    console = Console(emoji=False)
    console.print(table)
    if family.dense_metric is not None:
        console.print(f"Dense model: {family.metric_name} {family.dense_metric:.4f}", highlight=False)
    for name, reason in family.dense.items():
        console.print(f"Left dense: {name} ({reason})", highlight=False)
    for note in family.notes:
        console.print(f"- {note}", highlight=False)
    console.print(
        f"Written to {out}/ (model.pt is the largest size). Cut another: compress lowrank extract {out} "
        "--budget macs=0.5x -o half.pt",
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
