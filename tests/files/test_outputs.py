"""What is written is there whole or not at all, whenever a process dies; and one run at a time writes a place."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import InputError
from compress.files import lock, outputs
from compress.files.outputs import claim, claims, kept, new_file, new_files, new_folder, writing
from tests.sweep import sweep

Step = Callable[[Path], None]


def write_folder(out: Path) -> None:
    with new_folder(out, overwrite=True) as partial:
        (partial / "plan.json").write_text("new")
        (partial / "more").mkdir()
        (partial / "more" / "model.onnx").write_text("new")


def write_files(out: Path) -> None:
    with new_files(out) as partial:
        (partial / out.name).write_text("new")
        (partial / f"{out.name}.data").write_text("new")
        (partial / f"{out.name}.old").touch()


def old_folder(out: Path) -> None:
    (out / "more").mkdir(parents=True)
    (out / "plan.json").write_text("old")
    (out / "more" / "model.onnx").write_text("old")


def old_files(out: Path) -> None:
    out.parent.mkdir()
    for name in (out.name, f"{out.name}.data", f"{out.name}.old"):
        (out.parent / name).write_text("old")


def content(place: Path) -> dict[str, str]:
    return {str(each.relative_to(place)): each.read_text() for each in place.rglob("*") if each.is_file()}


FOLDER = {"out/plan.json", "out/more/model.onnx"}
FILES = {"out", "out.data"}


class Dying:
    """Steps of a publication in a forked process, which ends by itself at one of them, as kill -9 would end it.

    Python tells an audit hook of every file that is opened, made, renamed or deleted, before it is; ``renameat2``, of
    which it does not know, stands between two of those.
    """

    def __init__(self, step: Step, out: Path) -> None:
        self.step, self.out = step, out

    def run(self, last: int) -> bool:
        """Whether the process came to its end without reaching step ``last``."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                left = last

                def hook(event: str, args: tuple[object, ...]) -> None:
                    nonlocal left
                    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.chmod"):
                        left -= 1
                        if left < 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
                self.step(self.out)
                code = 0
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status == 0


@pytest.fixture(params=["exchanged", "renamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In one step, and as where the system has none for it."""
    if request.param == "renamed":
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    return str(request.param)


@sweep("stride", [1, 6], sample=[6])
@pytest.mark.parametrize(
    ("step", "before", "names"), [(write_folder, old_folder, FOLDER), (write_files, old_files, FILES)]
)
def test_old_or_new_whenever_the_process_dies(
    tmp_path: Path, way: str, step: Step, before: Step, names: set[str], stride: int
) -> None:
    seen: list[str] = []
    for last in range(0, 200, stride):
        place = tmp_path / str(last)
        before(place / "out")
        old = content(place)
        ended = Dying(step, place / "out").run(last)
        if step is write_folder and way == "exchanged":
            # Not even for a moment is it anything else.
            assert {each: text for each, text in content(place).items() if each.startswith("out")} in (
                old,
                dict.fromkeys(names, "new"),
            )
        # The next run begins with this, whatever it then does.
        with claim(place / "out"):
            pass
        found = content(place)
        assert found in (old, dict.fromkeys(names, "new")), (last, found)
        seen.append("new" if "new" in found.values() else "old")
        step(place / "out")
        assert content(place) == dict.fromkeys(names, "new")
        assert sorted(each.name for each in place.iterdir() if each.name.startswith(".")) == []
        if ended:
            break
    assert len(seen) > 20 / stride
    # First always the old one, from one moment on always the new one.
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}


def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not outputs._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("the system cannot")
    assert content(tmp_path) == {"a/file": "b", "b/file": "a"}
    with pytest.raises(OSError, match="No such file"):
        outputs._exchange(tmp_path / "a", tmp_path / "none")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with new_file(tmp_path / "deep" / "file") as temporary:
        temporary.write_text("one")
        temporary.chmod(0o600)
    assert (tmp_path / "deep" / "file").read_text() == "one"
    (tmp_path / "usual").touch()
    assert (tmp_path / "deep" / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def fail() -> None:
        with new_file(tmp_path / "deep" / "file") as temporary:
            temporary.write_text("two")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(tmp_path / "deep") == {"file": "one"}


def test_files_of_a_folder_are_not_their_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with new_folder(tmp_path / "out", overwrite=False) as partial:
        (partial / "plan.json").touch(0o600)
    assert (tmp_path / "out" / "plan.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some space or choose another --out"),
        (OSError(13, "Permission denied"), "Permission denied; choose another --out"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470"),
            "torch could not write all of it; free some space or choose another --out",
        ),
    ],
    ids=["full", "not allowed", "torch's"],
)
def test_one_sentence_for_what_cannot_be_written(error: Exception, sentence: str) -> None:
    with pytest.raises(InputError) as found, writing(Path("out")):
        raise error
    assert str(found.value) == f"cannot write out: {sentence}"
    with pytest.raises(RuntimeError, match="of another kind"), writing(Path("out")):
        raise RuntimeError("of another kind")


def test_torchs_and_safetensors_own_errors_are_known(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensor = torch.zeros(100_000)
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    for save in (
        lambda: torch.save(tensor, "/dev/full"),
        lambda: save_file({"x": tensor}, tmp_path / "none" / "file"),
    ):
        sentence = r"^cannot write out: .*; free some space or choose another --out$"
        with pytest.raises(InputError, match=sentence), writing(Path("out")):
            save()


HOLD = """
import sys, time
from pathlib import Path
from compress.files.outputs import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_says_who_holds_it_and_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    before = time.strftime("%Y-%m-%d %H:%M:%S")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError) as error, new_folder(out, overwrite=True):
            pass
    finally:
        process.kill()
        process.communicate()
    said = re.fullmatch(
        rf"{re.escape(str(out))} is being written by another run: process (\d+), since (.*); wait for that to end, or "
        "choose another --out",
        str(error.value),
    )
    assert said is not None, error.value
    assert int(said[1]) == process.pid
    assert before <= said[2] <= time.strftime("%Y-%m-%d %H:%M:%S")
    assert (out.parent / ".out.lock").exists(), "kill -9 leaves the file"
    with claim(out):
        assert (out.parent / ".out.lock").exists()
    assert list(out.parent.iterdir()) == []
    with claim(tmp_path / "other" / "out"):
        pass
    assert not (tmp_path / "other").exists(), "it was made for the lock alone"


def test_what_holds_a_place_may_claim_it_again_and_nobody_else(tmp_path: Path) -> None:
    @claims("out")
    def verb(first: int, out: Path | None = None) -> int:
        if out is not None:
            with pytest.raises(InputError, match=f"process {os.getpid()}, since"):
                lock._acquire(tmp_path / ".out.lock", out)
            write_folder(out)
            assert (tmp_path / ".out.lock").exists()
        return first

    assert verb(3, tmp_path / "out") == 3
    assert verb(4) == 4
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_refused(tmp_path: Path, there: bool) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "real")
    if there:
        old_folder(tmp_path / "real")
    with pytest.raises(InputError, match=r"--out .*out is a symbolic link, to .*real; give the name that it leads to"):
        write_folder(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"knows no locks: see to it that no other run writes there"):
        write_folder(tmp_path / "out")
    assert content(tmp_path) == dict.fromkeys(FOLDER, "new")


def test_what_is_kept_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_kept", [])
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "fingerprint").touch()
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not kept()
    (work / "layer.safetensors").touch()
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "out"):
        raise KeyboardInterrupt
    assert kept()


def test_names_that_are_none(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        for name in (".", "..", "a/.."):
            with pytest.raises(InputError, match="is the current folder or one around it"), claim(Path(name)):
                pass
    with pytest.raises(InputError, match="File name too long; choose another --out"), claim(tmp_path / ("x" * 252)):
        pass
