"""The checksums of a zip archive, which torch reads without looking at them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.errors import InputError
from compress.models.checkpoint import load_model


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_file_with_a_flipped_weight_is_refused(tmp_path: Path, suffix: str) -> None:
    weight = torch.arange(64.0)
    path = tmp_path / f"model{suffix}"
    torch.save({"weight": weight}, path)
    content = bytearray(path.read_bytes())
    place = content.index(weight.numpy().tobytes())
    content[place + 10] ^= 1  # torch reads it as it stands
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["weight"], weight)
    with pytest.raises(InputError, match=r"is truncated or damaged .*the checksum of .*data/0 is wrong"):
        load_model(path, model="torch.nn:Identity")
