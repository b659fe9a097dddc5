"""What makes a run, or an expert, another one: options by their names, said where they differ from those then."""

from __future__ import annotations

import json
from collections.abc import Mapping

__all__ = ["differences", "expert_parts", "loop_parts"]

_LOOP = {
    "each": "--ipc", "last": "--start-epochs", "rate": "--step-size", "rate_images": "--lr-images",
    "rate_rate": "--lr-step", "beta": "--intermediate", "augmentations": "--augment", "momentum": "the momentum",
}  # fmt: skip
_EXPERTS = {
    "count": "--experts", "epochs": "--expert-epochs", "batch": "--expert-batch", "rate": "--expert-lr",
    "penalty": "--penalty", "augmentations": "--augment", "seed": "--seed",
}  # fmt: skip


def loop_parts(settings: Mapping[str, object]) -> dict[str, str]:
    """All options of the outer loop, by name; ``settings`` by the name of its field."""
    return {_LOOP.get(name, f"--{name.replace('_', '-')}"): _said(value) for name, value in settings.items()}


def expert_parts(settings: Mapping[str, object]) -> dict[str, str]:
    """All of the experts, the same way."""
    return {_EXPERTS.get(name, f"the experts' {name}"): _said(value) for name, value in settings.items()}


def differences(before: str | None, now: Mapping[str, str]) -> str:
    """What of ``now`` is another than in ``before``, which is JSON, or None from an older version."""
    then = json.loads(before) if before else {}
    found = [
        f"{name} ({then.get(name, 'unknown')} then, {value} now)"
        for name, value in now.items()
        if then.get(name) != value
    ]
    return ", ".join(found) if then else "unknown, as an older version wrote it"


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
