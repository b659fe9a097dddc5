"""A run that was stopped: nothing looks finished, the same run goes on to the same bytes, another one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import compress
from compress.errors import InputError
from compress.records.report import StreamReport
from tests.streaming.conftest import GROUP, weight_files  # type: ignore[import-not-found]

METADATA = ("config.json", "model.safetensors.index.json", "plan.json")


def stream(model: Path, out: Path, **settings: Any) -> StreamReport:
    return compress.stream(model, out, **{"bits": 4, "group_size": GROUP, **settings})


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("with_data", [False, True], ids=["weights only", "with data"])
def test_stopped_and_continued_to_the_same_bytes(with_data: bool, llama: Path, ids: Path, tmp_path: Path) -> None:
    calib = ids if with_data else None
    whole = stream(llama, tmp_path / "whole", calib=calib)
    assert whole.continued == 0

    first = stream(llama, tmp_path / "out", calib=calib, blocks=1)
    assert (first.blocks, first.continued) == (3, 0)
    assert {layer.name.split(".")[2] for layer in first.layers} == {"0"}
    assert first.layers == whole.layers[: len(first.layers)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "whole"]

    second = stream(llama, tmp_path / "out", calib=calib)
    assert second.continued == 1
    assert {layer.name.split(".")[2] for layer in second.layers} == {"1", "2"}
    assert second.layers == whole.layers[len(first.layers) :]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    files = weight_files(tmp_path / "whole")
    assert len(files) == 4
    assert weight_files(tmp_path / "out") == files
    for name in METADATA:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["continued"] == 1


@pytest.mark.slow
def test_a_block_at_a_time(llama: Path, ids: Path, tmp_path: Path) -> None:
    stream(llama, tmp_path / "whole", calib=ids)
    for number in range(3):
        assert not (tmp_path / "out").exists()
        report = stream(llama, tmp_path / "out", calib=ids, blocks=1)
        assert report.continued == number
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    assert stream(llama, tmp_path / "many", calib=ids, blocks=7).continued == 0
    assert weight_files(tmp_path / "many") == weight_files(tmp_path / "whole")


@pytest.mark.matrix
def test_two_runs_give_the_same_bytes(llama: Path, ids: Path, tmp_path: Path) -> None:
    for name in "ab":
        stream(llama, tmp_path / name, calib=ids, bits=3)
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"bits": 3}, "bits (W4g32 then, W3g32 now)"),
        ({"group_size": 16}, "bits (W4g32 then, W4g16 now)"),
        ({"symmetric": False}, "symmetric (True then, False now)"),
        ({"method": "minmax"}, "method (gptq then, minmax now)"),
        ({"seed": 5}, "seed (0 then, 5 now)"),
        ({"samples": 7}, "the calibration data ("),
    ],
    ids=str,
)
def test_another_run_is_refused_by_name(
    settings: dict[str, Any], difference: str, llama: Path, ids: Path, tmp_path: Path
) -> None:
    stream(llama, tmp_path / "out", calib=ids, blocks=1)
    before = {path.name for path in (tmp_path / ".out.work").iterdir()}
    with pytest.raises(InputError) as caught:
        stream(llama, tmp_path / "out", calib=ids, **settings)
    assert "holds 1 finished layers of another run; different: " in str(caught.value)
    assert difference in str(caught.value)
    assert str(caught.value).count(" then, ") == 1, "what is the same is not named"
    assert {path.name for path in (tmp_path / ".out.work").iterdir()} == before
    assert stream(llama, tmp_path / "out", calib=ids).continued == 1


@pytest.mark.slow
def test_overwrite_throws_another_run_away(llama: Path, ids: Path, tmp_path: Path) -> None:
    stream(llama, tmp_path / "out", calib=ids, blocks=2)
    assert stream(llama, tmp_path / "out", bits=3, overwrite=True).continued == 0
    stream(llama, tmp_path / "whole", bits=3)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    assert not (tmp_path / ".out.work").exists()


def test_another_model_is_refused(own_llama: Path, tmp_path: Path) -> None:
    stream(own_llama, tmp_path / "out", blocks=1)
    config = own_llama / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(InputError, match=r"of another run; different: the model \("):
        stream(own_llama, tmp_path / "out")


@pytest.mark.slow
def test_an_error_in_the_middle_keeps_what_is_finished(own_llama: Path, llama: Path, tmp_path: Path) -> None:
    """Here one of whoever is shown the progress; a full disk or Ctrl-C comes to the same."""

    def stop(label: str, done: int, total: int) -> None:
        if label == "model.layers.1.mlp.gate_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(own_llama, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert stream(own_llama, tmp_path / "out").continued == 1
    stream(llama, tmp_path / "whole")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


def test_progress_names_every_linear_and_ends_full(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = stream(llama, tmp_path / "out", progress=lambda *step: seen.append(step))
    names = [layer.name for layer in report.layers]
    assert [label for label, _, _ in seen] == ["what stands before the blocks", *names, "writing"]
    assert [done for _, done, _ in seen] == [*range(22), 21]
    assert {total for _, _, total in seen} == {21}
