"""Small files that would take all time and memory: each is refused, at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.data.samples import load_samples
from compress.errors import InputError
from compress.models.checkpoint import load_model
from compress.models.expression import is_size_expression
from compress.models.growth import check_archive, check_module
from tests.hostile import call, container, number, write_exported

EXPRESSIONS = [
    "s0",
    "2*s0",
    "Mul(Integer(2), Symbol('s0', positive=True, integer=True))",
    "Pow(Symbol('s0', integer=True), Integer(2))",
    "2**63 - 1",
    "2**s0",
    "s0**2*s1**3 + 1",
    "Max(1, FloorDiv(s0, 2))",
    "-int_oo",
    "1.5*s0",
    "Float('2.5e10', precision=53)",
    "LShift(1, 16)",
    "Mod(s0, 8) <= 4",
    "9223372036854775807",
]
EXPLOSIONS = [
    "9**9**9**9",
    "9**9**9",
    "Pow(9, Pow(9, Pow(9, 9)))",
    "Pow(Integer(9), Integer(999999999))",
    "PowByNatural(10, 10**10)",
    "s0 + 10**10**10",
    "((9**99)**99)**99",
    "1<<9999999999",
    "LShift(1, 9999999999)",
    "9**(s0 - s0 + 10**9)",
    "floor(1e999999999)",
    "Integer('1e999999999')",
    "Pow(base=9, exp=9**9**9)",
    "9" * 20_000,
    "(" * 5000 + "1" + ")" * 5000,
    "9**-9**9**9",
    "Pow(*(9, 9**9**9))",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_size_expressions(text: str) -> None:
    assert is_size_expression(text)


@pytest.mark.parametrize("text", EXPLOSIONS, ids=range(len(EXPLOSIONS)))
def test_size_expressions_that_explode(text: str) -> None:
    start = time.process_time()
    assert not is_size_expression(text)
    assert time.process_time() - start < 0.5


def shared(levels: int) -> nn.Module:
    """Each level has two ways to the next."""
    module: nn.Module = nn.Linear(2, 2)
    for _ in range(levels):
        module = nn.Sequential(nn.Sequential(module), nn.Sequential(module))
    return module


def expanded(size: int) -> nn.Module:
    module = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.zeros(1).expand(size, size))
    return module


def itself() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module.add_module("0", module)
    return module


def deep(levels: int) -> nn.Module:
    module: nn.Module = nn.Linear(2, 2)
    for _ in range(levels):
        module = nn.Sequential(module)
    return module


def bare(lost: str, value: object = None) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    vars(module)[lost] = value
    return module


def refusal(file: Path) -> str:
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load_model(file)
    assert time.process_time() - start < 2
    return str(caught.value)


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shared": (lambda: shared(40), "are shared so often that there are more than 200,000 ways to reach one"),
    "expanded": (lambda: expanded(100_000), "its tensors have 40,000,000,004 bytes of which 8 are stored (parameter w"),
    "without modules": (lambda: bare("_modules"), "Sequential has no modules as a layer has them"),
    "odd modules": (lambda: bare("_modules", {"0": 3}), "Sequential has no modules as a layer has them"),
    "odd parameters": (lambda: bare("_parameters", {"w": "x"}), "Sequential has no parameters as a layer has them"),
    "itself": (lambda: nn.DataParallel(itself()), "is a part of itself"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_outgrow_their_file(tmp_path: Path, name: str) -> None:
    make, what = MODULES[name]  # never shown: to print such a module takes as long as to walk it
    file = tmp_path / "m.pt"
    torch.save(make(), file)
    assert file.stat().st_size < 1 << 18
    assert what in refusal(file)


def test_modules_that_are_too_deep() -> None:
    check_module(Path("m.pt"), deep(190))
    with pytest.raises(InputError, match="is more than 200 levels deep"):
        check_module(Path("m.pt"), deep(5000))


def test_what_is_shared_or_expanded_as_models_are(tmp_path: Path) -> None:
    module = nn.Sequential(shared(4), nn.Linear(2, 2))
    module.register_buffer("ids", torch.arange(64).expand(1, -1))
    module.register_buffer("mask", torch.ones(1).expand(1024, 1024))
    module[1].weight = nn.Parameter(module[0][0][0][0][0][0][0][0][0].weight.t())  # type: ignore[index]
    check_module(Path("m.pt"), module)
    torch.save(module, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").notes == ()


def test_dictionaries_that_hold_themselves(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = {"state_dict": content}
    torch.save(content, tmp_path / "c.pt")
    assert "holds a dictionary without weights" in refusal(tmp_path / "c.pt")


def test_archives_that_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1 << 22))
    assert "zip archive" not in refusal(tmp_path / "z.pt")  # small enough to look into
    with zipfile.ZipFile(tmp_path / "z.pt") as archive:
        check_archive(tmp_path / "z.pt", archive)
        with pytest.raises(InputError, match=r"z.pt has 4,\d\d\d bytes and would grow to 4,194,304; write it again"):
            check_archive(tmp_path / "z.pt", archive, spare=1 << 20)
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((1 << 20, 1), np.float32))
    assert len(load_samples(tmp_path / "x.npz").inputs[0]) == 1 << 20
    monkeypatch.setattr("compress.data.sources._SPARE", 1 << 20)
    with pytest.raises(InputError, match=r"x\.npz has .* and would grow to"):
        load_samples(tmp_path / "x.npz")


def wanting(folder: Path, **settings: int) -> Path:
    """A Hugging Face folder with nearly no weights."""
    folder.mkdir()
    save_file({"embeddings.word_embeddings.weight": torch.zeros(8, 8)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"} | settings))
    return folder


def files(folder: Path) -> dict[str, Path]:
    """What the refusals were made for, by name."""
    torch.save(shared(40), folder / "shared.pt")
    torch.save(expanded(100_000), folder / "expanded.pt")
    linear = call("torch.nn.modules.linear.Linear", number(20000), number(20000))
    return {
        "linear": container(folder / "linear.pt", linear),
        "shared": folder / "shared.pt",
        "expanded": folder / "expanded.pt",
        "layers": wanting(folder / "layers", num_hidden_layers=10**6),
        "labels": wanting(folder / "labels", num_labels=10**8),
        "powers": write_exported(folder / "powers.pt2", expression="9**9**9**9"),
    }


ALONE = """
import os, resource, sys, time
from pathlib import Path
import torch, transformers
from compress.data.samples import load_samples
from compress.models.checkpoint import load_model
from compress.errors import InputError
from transformers import BertModel
harmless, *files = sys.argv[1:]
try:  # what is imported as files are read
    load_model(Path(harmless))
except InputError:
    pass
for file in files:
    if os.fork() == 0:
        def most():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        before, start = most(), time.process_time()
        try:
            load_model(Path(file))
        except InputError as error:
            print(most() - before, time.process_time() - start, error)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_within_two_seconds_and_200_megabytes(tmp_path: Path) -> None:
    """Each in a process of its own, which has imported all that is needed."""
    pytest.importorskip("transformers", reason="needs the package transformers")
    harmless = wanting(tmp_path / "small", num_hidden_layers=1)
    command = [sys.executable, "-c", ALONE, harmless, *files(tmp_path).values()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    lines = run.stdout.splitlines()
    assert len(lines) == len(command) - 4, run.stderr
    for line in lines:
        megabytes, seconds, *_ = line.split()
        assert int(megabytes) < 200, line
        assert float(seconds) < 2, line
