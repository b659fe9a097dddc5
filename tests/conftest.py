"""What every test gets: a fixed seed, one thread, no benchmark, and the shared data where the machine has it."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports triton, which reads it once: kernels then run in the interpreter, without a GPU.
# TRITON_INTERPRET=0 in the environment tests them on a real one.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

from compress.options import Options
from compress.quant import instruction_sets
from tests import cases, processor_time, shares
from tests.processor_time import pytest_runtest_call, pytest_runtest_protocol

__all__ = ["pytest_runtest_call", "pytest_runtest_protocol"]

# What is planned here does not change when another processor is measured: leading convolutions of fewer than 16
# channels are float, and depthwise ones. tests/quant/test_instruction_sets.py reads what is shipped.
SHIPPED_SPEEDS = instruction_sets.DATA_FILE
instruction_sets.DATA_FILE = Path(__file__).with_name("instruction_sets.json")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    # Tests that never import torch should not pay seconds for it.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        # More threads change the order of sums, and on a busy machine they wait for each other: 60 times slower.
        torch.set_num_threads(1)
    translation = sys.modules.get("compress.exporters.translation")
    if translation is not None and translation.operator_table.cache_info().currsize:
        freeze_once()


@functools.cache
def freeze_once() -> None:
    """Leave what is there out of collections: the exporter's table of operators stays, and each would walk it."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """A test that looks at latency says ``bench=True``; the others do not pay for a benchmark each."""
    Options.__init__ = functools.partialmethod(Options.__init__, bench=False)  # type: ignore[assignment, method-assign]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this suite."""
    processor_time.add_option(parser)
    shares.add_option(parser)


@pytest.hookimpl(tryfirst=True)  # marks are there before any is asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a worker that began one of them last would keep the other waiting."""
    cases.mark_further_cases(items)
    shares.keep_share(config, items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real models and data beside the checkout; its README says what it holds."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the folder ../shared/data beside the checkout (real models and data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def compress_quickly(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``(module, calibration tensor or None, **options) -> TracedModel``: what ``compress.api.quantize`` exports.

    Rounds to nearest on min-max ranges, unless told otherwise, and measures nothing. ``shape`` is a sample's.
    """
    from compress.calib.resume import ResumeStore
    from compress.data.samples import load_samples
    from compress.intake.model import take_in
    from compress.options import Options
    from compress.pipeline.apply_plan import apply_plan
    from compress.plans.frame import make_plan

    def run(module: Any, calib: Any, shape: tuple[int, ...] | None = None, **settings: Any) -> Any:
        options = Options(**({"method": "mse", "observer": "minmax"} | settings))
        samples = load_samples(calib) if calib is not None else None
        intake = take_in(module, input_shape=shape, samples=samples)
        store = ResumeStore(tmp_path_factory.mktemp("store"), "test")
        inputs = samples.inputs if samples is not None else None
        return apply_plan(intake.traced, make_plan(intake, options, samples), inputs, store, lambda layer: None).model

    return run
