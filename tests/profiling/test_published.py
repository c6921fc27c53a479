"""Published rows: every one is sound, and those that are arithmetic agree with ours."""

from __future__ import annotations

import pytest

from tokprune.errors import OptionError
from tokprune.profiling.presets import list_presets, preset
from tokprune.profiling.published import CAUTION, KINDS, PublishedReduction, comparison, lines, measured_in
from tokprune.profiling.report import ProfileReport, RunResult
from tokprune.profiling.timing import Measurement

ROWS = [(name, row) for name in list_presets() for row in preset(name).published]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_is_sound(name: str, row: PublishedReduction) -> None:
    assert row.kind in KINDS
    assert 0 < row.share < 1
    assert row.source
    if row.full is not None and row.pruned is not None:
        assert row.share == pytest.approx(row.pruned / row.full)
    if row.tokens is not None and row.tokens_full is not None:
        assert 0 < row.tokens < row.tokens_full


def formula_rows() -> list[tuple[str, PublishedReduction]]:
    return [(name, row) for name, row in ROWS if row.formula is not None and "assumed" not in row.setting]


@pytest.mark.parametrize(("name", "row"), formula_rows())
def test_the_same_formula_gives_the_published_share(name: str, row: PublishedReduction) -> None:
    ours = row.ours(preset(name).decoder)
    assert ours is not None
    assert ours[0] == pytest.approx(row.share, rel=0.02)


def test_formula_rows_are_there_for_every_formula() -> None:
    assert {row.formula for _, row in formula_rows()} == {"fastv", "gated"}
    assert any(row.layer for _, row in formula_rows())


def test_times_stand_beside_flops_and_memory_beside_nothing() -> None:
    known = preset("llava-next-7b")
    rows = comparison(known.published, known.decoder, vision=1_000_000_000_000)
    by = {(r["method"], r["kind"]): r for r in rows}
    assert 0.1 < by["cdpruner", "prefill"]["ours"] < 0.13
    assert by["hired", "ttft"]["ours"] > by["cdpruner", "prefill"]["ours"]  # the tower is in it
    assert by["cdpruner", "memory"]["ours"] is None
    text = "\n".join(lines(rows))
    assert "CDPruner (NeurIPS 2025)" in text
    assert "250 to 38 ms" in text
    assert "hardware" in CAUTION


def test_a_measured_cell_comes_before_arithmetic() -> None:
    def cell(name: str, kind: str, visual: int, ms: float, peak: int, method: str | None = None) -> RunResult:
        times = {part: Measurement(part, "ms", (ms,)) for part in ("prefill", "ttft", "total")}
        return RunResult(name, kind, times, visual, 2880, visual + 64, method, peak_bytes=peak)

    cells = (
        cell("plain", "plain", 2880, 100.0, 1000),
        cell("random 0.1", "pruned", 317, 22.0, 500, "random"),
        cell("cdpruner 0.1", "pruned", 320, 20.0, 800, "cdpruner"),
    )
    report = ProfileReport("x", cells, 4, 1, {})
    known = preset("llava-next-7b")
    by = {(r["method"], r["kind"]): r for r in comparison(known.published, known.decoder, 0, measured_in(report))}
    assert by["cdpruner", "prefill"]["ours"] == pytest.approx(0.2)
    assert by["cdpruner", "memory"]["ours"] == pytest.approx(0.8)
    assert "measured here, cdpruner 0.1" in by["cdpruner", "prefill"]["ours_is"]
    assert "formula" in by["divprune", "flops"]["ours_is"]
    assert "FLOPs" in by["hired", "ttft"]["ours_is"]  # no cell near 20 %


def test_rows_that_say_too_little_are_refused() -> None:
    with pytest.raises(OptionError, match="prefill"):
        PublishedReduction.from_dict({"method": "a", "kind": "prefil", "source": "b", "share": 0.5})
    with pytest.raises(OptionError, match="needs share"):
        PublishedReduction.from_dict({"method": "a", "kind": "prefill", "source": "b", "full": 3.0})
