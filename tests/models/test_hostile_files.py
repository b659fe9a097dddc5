"""Broken and hostile files of every kind: each is answered by one sentence, in a bounded time, and runs nothing.

What a file of torch.save may name and call is in tests/models/test_torchfile.py, what may take all time and memory in
tests/models/test_growth.py, code in strings of our own files in tests/graph/test_code_in_files.py.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress.errors import CompressError
from tests.hostile import call, container, name, text, with_weights, write_exported
from tests.kinds import INDEX, KINDS, good_files
from tests.sweep import sweep

pytestmark = pytest.mark.slow

SECONDS = 10.0


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_files(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all good files, where code that runs would leave a mark."""
    copied = Path(shutil.copytree(good, tmp_path / "files"))
    monkeypatch.chdir(copied)
    return copied


def answer(kind: str, folder: Path) -> str | None:
    """The sentence that refuses the file of that kind, or None where it is read; nothing else may come of it."""
    start = time.process_time()
    sentence, code = None, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            KINDS[kind].read(folder)
        except CompressError as error:
            sentence, code = str(error), error.exit_code
    if sentence is not None:
        assert sentence
        assert code in (1, 2)
        assert "\n" not in sentence.strip(), sentence
        assert "add_safe_globals" not in sentence
    assert time.process_time() - start < SECONDS
    assert not list(folder.rglob("mark"))
    return sentence


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(folder: Path, kind: str) -> None:
    """Else what is refused below would be refused for nothing."""
    assert answer(kind, folder) is None


# What happens to files of every kind: empty, cut, of another kind, without end.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "other": lambda content: b"<html><title>404 Not Found</title></html>",
    "zeros": lambda content: bytes(len(content)),
}
# A table of texts has no form that half of it could lack.
READ_ALL_THE_SAME = {("texts", "cut"), ("report.json", "other")}


@sweep("damage", DAMAGE, sample=["cut", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage(folder: Path, kind: str, damage: str) -> None:
    file = folder / KINDS[kind].file
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    sentence = answer(kind, folder)
    assert sentence is not None or (kind, damage) in READ_ALL_THE_SAME


def changed(file: Path, change: Callable[[Any], Any]) -> None:
    """Change JSON, in place or to what is returned."""
    content = json.loads(file.read_text())
    result = change(content)
    file.write_text(json.dumps(content if result is None else result))


def rezipped(file: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Every member as ``change`` has it, with its checksum right; None leaves it out."""
    with zipfile.ZipFile(file) as archive:
        members = {each: change(each, archive.read(each)) for each in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for each, content in members.items():
            if content is not None:
                archive.writestr(each, content)


def settings(**values: object) -> Callable[[Path], None]:
    return lambda folder: changed(folder / "hf/config.json", lambda content: content.update(values))


def weight_map(value: object) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        content["weight_map"] = dict.fromkeys(content["weight_map"], value)

    return lambda folder: changed(folder / f"hf/{INDEX}", change)


def script(folder: Path) -> None:
    with zipfile.ZipFile(folder / "module.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/code/__torch__.py", "import os\nos.mkdir('mark')\n")


def objects(folder: Path) -> None:
    np.savez(folder / "x.npz", images=np.array([{"a": 1}], dtype=object), allow_pickle=True)


def header(folder: Path, length: int, said: bytes) -> None:
    (folder / "weights.safetensors").write_bytes(length.to_bytes(8, "little") + said)


RUN = call("posix.system", text("mkdir mark"))
HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a command": (".pt, a module", lambda f: container(f / "module.pt", RUN), "can run commands"),
    "a command beside weights": (".pt, weights", lambda f: container(f / "weights.pt", with_weights(RUN)), "commands"),
    "eval": (".pt, a module", lambda f: container(f / "module.pt", call("builtins.eval", text("1"))), "builtins.eval"),
    "a hub": (".pt, a module", lambda f: container(f / "module.pt", call("torch.hub.load", text("a/b"))), "commands"),
    "a command in samples": (".pt, samples", lambda f: container(f / "x.pt", RUN), "could not be read safely"),
    "a class in samples": (".pt, samples", lambda f: container(f / "x.pt", name("mine.Net")), "read safely"),
    "TorchScript": (".pt, a module", script, "is a TorchScript archive"),
    "objects": (".npz", objects, "pickled Python objects"),
    "a header without end": (".safetensors", lambda f: header(f, 1 << 62, b"{}"), "truncated or no safetensors"),
    "a header of lists": (".safetensors", lambda f: header(f, 2, b"[]"), "truncated or no safetensors"),
    "offsets outside": (
        ".safetensors",
        lambda f: header(f, 61, b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,999999999]}}'.ljust(61)[:61]),
        "truncated or no safetensors",
    ),
    "a size without end": (".pt2", lambda f: write_exported(f / "program.pt2", "9**9**9**9"), "the size expression"),
    "a call as size": (".pt2", lambda f: write_exported(f / "program.pt2", "__import__('os')"), "the size expression"),
    "a config of code": ("config.json", settings(auto_map={"AutoModel": "modeling.Own"}), "code of its own"),
    "a million layers": ("config.json", settings(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "layers of text": ("config.json", settings(num_hidden_layers="many"), "config.json"),
    "no layers": ("config.json", settings(num_hidden_layers=-3), "config.json"),
    "an unknown architecture": ("config.json", settings(architectures=["os"]), "the architecture 'os'"),
    "another architecture": ("config.json", settings(architectures=["LlamaModel"]), "LlamaModel"),
    "an index outside": ("index", weight_map("../../weights.safetensors"), "in its own folder alone"),
    "an index of numbers": ("index", weight_map(3), "weight_map"),
    "an index of files that are not there": ("index", weight_map("none.safetensors"), "lacks none.safetensors"),
    "an index of lists": ("index", lambda f: changed(f / f"hf/{INDEX}", lambda content: [content]), "JSON object"),
    "a deep index": ("index", lambda f: (f / f"hf/{INDEX}").write_text("[" * 10**5 + "]" * 10**5), "is not JSON"),
    "a deep config": (
        "config.json",
        lambda f: (f / "hf/config.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5),
        "is not JSON",
    ),
    "a picture of text": ("images", lambda f: (f / "images/3_a.png").write_text("no picture"), "no picture"),
    "no pictures": ("images", lambda f: [each.unlink() for each in (f / "images").iterdir()], "no pictures"),
    "a table without texts": ("texts", lambda f: (f / "texts.tsv").write_text("a\tb\n1\t2\n"), "texts.tsv"),
    "texts that are none": ("texts", lambda f: (f / "texts.tsv").write_bytes(b"sentence\n\xff\xfe\n"), "texts.tsv"),
    "a template without its token": (
        "tokenizer.json",
        lambda f: changed(f / "hf/tokenizer.json", lambda content: content["post_processor"].update(special_tokens={})),
        "tokenizer",
    ),
    "hashes of nothing": (
        "report.json",
        lambda f: changed(f / "out/report.json", lambda content: content.update(files="x")),
        "report.json is damaged",
    ),
    "a plan of another version": (
        "plan.json",
        lambda f: changed(f / "out/plan.json", lambda content: content.update(schema_version=99)),
        "has version 99",
    ),
    "a delta of nothing": (
        "delta",
        lambda f: save_file({"a": torch.ones(2)}, f / "delta.safetensors"),
        "delta.safetensors",
    ),
    "a table of another version": (
        "latency table",
        lambda f: changed(f / "latency.json", lambda content: content.update(schema_version=99)),
        "is not a latency table",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(folder: Path, case: str) -> None:
    kind, write, wanted = HOSTILE[case]
    write(folder)
    sentence = answer(kind, folder)
    assert sentence is not None
    assert wanted in sentence


def test_there_are_sixty() -> None:
    assert len(HOSTILE) + 2 * len(KINDS) >= 60


def mutated(content: bytes, random_: random.Random) -> bytes:
    """One change to bytes: a bit, a byte, a number, a piece lost, doubled or moved."""
    at = random_.randrange(max(len(content), 1))
    length = random_.choice((1, 2, 4, 8, 64))
    piece = content[at : at + length]
    kind = random_.randrange(6)
    if kind == 0:
        return content[:at] + bytes(each ^ 1 << random_.randrange(8) for each in piece[:1]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + random_.randbytes(len(piece)) + content[at + length :]
    if kind == 2:
        return content[:at] + random_.choice((b"\xff", b"\x00", b"\x7f")) * len(piece) + content[at + length :]
    if kind == 3:
        return content[:at] + content[at + length :]
    if kind == 4:
        return content[:at] + piece + content[at:]
    return content[: at + length]


VALUES = (None, True, -1, 0, 1 << 63, 1e308, "", "x", "../x", "é\u0000", [], [[]], {}, {"a": {}})


def mutated_field(content: Any, random_: random.Random) -> Any:
    """JSON with one field lost, doubled or of another value, anywhere in it."""
    places: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        each = pending.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        places += [(each, key) for key in keys]
        pending += [each[key] for key in keys]
    if not places:
        return random_.choice(VALUES)
    within, key = random_.choice(places)
    kind = random_.randrange(4)
    if kind == 0:
        del within[key]
    elif kind == 1 and isinstance(within, list):
        within.append(within[key])
    else:
        within[key] = random_.choice(VALUES)
    return content


def mutate(file: Path, random_: random.Random) -> None:
    """Fields of JSON, or of a member of an archive whose checksums are right afterwards; else bytes."""
    if file.suffix == ".json" and random_.random() < 0.7:
        file.write_text(json.dumps(mutated_field(json.loads(file.read_text()), random_)))
    elif zipfile.is_zipfile(file) and random_.random() < 0.7:
        with zipfile.ZipFile(file) as archive:
            chosen = random_.choice(archive.namelist())

        def change(member: str, content: bytes) -> bytes:
            if member != chosen:
                return content
            if member.endswith(".json"):
                with contextlib.suppress(ValueError):
                    return json.dumps(mutated_field(json.loads(content), random_)).encode()
            return mutated(content, random_)

        rezipped(file, change)
    else:
        file.write_bytes(mutated(file.read_bytes(), random_))


ROUNDS = 25  # of twenty mutations each


@sweep("round_", range(ROUNDS), sample=[0])
def test_mutations(folder: Path, good: Path, round_: int) -> None:
    """Twenty a round, of kinds in turn; a file may still be read, or be refused, and nothing else may come of it."""
    refused = 0
    broken = []
    for number in range(20 * round_, 20 * (round_ + 1)):
        kind = list(KINDS)[number % len(KINDS)]
        file = folder / KINDS[kind].file
        mutate(file, random.Random(number))
        try:
            refused += answer(kind, folder) is not None
        except AssertionError:
            raise
        except BaseException as error:  # noqa: BLE001 - what is looked for
            broken.append((number, kind, f"{type(error).__name__}: {error}"[:300]))
        shutil.copy2(good / KINDS[kind].file, file)
        shutil.copy2(good / "out/report.json", folder / "out/report.json")
    assert broken == []
    assert refused
