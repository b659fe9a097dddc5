"""``compress sparse``: learn small deltas to one base model, add them up, apply them, take them out again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.inputs import Allow, Factory, Length, Seed, numbers
from compress.cli.options import takes
from compress.cli.progress import ProgressBar
from compress.errors import InputError

if TYPE_CHECKING:
    from compress.sparse.deltas import Composed
    from compress.training.sparse.job import SparseResult

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Sparse fine-tuning: one base model, a small delta file a task")

Base = Annotated[Path, typer.Argument(help="The base model: a file, or a Hugging Face folder")]
Deltas = Annotated[list[Path], typer.Argument(help="Delta files; several are added up")]
OutModel = Annotated[Path, typer.Option("--out", "-o", help="Model to write, in the base's form")]
OutDelta = Annotated[Path, typer.Option("--out", "-o", help="Delta file to write")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Apply to a base that is not the deltas' own")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only")]


def adding(
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="A factor for each delta, in their order  [default: 1 each]")
    ] = None,
    head: Annotated[str | None, typer.Option(help="The delta whose head is taken, where several have one")] = None,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Whether the deltas' heads are taken")] = True,
    max_overlap: Annotated[
        float, typer.Option(help="Warn when a larger share of the smallest delta's entries is in others too")
    ] = 0.2,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """How deltas are added up."""


@app.command(no_args_is_help=True)
def train(
    model: Annotated[str, typer.Argument(help="The base model: a file, or a Hugging Face folder")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Labelled training samples: .npz with x and y, package.module:function, or for Hugging Face folders a "
            ".tsv or .csv of texts with a column label; several as NAME=FILE each, a batch being of one"
        ),
    ],
    out: OutDelta,
    test: Annotated[str | None, typer.Option(help="Labelled samples: the metric is measured on them")] = None,
    dev: Annotated[
        str | None, typer.Option(help="Labelled samples, others: the epoch best on them is kept, of each phase")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of all maskable entries that may change  [default: 0.01]")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="How many entries may change, instead")] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Layer or parameter trained in full and stored whole; several times")
    ] = None,
    frozen: Annotated[list[str] | None, typer.Option(help="Layer or parameter that stays; several times")] = None,
    train_norms: Annotated[bool, typer.Option("--train-norms", help="Train norms, stored whole, too")] = False,
    criterion: Annotated[
        str,
        typer.Option(help="change (after full fine-tuning); snip, gradient; as baselines random, magnitude, bitfit"),
    ] = "change",
    rounds: Annotated[int, typer.Option(help="Times through both phases, each selecting a part of the entries")] = 1,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="N of every M neighbours may change, instead; no faster")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Times through the data in the full phase")] = 3,
    sparse_epochs: Annotated[int, typer.Option(help="The same in the sparse phase")] = 10,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Learning rate at the start of the full phase  [default: 0.001, 5e-5 for folders]"),
    ] = None,
    sparse_lr: Annotated[
        float | None, typer.Option("--sparse-lr", help="The same of the sparse phase  [default: as --lr]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples a step")] = 32,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd")] = "adamw",
    schedule: Annotated[str, typer.Option(help="linear, cosine, steps or constant")] = "linear",
    weight_decay: Annotated[float, typer.Option(help="Of what is trained")] = 0.0,
    l1: Annotated[float, typer.Option("--l1", help="Pull towards the start in the full phase")] = 0.0,
    sparse_l1: Annotated[float, typer.Option("--sparse-l1", help="The same in the sparse phase")] = 0.0,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Delta to start from, beside which this one is used; with NAME beside batches of that --data",
        ),
    ] = None,
    repeat: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Times that --data NAME is seen an epoch, if not once")
    ] = None,
    eval_source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose --source is added where --test and --dev are measured")
    ] = None,
    values: Annotated[str, typer.Option(help="How numbers are stored: fp16, bf16, int8, fp32, fp64")] = "fp16",
    length: Length = None,
    seed: Seed = 0,
    factory: Factory = None,
    allow: Allow = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model so that few entries change (LT-SFT), and write the difference.

    Example: [bold]compress sparse train base.pt --data task.npz --density 0.05 --head classifier -o task.safetensors[/]

    Everything is trained first; the entries that moved most are selected, all goes back to the start, and the selected
    ones are trained alone. A delta makes the file small, not the model fast.
    """
    bar = ProgressBar(enabled=not quiet)
    from compress.training.loop import Recipe
    from compress.training.sparse.job import SparseOptions, train_sparse

    given, sources = _sources(data, source or [], repeat or [])
    options = SparseOptions(
        density=density, k=k, criterion=criterion, rounds=rounds, pattern=_pattern(pattern),
        head=tuple(head or ()), frozen=tuple(frozen or ()),
        train_norms=train_norms, l1=(l1, sparse_l1), sources=sources, eval_source=eval_source, values=values,
        factory=factory, allow=tuple(allow or ()), length=length, overwrite=overwrite,
    )  # fmt: skip
    rate = lr if lr is not None else 5e-5 if Path(model).is_dir() else 1e-3
    recipe = Recipe(
        epochs=epochs, batch=batch, rate=rate, schedule=schedule, weight_decay=weight_decay, optimizer=optimizer,
        seed=seed,
    )  # fmt: skip
    with bar:
        result = train_sparse(
            model, given, out, test=test, dev=dev, options=options, recipe=recipe, sparse_epochs=sparse_epochs,
            sparse_rate=sparse_lr, progress=bar.update,
        )  # fmt: skip
    for stop in result.stops:
        _warn(stop)
    if not quiet:
        _report(result, out)
        told = f" --model {factory}" if factory else ""
        added = "".join(f" {each}" for each in (out, *_needed(given, sources, eval_source)))
        _print(f"Apply it: compress sparse apply {model}{added}{told} -o {_beside(Path(model), 'task')}")


@app.command(no_args_is_help=True)
@takes(adding)
def apply(
    base: Base,
    deltas: Deltas,
    out: OutModel,
    any_base: AnyBase = False,
    factory: Factory = None,
    allow: Allow = None,
    **given: Any,
) -> None:
    """Add deltas to a base, in a way that can be taken back: a file beside the model keeps what the entries were.

    Example: [bold]compress sparse apply base.pt task.safetensors language.safetensors --weights 1,0.5 -o model.pt[/]
    """
    _apply(base, deltas, out, any_base, factory, allow, undo=True, given=given)


@app.command(no_args_is_help=True)
@takes(adding)
def merge(
    base: Base,
    deltas: Deltas,
    out: OutModel,
    any_base: AnyBase = False,
    factory: Factory = None,
    allow: Allow = None,
    **given: Any,
) -> None:
    """Add deltas to a base for good, to quantize or export the result.

    Example: [bold]compress sparse merge base.pt task.safetensors -o model.pt[/]
    """
    _apply(base, deltas, out, any_base, factory, allow, undo=False, given=given)


@app.command(no_args_is_help=True)
def revert(
    model: Annotated[Path, typer.Argument(help="A model that apply wrote")],
    out: OutModel,
    undo: Annotated[
        Path | None, typer.Option(help="What apply wrote beside it  [default: MODEL.undo.safetensors]")
    ] = None,
    factory: Factory = None,
    allow: Allow = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Take deltas out of a model: the base comes back bit for bit.

    Example: [bold]compress sparse revert model.pt -o base.pt[/]
    """
    from compress.sparse.deltas import restore

    count = restore(model, out, undo, factory=factory, allow=allow or (), overwrite=overwrite)
    if not quiet:
        _print(f"Written to {out}: the base, {count:,} entries put back; its hash is the one before.")


@app.command(no_args_is_help=True)
@takes(adding)
def compose(
    deltas: Deltas,
    out: Annotated[Path, typer.Option("--out", "-o", help="Delta file to write; .bin: the published code's form")],
    values: Annotated[
        str | None, typer.Option(help="fp16, bf16, int8, fp32, fp64  [default: the widest of the deltas' own]")
    ] = None,
    **given: Any,
) -> None:
    """Add deltas up to one. The published code's files (pytorch_diff.bin) are read and written too.

    Example: [bold]compress sparse compose task.safetensors language.safetensors -o both.safetensors[/]
    """
    from compress.sparse.deltas import compose as compose_deltas

    done = compose_deltas(
        deltas, out, numbers(given["weights"], "--weights"), head=given["head"], heads=given["heads"], values=values,
        overwrite=given["overwrite"],
    )  # fmt: skip
    _tell(done, out, given)


@app.command(no_args_is_help=True)
def inspect(
    delta: Annotated[Path, typer.Argument(help="A delta file")],
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON")] = False,
) -> None:
    """What a delta holds: entries by parameter, values, base, head.

    Example: [bold]compress sparse inspect task.safetensors[/]
    """
    from compress.sparse.deltas import inspect as inspect_delta

    found = inspect_delta(delta)
    if json:
        print(found.model_dump_json(indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.file}: {found.k:,} entries", title_justify="left")
    table.add_column("parameter")
    for name in ("shape", "entries", "share", "largest"):
        table.add_column(name, justify="right")
    for name, each in found.tensors.items():
        shape = " x ".join(map(str, each.shape))
        table.add_row(name, shape, f"{each.count:,}", f"{100 * each.share:.2f} %", f"{each.largest:.3g}")
    Console(emoji=False).print(table)
    size = f"{found.size_bytes:,} bytes, {found.size_bytes / found.k:.2f} an entry" if found.k else "no entries"
    _print(f"Numbers in {found.values}; {size} (with the header{' and the head' if found.dense else ''}).")
    _print(f"Base: {found.base or 'not named'}")
    for name, dense in found.dense.items():
        _print(f"Replaced whole: {name} [{', '.join(map(str, dense))}]")
    for name, note in found.notes.items():
        _print(f"{name}: {note}")


def _apply(
    base: Path, deltas: list[Path], out: Path, any_base: bool, factory: str | None, allow: list[str] | None, *,
    undo: bool, given: dict[str, Any],
) -> None:  # fmt: skip
    from compress.sparse.deltas import apply as apply_deltas
    from compress.sparse.deltas import undo_path

    done = apply_deltas(
        base, deltas, out, numbers(given["weights"], "--weights"), head=given["head"], heads=given["heads"],
        any_base=any_base, undo=undo, factory=factory, allow=allow or (), overwrite=given["overwrite"],
    )  # fmt: skip
    _tell(done, out, given)
    if undo and not given["quiet"]:
        _print(f"{undo_path(out)} takes it back: compress sparse revert {out} -o {_beside(base, 'again')}")


def _tell(done: Composed, out: Path, given: dict[str, Any]) -> None:
    overlap = done.overlap
    for sentence in overlap.warning(given["max_overlap"]):
        _warn(sentence)
    if given["quiet"]:
        return
    for note in done.notes:
        _print(f"- {note}")
    shared = f", {overlap.entries:,} of them in more than one delta" if overlap.entries else ""
    head = f", replaced whole: {', '.join(done.dense)}" if done.dense else ""
    _print(f"Written to {out}: {done.k:,} entries{shared}{head}.")


def _report(result: SparseResult, out: Path) -> None:
    delta = result.delta
    for note in result.notes:
        _print(f"- {note}")
    share = 100 * delta.k / result.maskable
    _print(
        f"Written to {out}: {delta.k:,} of {result.maskable:,} entries ({share:.2f} %), {result.size_bytes:,} bytes"
        + (f", replaced whole: {', '.join(delta.dense)}" if delta.dense else "")
        + "."
    )
    if result.sparse is not None:
        full = f"fully fine-tuned {result.full:.4f}, " if result.full is not None else ""
        base = "base with an untrained head" if result.new_head else "base"
        _print(f"{result.metric_name}: {base} {result.base:.4f}, {full}base and delta {result.sparse:.4f}")
    for phase, history in zip(("in full", "sparse"), result.histories, strict=True):
        if len(history) > 1:
            _print(f"Mean loss {phase}: {history[0].loss:.4g} in the first epoch, {history[-1].loss:.4g} in the last.")
        elif history:
            _print(f"Mean loss {phase}: {history[0].loss:.4g} in the one epoch.")


def _needed(given: Any, sources: tuple[Path, ...], chosen: str | None) -> tuple[Path, ...]:
    """Deltas that the new one was learned beside, and is used with: of several, that of ``chosen`` or of the first."""
    if not isinstance(given, dict):
        return sources
    delta = given[chosen or next(iter(given))].delta
    return (delta,) if delta is not None else ()


def _sources(data: list[str], deltas: list[str], repeats: list[str]) -> tuple[object, tuple[Path, ...]]:
    """Samples as train_sparse takes them, and deltas to start from."""
    from compress.training.labelled import Source

    if len(data) == 1 and not repeats and ("=" not in data[0] or Path(data[0]).exists()):
        return data[0], tuple(map(Path, deltas))
    named, beside, counts = _named(data, "--data"), _named(deltas, "--source"), _named(repeats, "--repeat")
    for option, given in (("--source", beside), ("--repeat", counts)):
        for name in given.keys() - named.keys():
            raise InputError(f"{option} {name}={given[name]}: there is no --data {name}=...; give it, or leave it out")
    for name, count in counts.items():
        if not count.isdigit():
            raise InputError(f"--repeat {name}={count}: a whole number is needed")
    return {
        name: Source(file, Path(beside[name]) if name in beside else None, int(counts.get(name, 1)))
        for name, file in named.items()
    }, ()


def _named(texts: list[str], option: str) -> dict[str, str]:
    """``["en=en.npz", ...]`` by name."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in found:
            raise InputError(f"{option} {text}: with several --data, or a --repeat, each is NAME=FILE, every name once")
        found[name] = value
    return found


def _pattern(text: str | None) -> tuple[int, int] | None:
    """``"2:4"`` as numbers."""
    if text is None:
        return None
    n, _, m = text.partition(":")
    if not (n.isdigit() and m.isdigit()):
        raise InputError(f"--pattern {text}: two numbers are needed, as in 2:4")
    return int(n), int(m)


def _beside(model: Path, word: str) -> Path:
    """A name to suggest for what becomes of ``model``."""
    return model.with_name(f"{model.name}-{word}" if model.is_dir() else f"{model.stem}-{word}{model.suffix}")


def _print(line: str) -> None:
    from rich.console import Console

    Console(emoji=False, soft_wrap=True).print(line, highlight=False, markup=False)


def _warn(sentence: str) -> None:
    from rich.console import Console

    Console(stderr=True, emoji=False, soft_wrap=True).print(f"warning: {sentence}", highlight=False, markup=False)
