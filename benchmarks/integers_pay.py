"""Where integers pay: integer and float operators of ONNX Runtime, one thread, batch 1, all of a kind in turn.

``python -m benchmarks.integers_pay`` measures the machine at hand, puts what it finds into
``compress/quant/instruction_sets.json``, and writes that set's table to ``benchmarks/results/integers-SET.md``.
``--as-avx2`` hides AVX-512 from ONNX Runtime first (benchmarks/mask_cpuid.c): its AVX2 kernels, on this processor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.accuracy import RESULTS
from compress.measure.latency_table import Operator
from compress.measure.machine import describe_environment
from compress.measure.operators import Shape, Variant, time_operators
from compress.progress import silent
from compress.quant.instruction_sets import DATA_FILE, InstructionSet, Measurement, Speed, instruction_sets
from compress.quant.targets import find_target
from compress.records.layers import QuantOption

# Output sizes of a convolution by its channels, as networks have them.
SIZES = {8: (112, 56, 28), 16: (112, 56, 28), 32: (56, 28), 64: (56, 28), 128: (28, 14), 256: (14, 7), 512: (14, 7)}
LENGTHS = {8: (1024,), 16: (1024,), 32: (256,), 64: (256,), 128: (64,), 256: (64,)}
FEATURES = (16, 64, 256, 768)
MANY_ROWS = 128
GROUPS = 4
IMAGE = "conv of an image"
STEM_MOST = 64  # channels behind an image
MASKED = "COMPRESS_BENCHMARK_MASKED"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as-avx2", action="store_true")
    arguments = parser.parse_args()
    if arguments.as_avx2 and MASKED not in os.environ:
        sys.exit(run_masked())
    environment = describe_environment()
    flags = tuple(each for each in environment.cpu_flags if not (arguments.as_avx2 and each.startswith("avx512")))
    name = set_of(flags)
    speeds = [speed for kind, shapes in grid().items() for speed in measure(kind, shapes)]
    hidden = ", AVX-512 hidden" if arguments.as_avx2 else ""
    measurement = Measurement(
        processor=environment.cpu + hidden,
        flags=flags,
        onnxruntime=str(environment.onnxruntime),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        source="python -m benchmarks.integers_pay" + (" --as-avx2" if arguments.as_avx2 else ""),
        speeds=tuple(speeds),
    )
    sets = with_measurement(instruction_sets(), name, measurement)
    content = {each: found.model_dump(mode="json") for each, found in sets.items()}
    DATA_FILE.write_text(json.dumps(content, indent=1) + "\n")
    for each, found in sets.items():
        (RESULTS / f"integers-{each}.md").write_text(table(found))


def run_masked() -> int:
    """This benchmark again, in a process that does not see AVX-512; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "mask.so"
        source = Path(__file__).with_name("mask_cpuid.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        command = [sys.executable, "-m", "benchmarks.integers_pay", *sys.argv[1:]]
        environment = {**os.environ, "LD_PRELOAD": str(library), MASKED: "1"}
        return subprocess.run(command, env=environment, check=False).returncode


def set_of(flags: Sequence[str]) -> str:
    """The instruction set that a processor with ``flags`` belongs to."""
    if "asimd" in flags:
        return "arm"
    return "vnni" if {"avx512_vnni", "avx_vnni"} & {*flags} else "avx2"


def grid() -> dict[str, list[Shape]]:
    """The shapes of each kind of layer."""
    found: dict[str, list[Shape]] = {}
    for channels, sizes in SIZES.items():
        for size in sizes:
            if channels <= STEM_MOST:
                found.setdefault(IMAGE, []).append(_conv(channels, 3, 3, size))
            found.setdefault("conv 3x3", []).append(_conv(channels, channels, 3, size))
            found.setdefault("conv 1x1", []).append(_conv(channels, channels, 1, size))
            found.setdefault("depthwise conv", []).append(_conv(channels, channels, 3, size, channels))
            found.setdefault("grouped conv", []).append(_conv(channels, channels, 3, size, GROUPS))
    for channels, lengths in LENGTHS.items():
        for length in lengths:
            for kind, groups in (("conv1d", 1), ("grouped conv1d", GROUPS)):
                rest = ((1,), (1,), (1,), groups)
                weight, given = (channels, channels // groups, 3), (1, channels, length)
                found.setdefault(kind, []).append(Shape("conv1d", weight, rest, True, "relu", given))
    for features in FEATURES:
        for rows, given in (("one row", (1, features)), ("many rows", (1, MANY_ROWS, features))):
            shape = Shape("linear", (features, features), (), True, None, given)
            found.setdefault(f"linear, {rows}", []).append(shape)
            found.setdefault(f"dynamic linear, {rows}", []).append(shape)
    return found


def measure(kind: str, shapes: Sequence[Shape]) -> list[Speed]:
    """One row for each number of channels: of several sizes that at which integers do best.

    What stands behind a first convolution quantizes its output: a 1x1 convolution, as large, is timed beside it.
    """
    option = QuantOption(bits=8, act_bits=8, dynamic=kind.startswith("dynamic"))
    variants = [
        Variant(QuantOption(bits=8, symmetric=False), "float-weights"),
        Variant(option, "dynamic" if option.dynamic else "integer"),
    ]
    behind = [_conv(shape.weight[0], shape.weight[0], 1, shape.input[-1]) for shape in shapes if kind == IMAGE]
    rows = time_operators([*shapes, *behind], find_target("onnx-cpu"), 1, silent, variants=variants)
    floats, integers = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    following = integers[len(shapes) :] if behind else integers  # else a layer like itself
    found: dict[int, list[tuple[float, float, float]]] = {}
    for shape, plain, quantized, after in zip(shapes, floats, integers, following, strict=False):
        print(f"{kind}, {shape.signature}: {_times(plain)} float, {_times(quantized)} integers", flush=True)
        found.setdefault(shape.weight[0], []).append(ratios(shape, plain, quantized, after))
    channels = [*found]
    return [
        Speed(
            kind=kind,
            least=least if number else 1,
            below=channels[number + 1] if number + 1 < len(channels) else None,
            alone=round(max(each[0] for each in found[least]), 2),
            placed=round(max(each[1] for each in found[least]), 2),
            leading=None if "linear" in kind else round(max(each[2] for each in found[least]), 2),
        )
        for number, least in enumerate(channels)
    ]


def ratios(shape: Shape, plain: Operator, quantized: Operator, after: Operator) -> tuple[float, float, float]:
    """Float time over integer time: of the kernels, as they stand in a network, and first in it.

    A float convolution among integer ones changes numbers and memory layout on both sides; an integer linear among
    float layers quantizes its input.
    """
    changes = quantized.enter_us + quantized.leave_us
    if shape.kind == "linear":
        placed = plain.layer_us / (quantized.layer_us + changes)
        return plain.layer_us / quantized.layer_us, placed, placed
    island = plain.layer_us + plain.enter_us + plain.leave_us + changes
    first = (plain.layer_us + plain.leave_us + after.enter_us) / (quantized.enter_us + quantized.layer_us)
    return plain.layer_us / quantized.layer_us, island / quantized.layer_us, first


def with_measurement(
    sets: Mapping[str, InstructionSet], name: str, measurement: Measurement
) -> dict[str, InstructionSet]:
    """``sets`` with ``measurement`` in the place of an older one of that processor."""
    old = [
        each
        for each in sets[name].measurements
        if (each.processor, each.flags, each.source) != (measurement.processor, measurement.flags, measurement.source)
    ]
    return {**sets, name: sets[name].model_copy(update={"measurements": (*old, measurement)})}


def table(found: InstructionSet) -> str:
    """Everything that is known of one instruction set."""
    lines = [f"# Where integers pay: {found.title}", ""]
    if not found.measurements:
        return "\n".join([*lines, "Not measured: there was no such machine. Nothing is left float for its sake.", ""])
    lines += [
        "Float time over integer time on one thread, batch 1, W8A8: above 1 integers are faster. `alone`: the two",
        "kernels. `placed`: with what a change of numbers costs, a float convolution among integer layers (two casts",
        "and two changes of the memory layout), an integer linear among float ones (its input is quantized). `first`:",
        "a model's first convolution, with the casts and changes of layout around it. Of several sizes that at which",
        "integers do best. Figures are of the channels or features that a row begins with. Empty: not measured.",
        "",
    ]
    for number, each in enumerate(found.measurements, 1):
        flags = ", ".join(each.flags)
        where = f"{each.processor} ({flags}), onnxruntime {each.onnxruntime}"
        lines += [f"{number}. {where}, {each.date}: {each.source}", ""]
    heads = "".join(
        f" {number}: alone | {number}: placed | {number}: first |" for number in range(1, len(found.measurements) + 1)
    )
    lines += [f"| kind | output channels |{heads}", "|---|---|" + "---|" * (3 * len(found.measurements))]
    known = {(speed.kind, speed.least, speed.below): None for each in found.measurements for speed in each.speeds}
    for kind, least, below in sorted(known, key=lambda key: (key[0], key[1], key[2] or math.inf)):
        cells = ""
        for each in found.measurements:
            keys = {(speed.kind, speed.least, speed.below): speed for speed in each.speeds}
            speed = keys.get((kind, least, below))
            cells += f" {_ratio(speed.alone if speed else None)} | {_ratio(speed.placed if speed else None)} |"
            cells += f" {_ratio(speed.leading if speed else None)} |"
        lines.append(f"| {kind} | {least}{f' to {below - 1}' if below else ' and more'} |{cells}")
    return "\n".join([*lines, ""])


def _conv(outputs: int, inputs: int, kernel: int, size: int, groups: int = 1) -> Shape:
    rest = ((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    weight = (outputs, inputs // groups, kernel, kernel)
    return Shape("conv2d", weight, rest, True, "relu", (1, inputs, size, size))


def _times(row: Operator) -> str:
    return f"{row.layer_us:.1f} (+{row.enter_us:.1f} +{row.leave_us:.1f}) us"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
