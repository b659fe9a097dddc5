"""A good file of every kind that the product reads, and how it is read: what tests of damage start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress import api
from compress.data.samples import load_samples
from compress.files.known_folders import FAMILY_FILE
from compress.measure.latency_table import LatencyTable, Operator, open_table
from compress.measure.machine import describe_environment
from compress.models.checkpoint import load_model
from compress.models.huggingface import open_pretrained
from compress.plans.plan_file import load_plan
from compress.runtime.artifact import load_artifact
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import read_delta, write_delta
from compress.training.lowrank.family import read_family
from compress.training.lowrank.job import LowRankOptions, truncate
from tests.forgery import forge_report

__all__ = ["KINDS", "Kind", "good_files", "net"]

NET = """
from torch import nn
def net(): return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
"""
INDEX = "model.safetensors.index.json"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


@dataclass(frozen=True)
class Kind:
    """One kind of file: where it lies in a folder of good files, and what reads it in that folder."""

    file: str
    read: Callable[[Path], object]

    @property
    def is_json(self) -> bool:
        return self.file.endswith(".json")


def _model(name: str, factory: str | None = None) -> Callable[[Path], object]:
    return lambda folder: load_model(folder / name, model=factory)


def _samples(name: str) -> Callable[[Path], object]:
    return lambda folder: load_samples(folder / name)


def _graph(folder: Path) -> object:
    forge_report(folder / "out")  # as whoever means harm would
    return load_artifact(folder / "out")


def _text(folder: Path) -> object:
    found = open_pretrained(folder / "hf").text
    assert found is not None
    return load_samples(folder / "texts.tsv", text=found)


KINDS = {
    ".pt, a module": Kind("module.pt", _model("module.pt")),
    ".pt, weights": Kind("weights.pt", _model("weights.pt", "nets_of_kinds:net")),
    ".pth of old": Kind("old.pth", _model("old.pth", "nets_of_kinds:net")),
    ".pt2": Kind("program.pt2", _model("program.pt2")),
    ".safetensors": Kind("weights.safetensors", _model("weights.safetensors", "nets_of_kinds:net")),
    ".onnx": Kind("out/model.onnx", lambda folder: api.verify(folder / "out/model.onnx")),
    ".npz": Kind("x.npz", _samples("x.npz")),
    ".npy": Kind("x.npy", _samples("x.npy")),
    ".pt, samples": Kind("x.pt", _samples("x.pt")),
    "images": Kind("images/3_a.png", _samples("images")),
    "texts": Kind("texts.tsv", _text),
    "plan.json": Kind("out/plan.json", lambda folder: load_plan(folder / "out")),
    "graph.json": Kind("out/graph.json", _graph),
    "tensors": Kind("out/model.safetensors", _graph),
    "report.json": Kind("out/report.json", lambda folder: load_artifact(folder / "out")),
    "family.json": Kind(f"family/{FAMILY_FILE}", lambda folder: read_family(folder / "family")),
    "delta": Kind("delta.safetensors", lambda folder: read_delta(folder / "delta.safetensors")),
    "latency table": Kind("latency.json", lambda folder: open_table(folder / "latency.json", "CPU", 1)),
    "config.json": Kind("hf/config.json", lambda folder: open_pretrained(folder / "hf")),
    "index": Kind(f"hf/{INDEX}", lambda folder: open_pretrained(folder / "hf")),
    "tokenizer.json": Kind("hf/tokenizer.json", _text),
}


def good_files(folder: Path) -> Path:
    """All of them, in ``folder``, which is to be on Python's path."""
    torch.manual_seed(0)
    module = net()
    (folder / "nets_of_kinds.py").write_text(NET)
    torch.save(module, folder / "module.pt")
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, folder / "weights.pt")
    torch.save(module.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    x = torch.randn(4, 2, 6, 6)
    batch = torch.export.Dim("batch", min=2)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: batch},)), folder / "program.pt2")
    save_file(module.state_dict(), folder / "weights.safetensors")
    np.savez(folder / "x.npz", images=x.numpy(), labels=np.arange(4))
    np.save(folder / "x.npy", x.numpy())
    torch.save({"images": x, "labels": torch.arange(4)}, folder / "x.pt")
    (folder / "images").mkdir()
    for name in ("3_a.png", "5_b.png"):
        PIL.Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "images" / name)
    (folder / "texts.tsv").write_text("sentence\tlabel\nw1 w2 w3\t0\nw4 w5\t1\n")
    api.quantize(module, bits=4, input_shape=(2, 6, 6), out=folder / "out", bench=False)
    truncate(module, (x, torch.arange(4)), folder / "family", options=LowRankOptions(smallest=0.5))
    name, shape = "3.weight", (4, 128)
    tensors = {name: SparseTensor(shape, "float32", torch.tensor([1, 5, 7]), torch.ones(3))}
    dense = {"3.bias": torch.ones(4)}
    write_delta(SparseDelta(None, tensors, dense, {"how": "by hand"}, tuple(dense)), folder / "delta.safetensors")
    row = Operator(signature="conv", compute="integer", layer_us=3.0, enter_us=1.0, leave_us=1.0)
    environment = describe_environment()
    LatencyTable(environment=environment, provider="CPU", threads=1, operators=(row,)).save(folder / "latency.json")
    _pretrained(folder / "hf")
    return folder


def _pretrained(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    from tests.models.test_huggingface import WORDS, bert, save_tokenizer

    module = bert(1)
    assert isinstance(module, transformers.PreTrainedModel)
    module.save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder, WORDS, ends=True)
    assert (folder / INDEX).is_file()
