"""What a run of benchmarks.kernels has found so far, on disk after every case: JSON, and a table of it.

A case that failed is in the file with what it said. A run that was cut short, or that a kernel left without a usable
GPU, goes on behind its last case (``--from N``): machines with a GPU are lent by the minute.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["Results", "table"]

# What two halves of one run have in common.
_SAME = ("device", "dtype", "torch", "triton")


class Results:
    """Rows and failures of a run under ``header``, which says on what; written into ``folder``.

    Args:
        first: cases that an earlier run has done, whose results are kept; 0: begin anew.

    Raises:
        SystemExit: there is no such run in ``folder``, or it was another device's or another program's.
    """

    def __init__(self, folder: Path, header: dict[str, Any], first: int = 0) -> None:
        name = re.sub("[^a-z0-9]+", "-", header["device"].lower())
        suffix = "" if header["dtype"] == "bfloat16" else f"-{header['dtype']}"
        self._path = folder / f"kernels-{name}{suffix}.json"
        self.content: dict[str, Any] = header | {"rows": [], "failures": []}
        if not first:
            return
        if not self._path.is_file():
            raise SystemExit(f"--from {first}: {self._path} does not exist; leave --from out")
        earlier = json.loads(self._path.read_text(encoding="utf-8"))
        for key in _SAME:
            if earlier.get(key) != header[key]:
                raise SystemExit(f"--from {first}: {self._path} has {key} {earlier.get(key)}, here it is {header[key]}")
        self.content = earlier

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Cases that failed, those of earlier runs too."""
        found: list[dict[str, Any]] = self.content["failures"]
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Keep a case's figures."""
        self.content["rows"].append(row)
        self._write()

    def fail(self, case: str, rows: int, shape: tuple[int, int], error: BaseException) -> None:
        """Keep what a case failed of."""
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        self.failures.append({"case": case, "rows": rows, "outputs": shape[0], "inputs": shape[1], "failed": said})
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        self._path.with_suffix(".md").write_text(table(self.content), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Kernels on one {result['device']}",
        "",
        f"`{result['command']}`, torch {result['torch']}, triton {result['triton']}. Copy: "
        f"{result['copy_gb_per_s']:.0f} GB/s, read and written; matmul: {result['matmul_tflop_per_s']:.0f} TFLOP/s. "
        f"All in CUDA graphs over cold buffers; dense is torch.matmul in {result['dtype']} in the same rounds; GB/s "
        "counts the bytes of the compressed weight, TFLOP/s the operations of the dense product.",
        "",
        "| weight | outputs x inputs | rows | kernel | us | dense us | speedup | GB/s | of copy | TFLOP/s | of matmul "
        "| target |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        target = row["target"]
        if "times_beside" in row:
            target = f"{row['times_beside']:.2f}x the time without; {target}".removesuffix("; ")
        beside = [
            f"{name} {peer['times_ours']:.2f}x our time" for name, peer in row.get("peers", {}).items() if "us" in peer
        ]
        target = "; ".join(part for part in (target, *beside) if part)
        lines.append(
            f"| {row['case']} | {row['outputs']} x {row['inputs']} | {row['rows']} | {row['kernel']} | {row['us']:.1f} "
            f"| {row['dense_us']:.1f} | {row['speedup']:.2f}x | {row['gb_per_s']:.0f} "
            f"| {100 * row['share_of_copy']:.0f} % | {row['tflop_per_s']:.0f} | {100 * row['share_of_matmul']:.0f} % "
            f"| {target} |"
        )
    lines += [
        f"| {each['case']} | {each['outputs']} x {each['inputs']} | {each['rows']} | failed | | | | | | | "
        f"| {each['failed'].replace('|', '/')} |"
        for each in result["failures"]
    ]
    return "\n".join(lines) + "\n"
