"""Token ids cannot be transformed, their embeddings can; padding has no part in it; what is neither is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calib.metaaug import augmentation, method
from compress.calib.metaaug.network import TokenResidual, make_network
from compress.calib.metaaug.settings import MetaAug
from compress.calib.metaaug.site import find_site
from compress.calib.resume import ResumeStore
from compress.data.samples import load_samples
from compress.errors import InputError
from compress.intake.model import take_in
from compress.options import Options
from compress.pipeline.apply_plan import Compressed, apply_plan
from compress.plans.frame import make_plan
from tests.sweep import sweep

QUICK = MetaAug(steps=3, warm_up=20, rate=2e-2)
WORDS, LENGTH, WIDTH = 30, 6, 8


class Encoder(nn.Module):
    """Embeddings with positions and a norm, attention, a feed-forward half, a head on the first token or on all."""

    def __init__(self, tags: bool = False) -> None:
        super().__init__()
        self.tags = tags
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.words(input_ids) + self.places(torch.arange(LENGTH)))
        mask = (1.0 - attention_mask.to(x.dtype))[:, None] * -1e4
        x = x + self.out((self.q(x) @ self.k(x).transpose(1, 2) + mask).softmax(-1) @ self.v(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x if self.tags else x[:, 0])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[MetaAug], None]:
    """Sets what the row of the table holds."""
    return lambda wanted: monkeypatch.setattr(method, "METAAUG", replace(method.METAAUG, transform=wanted))


def texts(padding: int = 0, count: int = 40) -> tuple[Tensor, Tensor]:
    """Ids [N, L] and a mask, of 2 to 4 tokens and then padding; ``padding`` is the id there."""
    ids = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(LENGTH) < 2 + torch.arange(count)[:, None] % 3).long()
    return torch.where(mask == 1, ids, padding), mask


def carried(inputs: tuple[Tensor, Tensor], name: str, folder: Path, tags: bool = False) -> Compressed:
    torch.manual_seed(20)
    samples = load_samples(inputs)
    intake = take_in(Encoder(tags).eval(), samples=samples)
    plan = make_plan(intake, Options(method=name, bits=3, iterations=12, ignore=("head",)), samples)
    return apply_plan(
        intake.traced.copy(), plan, samples.inputs, ResumeStore(folder, "x"), lambda label: None, lambda said: None
    )


def assert_same(one: Compressed, other: Compressed) -> None:
    states = (one.model.module.state_dict(), other.model.module.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.matrix
def test_embeddings_are_transformed_and_their_blocks_learned_on_both(
    quick: Callable[[MetaAug], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def made(shape: tuple[int, ...], *given: object) -> nn.Module:
        seen.append(shape)
        return make_network(shape, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(augmentation, "make_network", made)
    quick(QUICK)
    done = carried(texts(), "metaaug", tmp_path / "a")
    notes = {result.layer: result.note or "" for result in done.layers}
    assert seen
    assert set(seen) == {(LENGTH, WIDTH)}
    assert "reconstructed" in notes["up"]
    assert "without" not in notes["up"]
    genie = carried(texts(), "genie", tmp_path / "b")
    scales = (each.model.tensor("up.weight_scale") for each in (done, genie))
    assert not torch.equal(*scales)


@pytest.mark.matrix
def test_without_a_change_it_is_genie_on_every_text_twice(
    quick: Callable[[MetaAug], None], unchanged: None, tmp_path: Path
) -> None:
    quick(replace(QUICK, margin_weight=0.0, similarity_weight=0.0))
    done = carried(texts(), "metaaug", tmp_path / "a")
    twice = tuple(torch.cat([x, x]) for x in texts())
    assert_same(done, carried(twice, "genie", tmp_path / "b"))  # type: ignore[arg-type]


@pytest.mark.matrix
@sweep("tags", [False, True], sample=[True])
def test_what_stands_at_padding_is_not_looked_at(quick: Callable[[MetaAug], None], tmp_path: Path, tags: bool) -> None:
    quick(QUICK)
    one, other = (carried(texts(padding), "metaaug", tmp_path / str(padding), tags) for padding in (0, 7))
    assert_same(one, other)


def test_the_transformation_of_tokens_begins_near_the_identity_and_moves() -> None:
    network = make_network((LENGTH, WIDTH), False, seed=1)
    assert isinstance(network, TokenResidual)
    x = torch.randn(3, LENGTH, WIDTH)
    assert network(x).shape == x.shape
    assert not torch.equal(network(x), x)


def test_sequences_of_floats_are_transformed_as_they_come() -> None:
    traced = take_in(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), samples=load_samples(torch.randn(4, 3, 4))
    )
    assert find_site(traced.traced, (torch.randn(4, 3, 4),)) == traced.traced.input_names[0]


class Indexed(nn.Module):
    """Integers as a table's row numbers, one a sample: no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


@pytest.mark.parametrize(
    ("module", "x", "why"),
    [
        (Indexed(), torch.randint(9, (4,)), r"not one value of embeddings \[N, L, C\]"),
        (nn.Linear(6, 3), torch.randn(4, 6), r"inputs of shape \[N, 6\]"),
    ],
    ids=["integers", "vectors"],
)
def test_what_is_neither_is_refused_before_anything_runs(module: nn.Module, x: Tensor, why: str) -> None:
    given = load_samples(x)
    with pytest.raises(InputError, match=f"metaaug .*{why}.*--method genie"):
        make_plan(take_in(module.eval(), samples=given), Options(method="metaaug"), given)
