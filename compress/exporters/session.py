"""ONNX Runtime sessions as this project opens them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from compress.errors import InputError

__all__ = ["open_session", "run_session"]

_QUIET = 3  # errors only: the optimiser warns about initialisers it folded


def open_session(
    path: Path | bytes,
    level: str,
    *,
    threads: int = 0,
    provider: str = "CPUExecutionProvider",
    optimized: Path | None = None,
    profile: Path | None = None,
    signed: bool = True,
) -> ort.InferenceSession:
    """A session on ``path`` (a file, or a model's bytes) at graph optimisation ``level``, as ORT spells it.

    Args:
        level: "ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED" or "ORT_ENABLE_ALL".
        threads: threads within an operator; 0 leaves the choice to ONNX Runtime.
        optimized: where to write the optimised graph, to look at what was fused; its large tensors beside it.
        profile: beginning of the name of the profile that the session's ``end_profiling`` writes; None: no profiler.
        signed: signed activations stay as they are, which is ONNX Runtime's default on Arm; else they are rewritten to
            unsigned ones first, which is its default on x86.

    Raises:
        InputError: ONNX Runtime refuses the file.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    options.log_severity_level = _QUIET
    # As on Arm: signed activations (of a file for Arm) reach integer kernels. Without it x86 rewrites them to unsigned
    # ones first, and leaves half of a residual network float.
    options.add_session_config_entry("session.qdqisint8allowed", "1" if signed else "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # One protobuf holds 2 GB at most.
        data = f"{optimized.name}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(path if isinstance(path, bytes) else str(path), options, providers=[provider])
    except Exception as error:
        name = "the exported model" if isinstance(path, bytes) else str(path)
        raise InputError(f"ONNX Runtime cannot load {name}: {str(error).splitlines()[0]}") from error


def run_session(session: ort.InferenceSession, batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Every output over all ``batches``, concatenated along the batch; of one number a batch, one for each."""
    names = [each.name for each in session.get_inputs()]
    results = [
        session.run(None, {name: np.ascontiguousarray(x.numpy()) for name, x in zip(names, batch, strict=True)})
        for batch in batches
    ]
    return [torch.from_numpy(np.concatenate(list(map(np.atleast_1d, parts)))) for parts in zip(*results, strict=True)]
