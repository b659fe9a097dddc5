"""Texts and labels from .txt, .tsv and .csv, and a sentence for every file that is not one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.data.text import TEXT_SUFFIXES, Texts, read_texts
from compress.errors import InputError


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        read_texts(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_a_line(tmp_path: Path, newline: str) -> None:
    lines = ["first line", "", '  ünïcode, "quotes" and\ttabs  ', "   ", "last"]
    texts = read_texts(write(tmp_path, "a.txt", newline.join(lines)))
    assert texts == Texts(["first line", 'ünïcode, "quotes" and\ttabs', "last"])


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    content = 'sentence\tlabel\n"all\'s well\t1\nhe said "no", and left\t0\nplain\t1\n'
    found = read_texts(write(tmp_path, "a.tsv", content))
    texts, labels = found.first, found.labels
    assert texts == ["\"all's well", 'he said "no", and left', "plain"]
    assert labels is not None
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 1]


def test_csv_quotes_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    content = 'label,text\r\n2,"one, two"\r\n0,"he said ""no"""\r\n1,"over\r\ntwo lines"\r\n3,plain\r\n'
    found = read_texts(write(tmp_path, "a.csv", content))
    texts, labels = found.first, found.labels
    assert texts == ["one, two", 'he said "no"', "over\r\ntwo lines", "plain"]
    assert labels is not None
    assert labels.tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".TSV"])
@pytest.mark.parametrize("column", ["sentence", "text", "sentence1", "question", "review", " Text "])
def test_columns_by_name(tmp_path: Path, suffix: str, column: str) -> None:
    separator = "," if suffix == ".csv" else "\t"
    rows = [["idx", column, "other"], ["7", "hello there", "no"], ["8", "good bye", "yes"]]
    path = write(tmp_path, f"a{suffix}", "\n".join(separator.join(row) for row in rows))
    found = read_texts(path)
    texts, labels = found.first, found.labels
    assert texts == ["hello there", "good bye"]
    assert labels is None


@pytest.mark.parametrize("column", ["label", "labels", "y", "target", "Label"])
def test_labels_by_name(tmp_path: Path, column: str) -> None:
    found = read_texts(write(tmp_path, "a.csv", f"{column},text\n-1,a\n12,b\n"))
    texts, labels = found.first, found.labels
    assert texts == ["a", "b"]
    assert labels is not None
    assert labels.tolist() == [-1, 12]


def test_the_first_known_name_is_taken(tmp_path: Path) -> None:
    found = read_texts(write(tmp_path, "a.tsv", "sentence1\tsentence\nno\tyes\n"))
    assert found.first == ["yes"]


def test_upper_case_text_file(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, "A.TXT", "a\nb\n")).first == ["a", "b"]
    assert TEXT_SUFFIXES == (".txt", ".tsv", ".csv")


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_a_table_without_texts(tmp_path: Path, suffix: str) -> None:
    separator = "," if suffix == ".csv" else "\t"
    refused(
        write(tmp_path, f"a{suffix}", f"idx{separator}words\n1{separator}a\n"),
        "no column of texts", "found: idx, words", "sentence, text",
    )  # fmt: skip
    refused(write(tmp_path, f"b{suffix}", ""), "no column of texts", "found: nothing")


def test_a_ragged_line_is_numbered(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.tsv", "text\tlabel\na\t1\nb\nc\t0\n"), "line 3 has 1 columns, the first 2")
    refused(write(tmp_path, "a.csv", "text,label\na,1\nb,0\nwith, comma,1\n"), "line 4 has 3 columns, the first 2")
    refused(write(tmp_path, "a.tsv", "\ntext\tlabel\na\t1\n\nb\n"), "line 5 has 1 columns, the first 2")


@pytest.mark.parametrize("label", ["good", "nan", "inf", ""])
def test_a_label_that_is_no_number(tmp_path: Path, label: str) -> None:
    refused(write(tmp_path, "a.csv", f"text,label\na,1\nb,{label}\n"), "column label", "no finite numbers", repr(label))


def test_a_label_beyond_64_bits(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.csv", f"text,label\na,1\nb,{1 << 64}\n"), "labels beyond 64 bits")


def test_labels_with_a_fraction_are_numbers_to_predict(tmp_path: Path) -> None:
    labels = read_texts(write(tmp_path, "a.tsv", "text\tscore\na\t5.000\nb\t-1\n")).labels
    assert labels is not None
    assert labels.dtype == torch.float32
    assert labels.tolist() == [5.0, -1.0]
    refused(write(tmp_path, "a.tsv", "text\tscore\na\t5.000\nb\t-1e39\n"), "too large for float32 (such as -1e39)")


@pytest.mark.parametrize("columns", ["sentence1 sentence2", "premise hypothesis", "question sentence"])
def test_pairs(tmp_path: Path, columns: str) -> None:
    lines = ["idx " + columns + " label", "0 a b 1", "1 c d 0"]
    found = read_texts(write(tmp_path, "a.tsv", "\n".join(lines).replace(" ", "\t")))
    assert (found.first, found.second) == (["a", "c"], ["b", "d"])
    taken = found.take(torch.tensor([1]))
    assert taken.labels is not None
    assert (taken.first, taken.second, taken.labels.tolist()) == (["c"], ["d"], [0])


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.csv"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path, name, "text\nmüde\n".encode("latin-1")), "is not UTF-8 text", "at byte 6")
    refused(write(tmp_path, name, "text\nwide\n".encode("utf-16")), "is not UTF-8 text")


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n\t\n"), ("a.csv", "text,label\n")])
def test_empty(tmp_path: Path, name: str, content: str) -> None:
    refused(write(tmp_path, name, content), "holds no text")


def test_a_field_too_long_for_a_table(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n"), "is no table that can be read")
