"""Samples on disk: what goes in comes out, by index, and the file goes when it is closed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.calib.spill import SpilledSamples


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
def test_samples_come_back_by_index(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randint(-(2**40), 2**40, (10, *shape)).to(dtype)
    with SpilledSamples(tmp_path / "x") as samples:
        for part in values.split(4):
            samples.append(part)
        assert len(samples) == 10
        index = torch.tensor([9, 0, 3, 3])
        taken = samples.take(index)
        assert taken.dtype == dtype
        assert torch.equal(taken, values[index])
        assert torch.equal(torch.cat(list(samples.batches(3))), values)
        assert samples.take(torch.arange(0)).shape == (0, *shape)


def test_a_strided_batch_is_stored_as_it_reads(tmp_path: Path) -> None:
    values = torch.randn(4, 3, 5).transpose(1, 2)
    with SpilledSamples(tmp_path / "x") as samples:
        samples.append(values)
        assert torch.equal(samples.take(torch.arange(4)), values)


def test_the_file_goes_on_close_and_on_an_error(tmp_path: Path) -> None:
    samples = SpilledSamples(tmp_path / "x")
    samples.append(torch.ones(2, 2))
    assert (tmp_path / "x").stat().st_size == 16
    samples.close()
    samples.close()
    assert not (tmp_path / "x").exists()
    with pytest.raises(ZeroDivisionError), SpilledSamples(tmp_path / "y"):
        _ = 1 / 0
    assert not (tmp_path / "y").exists()


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    with SpilledSamples(tmp_path / "x") as samples:
        samples.append(torch.ones(2, 2))
        with open(tmp_path / "x", "r+b") as file:
            file.truncate(12)
        assert torch.equal(samples.take(torch.tensor([0])), torch.ones(1, 2))
        with pytest.raises(OSError, match="sample 1 is not there"):
            samples.take(torch.tensor([1]))
