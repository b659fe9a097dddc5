"""What cannot be done: exit code 2, one sentence on stderr that says what to do, nothing written."""

from __future__ import annotations

import resource
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.cli.main import main
from compress.files.cache import remembered
from tests.cli.conftest import NETS, Forks, command, environment, populate, run_alone  # type: ignore[import-not-found]
from tests.sweep import sweep

BRANCH = 1 + NETS[: NETS.index("if y.sum()")].count("\n")
"""The line of nets.py that torch.export cannot trace."""

CASES = {
    "missing file": (("nothere.pt",), "There is no file nothere.pt; check the path."),
    "truncated file": (("cut.pt",), "cut.pt is truncated or damaged"),
    "foreign class": (("foreign.pt",), "--allow nets.Own"),
    "weights without a model": (
        ("weights.th", "--bits", "8"), "weights.th --bits 8 --model package.module:factory"
    ),
    "an option before a file": (("nothere.pt", "--bits", "9"), "--bits 9: allowed are 2 to 8"),
    "an option before a folder": (("model.pt", "--out", "taken", "--observer", "magic"), "unknown observer 'magic'"),
    "a budget's option before a file": (("nothere.pt", "--budget", "size=1MB", "--solver", "x"), "unknown solver 'x'"),
    "a search without a budget": (("nothere.pt", "--tied"), "--tied: only a search for a plan uses that"),
    "a length without texts": (
        ("model.pt", "--calib", "calib.npz", "--length", "64"), "--length 64: it cuts texts, and none are given"
    ),
    "an ONNX file": (("given.onnx",), "given.onnx is an ONNX file, which models are exported to"),
    "a TorchScript file": (("given.jit",), "given.jit is a TorchScript archive, which is not supported"),
    "no such factory": (("weights.th", "--model", "nets:nothing"), "nothing"),
    "control flow": (("fickle.th", "--model", "nets:fickle"), f"nets.py:{BRANCH} (if y.sum() > 0:)"),
    "NaN in the data": (("model.pt", "--calib", "nan.npz"), "nan.npz"),
    "wrong shape of the data": (("model.pt", "--calib", "wide.npz"), "2x8x8"),
    "wrong input shape": (("model.pt", "--input-shape", "3,8,8"), "expects 1 channels"),
    "no shape": (("model.pt", "--input-shape", "big"), "write the shape of one input without the batch, as 3,32,32"),
    "existing folder": (("model.pt", "--out", "taken"), "taken exists already; choose another --out, or replace it"),
    "somebody else's folder": (("model.pt", "--out", "taken", "--overwrite"), "so --overwrite leaves it alone"),
    "too many bits": (("model.pt", "--bits", "9"), "--bits 9: allowed are 2 to 8"),
    "activations without data": (("model.pt", "--act-bits", "4"), "are for 8 bits; give --calib"),
    "activations with no data": (
        ("model.pt", "--calib", "none", "--act-bits", "4"), "or leave --act-bits out, and the weights alone"
    ),
    "unknown method": (("model.pt", "--method", "magic"), "unknown method 'magic'; known: minmax, mse, hqq, gptq"),
    "unknown target": (("model.pt", "--target", "magic"), "unknown target 'magic'; known: onnx-cpu, onnx-arm"),
    "unknown observer": (("model.pt", "--observer", "magic"), "unknown observer 'magic'; known: minmax, percentile"),
    "bad normalisation": (("model.pt", "--calib", "calib.npz", "--mean", "a,b"), "--mean 'a,b': numbers separated"),
    "labels missing": (("model.pt", "--calib", "calib.npz", "--eval", "calib.npz"), "labels"),
    "unwritable folder": (("model.pt", "--out", "nets.py/out", "--input-shape", "1,8,8"), "Not a directory"),
}  # fmt: skip


def listing(folder: Path) -> set[str]:
    ours = (path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path) for path in ours if path.parts[0] != "tmp"}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that can go wrong."""
    folder = populate(tmp_path_factory.mktemp("refusals"))
    whole = (folder / "model.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "given.onnx").write_bytes(b"\x08\x0a")
    with zipfile.ZipFile(folder / "given.jit", "w") as archive:
        archive.writestr("given/constants.pkl", b"\x80\x02).")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("years of work")
    x = np.zeros((8, 1, 8, 8), np.float32)
    np.savez(folder / "wide.npz", x=np.concatenate([x, x], 1))
    x[3, 0, 2, 1] = np.nan
    np.savez(folder / "nan.npz", x=x)
    layer = torch.nn.Linear(8, 4)
    torch.save({f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}, folder / "fickle.th")
    code = "import nets, torch; torch.save(nets.Own(), 'foreign.pt')"
    subprocess.run([*command()[:1], "-c", code], cwd=folder, check=True)
    return folder


def assert_refused(run: subprocess.CompletedProcess[str], wanted: str) -> None:
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1, run.stderr
    assert wanted in run.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(forks: Forks, crowded: Path, case: str) -> None:
    before = listing(crowded)
    arguments, wanted = CASES[case]
    assert_refused(forks.run(crowded, "quantize", *arguments), wanted)
    assert listing(crowded) == before, "files were left behind"
    assert (crowded / "taken" / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "more"), [("inspect", ()), ("export", ("--out", "x.onnx")), ("allocate", ("--budget", "size=0.3x"))]
)
def test_weights_alone_get_the_commands_own_answer(
    forks: Forks, crowded: Path, verb: str, more: tuple[str, ...]
) -> None:
    run = forks.run(crowded, verb, "weights.th", *more)
    whole = " ".join(("compress", verb, "weights.th", *more))
    assert_refused(
        run,
        f"give the function that builds it, --model package.module:factory: {whole} --model package.module:factory\n",
    )  # no emoji


@pytest.mark.slow
@sweep("case", ["missing file", "control flow", "NaN in the data"], sample=["control flow"])
def test_the_same_in_a_process_of_its_own(crowded: Path, case: str) -> None:
    # Warnings and logs of a fresh start, which a fork of a running program does not show.
    arguments, wanted = CASES[case]
    run = run_alone(crowded, "quantize", *arguments)
    assert_refused(run, wanted)


@pytest.mark.slow
def test_an_option_that_is_none(tmp_path: Path) -> None:
    run = run_alone(tmp_path, "quantize", "model.pt", "--bit", "4")
    assert run.returncode == 2
    assert "No such option" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many bytes, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={request.param}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiny_disk", "arguments"),
    [
        ("16k", ("--calib", "calib.npz", "--method", "mse")),  # not even room for the activations
        ("8k", ("--input-shape", "1,8,8")),  # nor for the layers
        ("28k", ("--input-shape", "1,8,8")),  # for the layers, but not for the folder
    ],
    indirect=["tiny_disk"],
    ids=["activations", "layers", "folder"],
)
def test_a_full_disk(forks: Forks, tmp_path: Path, tiny_disk: Path, arguments: tuple[str, ...]) -> None:
    folder = populate(tmp_path / "work")
    run = forks.run(folder, "quantize", "model.pt", "--out", tiny_disk / "out", *arguments)
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert "No space left on device" in run.stderr
    assert "free some space" in run.stderr
    assert not (tiny_disk / "out").exists()
    assert not list(tiny_disk.glob("*.partial"))
    assert not list(tiny_disk.rglob("*.samples"))


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path: Path) -> None:
    # As a full disk, but without a file system of its own: any file over 3 kB is refused.
    folder = populate(tmp_path / "work")
    run = run_alone(
        folder, "quantize", "model.pt", "--out", "out", "--calib", "calib.npz", "--method", "mse",
        env={**environment(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert "File too large; free some space" in run.stderr
    assert not (folder / "out").exists()
    assert not (folder / ".out.work").exists(), "no layer was finished"


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    "arguments",
    [
        ("lowrank", "train", "model.pt", "--data", "test.npz", "--epochs", 2),
        ("lowrank", "truncate", "model.pt", "--calib", "calib.npz"),
        ("sparse", "train", "model.pt", "--data", "test.npz", "--epochs", 1, "--sparse-epochs", 1),
    ],
    ids=["lowrank train", "lowrank truncate", "sparse train"],
)
def test_other_verbs_say_it_in_one_sentence_and_go_on_afterwards(
    tmp_path: Path, forks: Forks, arguments: tuple[object, ...]
) -> None:
    folder = populate(tmp_path / "work")
    given = (*arguments, "--out", "out.safetensors" if arguments[0] == "sparse" else "out")
    run = run_alone(
        folder, *given,
        env={**environment(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("error: cannot write ")
    assert "; free some space or choose another --out" in run.stderr
    assert [path.name for path in folder.iterdir() if path.name.startswith(("out", ".out"))] == []
    again = forks.run(folder, *given)
    assert again.returncode == 0, again.stderr


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").touch()  # where its folder should be
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("compress.cli.main.app", lambda **_: remembered("pass", "key", lambda: 1.0))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert ".json: File exists; name a folder that can be written in COMPRESS_CACHE" in capsys.readouterr().err
