"""The folder a run leaves: whole or not there, and a sentence for every way it can be damaged."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress import api
from compress.errors import InputError
from compress.files.outputs import check_folder, new_folder
from compress.measure.bench import bench
from compress.plans.plan_file import load_plan
from compress.runtime.artifact import load_artifact, sum_tensor_bytes
from tests.sweep import sweep


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished artifact; tests damage copies of it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    folder = tmp_path_factory.mktemp("artifact") / "out"
    api.quantize(module, calib=torch.randn(16, 2, 4, 4), method="mse", out=folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


# Of folders that were made old.
pytestmark = pytest.mark.filterwarnings("ignore:.*from before reports had hashes:UserWarning")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_old_graph(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the graph of a folder from before anything was hashed: nothing but the graph itself can tell."""
    edit_json(
        folder / "graph.json", lambda content: (content.pop("graph_sha256"), content.pop("report"), change(content))
    )
    (folder / "report.json").unlink()


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        api.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_an_untouched_copy_loads(folder: Path) -> None:
    traced = load_artifact(folder)
    with torch.no_grad():
        assert traced.module(torch.randn(5, 2, 4, 4)).shape == (5, 3)
    assert sum_tensor_bytes(traced) == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graph.json", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"holds no {name}; give a folder that `compress quantize` has written" in refused(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "holds no graph.json" in refused(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"plan\.json does not exist"):
        load_plan(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_tensors_cut_short(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors is damaged" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"version": 99}', "\x00\x01"])
def test_a_graph_that_is_no_graph(folder: Path, text: str) -> None:
    (folder / "graph.json").write_text(text)
    assert "graph.json" in refused(folder)


def test_a_graph_in_another_encoding(folder: Path) -> None:
    (folder / "graph.json").write_bytes(b"\xff\xfe{\x00}\x00")
    assert "graph.json is not JSON" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("0.weight_packed"),
        lambda tensors: tensors.update({"0.weight_packed": tensors["0.weight_packed"][:, :-1].contiguous()}),
        lambda tensors: tensors.update({"0.weight_scale": tensors["0.weight_scale"][:-1].contiguous()}),
    ],
    ids=["missing", "too few codes", "too few scales"],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    assert "model.safetensors is damaged, or not the file that graph.json was written with" in refused(folder)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_old_graph(folder, lambda content: content.update(tensors_sha256=digest))
    refused(folder)


def test_tensors_of_another_run(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # still a file of tensors, all of the right shape
    file.write_bytes(content)
    assert "not the file that graph.json was written with: its SHA-256 is" in refused(folder)


def narrow_a_grid(content: dict[str, Any]) -> None:
    """The graph still runs, and computes something else."""
    quantizer = next(node for node in content["nodes"] if node["target"] == "compress.fake_quantize.default")
    quantizer["args"][3] = 2


@pytest.mark.parametrize(
    "change",
    [
        narrow_a_grid,
        lambda content: content.update(tensors_sha256="0" * 64),
        lambda content: content.update(graph_sha256="0" * 64),
        lambda content: content.update(graph_sha256=None),
    ],
    ids=["another grid", "another file's hash", "another hash", "no hash"],
)
def test_an_edited_graph(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder / "graph.json", change)
    assert "graph.json is damaged, or was edited: its SHA-256 is" in refused(folder)


def test_a_folder_from_before_graphs_were_hashed_loads(folder: Path) -> None:
    wanted = load_artifact(folder).module(torch.ones(1, 2, 4, 4))
    edit_old_graph(folder, lambda content: None)
    assert torch.equal(load_artifact(folder).module(torch.ones(1, 2, 4, 4)), wanted)


HASHED = ["base.safetensors", "graph.json", "model.onnx", "model.safetensors"]


def test_the_report_has_a_hash_of_every_file_but_the_plans(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["schema_version"] == 3
    assert report["files"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in HASHED}
    (folder / "plan.json").write_text(json.dumps(json.loads((folder / "plan.json").read_text())))  # the user's to edit
    load_artifact(folder)


@pytest.mark.parametrize("name", HASHED)
def test_one_flipped_bit_in_any_file_is_found_by_every_verb(folder: Path, name: str, tmp_path: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    for verb in (
        api.load,
        api.verify,
        lambda each: api.export(each, tmp_path / "out.onnx"),
        lambda each: bench([each]),
    ):
        with pytest.raises(InputError, match=rf"{re.escape(name)} is (damaged|not JSON)"):
            verb(folder)
    assert not (tmp_path / "out.onnx").exists()


def test_a_folder_that_was_written_with_hashes_is_refused_without(folder: Path) -> None:
    edit_json(folder / "report.json", lambda content: content.pop("files"))
    assert "has no hashes of its files in report.json, with which it was written" in refused(folder)
    (folder / "report.json").unlink()
    assert "has no hashes of its files" in refused(folder)


def test_a_file_that_has_a_hash_is_missed(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    assert "holds no model.onnx, which report.json has a hash of" in refused(folder)


def test_an_older_folder_is_read_with_a_warning(folder: Path) -> None:
    edit_old_graph(folder, lambda content: None)
    with pytest.warns(UserWarning, match="from before reports had hashes: whether its files are damaged is not known"):
        load_artifact(folder)


@pytest.mark.parametrize("target", ["os.system", "aten.nothing.default", "builtins.eval", "aten.__class__.x", "torch"])
def test_a_graph_may_call_operators_only(folder: Path, target: str) -> None:
    def change(content: dict[str, Any]) -> None:
        next(node for node in content["nodes"] if node["op"] == "call_function")["target"] = target

    edit_old_graph(folder, change)
    assert f"graph.json calls {target!r}, which is not an operator" in refused(folder)


def mutate(value: Any, dice: random.Random) -> Any:
    """The same JSON with one value somewhere in it replaced."""
    replacements = [None, -1, 0, 1.5, "", "x", [], {}, {"node": "x"}, {"dtype": "float99"}, 10**12, True]
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        return {**value, key: mutate(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        position = dice.randrange(len(value))
        return [*value[:position], mutate(value[position], dice), *value[position + 1 :]]
    return dice.choice(replacements)


@sweep("times", [50, 500], sample=[50])
def test_a_tampered_graph_is_refused_or_runs_but_never_breaks(times: int, folder: Path) -> None:
    content = json.loads((folder / "graph.json").read_text())
    del content["graph_sha256"], content["report"]
    (folder / "report.json").unlink()
    dice, refusals, broken = random.Random(times), 0, []
    for _ in range(times):
        tampered = mutate(content, dice)
        (folder / "graph.json").write_text(json.dumps(tampered))
        try:
            load_artifact(folder)
        except InputError:
            refusals += 1
        except Exception as error:  # noqa: BLE001 - what is looked for
            broken.append(f"{type(error).__name__}: {error}")
    assert broken == []
    assert refusals > times // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("target"), "target: Field required"),
        (lambda plan: plan.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda plan: plan.update(schema_version=2), "has version 2; this program reads 1"),
        (lambda plan: plan["choices"][0]["option"].update(bits=9), "choices.0.option.bits: Input should be less"),
    ],
    ids=["field missing", "field too many", "another version", "width out of range"],
)
def test_a_plan_that_is_none(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_json(folder / "plan.json", change)
    with pytest.raises(InputError) as error:
        api.verify(folder)
    assert message in str(error.value)


def test_a_plan_comes_back_as_it_was(folder: Path) -> None:
    plan = load_plan(folder)
    assert [choice.layer for choice in plan.choices] == ["0", "3"]
    assert plan.model_dump_json(indent=2) == (folder / "plan.json").read_text()


def write(path: Path, overwrite: bool, content: str, error: Exception | None = None) -> None:
    with new_folder(path, overwrite) as partial:
        assert partial.parent == path.parent
        assert not (path / "plan.json").exists() or overwrite
        (partial / "plan.json").write_text(content)
        if error is not None:
            raise error


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", False, "one")
    assert (tmp_path / "deep" / "out" / "plan.json").read_text() == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "deep" / "out", False, "two")
    write(tmp_path / "deep" / "out", True, "two")
    assert (tmp_path / "deep" / "out" / "plan.json").read_text() == "two"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: Exception, overwrite: bool) -> None:
    if overwrite:
        write(tmp_path / "out", False, "old")
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match=r"No space left.*free some space" if expected is InputError else None):
        write(tmp_path / "out", overwrite, "new", error)
    names = [path.name for path in tmp_path.iterdir()]
    assert names == (["out"] if overwrite else [])
    assert not overwrite or (tmp_path / "out" / "plan.json").read_text() == "old"


def test_overwrite_spares_what_is_not_ours(tmp_path: Path) -> None:
    precious = tmp_path / "project"
    precious.mkdir()
    check_folder(precious, overwrite=True)  # empty: nothing to lose
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a folder that `compress quantize` has written"):
        write(precious, True, "new")
    with pytest.raises(InputError, match="is not a folder that `compress quantize` has written"):
        write(precious / "thesis.tex", True, "new")
    assert (precious / "thesis.tex").read_text() == "years of work"
