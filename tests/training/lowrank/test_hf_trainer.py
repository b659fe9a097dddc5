"""Maestro under the Hugging Face Trainer, on a tiny classifier made here: it learns, shrinks, goes on from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.lowrank.layers import LowRankLayer
from compress.lowrank.shrink import hierarchical_lasso

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from compress.training.lowrank.hf_trainer import MaestroCallback  # noqa: E402 - optional
from tests.every import every  # noqa: E402
from tests.networks import WORDS, Sentences, classifier  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def arguments(out: Path, **given: Any) -> Any:
    settings = {
        "num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "save_strategy": "epoch", "report_to": [], "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "seed": 3, "lr_scheduler_type": "constant", **given,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(out), **settings)


SETTINGS: dict[str, Any] = {"penalty": 0.002, "threshold": 0.1}


def run(out: Path, callback: Any, model: nn.Module, resume: Path | None = None, **given: Any) -> Any:
    trainer = transformers.Trainer(
        model=model, args=arguments(out, **given), train_dataset=Sentences(96), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


class Watch(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """Ranks in force while batches run, and after steps."""

    def __init__(self, maestro: MaestroCallback) -> None:
        self.layers = maestro.maestro.layers
        self.during: list[dict[str, int]] = []
        self.after: set[int | None] = set()

    def _ranks(self) -> dict[str, int]:
        return {name: layer.active for name, layer in self.layers.items() if layer.active is not None}

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.during.append(self._ranks())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.during.append(self._ranks())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after |= {layer.active for layer in self.layers.values()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, MaestroCallback, Watch]:
    out = tmp_path_factory.mktemp("trainer") / "out"
    torch.set_num_threads(1)  # as every test has: with two, sums round otherwise
    model = classifier()
    callback = MaestroCallback(model, **SETTINGS)
    watch = Watch(callback)
    trainer = transformers.Trainer(
        model=model, args=arguments(out), train_dataset=Sentences(96), callbacks=[callback, watch]
    )
    trainer.train()
    return out, trainer, callback, watch


@pytest.mark.slow
def test_it_learns_and_ranks_shrink_with_the_optimizer(trained: Any) -> None:
    _, trainer, callback, watch = trained
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    layers: dict[str, LowRankLayer] = callback.maestro.layers
    assert sum(layer.rank for layer in layers.values()) < sum(layer.full_rank for layer in layers.values())
    inner = trainer.optimizer.optimizer  # accelerate's wrapper around the real one
    held = {id(each) for group in inner.param_groups for each in group["params"]}
    assert held == {id(each) for each in trainer.model.parameters()}
    for layer in layers.values():
        for each in (layer.up, layer.down):
            assert inner.state[each]["exp_avg"].shape == each.shape
    assert set(map(id, inner.state)) <= held, "nothing is kept of parameters that are gone"
    # Both batches of a step ran at the same ranks, other steps at others.
    pairs = list(zip(watch.during[::2], watch.during[1::2], strict=True))
    assert every(first == second != {} for first, second in pairs)
    assert len({json.dumps(first) for first, _ in pairs}) > 5
    assert watch.after == {None}


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(trained: Any, tmp_path: Path) -> None:
    out, trainer, callback, _ = trained
    checkpoint = sorted(out.glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))[1]
    model = classifier()
    resumed = MaestroCallback(model, resume=checkpoint, **SETTINGS)
    again = run(tmp_path / "again", resumed, model, checkpoint)
    assert resumed.maestro.ranks == callback.maestro.ranks
    states = [each.model.state_dict() for each in (trainer, again)]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.slow
def test_what_comes_out_is_ordinary(trained: Any) -> None:
    _, trainer, callback, _ = trained
    model = trainer.model.eval()
    batch = {name: value[None] for name, value in Sentences(96)[0].items()}
    with torch.no_grad():
        wanted = model(**batch).logits
        callback.extract()
        assert not any(isinstance(each, LowRankLayer) for each in model.modules())
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_penalty_is_added_once_a_step_at_its_full_weight(accumulated: int, tmp_path: Path) -> None:
    found = []
    for penalty in (0.0, 0.5):
        model = classifier()
        for each in model.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        callback = MaestroCallback(model, penalty=penalty, sampler="full")

        class Grab(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
            gradients: dict[str, Tensor]

            def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
                self.gradients = {name: each.grad.clone() for name, each in given["model"].named_parameters()}

        grab = Grab()
        given = {
            "max_steps": 1,
            "gradient_accumulation_steps": accumulated,
            "save_strategy": "no",
            "max_grad_norm": 0.0,
        }
        transformers.Trainer(
            model=model,
            args=arguments(tmp_path / "out", **given),
            train_dataset=Sentences(96),
            callbacks=[callback, grab],
        ).train()
        found.append(grab.gradients)
    model = classifier()
    layers = MaestroCallback(model).maestro.layers
    (0.5 * hierarchical_lasso(layers)).backward()
    for name, each in model.named_parameters():
        wanted = torch.zeros_like(each) if each.grad is None else each.grad
        torch.testing.assert_close(found[1][name] - found[0][name], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = classifier()
    callback = MaestroCallback(model, penalty=0.0)

    class Poison(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        good: dict[str, Tensor]

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                self.good = {name: each.clone() for name, each in model.state_dict().items()}
                model.classifier.bias.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[union-attr]

    poison = Poison()
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, save_strategy="no"),
        train_dataset=Sentences(96),
        callbacks=[callback, poison],
    )
    trainer.train()
    assert "in step 3: the model is as it was after step 2" in str(callback.stopped)
    assert trainer.state.global_step == 3
    assert every(torch.equal(poison.good[name], each) for name, each in model.state_dict().items())


def test_refusals(trained: Any, tmp_path: Path) -> None:
    out = trained[0]
    checkpoint = next(iter(out.glob("checkpoint-*")))
    with pytest.raises(InputError, match=r"has no maestro\.json: its run had no MaestroCallback"):
        MaestroCallback(classifier(), resume=tmp_path)
    with pytest.raises(InputError, match=r"was written with penalty=0\.002, this run has 0\.5; give the same"):
        MaestroCallback(classifier(), resume=checkpoint, **SETTINGS | {"penalty": 0.5})
    with pytest.raises(InputError, match=r"another architecture: layer bert\.encoder.* is 16 x 16 there, 24 x 24 here"):
        MaestroCallback(classifier(24), resume=checkpoint, **SETTINGS)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"another architecture: bert\.encoder\.layer\.1\..* only in one of them"):
        MaestroCallback(model, resume=checkpoint, **SETTINGS)
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "maestro.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged; use an earlier checkpoint"):
        MaestroCallback(classifier(), resume=broken, **SETTINGS)


@pytest.mark.matrix
def test_refusals_as_training_begins(trained: Any, tmp_path: Path) -> None:
    checkpoint = next(iter(trained[0].glob("checkpoint-*")))
    model = classifier()
    with pytest.raises(InputError, match="was made for another model"):
        run(tmp_path, MaestroCallback(classifier()), model, save_strategy="no")
    callback = MaestroCallback(model, resume=checkpoint, **SETTINGS)
    with pytest.raises(InputError, match="the Trainer starts at step 0, MaestroCallback at step"):
        run(tmp_path, callback, model, save_strategy="no")
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path, save_strategy="no"), train_dataset=Sentences(96),
        callbacks=[MaestroCallback(model)], optimizers=(optimizer, None),
    )  # fmt: skip
    with pytest.raises(InputError, match="the optimizer does not hold the factors of bert"):
        trainer.train()
    model = classifier()
    settings = {"load_best_model_at_end": True, "eval_strategy": "epoch"}
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path, **settings), train_dataset=Sentences(96), eval_dataset=Sentences(96),
        callbacks=[MaestroCallback(model)],
    )  # fmt: skip
    with pytest.raises(InputError, match="does not go with load_best_model_at_end"):
        trainer.train()
