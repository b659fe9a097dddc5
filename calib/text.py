"""Texts from a file: one a line, or a table with a column of texts and maybe one of labels."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from compress.errors import InputError

__all__ = ["TEXT_SUFFIXES", "read_texts"]

TEXT_SUFFIXES = (".txt", ".tsv", ".csv")
_TEXT_COLUMNS = ("sentence", "text", "sentence1", "question", "review")
_LABEL_COLUMNS = ("label", "labels", "y", "target")


def read_texts(path: Path) -> tuple[list[str], torch.Tensor | None]:
    """The texts of a .txt file (empty lines left out), or of a .tsv or .csv table, and the table's labels [N] int64.

    Raises:
        InputError: it is not UTF-8, empty, or a table without a column of texts.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".txt":
                texts = [line.strip() for line in stream if line.strip()]
                labels = None
            else:
                texts, labels = _table(path, [row for row in _reader(path, stream) if row])
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except csv.Error as error:
        raise InputError(f"{path} is no table that can be read ({error})") from error
    if not texts:
        raise InputError(f"{path} holds no text")
    return texts, labels


def _reader(path: Path, stream: TextIO) -> Iterator[list[str]]:
    if path.suffix.lower() == ".tsv":  # quotes mean nothing there
        return csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(stream)


def _table(path: Path, rows: list[list[str]]) -> tuple[list[str], torch.Tensor | None]:
    header = [name.strip().lower() for name in rows[0]] if rows else []
    column = next((header.index(name) for name in _TEXT_COLUMNS if name in header), None)
    if column is None:
        raise InputError(
            f"{path}: its first line names no column of texts (found: {', '.join(header) or 'nothing'}); name it "
            f"{', '.join(_TEXT_COLUMNS)}"
        )
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    wrong = next((number for number, row in enumerate(rows[1:], 2) if len(row) != len(header)), None)
    if wrong is not None:
        raise InputError(f"{path}: line {wrong} has {len(rows[wrong - 1])} columns, the first {len(header)}")
    texts = [row[column] for row in rows[1:]]
    if label is None:
        return texts, None
    try:
        return texts, torch.tensor([int(row[label]) for row in rows[1:]])
    except ValueError as error:
        raise InputError(f"{path}: column {header[label]} holds labels that are no whole numbers ({error})") from error
