"""Embeddings stored in groups of codes and unpacked row by row as they are looked up (GatherBlockQuantized)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import compress
from compress import api
from compress.exporters.session import open_session

WORDS = 90


class Bag(nn.Module):
    """Token ids [N, L] to [N, 3]; with ``twice`` a second look-up, at the ids backwards."""

    def __init__(self, width: int, twice: bool = False, words: int = WORDS) -> None:
        super().__init__()
        self.words, self.head, self.twice = nn.Embedding(words, width), nn.Linear(width, 3), twice

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.twice:
            x = x + self.words(ids.flip(1)).relu()
        return self.head(x.mean(1))


def compressed(module: nn.Module, out: Path, **settings: object) -> tuple[compress.Result, onnx.GraphProto]:
    ids = torch.randint(0, WORDS, (16, 6))
    result = compress.quantize(module.eval(), calib=ids, method="mse", out=out, **settings)  # type: ignore[arg-type]
    return result, onnx.load(out / "model.onnx").graph


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize(("bits", "ends"), [(8, 8), (4, 4), (3, 3)])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_the_file_looks_up_what_pytorch_looks_up(bits: int, ends: int, twice: bool, tmp_path: Path) -> None:
    module = Bag(48, twice)
    result, graph = compressed(module, tmp_path / "out", bits=bits, first_last_bits=ends)
    stored = 4 if bits <= 4 else 8
    lookups = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert len(lookups) == 1 + twice
    assert len({node.input[0] for node in lookups}) == 1, "one table"
    choice = result.report.plan.choice("words")
    assert choice is not None
    assert (str(choice.option), choice.format) == (f"W{stored}g16", "gather-blocks")
    ids = torch.randint(0, WORDS, (5, 11))
    session = open_session(tmp_path / "out" / "model.onnx", "ORT_ENABLE_ALL")
    got = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    with torch.no_grad():
        loaded = compress.load(tmp_path / "out")(ids).numpy()
        plain = module(ids).numpy()
    assert np.allclose(got, loaded, atol=1e-5)
    assert np.linalg.norm(got - plain) / np.linalg.norm(plain) < (0.03 if bits == 8 else 0.5)


@pytest.mark.slow
def test_a_tables_codes_by_hand(tmp_path: Path) -> None:
    module = Bag(32)
    with torch.no_grad():  # a grid that holds every value exactly
        module.words.weight.copy_(torch.randint(0, 16, (WORDS, 32)) * 0.25 - 2.0)
        module.words.weight[:, 0], module.words.weight[:, 16] = -2.0, -2.0
        module.words.weight[:, 1], module.words.weight[:, 17] = 1.75, 1.75
    result, graph = compressed(module, tmp_path / "out", bits=4, first_last_bits=4, ignore=("head",))
    assert result.report.layers[0].weight_error < 1e-10
    (lookup,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    codes, scale, zero = (tensors[lookup.input[k]] for k in (0, 2, 3))
    attributes = {each.name: each.i for each in lookup.attribute}
    low = np.stack([codes & 15, codes >> 4], -1).reshape(WORDS, 32).astype(np.float32)
    points = np.stack([zero & 15, zero >> 4], -1).reshape(WORDS, -1)[:, : scale.shape[1]].astype(np.float32)
    block = attributes["block_size"]
    rows = (low - points.repeat(block, 1)) * scale.repeat(block, 1)
    assert np.allclose(rows, module.words.weight.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Bag(20), "rows of 20 are no multiple of 16"),
        (Bag(32, words=8), "a table of 8 rows"),
    ],
    ids=["width", "rows"],
)
def test_what_stays_float_says_why(module: nn.Module, reason: str) -> None:
    plan = api.preview(module.eval(), calib=torch.randint(0, 8, (16, 6)), bits=8, method="mse").plan
    assert {skip.layer: skip.reason for skip in plan.skipped} == {"words": f"left float: {reason}"}


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(WORDS, 32)), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(nn.functional.embedding(ids, self.table))  # type: ignore[no-any-return]


class ReadTwice(Bag):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids) + self.words.weight[3])  # type: ignore[no-any-return]


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(WORDS, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_bare_parameter_is_a_table_too(tmp_path: Path) -> None:
    result, graph = compressed(Bare(), tmp_path / "out", bits=8)
    assert [row.name for row in result.report.layers] == ["table", "head"]
    assert "GatherBlockQuantized" in {node.op_type for node in graph.node}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("module", "reason"),
    [(ReadTwice(32), "its table is read by something else, too"), (Summed(), "embeddings that are summed")],
    ids=["read otherwise", "summed"],
)
def test_tables_that_are_more_than_looked_up_stay_float(module: nn.Module, reason: str) -> None:
    plan = api.preview(module.eval(), calib=torch.randint(0, WORDS, (16, 6)), bits=8, method="mse").plan
    assert [skip.layer for skip in plan.skipped] == ["words"]
    assert reason in plan.skipped[0].reason


@pytest.mark.slow
def test_ignored_tables_stay_float(tmp_path: Path) -> None:
    result, graph = compressed(Bag(32), tmp_path / "out", bits=8, ignore=("words",))
    assert result.report.plan.skipped[0].reason == "named by --ignore"
    assert "GatherBlockQuantized" not in {node.op_type for node in graph.node}


@pytest.mark.slow
def test_budgets_choose_a_tables_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    module = Bag(256, words=2000)  # nearly all of the file
    calib = torch.randint(0, 2000, (32, 6))
    for share, bits in ((0.5, 8), (0.2, 4)):
        out = tmp_path / f"{bits}"
        report = compress.quantize(
            module.eval(), calib=calib, budgets=f"size={share}x", method="mse", weight_widths=(4, 8), out=out
        ).report
        choice = report.plan.choice("words")
        assert choice is not None
        assert (choice.option.bits, choice.format) == (bits, "gather-blocks")
        assert report.plan.allocation is not None
        limit = share * report.plan.allocation.float_totals["size"]
        assert (out / "model.onnx").stat().st_size <= limit
        predicted, measured = (getattr(report.plan.allocation, name)["size"] for name in ("predicted", "measured"))
        assert abs(predicted - measured) < 0.01 * measured
