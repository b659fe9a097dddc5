"""The machine a measurement was made on: a latency without it says nothing.

Cheap and without torch: versions come from the installed packages' metadata, nothing heavy is imported.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from compress.records.environment import Environment

__all__ = ["TELLING_FLAGS", "describe_environment", "parse_cpuinfo"]

# Those that decide which integer or half-precision kernels run; Arm names after the x86 ones.
TELLING_FLAGS = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
# The same module comes as several packages, one per accelerator.
_ONNXRUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def describe_environment() -> Environment:
    """Return what this process runs on, in some milliseconds and without importing torch or onnxruntime."""
    import psutil

    cpu, flags = _processor()
    return Environment(
        cpu=cpu,
        cpu_flags=flags,
        architecture=platform.machine(),
        cores=psutil.cpu_count(logical=False),
        usable_cpus=_usable_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=_version("torch"),
        onnxruntime=_version(*_ONNXRUNTIME_PACKAGES),
        onnx=_version("onnx"),
        numpy=_version("numpy"),
    )


def parse_cpuinfo(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the processor's name (None on Arm, where Linux gives none) and its telling flags from /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        # The first processor speaks for all.
        fields.setdefault(key.strip().lower(), value.strip())
    present = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name") or None, tuple(flag for flag in TELLING_FLAGS if flag in present)


def _processor() -> tuple[str, tuple[str, ...]]:
    name: str | None = None
    flags: tuple[str, ...] = ()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name, flags = parse_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    elif platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return name or platform.processor() or platform.machine() or "unknown", flags


def _usable_cpus() -> int:
    # A container or taskset often grants fewer than the machine has.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
