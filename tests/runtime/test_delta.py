"""Deltas over a compressed graph: what is added is what a float model would have gained, whatever was folded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import InputError
from compress.files.known_folders import BASE_FILE
from compress.graph.fold import fold_batch_norm
from compress.graph.simplify import simplify
from compress.graph.traced import trace
from compress.kernels.delta_reference import add_reference
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.table import register_operators
from compress.runtime.artifact import load_artifact, tensors_digest
from compress.runtime.base import compare_base, read_base, write_base
from compress.runtime.delta import add_to_graph
from compress.runtime.explain import explain
from compress.runtime.pack import packed_for_gpu
from compress.sparse.application import apply_deltas
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import write_delta
from compress.transform.table import apply_transform
from tests.networks import Language

register_operators()


class Images(nn.Module):
    """Convolutions with BatchNorms of either sign, a grouped one, and two linears that equalization scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.wide(torch.relu(self.deep(x)))).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Words(nn.Module):
    """A table, and norms before linears, whose outliers SmoothQuant moves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(40, 16), nn.Parameter(torch.randn(8, 16))
        self.norm, self.query, self.value = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids) + self.place)
        mixed = torch.softmax(self.query(x) @ x.transpose(1, 2), -1) @ self.value(x)
        return self.head((x + self.out(mixed)).mean(1))


def images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Images()
    x = torch.randn(32, 3, 8, 8)
    net(x)
    with torch.no_grad():
        net.norm.weight.uniform_(-1, 2)
        net.norm.bias.normal_()
        net.wide.weight[3] *= 20
        net.first.weight[5] *= 30
    return net.eval(), x


def words() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Words()
    with torch.no_grad():
        net.norm.weight[3] = 30.0
        net.norm.bias.normal_()
    return net.eval(), torch.randint(0, 40, (32, 8))


def delta_to(net: nn.Module, *, head: bool = False, frozen: str = "norm", size: float = 0.05) -> SparseDelta:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, each in net.named_parameters():
        if not name.startswith(frozen):
            index = (torch.rand(each.numel(), generator=generator) < 0.3).nonzero()[:, 0]
            values = torch.randn(len(index), generator=generator) * size * float(each.detach().std())
            tensors[name] = SparseTensor(tuple(each.shape), "float32", index, values)
    dense = {}
    if head:
        for name in ("head.weight", "head.bias"):
            dense[name] = torch.randn(tensors.pop(name).shape, generator=generator)
    return SparseDelta(base_hash(tensor_hashes(base_tensors(net)), dense), tensors, dense, {}, tuple(dense))


def merged(net: nn.Module, delta: SparseDelta) -> nn.Module:
    net = copy.deepcopy(net)
    apply_deltas(net, {"d": delta})
    return net


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("make", "transforms"),
    [(images, ()), (images, ("equalize",)), (words, ()), (words, ("smoothquant",))],
    ids=["images", "equalized", "words", "smoothed"],
)
def test_a_delta_to_the_module_is_one_to_its_folded_and_scaled_graph(
    make: Callable[[], tuple[nn.Module, Tensor]], transforms: tuple[str, ...], tmp_path: Path
) -> None:
    from compress.records.layers import QuantOption

    net, x = make()
    traced = trace(net, (x[:2],))
    simplify(traced)
    fold_batch_norm(traced)
    for name in transforms:
        options = {each: QuantOption(bits=8, act_bits=8) for each in ("query", "value", "out", "head")}
        given = {"samples": (x,), "options": options} if name == "smoothquant" else {}
        apply_transform(name, traced, (x[:8],), **given)
    base = compare_base(net, traced)
    if transforms:
        assert base.columns
    write_base(base, tmp_path, "a")
    for head in (False, True):
        delta, graph = delta_to(net, head=head), traced.copy()
        if "equalize" in transforms:
            with pytest.raises(
                InputError, match=r"d: deep\.bias was scaled, nothing tells how much, when the model was"
            ):
                add_to_graph(graph, base, {"d": delta})
            del delta.tensors["deep.bias"]
        with torch.no_grad():
            before, wanted = net(x), merged(net, delta)(x)
            add_to_graph(graph, read_base(tmp_path, "a"), {"d": delta})
            got = graph.module(x)
        assert relative(before, wanted) > 0.02
        assert relative(got, wanted) < 1e-4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delta") / "words"
    net, x = words()
    compress.quantize(net, calib={"ids": x.numpy()}, bits=4, group_size=16, method="mse", out=folder)
    torch.save(net.state_dict(), folder.parent / "words.th")
    write_delta(delta_to(net, head=True, size=0.3), folder.parent / "task.safetensors", "fp32")
    write_delta(delta_to(net, size=0.3), folder.parent / "language.safetensors", "fp32")
    return folder


@pytest.mark.matrix
def test_what_is_added_is_not_rounded_to_the_base(artifact: Path) -> None:
    """As much as in floats, of every tensor, in codes or not: to within what is rounded in the base."""
    net, x = words()
    base, task = load_artifact(artifact), artifact.parent / "task.safetensors"
    module = compress.load(artifact, deltas=task)
    stored = [node for node in base.graph.nodes if "dequantize_weight" in str(node.target)]
    assert len(stored) > 3
    assert sum("delta_linear" in str(node.target) for node in module.graph.nodes) == 3  # query, value, out
    for name, each in delta_to(net, head=True, size=0.3).tensors.items():
        if name in ("query.weight", "out.weight"):
            flat = torch.zeros(each.size)
            flat[each.index] = each.values
            parts = [module.get_buffer(f"{name}_delta_{part}") for part in ("starts", "columns", "values")]
            dense = torch.zeros(each.shape)
            rows = torch.repeat_interleave(torch.arange(each.shape[0]), parts[0][0].long().diff())
            dense[rows, parts[1].long()] = parts[2]
            assert torch.allclose(dense, flat.view(each.shape))
    with torch.no_grad():
        wanted = merged(net, delta_to(net, head=True, size=0.3))(x)
        assert relative(module(x), wanted) < 0.6 * relative(base.module(x), wanted)
    both = [task, artifact.parent / "language.safetensors"]
    with pytest.warns(UserWarning, match="entries are in more than one delta"):
        several = compress.load(artifact, deltas=both, weights=[1, 0.5], head=str(task))
    with torch.no_grad():
        assert relative(several(x), module(x)) > 1e-3
        assert torch.equal(compress.load(artifact)(x), base.module(x))


@pytest.mark.slow
def test_on_gpus_codes_stay_packed_beside_the_delta(artifact: Path) -> None:
    from compress.sparse.deltas import open_deltas

    _, x = words()
    traced = load_artifact(artifact)
    add_to_graph(
        traced, read_base(artifact, tensors_digest(artifact)), open_deltas([artifact.parent / "task.safetensors"])
    )
    for dtype, near in ((None, 1e-5), (torch.bfloat16, 2e-2)):
        packed = packed_for_gpu(traced, (9, 0), dtype)
        with torch.no_grad():
            assert relative(packed.module(x), traced.module(x)) < near
        runs = {run.layer: run for run in explain(packed, (x,), (9, 0))}
        assert runs["query"].operator == "packed_delta_linear"
        assert (runs["query"].bits, runs["query"].group_size) == (4, 16)
    runs = {run.layer: run for run in explain(traced, (x,))}
    assert (runs["query"].operator, runs["query"].kernel) == ("delta_linear", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adding_in_place_is_merging(dtype: torch.dtype) -> None:
    """To the bit; the kernel is compared with the reference in tests/kernels/test_delta.py."""
    module = nn.Conv2d(3, 7, 3, dtype=dtype)
    shape, weight = tuple(module.weight.shape), module.weight.detach().clone()
    index = torch.randperm(7 * 27)[:80].sort().values
    values = torch.randn(80) * torch.tensor(10.0).pow(torch.randint(-6, 3, (80,)))
    sparse = SparseDelta(None, {"weight": SparseTensor(shape, str(dtype).removeprefix("torch."), index, values)})
    apply_deltas(module, {"delta": sparse}, any_base=True)
    add_reference(weight, DeltaRows.from_flat(shape, index, values))
    assert torch.equal(weight, module.weight)


def test_refusals(artifact: Path, tmp_path: Path) -> None:
    net, _ = words()
    good = delta_to(net, size=0.3)

    def refused(delta: SparseDelta, sentence: str, **given: object) -> None:
        write_delta(delta, tmp_path / "d.safetensors", "fp32")
        with pytest.raises(InputError, match=sentence):
            compress.load(artifact, deltas=tmp_path / "d.safetensors", **given)  # type: ignore[arg-type]

    one = SparseTensor((2,), "float32", torch.tensor([0]), torch.ones(1))
    refused(SparseDelta("0" * 64, good.tensors), r"d\.safetensors is for another base: its hash is 000000000000")
    refused(SparseDelta(None, {"gone": one}), r"gone was folded into others, split or renamed .* quantize --delta")
    refused(SparseDelta(None, {"head.bias": one}), r"head\.bias has shape \[2\] there and \[3\] in the artifact")
    refused(good, "2 weights for 1 delta;", weights=[1, 2])
    refused(good, "would not be finite", weights=[1e300])
    content = (artifact / BASE_FILE).read_bytes()
    try:
        (artifact / BASE_FILE).write_bytes(content[:-5])
        refused(good, rf"{BASE_FILE} is damaged")
        (artifact / BASE_FILE).write_bytes(content.replace(b"query.weight", b"value.weight"))
        with pytest.raises(InputError, match=rf"{BASE_FILE} is damaged \(its SHA-256 differs\)"):
            read_base(artifact, tensors_digest(artifact))
        (artifact / BASE_FILE).write_bytes(content)
        write_base(read_base(artifact, tensors_digest(artifact)), artifact, "a")
        with pytest.raises(InputError, match=rf"{BASE_FILE} is damaged \(it is another artifact's\)"):
            read_base(artifact, tensors_digest(artifact))
        (artifact / BASE_FILE).unlink()
        refused(good, f"holds no {BASE_FILE}")
    finally:
        (artifact / BASE_FILE).write_bytes(content)


@pytest.mark.matrix
def test_a_tied_weight_is_found_by_the_name_that_tracing_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Language(40, 16), torch.randint(0, 40, (64, 6))
    index = torch.arange(0, 40 * 16, 7)
    delta = SparseDelta(None, {"words.weight": SparseTensor((40, 16), "float32", index, 0.3 * torch.randn(len(index)))})
    compress.quantize(net, calib={"ids": x.numpy()}, bits=8, method="mse", out=tmp_path / "tied")
    write_delta(delta, tmp_path / "d.safetensors", "fp32")
    with torch.no_grad():
        before, wanted = net(x), merged(net, delta)(x)
        with pytest.warns(UserWarning, match="does not say which base it is for"):
            got = compress.load(tmp_path / "tied", deltas=tmp_path / "d.safetensors")(x)
    assert relative(before, wanted) > 0.1
    assert relative(got, wanted) < 0.2 * relative(before, wanted)


def test_nothing_is_guessed_where_zeros_hide_a_factor() -> None:
    torch.manual_seed(0)
    before, after = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        before.weight[:, 1] = 0
        before.bias.zero_()
        after.weight.copy_(before.weight * torch.tensor([1.0, 5.0, 2.0, 3.0]))
        after.bias.zero_()
    base = compare_base(before, trace(after, (torch.zeros(2, 4),)))
    factor = base.factor("weight", (3, 4), torch.arange(12))
    assert factor is not None
    assert torch.allclose(factor.view(3, 4)[:, [0, 2, 3]], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert bool(factor.view(3, 4)[:, 1].isnan().all())
    assert base.factor("bias", (3,), torch.arange(3)).tolist() == [1.0] * 3  # type: ignore[union-attr] - rows have none
    with torch.no_grad():
        after.weight.copy_(before.weight + torch.randn(3, 4))
    assert compare_base(before, trace(after, (torch.zeros(2, 4),))).factor("weight", (3, 4), torch.arange(1)) is None
