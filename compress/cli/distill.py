"""``compress distill``: a few synthetic images a class that train, and calibrate, in the place of many real ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.inputs import Allow, Mean, Seed, Std, numbers
from compress.cli.progress import ProgressBar

if TYPE_CHECKING:
    from compress.distillation.folder import DistillReport
    from compress.distillation.preview import DistillPreview

__all__ = ["distill"]

_EXPERTS, _MATCHING, _MODEL = "Experts", "Matching", "Suiting a model"


def distill(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="Labelled images: .npz with images and labels, or as --calib elsewhere")],
    classes: Annotated[int, typer.Option(help="Classes; labels are 0 to one less")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write")],
    ipc: Annotated[int, typer.Option("--ipc", help="Images a class")] = 1,
    iterations: Annotated[int, typer.Option(help="Steps of the outer loop")] = 150,
    method: Annotated[str, typer.Option(help="ast, or mtt: without AST's parts")] = "ast",
    augment: Annotated[
        str, typer.Option(help="all, none, or some of color, crop, cutout, flip, scale, rotate")
    ] = "color,crop,cutout,scale,rotate",
    test: Annotated[str | None, typer.Option(help="Labelled images to judge sets on  [default: held out ones]")] = None,
    hold_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the images, for judging alone; 0: on those of the experts")
    ] = 0.2,
    zca: Annotated[bool, typer.Option("--zca", help="Whiten images first")] = False,
    network: Annotated[
        str | None, typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="Network to match  [default: a ConvNet]")
    ] = None,
    width: Annotated[int, typer.Option(help="Channels of the ConvNet")] = 32,
    depth: Annotated[int, typer.Option(help="Its blocks, each of which halves the image")] = 3,
    experts: Annotated[int, typer.Option(help="How many", rich_help_panel=_EXPERTS)] = 3,
    expert_epochs: Annotated[int, typer.Option(help="Times through the data", rich_help_panel=_EXPERTS)] = 10,
    expert_batch: Annotated[int, typer.Option(help="Images a step", rich_help_panel=_EXPERTS)] = 100,
    expert_lr: Annotated[
        float, typer.Option("--expert-lr", help="With momentum; ten times it without", rich_help_panel=_EXPERTS)
    ] = 0.01,
    penalty: Annotated[
        float, typer.Option(help="Weight of the gradient penalty; 2 as published", rich_help_panel=_EXPERTS)
    ] = 0.0,
    expert_folder: Annotated[
        Path | None, typer.Option(help="Where they are kept  [default: in the user's cache]", rich_help_panel=_EXPERTS)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a student", rich_help_panel=_MATCHING)] = 15,
    ahead: Annotated[int, typer.Option(help="Epochs of an expert it is to cover", rich_help_panel=_MATCHING)] = 2,
    start_epochs: Annotated[
        int, typer.Option(help="It starts in one of an expert's first epochs, so many", rich_help_panel=_MATCHING)
    ] = 8,
    batch: Annotated[int | None, typer.Option(help="Images a step  [default: all]", rich_help_panel=_MATCHING)] = None,
    lr_images: Annotated[
        float | None,
        typer.Option(help="Outer step size of images  [default: by their first gradients]", rich_help_panel=_MATCHING),
    ] = None,
    lr_step: Annotated[
        float | None, typer.Option(help="The same of the student's step size", rich_help_panel=_MATCHING)
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(help="The student's at the start  [default: of a few, the best]", rich_help_panel=_MATCHING),
    ] = None,
    intermediate: Annotated[
        str,
        typer.Option(
            help="Weights of intermediate terms: aggregate (1), adaptive (i/M), none", rich_help_panel=_MATCHING
        ),
    ] = "aggregate",
    perturbation: Annotated[float, typer.Option(help="Of starts, relative", rich_help_panel=_MATCHING)] = 1.0,
    balance: Annotated[
        bool,
        typer.Option("--balance/--no-balance", help="AST's: gentler at early epochs", rich_help_panel=_MATCHING),
    ] = False,
    representative: Annotated[
        bool,
        typer.Option("--representative/--random", help="Begin with cluster centres' images", rich_help_panel=_MATCHING),
    ] = True,
    gradients: Annotated[
        str, typer.Option(help="recomputed (flat memory) or unrolled; both exact", rich_help_panel=_MATCHING)
    ] = "recomputed",
    looks: Annotated[
        int, typer.Option(help="Times networks are trained on the set, to keep the best", rich_help_panel=_MATCHING)
    ] = 4,
    model: Annotated[
        str | None,
        typer.Option(help="Model file: match its BatchNorm statistics and logits too", rich_help_panel=_MODEL),
    ] = None,
    model_weight: Annotated[
        float, typer.Option(help="Step on these terms, of that on trajectories", rich_help_panel=_MODEL)
    ] = 1.0,
    model_steps: Annotated[int, typer.Option(help="On these terms alone, at the end", rich_help_panel=_MODEL)] = 200,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY", help="Where the file holds weights only", rich_help_panel=_MODEL
        ),
    ] = None,
    allow_poor_model: Annotated[
        bool,
        typer.Option(
            "--allow-poor-model", help="One that gives images other classes than their labels", rich_help_panel=_MODEL
        ),
    ] = False,
    allow: Allow = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, with an estimate of time and memory, and stop")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there")] = False,
    allow_originals: Annotated[
        bool, typer.Option("--allow-originals", help="Write real images where no distilled ones were better")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table; warnings stay")] = False,
) -> None:
    """Distil labelled images into a handful that --calib takes (AST, trajectory matching); on the CPU.

    Example: [bold]compress distill train.npz --classes 10 --ipc 10 -o small[/]

    Stopped with Ctrl-C, it keeps its state and a preview in the hidden folder .OUT.work; the same command goes on, and
    with --overwrite another one begins anew.
    """
    bar = ProgressBar(enabled=not quiet and not dry_run)
    from compress.distillation.augment import parse_augmentations
    from compress.distillation.distiller import DistillSettings
    from compress.distillation.experts import ExpertSettings
    from compress.distillation.job import DistillOptions
    from compress.distillation.job import distill as distill_data

    if method == "mtt":
        _refuse_ast_parts(context)
    settings = DistillSettings(
        each=ipc, iterations=iterations, steps=steps, ahead=ahead, last=start_epochs, batch=batch, rate=step_size,
        rate_images=lr_images, rate_rate=lr_step, representative=representative, beta=intermediate, balance=balance,
        perturbation=perturbation, augmentations=parse_augmentations(augment), gradients=gradients, looks=looks,
        model_weight=model_weight, model_steps=model_steps, seed=seed,
    )  # fmt: skip
    recipe = ExpertSettings(
        count=experts, epochs=expert_epochs, batch=expert_batch, rate=expert_lr, penalty=penalty
    )  # fmt: skip
    options = DistillOptions(
        settings=settings, experts=recipe, method=method, network=network, width=width, depth=depth,
        expert_folder=expert_folder, test=test, hold_out=hold_out, zca=zca, model=model, factory=factory,
        allow=tuple(allow or ()), allow_poor_model=allow_poor_model,
        mean=numbers(mean, "--mean"), std=numbers(std, "--std"), overwrite=overwrite,
        allow_originals=allow_originals,
    )  # fmt: skip
    if dry_run:
        from compress.distillation.preview import preview

        _print_preview(preview(data, out, classes=classes, options=options), json)
        return
    say = (lambda sentence: None) if quiet else _say
    with bar:
        report = distill_data(data, out, classes=classes, options=options, progress=bar.update, say=say)
    for sentence in report.warnings:
        _warn(sentence)
    if json:
        print(report.model_dump_json(indent=2))
    elif not quiet:
        _print(report, out)


def _refuse_ast_parts(context: typer.Context) -> None:
    """Refuse options of AST's parts that were given, whatever their value, unless it turns the part off."""
    from compress.errors import InputError

    for name, off in (
        ("intermediate", "none"), ("perturbation", 0), ("penalty", 0), ("balance", False), ("representative", False),
    ):  # fmt: skip
        value, source = context.params[name], context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and value != off:
            told = "" if isinstance(value, bool) else f" {value}"
            raise InputError(f"--{name}{told}: a part of AST, which --method mtt goes without; leave one out")


def _print(report: DistillReport, out: Path) -> None:
    from statistics import median

    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for note in report.notes:
        console.print(f"- {note}")
    scores = ", ".join(f"{100 * score:.1f} % at {number}" for number, score in sorted(report.scores.items()))
    console.print(
        f"Experts: {', '.join(f'{100 * each:.1f} %' for each in report.expert_accuracies)} of the images they "
        "were trained on"
    )
    if scores:
        console.print(
            f"Networks trained on the set, by iteration: {scores}, of {report.judged}; kept is {report.iteration}"
        )
    near = report.neighbours
    console.print(
        f"Nearest real images: at {min(near.distances):.3f} or more, median {median(near.distances):.3f}; real ones "
        f"among each other {near.typical:.3f}. Of {len(near.distances)}, {near.nearest_is_start} are nearest to what "
        f"they began as, {near.nearer_than_typical} nearer to a real image than real ones are to each other."
    )
    images = "images" if report.iteration else "real images, none distilled"
    learned = report.learned_step_size
    which = " (the learned one)"
    if learned != report.step_size:
        than = f"; networks became no better with the learned one, {learned:.4g}" if learned else ""
        which = f" (a usual one{than})"
    if report.seconds_per_100 is not None:
        console.print(f"Time: {report.seconds_per_100:.3g} seconds per 100 iterations, judging left out")
    console.print(
        f"Written to {out}: {report.classes * report.each} {images}, step size {report.step_size:.4g}{which}."
    )
    console.print(f"Calibrate with it: compress quantize MODEL --calib {out}/distilled.npz")


def _print_preview(found: DistillPreview, as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for note in found.notes:
        console.print(f"- {note}")
    for sentence in found.warnings:
        _warn(sentence)
    shape = " x ".join(map(str, found.shape))
    console.print(f"Data: {found.images:,} images of {shape} in {found.classes} classes, to train experts on")
    console.print(
        f"Experts: {found.experts} of {found.expert_epochs} epochs of {found.expert_steps} steps, "
        f"{found.experts_there} there already; {found.expert_bytes / 1e6:,.1f} MB in {found.expert_folder}"
    )
    judged = f"judged {found.looks} times on {found.judged}" if found.judged else "not judged"
    console.print(
        f"Set: {found.classes * found.each} images, {found.each} a class; {found.iterations} iterations of "
        f"{found.student_steps} steps, {found.iteration_seconds:.2g} s each; {judged}"
    )
    parts = {"experts": found.expert_seconds, "distilling": found.distill_seconds, "judging": found.judge_seconds}
    times = ", ".join(f"{name} {_duration(each)}" for name, each in parts.items())
    console.print(
        f"Estimated: {_duration(found.seconds)} ({times}), {found.memory_bytes / 1e6:.0f} MB beyond the program itself "
        "(within a factor of two). Nothing was written."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _say(sentence: str) -> None:
    from rich.console import Console

    Console(stderr=True, emoji=False, soft_wrap=True, highlight=False, markup=False).print(sentence)


def _warn(sentence: str) -> None:
    _say(f"WARNING: {sentence}")
