"""The wheel: complete, alone, licensed, and typed for whoever installs it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.test_architecture import LINKS, ROOT, python_files

pytestmark = pytest.mark.slow
# Of the text as the Apache Software Foundation publishes it.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"

CONSUMER = """\
import torch

import compress

result = compress.quantize(torch.nn.Linear(4, 4), bits=4, out="folder")
reveal_type(compress.__version__)
reveal_type(result.report.size)
compress.quantize(torch.nn.Linear(4, 4), bits="four", out="folder")
compress.quantise
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git knows of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build from a checkout without links succeeds and silently leaves out both folders: only the wheel tells.
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    # safe.directory: CI may own the checkout under another user; nothing from its configuration is run here.
    git = subprocess.run(["git", "-c", "safe.directory=*", *listing], cwd=ROOT, capture_output=True, check=True)
    source = folder / "source"
    for name in git.stdout.decode().split("\0"):
        path = ROOT / name
        if name and (path.is_symlink() or path.is_file()):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    build = subprocess.run([*pip, "-w", str(folder), str(source)], capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_is_complete_and_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"compress"}
    expected = {f"compress/{path}" for path in python_files("kernels", "calib")}
    assert all(any(name.startswith(f"{link}/") for name in expected) for link in LINKS)
    expected |= {f"compress/kernels/{path.name}" for path in (ROOT / "kernels").glob("tiles-*.json")}
    expected |= {"compress/proof/gate_text.txt", "compress/quant/instruction_sets.json", "compress/py.typed"}
    assert (expected | {str(path) for path in python_files("compress")}) - names == set()


def test_wheel_holds_the_licence_and_names_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        said = Parser().parsestr(archive.read(metadata).decode())
        text = archive.read(licence)
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_all("License-File") == ["LICENSE"]
    assert hashlib.sha256(text).hexdigest() == APACHE_2
    classifiers = said.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    # With an SPDX expression there must be no classifier of a licence: the pinned setuptools refuses it.
    assert not [each for each in classifiers if each.startswith("License ::")]
    versions = {each.rpartition(" ")[2] for each in classifiers if "Python :: 3." in each}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == f">={min(versions)}"


def test_types_are_those_of_whoever_installs_it(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "installed", with_pip=False)
    (packages,) = (tmp_path / "installed" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    # Elsewhere, so that neither this checkout nor its settings are seen; torch is not there, and is not what is asked.
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "installed" / "bin" / "python")]
    mypy += ["--config-file", "", "--cache-dir", str(tmp_path / "cache"), "--ignore-missing-imports", "consumer.py"]
    found = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert 'consumer.py:6: note: Revealed type is "str"' in found.stdout, found.stdout + found.stderr
    assert 'consumer.py:7: note: Revealed type is "compress.records.report.Size"' in found.stdout, found.stdout
    wrong = [line.split(": ")[0] for line in found.stdout.splitlines() if ": error:" in line]
    assert wrong == ["consumer.py:8", "consumer.py:9"], found.stdout
