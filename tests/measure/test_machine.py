from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from pydantic import ValidationError

from compress.measure import machine
from compress.measure.machine import describe_environment, parse_cpuinfo
from compress.records.environment import Environment

X86 = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd40\n"


def test_names_machine_and_versions() -> None:
    environment = describe_environment()
    assert environment.cpu
    assert environment.usable_cpus >= 1
    assert environment.memory_bytes > 1 << 20
    assert environment.python.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert environment.onnx == metadata.version("onnx")
    assert environment.torch == metadata.version("torch")


def test_is_frozen_and_round_trips() -> None:
    environment = describe_environment()
    assert Environment.model_validate_json(environment.model_dump_json()) == environment
    with pytest.raises(ValidationError, match="frozen"):
        environment.cpu = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (X86, "Some CPU @ 2.00GHz", ("avx2", "avx512f", "avx512_vnni", "amx_int8")),
        (ARM, None, ("asimd", "asimddp", "i8mm")),
        ("", None, ()),
    ],
    ids=["x86", "arm", "empty"],
)
def test_reads_cpuinfo(text: str, name: str | None, flags: tuple[str, ...]) -> None:
    assert parse_cpuinfo(text) == (name, flags)


def test_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", missing)
    environment = describe_environment()
    assert (environment.torch, environment.onnxruntime) == (None, None)


def test_any_onnxruntime_package_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_gpu(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "9.9"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", only_gpu)
    assert describe_environment().onnxruntime == "9.9"


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys; from compress.measure.machine import describe_environment; describe_environment();"
        "assert not {'torch', 'onnxruntime', 'onnx', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
