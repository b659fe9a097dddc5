"""From a Hugging Face folder to one whose linears are packed, without the model ever being in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.calib.resume import ResumeStore, open_store
from compress.data.samples import Samples, load_samples
from compress.data.text import check_length
from compress.errors import InputError
from compress.files.cache import digest
from compress.files.digests import file_digests
from compress.files.known_folders import PLAN_FILE, REPORT_FILE
from compress.files.outputs import check_folder, claims, new_folder
from compress.measure.isolated import peak_bytes
from compress.measure.machine import describe_environment
from compress.models.weightfiles import INDEX
from compress.progress import Progress, Tally, silent
from compress.quant.methods import METHODS
from compress.records.layers import QuantOption
from compress.records.plan import Choice, Plan
from compress.records.registry import resolve
from compress.records.report import StreamedLayer, StreamReport
from compress.streaming.blocks import BlockModel, open_blocks
from compress.streaming.packed import quantization_config
from compress.streaming.walk import BlockWalk

__all__ = ["stream"]

_FORMAT = "pack-quantized"
_BATCH_TOKENS = 4096
_WIDTHS = (2, 3, 4, 5, 6, 8)


class _EnoughError(Exception):
    """As many blocks as were asked for are done."""


@claims("out")
def stream(
    model: str | Path,
    out: str | Path,
    *,
    calib: object | None = None,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    method: str | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    blocks: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> StreamReport:
    """Quantize the linears of all blocks of the model in ``model`` and write the folder ``out``.

    Args:
        calib: text or token ids; None for methods that need none.
        method: None: ``gptq`` with data, ``mse`` without.
        samples: of ``calib``, at most.
        length: tokens of a sample of text.
        blocks: stop after so many, for a trial; nothing is written but what a further run continues with.

    Raises:
        InputError: the folder, the data or an option cannot be used; or another run's blocks are there.
    """
    started = time.monotonic()
    model, out = Path(model), Path(out)
    method = method or ("gptq" if calib is not None else "mse")
    check_length(length, calib)
    _check(out, overwrite, bits, group_size, method, calib, blocks)
    opened = open_blocks(model)
    _check_groups(opened, group_size)
    data = _read(opened, calib, samples, length, seed)
    option = QuantOption(bits=bits, group_size=group_size, symmetric=symmetric)
    job = _Job(model, opened, data, option, method, seed)
    run = _Run(job, started, progress)
    try:
        with open_store(out.with_name(f".{out.name}.work"), digest(job.parts), job.parts, restart=overwrite) as store:
            run.quantize(store, blocks)
            report = run.report()
            with new_folder(out, overwrite) as folder:
                report = _write(folder, job, store, report)
    except _EnoughError:
        return run.report()
    return report


@dataclass(frozen=True)
class _Job:
    """What is quantized, on what data, and how; ``folder`` is where ``model`` is from."""

    folder: Path
    model: BlockModel
    data: Samples | None
    option: QuantOption
    method: str
    seed: int

    @cached_property
    def parts(self) -> dict[str, str]:
        """What makes a run another one."""
        return {
            "the model": _fingerprint(self.folder),
            "the calibration data": self.data.fingerprint[:12] if self.data is not None else "none",
            "bits": str(self.option),
            "symmetric": str(self.option.symmetric),
            "method": self.method,
            "seed": str(self.seed),
            "versions": f"compress {version('compress-toolchain')}, torch {torch.__version__}",
        }

    def walk(self, store: ResumeStore) -> BlockWalk:
        """At the first block."""
        batches = _batches(self.model, self.data) if self.data is not None else None
        return BlockWalk(self.model, self.option, self.method, batches, store, self.seed)


class _Run:
    """How far a job is, and what has come of it."""

    def __init__(self, job: _Job, started: float, progress: Progress) -> None:
        self.job, self._started, self._continued = job, started, 0
        self._tally = Tally(progress, job.model.count * len(job.model.linears()))
        self._layers: list[StreamedLayer] = []
        self._seconds: list[float] = []

    def quantize(self, store: ResumeStore, blocks: int | None) -> None:
        """Do all blocks that an earlier run has left.

        Raises:
            _EnoughError: there are more than ``blocks`` of them; so many are done.
        """
        model = self.job.model
        walk = self.job.walk(store)
        self._tally.say("what stands before the blocks")
        self._continued = walk.begin()
        self._tally.count = self._continued * len(model.linears())
        for number in range(self._continued, model.count):
            if blocks is not None and number - self._continued >= blocks:
                raise _EnoughError
            begun = time.monotonic()
            outcomes = walk.quantize_block(number, self._tally.add)
            self._layers += [StreamedLayer(**vars(each)) for each in outcomes]
            self._seconds.append(time.monotonic() - begun)
        self._tally.finish("writing")

    def report(self) -> StreamReport:
        """Of what was done so far."""
        job, seconds = self.job, self._seconds
        return StreamReport(
            model=str(job.folder),
            option=str(job.option),
            method=job.method,
            blocks=job.model.count,
            continued=self._continued,
            layers=tuple(self._layers),
            seconds_a_block=round(sum(seconds) / len(seconds), 3) if seconds else None,
            seconds=round(time.monotonic() - self._started, 3),
            peak_memory_bytes=peak_bytes(),
            notes=job.data.notes if job.data is not None else (),
            environment=describe_environment(),
        )


def _check(
    out: Path, overwrite: bool, bits: int, group_size: int | None, method: str, calib: object | None, blocks: int | None
) -> None:
    if bits not in _WIDTHS:
        raise InputError(f"--bits {bits}: the format {_FORMAT} is written with {', '.join(map(str, _WIDTHS))}")
    if group_size is not None and group_size < 16:
        raise InputError(f"--group-size {group_size}: 16 or more, or 0 for a grid a row")
    found = resolve(METHODS, method, "method")
    if not found.grouped:
        raise InputError(f"--method {method} does not work block by block; choose minmax, mse, hqq or gptq")
    if found.needs_data and calib is None:
        raise InputError(f"--method {method} needs calibration data: give --calib, or choose --method mse")
    if blocks is not None and blocks < 1:
        raise InputError(f"--blocks {blocks}: 1 or more")
    check_folder(out, overwrite)


def _check_groups(model: BlockModel, group_size: int | None) -> None:
    for name, part in model.linears().items():
        if group_size and part.in_features % group_size:
            raise InputError(
                f"--group-size {group_size}: the rows of {name} have {part.in_features} weights, which is no multiple "
                "of it"
            )


def _read(model: BlockModel, calib: object | None, samples: int, length: int | None, seed: int) -> Samples | None:
    if calib is None:
        return None
    found = load_samples(
        calib, limit=samples, seed=seed, parameters=model.text.positional, text=model.text, length=length
    )
    model.text.check_ids(found.inputs[0], found.source)
    return found


def _batches(model: BlockModel, samples: Samples) -> list[dict[str, Tensor]]:
    names = samples.names or model.text.positional[: len(samples.inputs)]
    size = max(_BATCH_TOKENS // samples.inputs[0].shape[1], 1)
    return [dict(zip(names, batch, strict=True)) for batch in samples.batches(size)]


def _fingerprint(folder: Path) -> str:
    """Of all files that make the model what it is."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            found.update(path.name.encode())
            with path.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def _write(folder: Path, job: _Job, store: ResumeStore, report: StreamReport) -> StreamReport:
    """Everything into ``folder``; the report with the hashes of it."""
    model, option = job.model, job.option
    files = model.count + 1
    names = [f"model-{number + 1:05d}-of-{files:05d}.safetensors" for number in range(files)]
    others = model.shards.read(model.others())
    save_file(others, folder / names[0], {"format": "pt"})
    index = dict.fromkeys(others, names[0])
    for number in range(model.count):
        store.link(f"block{number}", folder / names[number + 1])
        index |= dict.fromkeys(_names(folder / names[number + 1]), names[number + 1])
    size = sum((folder / name).stat().st_size for name in names)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1))
    linears = [f"{model.block_name(number)}{name}" for number in range(model.count) for name in model.linears()]
    ignored = [name for name, part in model.skeleton.named_modules() if _is_outside(model, name, part)]
    settings = model.settings | {
        "quantization_config": quantization_config(option.bits, option.group_size, option.symmetric, ignored)
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    plan = Plan(
        choices=tuple(Choice(layer=name, method=job.method, option=option, format=_FORMAT) for name in linears),
        target="compressed-tensors",
        observer="minmax",
        iterations=0,
        seed=job.seed,
        samples=len(job.data) if job.data is not None else 0,
        model_fingerprint=job.parts["the model"],
        data_fingerprint=job.parts["the calibration data"],
    )
    (folder / PLAN_FILE).write_text(plan.model_dump_json(indent=2))
    taken = {path.name for path in folder.iterdir()} | {REPORT_FILE}
    for path in model.shards.folder.iterdir():  # the tokenizer and what else belongs to the model
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and path.name not in taken:
            shutil.copy2(path, folder / path.name)
    report = report.model_copy(update={"files": file_digests(folder)})
    (folder / REPORT_FILE).write_text(report.model_dump_json(indent=2))
    return report


def _is_outside(model: BlockModel, name: str, part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear) and not name.startswith(f"{model.path}.")


def _names(file: Path) -> list[str]:
    with safetensors.safe_open(file, framework="pt") as opened:
        return list(opened.keys())
