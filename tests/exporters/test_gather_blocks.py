"""Embeddings in the file, number by number: what is stored, what comes out of a look-up, what ids may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compress.data.samples import load_samples
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.session import open_session
from compress.graph.traced import TracedModel
from compress.intake.model import take_in

WORDS = 90
Quickly = Callable[..., TracedModel]
Numbers = np.ndarray[Any, Any]


class Rows(nn.Module):
    """Token ids [N, L] to rows of the table [N, L, width], and to [N, L, 3]."""

    def __init__(self, width: int, words: int = WORDS, padding: int | None = None) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(words, width, padding_idx=padding), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.words(ids)
        return rows, self.head(rows)


class Tables(nn.Module):
    """Two tables of different widths, one of them too small; one behind arithmetic on the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.letters = nn.Embedding(WORDS, 48), nn.Embedding(2, 48), nn.Embedding(30, 32)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.words(ids) + self.kinds(ids % 2), self.letters(ids % 30)


def ids_of(count: int, length: int = 6) -> Tensor:
    return torch.randint(0, WORDS, (count, length))


def exported(traced: TracedModel, folder: Path) -> tuple[onnx.GraphProto, ort.InferenceSession]:
    write_onnx(build_onnx(traced), folder / "model.onnx", {})
    return onnx.load(folder / "model.onnx").graph, open_session(folder / "model.onnx", "ORT_ENABLE_ALL")


def looked_up(session: ort.InferenceSession, ids: Tensor | Numbers) -> list[Numbers]:
    given = ids.numpy() if isinstance(ids, Tensor) else ids
    return list(session.run(None, {session.get_inputs()[0].name: given}))


def plain_table(graph: onnx.GraphProto, lookup: onnx.NodeProto, width: int) -> Numbers:
    """The floats that a table's codes stand for, [rows, width], one number at a time."""
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    codes, scale, zero = (tensors[lookup.input[position]] for position in (0, 2, 3))
    settings = {each.name: each.i for each in lookup.attribute}
    per_byte = 8 // settings["bits"]

    def code(row: Numbers, position: int) -> int:
        byte = int(row[position // per_byte])
        return byte >> settings["bits"] * (position % per_byte) & (1 << settings["bits"]) - 1

    found = np.empty((len(codes), width), np.float32)
    for row in range(len(codes)):
        for column in range(width):
            group = column // settings["block_size"]
            found[row, column] = (code(codes[row], column) - code(zero[row], group)) * scale[row, group]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "width"), [(4, 16), (4, 48), (4, 64), (8, 48)])
def test_a_look_up_is_the_row_that_the_stored_codes_stand_for(
    bits: int, width: int, compress_quickly: Quickly, tmp_path: Path
) -> None:
    module = Rows(width)
    traced = compress_quickly(module.eval(), ids_of(16), bits=bits, first_last_bits=bits, ignore=("head",))
    graph, session = exported(traced, tmp_path)
    (lookup,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    table = plain_table(graph, lookup, width)
    for count, length in ((1, 1), (1, 300), (40, 2)):
        ids = ids_of(count, length)
        rows, heads = looked_up(session, ids)
        assert rows.shape == (count, length, width)
        assert np.allclose(rows, table[ids.numpy()], atol=1e-6)
        with torch.no_grad():
            wanted = traced.module(ids)
        assert np.allclose(rows, wanted[0].numpy(), atol=1e-6)
        assert np.allclose(heads, wanted[1].numpy(), atol=1e-5)
    float_table = module.words.weight.detach().numpy()
    assert np.linalg.norm(table - float_table) < (0.006 if bits == 8 else 0.1) * np.linalg.norm(float_table)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("bits", "share"), [(4, 0.2), (8, 0.33)])
def test_the_file_is_as_small_as_its_codes(bits: int, share: float, compress_quickly: Quickly, tmp_path: Path) -> None:
    words, width = 1500, 64
    module, ids = Rows(width, words).eval(), ids_of(16)
    traced = compress_quickly(module, ids, bits=bits, first_last_bits=bits, ignore=("head",))
    write_onnx(build_onnx(traced), tmp_path / "small.onnx", {})
    write_onnx(build_onnx(take_in(module, samples=load_samples(ids)).traced), tmp_path / "float.onnx", {})
    small, whole = ((tmp_path / name).stat().st_size for name in ("small.onnx", "float.onnx"))
    groups = width // 32
    # Codes, a float scale a group, and zero points of as many bits as a code, in whole bytes a row.
    stored = words * (width * bits // 8 + 4 * groups + -(-groups * bits // 8))
    assert stored < small < stored + 4000
    assert small < share * whole


def test_every_table_on_its_own(compress_quickly: Quickly, tmp_path: Path) -> None:
    module = Tables().eval()
    traced = compress_quickly(module, ids_of(16), bits=4, first_last_bits=4)
    graph, session = exported(traced, tmp_path)
    operators = [node.op_type for node in graph.node]
    assert (operators.count("GatherBlockQuantized"), operators.count("Gather")) == (2, 1)
    blocks = {each.i for node in graph.node for each in node.attribute if each.name == "block_size"}
    assert blocks == {16, 32}, "48 is no multiple of 32"
    ids = ids_of(5, 9)
    with torch.no_grad():
        for got, wanted, plain in zip(looked_up(session, ids), traced.module(ids), module(ids), strict=True):
            assert np.allclose(got, wanted.numpy(), atol=1e-6)
            assert np.linalg.norm(got - plain.numpy()) < 0.12 * np.linalg.norm(plain.numpy())


def test_a_row_of_zeros_for_padding_stays_one(compress_quickly: Quickly, tmp_path: Path) -> None:
    module = Rows(32, padding=3)
    traced = compress_quickly(module.eval(), ids_of(16), bits=4, first_last_bits=4, ignore=("head",))
    _, session = exported(traced, tmp_path)
    assert not looked_up(session, torch.full((2, 4), 3))[0].any()


def test_ids_out_of_range_get_no_words_row(compress_quickly: Quickly, tmp_path: Path) -> None:
    """PyTorch refuses them; ONNX Runtime may refuse them or give zeros, but never what is stored behind the table."""
    traced = compress_quickly(Rows(32).eval(), ids_of(16), bits=4, first_last_bits=4, ignore=("head",))
    _, session = exported(traced, tmp_path)
    assert looked_up(session, np.array([[0, WORDS - 1]]))[0].any(-1).all()
    for wrong in (WORDS, WORDS + 1, 10**6, 2**40, -WORDS - 1):
        with pytest.raises(IndexError):
            traced.module(torch.tensor([[wrong]]))
        try:
            rows = looked_up(session, np.array([[wrong]]))[0]
        except ort.capi.onnxruntime_pybind11_state.InvalidArgument:
            continue
        assert not rows.any(), wrong
