"""Texts from a file: one a line, or a table with a column of texts, or two of pairs, and maybe one of labels."""

from __future__ import annotations

import contextlib
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from compress.errors import InputError

__all__ = ["TEXT_SUFFIXES", "Texts", "check_length", "read_texts"]

TEXT_SUFFIXES = (".txt", ".tsv", ".csv")
_TEXT_COLUMNS = ("sentence", "text", "sentence1", "question", "review")
_PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_LABEL_COLUMNS = ("label", "labels", "y", "target", "score")


@dataclass(frozen=True)
class Texts:
    """What a file holds.

    Attributes:
        first: a text a sample, or the first of each pair.
        second: the pairs' second; None where there are no pairs.
        labels: [N], int64 where all are whole numbers, else float32; None without.
    """

    first: list[str]
    second: list[str] | None = None
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: torch.Tensor) -> Texts:
        """The samples at ``index``, int64 [n]."""
        second = None if self.second is None else [self.second[i] for i in index.tolist()]
        labels = None if self.labels is None else self.labels[index]
        return Texts([self.first[i] for i in index.tolist()], second, labels)


def check_length(length: int | None, *sources: object) -> None:
    """Refuse ``length`` where none of ``sources`` is a file of text: arrays have the length that they have.

    Raises:
        InputError: with what to do.
    """
    texts = [each for each in sources if isinstance(each, str | Path) and Path(each).suffix.lower() in TEXT_SUFFIXES]
    if length is not None and not texts:
        raise InputError(
            f"--length {length}: it cuts texts, and none are given ({', '.join(TEXT_SUFFIXES)}); leave it out"
        )


def read_texts(path: Path) -> Texts:
    """The texts of a .txt file (empty lines left out), or of a .tsv or .csv table.

    Raises:
        InputError: it is not UTF-8, empty, or a table without a column of texts or with labels that are no numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".txt":
                texts = Texts([line.strip() for line in stream if line.strip()])
            else:
                texts = _table(path, _rows(path, stream))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except csv.Error as error:
        raise InputError(f"{path} is no table that can be read ({error})") from error
    if not texts:
        raise InputError(f"{path} holds no text")
    return texts


def _rows(path: Path, stream: TextIO) -> list[tuple[int, list[str]]]:
    """Rows that are not empty, each with the number of the line that it ends in."""
    if path.suffix.lower() == ".tsv":  # quotes mean nothing there
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(stream)
    return [(reader.line_num, row) for row in reader if row]


def _table(path: Path, numbered: list[tuple[int, list[str]]]) -> Texts:
    rows = [row for _, row in numbered]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    pair = next((each for each in _PAIR_COLUMNS if set(each) <= set(header)), None)
    names = pair or [name for name in _TEXT_COLUMNS if name in header][:1]
    if not names:
        raise InputError(
            f"{path}: its first line names no column of texts (found: {', '.join(header) or 'nothing'}); name it "
            f"{', '.join(_TEXT_COLUMNS)}, or two of them {', '.join(' and '.join(each) for each in _PAIR_COLUMNS)}"
        )
    for line, row in numbered:
        if len(row) != len(header):
            raise InputError(f"{path}: line {line} has {len(row)} columns, the first {len(header)}")
    first, *second = ([row[header.index(name)] for row in rows[1:]] for name in names)
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    labels = None if label is None else _numbers([row[label] for row in rows[1:]], f"{path}: column {header[label]}")
    return Texts(first, second[0] if second else None, labels)


def _numbers(fields: list[str], source: str) -> torch.Tensor:
    """int64 where all are whole numbers, else float32."""
    with contextlib.suppress(ValueError):
        whole = [int(field) for field in fields]
        largest = max(map(abs, whole), default=0)
        if largest >= 1 << 63:
            raise InputError(f"{source} holds labels beyond 64 bits (such as {largest})")
        return torch.tensor(whole, dtype=torch.int64)
    wrong = next((field for field in fields if not _is_finite(field)), None)
    if wrong is not None:
        raise InputError(f"{source} holds labels that are no finite numbers (such as {wrong!r})")
    labels = torch.tensor([float(field) for field in fields])
    if not bool(labels.isfinite().all()):
        raise InputError(f"{source} holds labels too large for float32 (such as {fields[int(labels.abs().argmax())]})")
    return labels


def _is_finite(field: str) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False
