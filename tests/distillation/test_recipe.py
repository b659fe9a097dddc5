"""The guide's recipe for training on a distilled set runs as it stands, and the network learns what the set is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.bars import arrays, run

GUIDE = Path(__file__).resolve().parents[2] / "docs/distillation.md"


@pytest.mark.matrix
@pytest.mark.parametrize("whiten", [False, True])
def test_training_on_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whiten: bool) -> None:
    run(tmp_path / "small", tmp_path, zca=whiten)
    code = GUIDE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code, scope)
    real = {name: torch.from_numpy(array) for name, array in arrays().items()}
    with torch.no_grad():
        classes = scope["network"](scope["seen"](real["images"])).argmax(1)
    assert float((classes == real["labels"]).float().mean()) > 0.6  # guessing: a third
