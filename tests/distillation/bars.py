"""Images of bars in three classes, and a run on them that takes a second: what several tests of the whole way share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.distillation.distiller import DistillSettings
from compress.distillation.experts import ExpertSettings
from compress.distillation.folder import DistillReport
from compress.distillation.job import DistillOptions, distill

SETTINGS = DistillSettings(each=2, iterations=6, steps=4, last=2, looks=2, augmentations=("crop", "flip"))
EXPERTS = ExpertSettings(count=2, epochs=3, batch=8, rate=0.05)


def arrays() -> dict[str, np.ndarray]:
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).standard_normal((60, 1, 8, 8), np.float32)
    for number in range(3):
        images[labels == number, :, 2 * number : 2 * number + 3] += 2
    return {"images": 0.25 * images + 0.5, "labels": labels}


def run(out: Path, cache: Path, data: Any = None, progress: Any = None, **given: Any) -> DistillReport:
    options = DistillOptions(
        settings=replace(SETTINGS, **given.pop("settings", {})), experts=EXPERTS, width=4, depth=2,
        allow_originals=given.pop("allow_originals", True), hold_out=given.pop("hold_out", 0.0),
        expert_folder=given.pop("expert_folder", cache / "ast"), nets=1, judge_steps=10, every=2, **given,
    )  # fmt: skip
    return distill(data or arrays(), out, classes=3, options=options, progress=progress or (lambda *_: None))
