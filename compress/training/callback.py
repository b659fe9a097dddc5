"""What every technique under the Hugging Face ``Trainer`` needs: a penalty once a step, a stop at NaN, a safe start.

``transformers`` and ``accelerate`` are needed, and imported, by this module and the callbacks built on it alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from compress.errors import InputError

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "compress.training's callbacks are for the Hugging Face Trainer: pip install transformers accelerate"
    ) from error

__all__ = ["PenaltyCallback"]


class PenaltyCallback(TrainerCallback, ABC):
    """Adds the gradient of a technique's penalty once a step, at its full weight, to what was gathered and clipped.

    Attributes:
        penalty: the weighted penalty at the last step.
        stopped: why training stopped before its end; None while it did not.
    """

    def __init__(self) -> None:
        self.penalty = 0.0
        self.stopped: str | None = None
        self._step = 0  # of the checkpoint that the technique goes on from

    @abstractmethod
    def compute_penalty(self) -> Tensor:
        """The weighted penalty, a scalar; the technique's own."""

    def check_start(self, args: TrainingArguments, state: TrainerState, refused: dict[str, str]) -> None:
        """Refuse ways of training that would do something else than it seems.

        Args:
            refused: fields of ``args`` that do not go with this technique, and why, beside several processes,
                deepspeed and fsdp, which split parameters.

        Raises:
            InputError: one of them is set, or Trainer and technique do not go on from the same step.
        """
        name = type(self).__name__
        split = "it splits parameters; train in one process"
        reasons = {"deepspeed": split, "fsdp": split, **refused}
        found = {field: why for field, why in reasons.items() if getattr(args, field)}
        if args.world_size > 1:
            found = {"several processes": split}
        for field, why in found.items():
            raise InputError(f"{name} does not go with {field}: {why}")
        if args.fp16 and not args.max_grad_norm:
            raise InputError(f"{name} with fp16 needs max_grad_norm above 0, which takes the loss's scale out")
        if state.global_step != self._step:
            raise InputError(
                f"the Trainer starts at step {state.global_step}, {name} at step {self._step}: name one checkpoint to "
                f"both, {name}(model, resume=FOLDER) and train(resume_from_checkpoint=FOLDER)"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Add the penalty's gradient; a loss scaler's factor was taken out as the Trainer clipped."""
        parameters = [each for each in given["model"].parameters() if each.requires_grad]
        gathered = [each.grad for each in parameters if each.grad is not None]
        # Half precision scales its loss: a step that overflows is skipped, which is nothing to stop for.
        if not args.fp16 and not all(bool(each.isfinite().all()) for each in gathered):
            for each in parameters:
                each.grad = None
            self.stopped = (
                f"the gradient was not finite in step {state.global_step + 1}: the model is as it was after step "
                f"{state.global_step}; try a smaller learning rate"
            )
            control.should_training_stop = True
            return
        penalty = self.compute_penalty()
        self.penalty = float(penalty.detach())
        if not penalty.requires_grad:
            return
        for each, gradient in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                each.grad = gradient if each.grad is None else each.grad + gradient
