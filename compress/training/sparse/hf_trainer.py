"""LT-SFT under the Hugging Face ``Trainer`` (arXiv 2110.07560): two trainings with one callback, then a delta.

    sparse = SparseCallback(model, density=0.05, head=("classifier",))
    Trainer(model=model, args=full, train_dataset=data, callbacks=[sparse]).train()
    sparse.select()                                                  # the mask; everything is as it was at the start
    Trainer(model=model, args=fewer, train_dataset=data, callbacks=[sparse]).train()
    write_delta(sparse.delta(), "task.safetensors")

Each training has a Trainer, and so an optimizer, of its own. To go on from a checkpoint, load the base again, name the
checkpoint to both, and leave out the phases that are over:

    sparse = SparseCallback(model, density=0.05, head=("classifier",), resume="out/checkpoint-40")
    Trainer(..., callbacks=[sparse]).train(resume_from_checkpoint="out/checkpoint-40")

Needs ``transformers`` and ``accelerate``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import InputError
from compress.models.huggingface import is_classifier
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import CLASSES, SparseDelta
from compress.sparse.tuner import SparseFineTuner
from compress.training.callback import PenaltyCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments
from compress.files.outputs import new_file

__all__ = ["SparseCallback"]

_FILE = "sparse.safetensors"
_HEADER = "compress.sparse"


class SparseCallback(PenaltyCallback):
    """Trains ``model`` with :class:`~compress.sparse.tuner.SparseFineTuner` inside ``Trainer``.

    After every optimisation step what is not trained has the bits it had at the start. The L1 penalty's gradient is
    added once a step, at its full weight, to what the Trainer has gathered and clipped.

    Args:
        model: as it is now is the start that differences are to.
        resume: a checkpoint of such a run; phase and mask are taken from it. The model must be at the start again.
        settings: of :class:`~compress.sparse.tuner.SparseFineTuner`; ``sources`` have no place here.

    Attributes:
        tuner: parts, mask, k.
        penalty: the L1 distance, weighted, at the last step: above 0 where a weight was given and anything has moved.
        stopped: why training stopped before its end; None while it did not.

    Raises:
        InputError: ``resume`` holds no run like this one.
        ValueError: a setting is impossible.
    """

    def __init__(self, model: nn.Module, *, resume: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        if "sources" in settings:
            raise ValueError("sources change by step, which a Trainer does not say; use a loop of your own")
        super().__init__()
        self.tuner = SparseFineTuner(model, **settings)
        self._start = base_hash(tensor_hashes(base_tensors(model)))
        self._open = False
        if resume is not None:
            self._continue(Path(resume))

    def select(self, scores: Mapping[str, Tensor] | None = None) -> None:
        """Choose the mask and go back to the start, between the two trainings; see the tuner's ``select``."""
        self.tuner.select(scores)
        self._step = 0

    def delta(self) -> SparseDelta:
        """What was learned; see the tuner's ``delta``. It says of which size a head it needs, as folders have none."""
        learned, model = self.tuner.delta(), self.tuner.module
        if is_classifier(model):
            learned.notes[CLASSES] = str(model.config.num_labels)  # type: ignore[union-attr]
        return learned

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Refuse what would train something else than it seems."""
        self.check_start(args, state, {})
        if given["model"] is not self.tuner.module:
            raise InputError("SparseCallback was made for another model than the Trainer's; give it the same object")
        trained = {**self.tuner.parts.maskable, **self.tuner.parts.dense}
        held = {id(each) for group in given["optimizer"].param_groups for each in group["params"]}
        for name, each in trained.items():
            if id(each) not in held:
                raise InputError(f"the optimizer does not hold {name}; leave the optimizer to the Trainer")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mask gradients until the optimizer's step; before every one of them, not before every batch."""
        self.tuner.begin_step()
        self._open = True

    def compute_penalty(self) -> Tensor:
        """The L1 distance from the start, weighted as the phase has it."""
        return self.tuner.penalty()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is not trained goes back, bit for bit, before anything is evaluated or saved."""
        self._end()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave no hook behind."""
        self._end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write phase and mask beside the Trainer's own files."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        mask = self.tuner.mask
        header = {"step": state.global_step, "start": self._start, "k": self.tuner.k, "sparse": mask is not None}
        with new_file(folder / _FILE) as temporary:
            told = {_HEADER: json.dumps(header)}
            save_file({name: each.cpu() for name, each in (mask or {}).items()}, temporary, told)

    def _end(self) -> None:
        if self._open:
            self.tuner.end_step()
        self._open = False

    def _continue(self, checkpoint: Path) -> None:
        path = checkpoint / _FILE
        if not path.is_file():
            raise InputError(
                f"{checkpoint} has no {_FILE}: its run had no SparseCallback, or was cut off there; use an earlier one"
            )
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                mask = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            step, start, k, sparse = int(header["step"]), header["start"], int(header["k"]), bool(header["sparse"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged; use an earlier checkpoint") from error
        if start != self._start:
            raise InputError(
                f"{path} is of a run that started from other weights; load the base as it was, its head with the same "
                "seed, before SparseCallback is made"
            )
        if k != self.tuner.k:
            raise InputError(f"{path} was written with k={k:,}, this run has {self.tuner.k:,}; give the same")
        if sparse:
            try:
                self.tuner.use_mask(mask)
            except ValueError as error:
                raise InputError(f"{path}: {error}") from error
        self._step = step
