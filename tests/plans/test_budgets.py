"""Budgets as text: every unit, and a sentence for everything that is none."""

from __future__ import annotations

import pytest

from compress.errors import InputError
from compress.plans.budgets import UNITS, format_value, parse_budgets
from compress.records.allocation import Budget


def one(text: str) -> Budget:
    (budget,) = parse_budgets([text])
    return budget


@pytest.mark.parametrize(
    ("text", "quantity", "limit"),
    [
        ("size=700B", "size", 700),
        ("size=2kB", "size", 2e3),
        ("size=2KB", "size", 2e3),
        ("size=2MB", "size", 2e6),
        ("size=2GB", "size", 2e9),
        ("size=2KiB", "size", 2048),
        ("size=1.5MiB", "size", 1.5 * 1024**2),
        ("size=2GiB", "size", 2 * 1024**3),
        ("latency=3us", "latency", 3),
        ("latency=3µs", "latency", 3),
        ("latency=0.25ms", "latency", 250),
        ("latency=1.5s", "latency", 1.5e6),
        ("drop=0.5", "drop", 0.5),
        ("drop=0", "drop", 0),
        ("drop=0.5points", "drop", 0.5),
        ("drop=0.5pt", "drop", 0.5),
        ("drop=0.5pp", "drop", 0.5),
        ("bops=7000", "bops", 7000),
        ("bops=3M", "bops", 3e6),
        ("bops=3G", "bops", 3e9),
        ("bops=0.5T", "bops", 5e11),
        # Ways to write the same.
        ("SIZE = 2 MB", "size", 2e6),
        ("  size=2e-1MB ", "size", 2e5),
        ("size=+2.MB", "size", 2e6),
        ("size=1e3kB", "size", 1e6),
    ],
)
def test_every_unit(text: str, quantity: str, limit: float) -> None:
    budget = one(text)
    assert (budget.quantity, budget.relative) == (quantity, False)
    assert budget.limit == pytest.approx(limit, rel=1e-12)


def test_no_unit_was_forgotten() -> None:
    for quantity, units in UNITS.items():
        for unit, factor in units.items():
            assert one(f"{quantity}=3{unit}").limit == pytest.approx(3 * factor), (quantity, unit)


@pytest.mark.parametrize("quantity", ["size", "latency", "bops"])
def test_a_multiple_of_the_float_model(quantity: str) -> None:
    assert one(f"{quantity}=0.15x") == Budget.model_validate({"quantity": quantity, "limit": 0.15, "relative": True})
    assert one(f"{quantity} = 1.5 x").limit == 1.5


def test_several_in_one_text_and_in_several() -> None:
    wanted = [("size", 0.15, True), ("latency", 3000.0, False), ("drop", 0.5, False)]
    for texts in (["size=0.15x,latency=3ms, drop=0.5"], ["size=0.15x", "latency=3ms,drop=0.5"]):
        assert [(each.quantity, each.limit, each.relative) for each in parse_budgets(texts)] == wanted
    assert parse_budgets([]) == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("size=2", "--budget size=2: size needs a unit (B, kB, KB, MB, GB, KiB, MiB, GiB, x); write size=2MB, or"),
        (
            "latency=3",
            "--budget latency=3: latency needs a unit (us, µs, ms, s, x); write latency=3ms, or latency=0.5x",
        ),
        ("size=2Mb", "--budget size=2Mb: 'Mb' is no unit of size (B, kB"),
        ("size=3ms", "'ms' is no unit of size"),
        ("latency=2MB", "'MB' is no unit of latency (us, µs, ms, s, x); write latency=3ms"),
        ("size=15%", "'%' is no unit of size"),
        ("drop=0.5x", "'x' is no unit of drop (points, pt, pp); write drop=0.5, in points of accuracy"),
        ("drop=1%", "'%' is no unit of drop"),
        ("bops=2k", "'k' is no unit of bops (M, G, T, x); write bops=0.5G"),
        ("speed=2MB", "--budget speed=2MB: unknown quantity 'speed'; known: size, latency, drop, bops"),
        ("error=0.1", "unknown quantity 'error'"),
        ("size=-2MB", "--budget size=-2MB: -2 is no limit that can be kept; write size=2MB"),
        ("drop=-0.1", "-0.1 is no limit that can be kept; write drop=0.5"),
        ("size=0MB", "0 is no limit that can be kept"),
        ("size=0x", "0 is no limit that can be kept"),
        ("latency=0ms", "0 is no limit that can be kept"),
        ("bops=0", "0 is no limit that can be kept"),
        ("size=1e999MB", "1e999 is no limit that can be kept"),
        ("size=1.2.3MB", "--budget size=1.2.3MB: '1.2.3' is not a number; write size=2MB"),
        ("size=--2MB", "'--2' is not a number"),
        ("size=nanMB", "--budget 'size=nanMB': write a quantity, a number and a unit, as in size=2MB"),
        ("size=infMB", "write a quantity, a number and a unit"),
        ("size", "--budget 'size': write a quantity, a number and a unit, as in size=2MB"),
        ("size=", "write a quantity, a number and a unit"),
        ("=2MB", "write a quantity, a number and a unit"),
        ("2MB", "write a quantity, a number and a unit"),
        ("size=2MB=3", "write a quantity, a number and a unit"),
        ("size=MB", "write a quantity, a number and a unit"),
        ("size<2MB", "write a quantity, a number and a unit"),
        ("", "write a quantity, a number and a unit"),
        ("size=2MB,", "--budget '': write a quantity, a number and a unit"),
    ],
)
def test_what_is_refused_and_how(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_budgets([text])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", [["size=2MB,size=0.1x"], ["size=2MB", "size=2MB"], ["drop=1", "latency=3ms,DROP=2"]])
def test_a_quantity_given_twice(texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"(size|drop) is limited twice; give one limit for each"):
        parse_budgets(texts)


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("size", 1234567, "1.235 MB"),
        ("size", 1e6, "1.000 MB"),
        ("size", 123456, "123.5 kB"),
        ("size", 12, "0.0 kB"),
        ("size", 4.5e9, "4,500.000 MB"),
        ("latency", 1234.5, "1.234 ms"),
        ("latency", 12, "0.012 ms"),
        ("drop", 0.456, "0.46 points"),
        ("bops", 1.5e9, "1.500 G bit operations"),
        ("error", 0.000123456, "0.0001235"),
    ],
)
def test_values_as_people_read_them(quantity: str, value: float, text: str) -> None:
    assert format_value(quantity, value) == text
