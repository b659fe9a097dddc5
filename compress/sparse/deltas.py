"""The verbs of ``compress sparse`` that do not train: one function each, from files to files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.errors import InputError
from compress.files.outputs import check_free, claims
from compress.models.checkpoint import LoadedModel, fingerprint, load_model
from compress.models.huggingface import is_classifier, is_pretrained, without_head
from compress.models.modelfile import check_target, save_like
from compress.records.layers import Record
from compress.sparse.application import Applied, apply_deltas, choose_head, revert
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import CLASSES, Overlap, SparseDelta, measure_overlap, sum_deltas
from compress.sparse.deltafile import VALUES, read_delta, read_undo, values_format, write_delta, write_undo
from compress.sparse.reference import REFERENCE_FILE, read_reference, write_reference

__all__ = [
    "REFERENCE_SUFFIX",
    "Composed",
    "DeltaSummary",
    "TensorSummary",
    "add_deltas",
    "apply",
    "compose",
    "doubts",
    "inspect",
    "load_with_deltas",
    "open_delta",
    "open_deltas",
    "restore",
    "unbound",
    "undo_path",
]

REFERENCE_SUFFIX = ".bin"
_TOOL = "compress sparse"
_NEW_HEAD = "new head"  # note of an undo file: parameters that the base's folder did not have


class TensorSummary(Record):
    """One parameter's part of a delta."""

    shape: tuple[int, ...]
    count: int
    share: float
    largest: float


class DeltaSummary(Record):
    """What a delta's file holds."""

    file: str
    size_bytes: int
    base: str | None
    k: int
    values: str
    tensors: dict[str, TensorSummary]
    dense: dict[str, tuple[int, ...]]
    notes: dict[str, str]


@dataclass(frozen=True)
class Composed:
    """What came of several deltas.

    Attributes:
        k: entries in all.
        dense: names of tensors that are replaced.
        overlap: entries in more than one delta.
        notes: what could not be checked, as sentences.
    """

    k: int
    dense: tuple[str, ...]
    overlap: Overlap
    notes: tuple[str, ...]


def open_delta(path: str | os.PathLike[str]) -> SparseDelta:
    """The delta in ``path``: ours, or the published code's (``.bin``, or a folder with ``pytorch_diff.bin``).

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    given = Path(path)
    return read_reference(given) if given.is_dir() or given.suffix == REFERENCE_SUFFIX else read_delta(given)


def open_deltas(paths: Sequence[str | os.PathLike[str]]) -> dict[str, SparseDelta]:
    """Several by path, in their order.

    Raises:
        InputError: as :func:`open_delta`, or one is given twice.
    """
    named: dict[str, SparseDelta] = {}
    for path in map(str, paths):
        if path in named:
            raise InputError(f"{path} is given twice; give it once, with a weight")
        named[path] = open_delta(path)
    return named


def unbound(deltas: Mapping[str, SparseDelta]) -> tuple[str, ...]:
    """Sentences about those that name no base."""
    found = [path for path, one in deltas.items() if one.base is None]
    return tuple(f"{path} does not say which base it is for: not checked" for path in found)


def doubts(deltas: Mapping[str, SparseDelta], *, any_base: bool) -> tuple[str, ...]:
    """Sentences about those that name no base, unless ``any_base`` takes them, and about entries of several."""
    given = list(deltas.values())
    met = measure_overlap(given, sum_deltas(given)).warning() if len(given) > 1 else ()
    return (*(() if any_base else unbound(deltas)), *met)


def undo_path(model: Path) -> Path:
    """Where :func:`apply` keeps what the model was before; the whole name, so that no two models share one."""
    return model.with_name(f"{model.name}.undo.safetensors")


def load_with_deltas(
    base: LoadedModel,
    deltas: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    head: str | None = None,
    heads: bool = True,
    any_base: bool = False,
    hashed: bool = False,
) -> tuple[LoadedModel, Applied, tuple[str, ...]]:
    """Add ``deltas`` to ``base`` in place; the model, what was done, and what could not be checked.

    A Hugging Face folder without a classification head is read again with one where a delta brings it.

    Raises:
        InputError: see :func:`~compress.sparse.application.apply_deltas`; or the same delta is given twice.
    """
    named = open_deltas(deltas)
    base = _with_head(base, named, head)
    done = apply_deltas(base.module, named, weights, head=head, heads=heads, any_base=any_base, hashed=hashed)
    if any_base:
        notes: tuple[str, ...] = ("whether the deltas are for this base was not checked (--any-base)",)
    else:
        notes = unbound(named)
    left = [name for name in base.head if name not in done.before.dense]
    if left:
        notes += (f"{', '.join(left)} is new and untrained, as no delta's head was taken",)
    return base, done, notes + _superseded(named, done.before.dense)


def _with_head(base: LoadedModel, named: Mapping[str, SparseDelta], head: str | None) -> LoadedModel:
    """``base``, with a classification head if a delta was trained with one and it has none: that of ``head``."""
    counts = {path: int(one.notes[CLASSES]) for path, one in named.items() if one.notes.get(CLASSES, "").isdigit()}
    if not counts or not is_pretrained(Path(base.source)) or is_classifier(base.module):
        return base
    return load_model(base.source, classes=counts.get(head or "", next(iter(counts.values()))))


def add_deltas(base: LoadedModel, deltas: Sequence[str | os.PathLike[str]]) -> LoadedModel:
    """``base`` with ``deltas`` added to its module, in place, under another fingerprint.

    Raises:
        InputError: see :func:`load_with_deltas`.
    """
    if not deltas:
        return base
    base, done, notes = load_with_deltas(base, deltas)
    shared = f", {done.overlap.entries:,} of them in more than one" if done.overlap.entries else ""
    notes += (f"{done.before.k:,} entries of {', '.join(map(str, deltas))} added to the model first{shared}",)
    return replace(base, fingerprint=fingerprint(base.module), notes=(*base.notes, *notes, *done.overlap.warning()))


@claims("out")
def apply(
    base: Path,
    deltas: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    *,
    head: str | None = None,
    heads: bool = True,
    any_base: bool = False,
    undo: bool = True,
    factory: str | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
) -> Composed:
    """Write ``base`` with ``deltas`` added to ``out``, and with ``undo`` what takes them out again beside it.

    Raises:
        InputError: see :func:`load_with_deltas`; ``out`` is there already, or is
            ``base`` with deltas that could not be taken out any more.
    """
    check_target(base, out, overwrite)
    if undo:
        check_free(undo_path(out), overwrite)
        if undo_path(out).exists() and base.resolve() == out.resolve():
            raise InputError(
                f"{undo_path(out)} takes back what was added to {base} before, and would be replaced; revert that "
                "first, or choose another --out"
            )
    loaded = _load(base, factory, allow)
    loaded, done, notes = load_with_deltas(
        loaded, deltas, weights, head=head, heads=heads, any_base=any_base, hashed=undo
    )
    if undo:  # with the model: one that cannot be taken back is not to be there, not even for a moment
        record = done.undo(loaded.module)
        if loaded.head:
            record = replace(record, before=replace(record.before, notes={_NEW_HEAD: ", ".join(loaded.head)}))

        def beside(folder: Path) -> None:
            write_undo(record, folder / undo_path(out).name)

    save_like(loaded, base, out, factory=factory, overwrite=overwrite, beside=beside if undo else None)
    return Composed(done.before.k, tuple(done.before.dense), done.overlap, (*loaded.notes, *notes))


@claims("out")
def restore(
    model: Path,
    out: Path,
    undo: Path | None = None,
    *,
    factory: str | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
) -> int:
    """Write to ``out`` what ``model`` was before :func:`apply`, bit for bit; entries that were put back.

    Raises:
        InputError: there is no undo file, or it is another model's.
    """
    check_target(model, out, overwrite)
    path = undo or undo_path(model)
    if not path.is_file():
        raise InputError(
            f"There is no {path}, which `{_TOOL} apply` writes beside a model; name it with --undo. A merged model has "
            "none: keep its base"
        )
    record, loaded = read_undo(path), _load(model, factory, allow)
    if (found := base_hash(tensor_hashes(base_tensors(loaded.module)))) != record.model:
        raise InputError(
            f"{path} is for another model: the hash there is {record.model[:12]}, that of {model} {found[:12]}; it was "
            "changed since the deltas were applied, or is another one"
        )
    revert(loaded.module, record.before)
    if base_hash(tensor_hashes(base_tensors(loaded.module))) != record.base:
        raise InputError(f"{path} does not lead back to the base it names; apply the deltas to the base again")
    if (new := record.before.notes.get(_NEW_HEAD)) is not None:
        loaded = replace(loaded, module=without_head(loaded.module), head=tuple(new.split(", ")))
    save_like(loaded, model, out, factory=factory, overwrite=overwrite)
    return record.before.k


@claims("out")
def compose(
    deltas: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    *,
    head: str | None = None,
    heads: bool = True,
    values: str | None = None,
    overwrite: bool = False,
) -> Composed:
    """Write the weighted sum of ``deltas``, all for one base, to ``out``; in the published form if that ends in .bin.

    Args:
        values: see :func:`~compress.sparse.deltafile.write_delta`; None: the widest of the deltas' own.

    Raises:
        InputError: the deltas are for different bases or shapes, or two have heads and none was chosen.
    """
    check_free(out, overwrite)
    found = open_deltas(deltas)
    published = out.suffix == REFERENCE_SUFFIX
    if published and values not in (None, "fp32"):
        raise InputError(f"--values {values}: the published code's form has fp32 alone; leave it out, or the .bin")
    base, notes = _common_base(found)
    dense = choose_head(found, head) if heads else {}
    try:
        tensors = sum_deltas(list(found.values()), weights)
    except ValueError as error:
        raise InputError(str(error)) from error
    notes += _superseded(found, dense)
    tensors = {name: each for name, each in tensors.items() if name not in dense}
    made_of = {"composed of": ", ".join(Path(path).name for path in found)}
    with_head = [one for one in found.values() if CLASSES in one.notes]
    with_head.sort(key=lambda one: one.dense is not dense)  # the one whose head is taken first
    made_of |= {CLASSES: with_head[0].notes[CLASSES]} if with_head else {}
    whole = SparseDelta(base.base, tensors, dense, made_of, base.without)
    if published:
        write_reference(whole, out)
    else:
        write_delta(whole, out, values or _widest(deltas))
    return Composed(whole.k, tuple(dense), measure_overlap(list(found.values()), tensors), notes)


def inspect(path: Path) -> DeltaSummary:
    """What the delta in ``path`` holds."""
    delta = open_delta(path)
    ours = path.is_file() and path.suffix != REFERENCE_SUFFIX
    tensors = {
        name: TensorSummary(
            shape=each.shape,
            count=len(each.index),
            share=len(each.index) / each.size if each.size else 0.0,
            largest=float(each.values.abs().max()) if len(each.values) else 0.0,
        )
        for name, each in delta.tensors.items()
    }
    size = (path / REFERENCE_FILE if path.is_dir() else path).stat().st_size
    return DeltaSummary(
        file=str(path), size_bytes=size, base=delta.base, k=delta.k, values=values_format(path) if ours else "fp32",
        tensors=tensors, dense={name: tuple(each.shape) for name, each in delta.dense.items()}, notes=delta.notes,
    )  # fmt: skip


def _superseded(deltas: Mapping[str, SparseDelta], dense: Collection[str]) -> tuple[str, ...]:
    """Sentences about entries that are not added because their tensor is replaced whole."""
    return tuple(
        f"{path}: its {len(one.tensors[name].index):,} entries of {name} are left out, as another delta replaces that "
        "whole"
        for path, one in deltas.items()
        for name in sorted(dense)
        if name in one.tensors and len(one.tensors[name].index)
    )


def _common_base(found: Mapping[str, SparseDelta]) -> tuple[SparseDelta, tuple[str, ...]]:
    """The delta that says most about the base of all, and what cannot be told.

    Raises:
        InputError: two are for different bases.
    """
    known = {path: one for path, one in found.items() if one.base is not None}
    notes = list(unbound(found))
    owners: dict[tuple[str, ...], str] = {}
    for path, one in known.items():
        first = owners.setdefault(tuple(sorted(one.without)), path)
        if known[first].base != one.base:
            raise InputError(f"{first} and {path} are for different bases; only deltas for one base can be added")
    if len(owners) > 1:
        notes.append("whether all are for one base was not checked: they differ in what they replace whole")
    chosen = min(known.values() or found.values(), key=lambda one: len(one.without))
    return chosen, tuple(notes)


def _widest(deltas: Sequence[Path]) -> str:
    ours = [path for path in deltas if path.is_file() and path.suffix != REFERENCE_SUFFIX]
    forms = [values_format(path) for path in ours] + ["fp32"] * (len(deltas) - len(ours))
    return min(forms, key=list(VALUES).index)


def _load(path: Path, factory: str | None, allow: Sequence[str]) -> LoadedModel:
    if path.suffix == ".pt2":
        raise InputError(
            f"{path} is an exported graph, which deltas are not added to; give the module it was made from"
        )
    return load_model(path, model=factory, allow=allow)
