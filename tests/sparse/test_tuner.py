"""LT-SFT's two phases: exactly K, frozen to the bit, back to the start, K = all is full fine-tuning."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.tuner import SparseFineTuner
from tests.every import every

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3, momentum=0.9, weight_decay=0.1),
}


class Net(nn.Module):
    """An embedding, a convolution whose weight lies channels last, norms with and without statistics, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.batch = nn.BatchNorm2d(4)
        self.layer = nn.LayerNorm(24)
        self.hidden = nn.Linear(24, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.conv(self.words(x)[:, None])).mean(2).flatten(1)
        return self.head(torch.relu(self.hidden(self.layer(y))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(module: nn.Module, tuner: SparseFineTuner | None, optimizer: str = "adamw", steps: int = 6) -> list[float]:
    """Some steps; all losses."""
    torch.manual_seed(1)
    x, y = torch.randint(0, 12, (steps, 16, 8)), torch.randint(0, 3, (steps, 16))
    solver, losses = OPTIMIZERS[optimizer](module.parameters()), []
    module.train()
    for at in range(steps):
        with tuner.step() if tuner else contextlib.nullcontext():
            loss = F.cross_entropy(module(x[at]), y[at]) + (tuner.penalty() if tuner else 0)
            solver.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            solver.step()
        losses.append(float(loss.detach()))
    return losses


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: each.detach().clone().contiguous().view(torch.uint8 if each.is_floating_point() else each.dtype)
        for name, each in module.state_dict().items()
        if each.dim()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names that differ."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_k_entries_move_and_no_bit_of_the_rest(optimizer: str) -> None:
    module = net()
    start = copy.deepcopy(module)
    tuner = SparseFineTuner(module, k=37, head=("head",))
    assert tuner.parts.count == 12 * 6 + 4 * 9 + 4 + 24 * 10 + 10
    train(module, tuner, optimizer)
    changes = torch.cat([(each - dict(start.named_parameters())[name]).detach().abs().reshape(-1)
                         for name, each in tuner.parts.maskable.items()])  # fmt: skip
    tuner.select()
    assert tuner.mask is not None
    assert sum(map(len, tuner.mask.values())) == 37
    offset, chosen = 0, torch.zeros(len(changes), dtype=torch.bool)
    for name, each in tuner.parts.maskable.items():
        chosen[offset + tuner.mask[name]] = True
        offset += each.numel()
    assert changes[chosen].min() >= changes[~chosen].max()
    train(module, tuner, optimizer)
    moved = 0
    for (name, each), before in zip(module.named_parameters(), start.parameters(), strict=True):
        unequal = each.detach().contiguous().view(torch.int32) != before.detach().contiguous().view(torch.int32)
        if name in tuner.mask:
            outside = torch.ones(each.numel(), dtype=torch.bool)
            outside[tuner.mask[name]] = False
            assert not unequal.reshape(-1)[outside].any(), name
            moved += int(unequal.sum())
        else:
            assert bool(unequal.any()) == name.startswith("head"), name
    assert moved == 37
    assert torch.equal(module.batch.running_mean, start.batch.running_mean)
    delta = tuner.delta()
    assert delta.k == 37
    assert sorted(delta.dense) == ["head.bias", "head.weight"]


def test_ties_give_exactly_k_and_zeros_count() -> None:
    module = nn.Linear(10, 10)
    tuner = SparseFineTuner(module, k=43)
    with torch.no_grad():
        module.weight += torch.tensor([0.5, -0.5]).repeat(50).reshape(10, 10)
        module.weight[0] = tuner._start["weight"][0]
    tuner.select()
    delta = tuner.delta()  # nothing trained: all of them zeros, none of them lost
    assert delta.k == 43
    assert every(not each.values.any() for each in delta.tensors.values())


def test_everything_goes_back_to_the_start_the_head_and_statistics_too() -> None:
    module = net()
    before = bits(module)
    tuner = SparseFineTuner(module, density=0.05, head=("head",), train_norms=True)
    train(module, tuner)
    assert "batch.running_mean" in same(before, bits(module))
    tuner.select()
    assert same(before, bits(module)) == []
    assert every(each.grad is None for each in module.parameters())
    train(module, tuner)
    assert {"batch.running_mean", "batch.running_var", "layer.weight", "head.bias"} <= tuner.delta().dense.keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_entries_is_full_fine_tuning(optimizer: str) -> None:
    module = net()
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d | nn.LayerNorm):
            each.requires_grad_(False)
    plain = copy.deepcopy(module)
    tuner = SparseFineTuner(module, density=1.0, head=("head",))
    full = train(module, tuner, optimizer)
    after = bits(module)
    tuner.select()
    assert train(module, tuner, optimizer) == full
    assert same(after, bits(module)) == []
    plain.batch.register_forward_pre_hook(lambda layer, _: layer.train(False) and None)
    assert train(plain, None, optimizer) == full
    assert same(after, bits(plain)) == []


def test_no_entries_trains_the_head_alone() -> None:
    module = net()
    before = bits(module)
    tuner = SparseFineTuner(module, k=0, head=("head",))
    tuner.select()
    train(module, tuner)
    assert same(before, bits(module)) == ["head.weight", "head.bias"]
    assert tuner.delta().k == 0


def test_other_criteria_through_the_same_door() -> None:
    masks = {}
    for name, seed in (("random", 0), ("random", 1), ("magnitude", 0), ("bitfit", 0)):
        module = net()
        tuner = SparseFineTuner(module, criterion=name, seed=seed, head=("head",),
                                **({} if name == "bitfit" else {"k": 40}))  # fmt: skip
        tuner.select()
        assert tuner.mask is not None
        masks[name, seed] = {each: index.tolist() for each, index in tuner.mask.items() if len(index)}
        train(module, tuner)
        assert tuner.delta().notes["criterion"] == name
    assert masks["random", 0] != masks["random", 1]
    assert sum(map(len, masks["random", 0].values())) == 40
    assert masks["bitfit", 0] == {"conv.bias": list(range(4)), "hidden.bias": list(range(10))}
    module = net()
    tuner = SparseFineTuner(module, k=5, criterion="magnitude", head=("head",))
    tuner.select()
    assert tuner.mask is not None
    parameters = tuner.parts.maskable
    largest = torch.cat([each.detach().abs().reshape(-1) for each in parameters.values()]).topk(5).values
    chosen = torch.cat([parameters[name].detach().reshape(-1)[index].abs() for name, index in tuner.mask.items()])
    assert sorted(chosen.tolist()) == sorted(largest.tolist())
    module = nn.Linear(3, 2, bias=False)
    tuner = SparseFineTuner(module, k=2)
    tuner.select({"weight": torch.tensor([[0.0, 1, 2], [9, 1, 0]])})
    assert tuner.mask is not None
    assert tuner.mask["weight"].tolist() == [2, 3]


@pytest.mark.slow
def test_the_penalty_is_the_published_one_and_shrinks_changes() -> None:
    changes = []
    for weight in (0.0, 0.1, 1.0, 10.0):
        module = net()
        tuner = SparseFineTuner(module, density=0.1, head=("head",), l1=(weight, 0.0))
        train(module, tuner, steps=30)
        total = sum(
            float((each.detach() - tuner._start[name]).abs().sum())
            for name, each in (tuner.parts.maskable | tuner.parts.dense).items()
        )
        expected = weight * total / sum(each.numel() for each in module.parameters())
        assert float(tuner.penalty().detach()) == pytest.approx(expected, rel=1e-5)
        changes.append(total)
        tuner.select()
        assert float(tuner.penalty()) == 0
    assert changes == sorted(changes, reverse=True)
    assert changes[3] < 0.9 * changes[0]


def test_a_source_is_there_for_a_step_and_leaves_no_bit() -> None:
    module = nn.Linear(8, 8)
    index = torch.arange(0, 64, 3)
    source = SparseDelta(None, {"weight": SparseTensor((8, 8), "float32", index, torch.randn(len(index)) * 100)})
    start = bits(module)
    tuner = SparseFineTuner(module, k=9, sources={"en": source}, l1=(1.0, 0.0))
    with tuner.step("en"):
        inside = module.weight.detach().clone()
        assert float(tuner.penalty().detach()) == 0  # the start it is measured from moved with it
    wanted = tuner._start["weight"].reshape(-1)[index].double() + source.tensors["weight"].values.double()
    assert torch.equal(inside.reshape(-1)[index], wanted.float())
    assert same(start, bits(module)) == []
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for name in ("en", None):
        with tuner.step(name):
            F.mse_loss(module(torch.randn(4, 8)), torch.zeros(4, 8)).backward()
            optimizer.step()
    tuner.select()
    assert same(start, bits(module)) == []
    with pytest.raises(ValueError, match="source 'de': known are en"), tuner.step("de"):
        pass
    wrong = SparseDelta(None, {"weight": SparseTensor((8, 9), "float32", index, torch.zeros(len(index)))})
    with pytest.raises(ValueError, match=r"source 'x': weight of shape \[8, 9\] has shape \[8, 8\] here"):
        SparseFineTuner(module, k=1, sources={"x": wrong})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many": ({"k": 10**6}, r"k 1,000,000: 362 entries can be selected"),
    "density": ({"density": 1.5}, "density 1.5: a share between 0 and 1"),
    "both": ({"density": 0.5, "k": 3}, "give density or k, not both"),
    "criterion": (
        {"criterion": "luck"},
        "criterion 'luck': known are change, snip, gradient, random, magnitude, bitfit",
    ),
    "pattern": ({"head": ("classifier",)}, "'classifier' is the name of no parameter or module"),
    "bitfit": ({"criterion": "bitfit", "k": 3}, "bitfit selects all biases"),
    "l1": ({"l1": (-1.0, 0.0)}, "two finite numbers"),
    "nothing": ({"frozen": ("*",)}, "no parameter is left to select from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        SparseFineTuner(net(), **({"head": ("head",)} | options))


def test_refusals_in_training() -> None:
    module = net()
    tuner = SparseFineTuner(module, k=5, head=("head",))
    with pytest.raises(ValueError, match=r"no maskable parameter has changed: train before select"):
        tuner.select()
    with pytest.raises(ValueError, match=r"the mask is not chosen yet: call select"):
        tuner.delta()
    train(module, tuner)
    tuner.select()
    with pytest.raises(ValueError, match="chosen already"):
        tuner.select()
    train(module, None)
    with pytest.raises(ValueError, match=r"words\.weight has moved outside the mask: put `with tuner\.step\(\):`"):
        tuner.delta()
    tuner.rewind()
    with torch.no_grad():
        module.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.weight is not finite after training"):
        tuner.delta()
    embedding = nn.Sequential(nn.Embedding(3, 4, sparse=True))
    with pytest.raises(ValueError, match="0 has sparse gradients, which cannot be masked"):
        SparseFineTuner(embedding)


def test_nothing_is_chosen_or_handed_over_within_a_step() -> None:
    tuner = SparseFineTuner(nn.Linear(3, 2), k=2, criterion="random")
    tuner.begin_step()
    for act in (tuner.begin_step, tuner.select, tuner.rewind):
        with pytest.raises(ValueError, match="a step has begun and not ended"):
            act()
    tuner.end_step()
    tuner.select()
    with tuner.step(), pytest.raises(ValueError, match="a step has begun"):
        tuner.delta()
