"""Memory: keys and values behind the prefill equal arithmetic, and the prefill's peak falls as the schedule says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark that docs/decoder.md shows, imported as `python benchmarks/decoder_memory.py` finds its helpers."""
    import importlib

    sys.path.insert(0, BENCHMARKS)
    try:
        yield importlib.import_module("decoder_memory")
    finally:
        sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def measured(script: ModuleType) -> dict[str, Any]:
    names = ("none", "fastv, half", "pyramiddrop", "pyramiddrop + mustdrop_cache", "fastkv", "dycoke_cache")
    return script.measured({name: script.SETTINGS[name] for name in names})


def test_keys_and_values_take_what_arithmetic_says(measured: dict[str, Any]) -> None:
    rows = {row["setting"]: row for row in measured["rows"]}
    for row in rows.values():
        assert row["cache"] == row["cache_by_arithmetic"]
    full = rows["none"]["cache"]
    assert full == 32 * 612 * 2 * 256 * 4
    assert rows["dycoke_cache"]["cache"] == full  # it saves reads alone
    for name in ("pyramiddrop + mustdrop_cache", "fastkv"):
        assert rows[name]["cache"] < full / 2


def test_the_peak_of_the_prefill_falls_as_the_schedule_says(measured: dict[str, Any]) -> None:
    rows = {row["setting"]: row for row in measured["rows"]}
    for row in rows.values():
        assert row["peak"] == pytest.approx(row["peak_by_arithmetic"], rel=0.08), row["setting"]
    full = rows["none"]["peak"]
    assert rows["fastkv"]["peak"] < 0.3 * full  # layers are cut one by one, not all at the end
    assert rows["pyramiddrop"]["peak"] == rows["pyramiddrop + mustdrop_cache"]["peak"] < 0.52 * full
    assert full <= rows["dycoke_cache"]["peak"]
