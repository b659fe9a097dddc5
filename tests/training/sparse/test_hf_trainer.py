"""LT-SFT under the Hugging Face Trainer: both phases, frozen to the bit, the penalty once a step, resumed runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.models.checkpoint import load_model
from compress.sparse.deltafile import write_delta
from compress.sparse.deltas import apply

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from compress.training.sparse.hf_trainer import SparseCallback  # noqa: E402 - optional
from tests.every import every  # noqa: E402
from tests.networks import Sentences, classifier  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, Any] = {"k": 60, "head": ("classifier",), "l1": (1.0, 0.5)}


def run(out: Path, callback: Any, model: nn.Module, resume: Path | None = None, **given: Any) -> Any:
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "weight_decay": 0.1,
        "learning_rate": 1e-2, "save_strategy": "epoch", "report_to": [], "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "seed": 3, "lr_scheduler_type": "constant", **given,
    }  # fmt: skip
    torch.set_num_threads(1)  # as every test has: with two, sums round otherwise
    arguments = transformers.TrainingArguments(output_dir=str(out), **settings)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences(48), callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, SparseCallback]:
    out = tmp_path_factory.mktemp("trainer")
    model = classifier()
    callback = SparseCallback(model, **SETTINGS)
    run(out / "full", callback, model)
    assert callback.penalty > 0
    callback.select()
    run(out / "sparse", callback, model)
    return out, model, callback


@pytest.mark.slow
def test_k_entries_move_and_no_bit_of_the_rest(trained: Any, tmp_path: Path) -> None:
    _, model, callback = trained
    moved = 0
    for (name, each), start in zip(model.named_parameters(), classifier().parameters(), strict=True):
        unequal = int((each.detach().view(torch.int32) != start.detach().view(torch.int32)).sum())
        if name.startswith("classifier"):
            assert unequal
        elif "LayerNorm" in name:
            assert not unequal
        else:
            assert unequal <= len(callback.tuner.mask[name])
            moved += unequal
    assert 0.9 * 60 <= moved <= 60  # embeddings of words that do not occur never move
    delta = callback.delta()
    assert delta.k == 60
    assert sorted(delta.dense) == ["classifier.bias", "classifier.weight"]
    # The folder of the encoder alone takes it.
    classifier().bert.save_pretrained(tmp_path / "bert")
    write_delta(delta, tmp_path / "task.safetensors", "fp32")
    apply(tmp_path / "bert", [tmp_path / "task.safetensors"], tmp_path / "task")
    found = load_model(tmp_path / "task").module.state_dict()
    assert every(torch.allclose(each, found[name], atol=1e-7) for name, each in model.state_dict().items())
    assert callback.penalty > 0
    assert not any(each._backward_hooks for each in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["full", "sparse"])
def test_a_resumed_phase_ends_in_the_same_weights(phase: str, trained: Any, tmp_path: Path) -> None:
    out, _, callback = trained
    first, last = sorted((out / phase).glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
    again = classifier()
    resumed = SparseCallback(again, resume=first, **SETTINGS)
    run(tmp_path / "again", resumed, again, first)
    wanted = transformers.BertForSequenceClassification.from_pretrained(last).state_dict()
    found = again.state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    if phase == "sparse":
        assert every(torch.equal(index, callback.tuner.mask[name]) for name, index in resumed.tuner.mask.items())


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_penalty_is_added_once_a_step_at_its_full_weight(accumulated: int, tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 50.0):
        model = classifier(dropout=0.0)
        callback = SparseCallback(model, k=60, head=("classifier",), l1=(weight, 0.0))
        with torch.no_grad():
            for each in model.parameters():
                each += 0.01  # off the start, where the distance has a slope

        class Grab(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
            gradients: dict[str, Tensor]

            def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
                self.gradients = {name: each.grad.clone() for name, each in given["model"].named_parameters()}

        grab = Grab()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=accumulated, save_strategy="no",
            max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        transformers.Trainer(
            model=model, args=arguments, train_dataset=Sentences(48), callbacks=[callback, grab]
        ).train()
        found.append(grab.gradients)
    total = sum(each.numel() for each in classifier().parameters())
    for name in found[0]:
        wanted = 0.0 if "LayerNorm" in name else 50.0 / total
        torch.testing.assert_close(
            found[1][name] - found[0][name], torch.full_like(found[0][name], wanted), rtol=1e-3, atol=1e-5
        )


@pytest.mark.slow
def test_refusals(trained: Any, tmp_path: Path) -> None:
    checkpoint = next(iter((trained[0] / "sparse").glob("checkpoint-*")))
    with pytest.raises(InputError, match=r"has no sparse\.safetensors: its run had no SparseCallback"):
        SparseCallback(classifier(), resume=tmp_path, **SETTINGS)
    with pytest.raises(InputError, match="is of a run that started from other weights; load the base as it was"):
        SparseCallback(classifier(seed=1), resume=checkpoint, **SETTINGS)
    with pytest.raises(InputError, match=r"was written with k=60, this run has 5; give the same"):
        SparseCallback(classifier(), resume=checkpoint, **SETTINGS | {"k": 5})
    with pytest.raises(InputError, match=r"bert\.embeddings\..* is no maskable parameter"):
        SparseCallback(classifier(), resume=checkpoint, **SETTINGS | {"frozen": ("bert.embeddings",)} | {"k": 60})
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "sparse.safetensors").write_text("{}")
    with pytest.raises(InputError, match="is damaged; use an earlier checkpoint"):
        SparseCallback(classifier(), resume=broken, **SETTINGS)
    with pytest.raises(ValueError, match="sources change by step"):
        SparseCallback(classifier(), sources={})
    model = classifier()
    with pytest.raises(InputError, match="was made for another model"):
        run(tmp_path, SparseCallback(classifier(), **SETTINGS), model, save_strategy="no")
    callback = SparseCallback(model, resume=checkpoint, **SETTINGS)
    with pytest.raises(InputError, match="the Trainer starts at step 0, SparseCallback at step"):
        run(tmp_path, callback, model, save_strategy="no")


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = classifier()
    callback = SparseCallback(model, **SETTINGS)
    model.classifier.bias.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[union-attr]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    run(tmp_path, callback, model, save_strategy="no")
    assert "in step 1: the model is as it was after step 0" in str(callback.stopped)
    assert every(torch.equal(before[name], each) for name, each in model.state_dict().items())
