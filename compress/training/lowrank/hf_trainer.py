"""Maestro under the Hugging Face ``Trainer``: ordered factors, ranks that shrink, checkpoints that go on.

    maestro = MaestroCallback(model, penalty=1e-3)                     # before the Trainer: it makes the optimizer
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[maestro])
    trainer.train()
    maestro.extract()                                                  # ordinary layers again

To go on from a checkpoint, name it to both: ranks have to be cut before the Trainer loads weights.

    maestro = MaestroCallback(model, penalty=1e-3, resume="out/checkpoint-40")
    Trainer(..., callbacks=[maestro]).train(resume_from_checkpoint="out/checkpoint-40")

Needs ``transformers`` and ``accelerate``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import InputError
from compress.lowrank.decompose import decomposed_layers
from compress.lowrank.maestro import Maestro
from compress.training.callback import PenaltyCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments
from compress.files.outputs import new_file

__all__ = ["MaestroCallback"]

_FILE = "maestro.json"
# Parameters are replaced as ranks shrink, and ranks are drawn every step.
_REFUSED = {
    "load_best_model_at_end": "an earlier checkpoint may have larger ranks; resume from it instead",
    "torch_compile": "every rank that is drawn would be compiled anew",
}


class MaestroCallback(PenaltyCallback):
    """Trains ``model`` with :class:`~compress.lowrank.maestro.Maestro` inside a ``Trainer``.

    Each optimisation step, however many batches its gradient is gathered from, has one draw of ranks; the penalty's
    gradient is added once, at its full weight, to what the Trainer has gathered and clipped; ranks shrink at every
    epoch's end.

    Args:
        model: decomposed in place, at once: the Trainer's optimizer must be made behind that.
        resume: a checkpoint of such a run; ranks and the sampler's place are taken from it.
        settings: of :class:`~compress.lowrank.maestro.Maestro`.

    Attributes:
        maestro: the layers, those left dense and why, the ranks.
        stopped: why training stopped before its end; None while it did not.

    Raises:
        InputError: ``resume`` holds no run like this one.
        ValueError: a setting of Maestro's is impossible.
    """

    def __init__(self, model: nn.Module, *, resume: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        super().__init__()
        self.maestro = Maestro(model, **settings)
        self._settings = {name: list(each) if isinstance(each, tuple) else each for name, each in settings.items()}
        self._drawn: dict[str, int] = {}
        if resume is not None:
            self._continue(Path(resume))

    def extract(self) -> dict[str, str]:
        """Make the model one of ordinary layers; what became of each. After training."""
        return self.maestro.extract()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Refuse what would train something else than it seems."""
        self.check_start(args, state, _REFUSED)
        layers = self.maestro.layers
        if decomposed_layers(given["model"]) != layers:
            raise InputError("MaestroCallback was made for another model than the Trainer's; give it the same object")
        held = {id(each) for group in given["optimizer"].param_groups for each in group["params"]}
        for name, layer in layers.items():
            if not all(id(each) in held for each in (layer.up, layer.down) if each.requires_grad):
                raise InputError(
                    f"the optimizer does not hold the factors of {name}: make MaestroCallback before the optimizer"
                )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cut the layers as drawn until the optimizer's step; before every one of them, not before every batch."""
        self._drawn = self.maestro.sampler.draw()
        for name, rank in self._drawn.items():
            self.maestro.layers[name].active = rank

    def compute_penalty(self) -> Tensor:
        """Maestro's, of the ranks drawn."""
        return self.maestro.penalty()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Whole again: what is evaluated or saved next is not cut."""
        self._whole()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Let worthless components go, from the optimizer too."""
        self._whole()
        optimizer: Optimizer = given["optimizer"]  # accelerate's wrapper hands groups and state through
        if self.stopped is None:  # else the model is left as it is said to be
            self.maestro.end_epoch(optimizer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave nothing cut behind."""
        self._whole()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write ranks and the sampler's place beside the Trainer's own files."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        content = {"step": state.global_step, "settings": self._settings, "maestro": self.maestro.state_dict()}
        with new_file(folder / _FILE) as temporary:
            temporary.write_text(json.dumps(content))

    def _whole(self) -> None:
        for name in self._drawn:
            self.maestro.layers[name].active = None
        self._drawn = {}

    def _continue(self, checkpoint: Path) -> None:
        path = checkpoint / _FILE
        if not path.is_file():
            raise InputError(
                f"{checkpoint} has no {_FILE}: its run had no MaestroCallback, or was cut off there; use an earlier one"
            )
        try:
            found = json.loads(path.read_text())
            step, settings, state = int(found["step"]), found["settings"], found["maestro"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; use an earlier checkpoint") from error
        for name in sorted(settings.keys() | self._settings.keys()):
            if settings.get(name) != self._settings.get(name):
                raise InputError(
                    f"{path} was written with {name}={settings.get(name, 'its default')}, this run has "
                    f"{self._settings.get(name, 'its default')}; give the same"
                )
        try:
            self.maestro.load_state_dict(state)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        self._step = step
