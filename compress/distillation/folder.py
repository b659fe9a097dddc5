"""What distillation writes: a folder with the set, a sheet to look at, and a report.

``distilled.npz`` is plain NumPy: ``images`` [n, C, H, W] float32 as the model takes them (so that ``--calib`` takes the
file as it is), ``labels`` [n] int64, ``step_size`` (to train on the set with, at ``momentum``: the learned one or a
usual one, whichever networks became better with), ``learned_step_size``, ``mean`` and ``std`` [C] (the network of
distillation saw z = (images - mean) / std), ``provenance``, a hash of data, network, experts and settings. Where they
were given, ``data_mean`` and ``data_std`` are the ``--mean`` and ``--std`` that made ``images`` of the user's. With ZCA
the network saw (z - centre) @ whitening, z flattened: ``centre`` [C * H * W], ``whitening`` [C * H * W, C * H * W].
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from compress.data.distilled import Normalisation
from compress.distillation.neighbours import Neighbours
from compress.distillation.sheet import write_sheet
from compress.distillation.standardisation import Standardisation
from compress.errors import InputError
from compress.files.known_folders import SET_FILE
from compress.files.outputs import check_folder, new_folder
from compress.records.environment import Environment
from compress.records.layers import Record

__all__ = ["REPORT_FILE", "DistillReport", "Fitted", "refuse_existing", "work_folder", "write_folder"]

REPORT_FILE = "distill.json"
_VERB = "compress distill"


class Fitted(Record):
    """What the last steps, on a model's terms alone, have changed."""

    steps: int
    distance: tuple[float, float] = Field(description="to BatchNorm's statistics, before and after")
    logits: tuple[float, float] = Field(description="to the real images' mean logits, before and after")
    moved: float = Field(description="images, in standard deviations of the data, root mean square")
    accuracy: float | None = Field(description="of networks trained on the set as it is now; None: it was not judged")


class DistillReport(Record):
    """How a set came about and what it is worth."""

    schema_version: int = 1
    classes: int
    each: int = Field(description="images a class")
    method: str = Field(description="ast or mtt")
    provenance: str
    step_size: float = Field(description="to train on the set with: the learned one or a usual one, the better of both")
    learned_step_size: float | None = Field(None, description="as learned; None: an older version's")
    iteration: int = Field(description="the iterate that was kept; 0: the real images of the start")
    scores: dict[int, float] = Field(description="accuracy of networks trained on the set, by iteration")
    judged: str = Field("", description="the images that scores are of; empty: no set was judged")
    losses: tuple[float, ...] = Field(description="L_out by iteration")
    matching: tuple[float, ...] = Field(description="L_TM by iteration")
    expert_accuracies: tuple[float, ...] = Field(description="on their own training images")
    model_accuracy: float | None = Field(None, description="of the model that the set suits, on the real images")
    model_distance: float | None = Field(
        None, description="of the real images to its BatchNorm statistics, as the set's is minimised; None: it has none"
    )
    fitted: Fitted | None = Field(None, description="the set's last steps, on the model's terms alone")
    seconds_per_100: float | None = Field(description="of this run's iterations, judging left out; None: all were done")
    neighbours: Neighbours
    settings: dict[str, object]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = Field((), description="what makes the set as sensitive as the originals")
    environment: Environment


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse what is there, before any work is done.

    Raises:
        InputError: ``out`` exists, or is to be replaced and is not a folder that distillation wrote, or is the current
            folder or one around it.
    """
    check_folder(out, overwrite, REPORT_FILE, _VERB)


def work_folder(out: Path) -> Path:
    """Beside ``out``: where the state of a run is kept until the run is done.

    Raises:
        InputError: there is a file of this name.
    """
    work = out.with_name(f".{out.name}.work")
    if work.exists() and not work.is_dir():
        raise InputError(f"{work} is a file, and a folder of this name keeps the state; move it, or give another --out")
    return work


def write_folder(
    out: Path,
    images: Tensor,
    labels: Tensor,
    momentum: float,
    standardisation: Standardisation,
    given: Normalisation,
    report: DistillReport,
    low: float,
    high: float,
    *,
    overwrite: bool,
) -> None:
    """Write ``out``, whole or not at all, in the place of what was there; ``images`` as the model takes them.

    Args:
        given: what made the real images such.

    Raises:
        InputError: as :func:`refuse_existing`, or there is no room.
    """
    more: dict[str, Any] = {}
    if report.learned_step_size is not None:
        more["learned_step_size"] = np.float32(report.learned_step_size)
    if standardisation.centre is not None and standardisation.matrix is not None:
        more |= {"centre": standardisation.centre.numpy(), "whitening": standardisation.matrix.numpy()}
    more |= {f"data_{name}": np.array(numbers) for name, numbers in asdict(given).items() if numbers is not None}
    with new_folder(out, overwrite, REPORT_FILE, _VERB) as partial:
        np.savez(
            partial / SET_FILE,
            images=images.numpy().astype(np.float32),
            labels=labels.numpy().astype(np.int64),
            step_size=np.float32(report.step_size),
            **more,
            momentum=np.float32(momentum),
            mean=standardisation.mean.numpy(),
            std=standardisation.std.numpy(),
            provenance=np.array(report.provenance),
        )
        write_sheet(partial / "distilled.png", images, report.each, low, high)
        (partial / REPORT_FILE).write_text(report.model_dump_json(indent=1) + "\n")
