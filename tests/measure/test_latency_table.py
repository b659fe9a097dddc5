"""The file of measured operators: kept, found again, and refused where its times mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import InputError
from compress.measure.latency_table import LatencyTable, Operator, open_table
from compress.measure.machine import describe_environment
from tests.every import every

CPU = "CPUExecutionProvider"


def row(signature: str = "linear 4x8 on 1x8", compute: str = "float", layer_us: float = 2.5) -> Operator:
    return Operator(signature=signature, compute=compute, layer_us=layer_us, enter_us=0.5, leave_us=0.25)


def table(*rows: Operator, threads: int = 1, **environment: Any) -> LatencyTable:
    here = describe_environment().model_copy(update=environment)
    return LatencyTable(environment=here, provider=CPU, threads=threads, operators=rows)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "table.json"
    written = table(row(), row(compute="integer", layer_us=1.125))
    written.save(path)
    found, place = open_table(path, CPU, 1)
    assert found == written
    assert place == path
    assert [each.name for each in path.parent.iterdir()] == ["table.json"], "no partial file is left"


def test_rows_are_found_by_signature_and_compute() -> None:
    found = table(row("a", "float", 1.0), row("a", "integer", 2.0), row("b", "float", 3.0))
    assert found.find("a", "integer") == row("a", "integer", 2.0)
    assert found.find("b", "integer") is None
    assert found.find("c", "float") is None


def test_new_rows_replace_old_ones_of_the_same_operator_only() -> None:
    old = table(row("a", "float", 1.0), row("a", "integer", 2.0), row("b", "float", 3.0))
    new = old.with_operators([row("a", "float", 10.0), row("c", "float", 4.0)])
    times = {(each.signature, each.compute): each.layer_us for each in new.operators}
    assert times == {("a", "float"): 10.0, ("a", "integer"): 2.0, ("b", "float"): 3.0, ("c", "float"): 4.0}
    assert len(new.operators) == 4
    assert len(old.operators) == 3
    assert old.find("a", "float") == row("a", "float", 1.0)


def test_the_place_in_the_cache(cache: Path) -> None:
    found, path = open_table(None, CPU, 1)
    assert found.operators == ()
    assert path.parent == cache
    assert not path.exists(), "nothing is written before there is something to keep"
    found.with_operators([row()]).save(path)
    again, same = open_table(None, CPU, 1)
    assert same == path
    assert again.operators == (row(),)
    # Other conditions, other file: nothing measured here is mixed with it.
    others = {open_table(None, provider, threads)[1] for provider, threads in ((CPU, 2), ("CUDAExecutionProvider", 1))}
    assert len(others | {path}) == 3
    assert every(open_table(None, CPU, threads)[0].operators == () for threads in (2, 3))


def test_the_place_without_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_table(None, CPU, 1)[1].parent == tmp_path / "xdg" / "compress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_table(None, CPU, 1)[1].parent == tmp_path / "home" / ".cache" / "compress"


@pytest.mark.parametrize(
    ("environment", "threads", "name"),
    [
        ({"cpu": "Elbrus-8SV"}, 1, "processor"),
        ({"cpu_flags": ("neon",)}, 1, "processor"),
        ({"onnxruntime": "0.1.2"}, 1, "onnxruntime"),
        ({}, 7, "threads"),
    ],
)
def test_another_machine_is_refused_with_both_named(
    environment: dict[str, Any], threads: int, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    table(row(), threads=threads, **environment).save(path)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        open_table(path, CPU, 1)
    said = str(caught.value)
    here = describe_environment()
    there = {"processor": environment.get("cpu", here.cpu), "onnxruntime": "0.1.2", "threads": "7"}[name]
    own = {"processor": here.cpu, "onnxruntime": str(here.onnxruntime), "threads": "1"}[name]
    assert said.startswith(f"{path} was measured with {name} {there}")
    assert f"this run has {own}" in said
    assert "--latency-table" in said
    if "cpu_flags" in environment:
        assert "neon" in said
    assert path.read_bytes() == before


def test_another_provider_is_refused(tmp_path: Path) -> None:
    table(row()).save(tmp_path / "table.json")
    with pytest.raises(InputError, match="provider CPUExecutionProvider; this run has CUDAExecutionProvider"):
        open_table(tmp_path / "table.json", "CUDAExecutionProvider", 1)


def test_what_does_not_decide_speed_is_not_compared(tmp_path: Path) -> None:
    written = table(row(), python="3.99.0", torch="9.9", memory_bytes=1, system="Plan 9")
    written.save(tmp_path / "table.json")
    assert open_table(tmp_path / "table.json", CPU, 1)[0] == written


def whole() -> dict[str, Any]:
    return json.loads(table(row()).model_dump_json())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        json.dumps(whole()).encode()[:-30],
        json.dumps({**whole(), "surprise": 1}).encode(),
        json.dumps({key: value for key, value in whole().items() if key != "environment"}).encode(),
        json.dumps({**whole(), "operators": [{"signature": "a", "compute": "float"}]}).encode(),
        json.dumps({**whole(), "operators": [row().model_dump() | {"layer_us": "fast"}]}).encode(),
    ],
    ids=["empty", "cut", "list", "null", "binary", "truncated", "unknown", "missing", "incomplete", "text"],
)
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not a latency table of this version; delete it") as caught:
        open_table(path, CPU, 1)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**whole(), "schema_version": 2}))
    with pytest.raises(InputError, match="is not a latency table of this version"):
        open_table(path, CPU, 1)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "table.json").mkdir()
    with pytest.raises(InputError, match="is not a latency table"):
        open_table(tmp_path / "table.json", CPU, 1)
