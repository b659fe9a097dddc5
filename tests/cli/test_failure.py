"""What nobody foresaw ends in a sentence, exit code 1, and a file with the traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.cli import main as command_line
from compress.cli.failure import take_traceback_option
from compress.errors import InputError

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``(body, *arguments) -> (exit code, stderr)`` of a command line whose verbs do ``body``."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(body: Callable[[], object], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(command_line, "app", lambda **_: body())
        monkeypatch.setattr(sys, "argv", ["compress", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


def raises(error: BaseException) -> Callable[[], object]:
    def body() -> object:
        raise error

    return body


def bottomless() -> object:
    return bottomless()


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (raises(KeyError("layer[3]")), "compress failed where it should not have (KeyError: 'layer[3]')"),
        (raises(ValueError("\n first line.\nsecond")), "(ValueError: first line)"),
        (raises(AssertionError()), "(AssertionError)"),
        (raises(MemoryError()), "the machine's memory was not enough; fewer samples (--samples)"),
        (bottomless, "nested more deeply than Python can follow"),
    ],
    ids=["key", "lines", "assertion", "memory", "recursion"],
)
def test_one_sentence_and_a_file(fail: Run, tmp_path: Path, body: Callable[[], object], wanted: str) -> None:
    code, said = fail(body, "quantize", "model.pt")
    assert code == 1
    assert said.count("\n") == 1
    assert wanted in said
    assert "Traceback" not in said
    (saved,) = (tmp_path / "cache" / "tracebacks").iterdir()
    assert f"where is in {saved}, and is printed with --traceback" in said
    kept = saved.read_text()
    assert kept.startswith("compress quantize model.pt\nPython 3.")
    assert "Traceback (most recent call last)" in kept


def test_no_place_for_the_file(fail: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    code, said = fail(raises(KeyError("a")), "quantize", "model.pt")
    assert code == 1
    assert said == (
        "error: compress failed where it should not have (KeyError: 'a'); repeat the command with --traceback to see "
        "where\n"
    )


@pytest.mark.parametrize("arguments", [("--traceback", "verify", "x"), ("verify", "x", "--traceback")])
def test_the_traceback_is_printed_where_it_is_asked_for(fail: Run, arguments: tuple[str, ...]) -> None:
    for error, exit_code in ((KeyError("a"), 1), (InputError("no such file"), 2)):
        code, said = fail(raises(error), *arguments)
        assert code == exit_code
        assert re.search(r"Traceback \(most recent call last\)(.|\n)+\nerror: .+\n$", said)
        assert sys.argv == ["compress", "verify", "x"]


def test_the_option_is_taken_out_wherever_it_stands() -> None:
    arguments = ["compress", "bench", "a.onnx"]
    assert not take_traceback_option(arguments)
    arguments.append("--traceback")
    assert take_traceback_option(arguments)
    assert arguments == ["compress", "bench", "a.onnx"]


def test_a_command_with_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["compress", "inspect", str(tmp_path / "none.pt"), "--traceback"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" in said
    assert str(tmp_path / "none.pt") in said.splitlines()[-1]


@pytest.mark.parametrize("verb", [("quantize",), ("distill",), ("bench",), ("stream",), ("lowrank", "train")])
@pytest.mark.parametrize("seed", ["99999999999999999999", "-1"])
def test_a_seed_that_no_generator_takes(
    verb: tuple[str, ...], seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress", *verb, "model.pt", "--seed", seed])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    # The bound is named, not only that something is wrong.
    assert ("4294967295" if len(seed) > 2 else "0") in capsys.readouterr().err
