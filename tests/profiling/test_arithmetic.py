"""The cost of presets on paper."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from tokprune.profiling import formulas
from tokprune.profiling.arithmetic import Arithmetic, arithmetic
from tokprune.profiling.presets import preset


@pytest.fixture(scope="module")
def llava() -> Arithmetic:
    return arithmetic(preset("llava-1.5-7b"), [1.0, 192 / 576, 1 / 9], new_tokens=2)


def test_rows_hold_tokens_bytes_and_flops(llava: Arithmetic) -> None:
    assert [row.visual for row in llava.rows] == [576, 192, 64]
    full = llava.rows[0]
    assert full.prompt == 640
    assert full.cache_bytes == 2 * 32 * 641 * 32 * 128 * 2
    assert full.total(2) == full.vision + full.projector + full.prefill + full.decode
    assert llava.weight_bytes == 2 * llava.parameters


def test_the_papers_numbers_stand_beside_ours(llava: Arithmetic) -> None:
    gated = [row.formulas["gated (4nd²+2n²d+3ndm)"] / 1e12 for row in llava.rows]
    assert gated == pytest.approx([3.82, 1.25, 0.42], abs=0.01)
    tables = [row for row in llava.published if row["formula"] == "gated" and row["tokens"] in (64, 128, 192)]
    assert len(tables) == 3
    for row in tables:
        assert row["ours"] == pytest.approx(row["share"], abs=0.002)


def test_table_and_json(llava: Arithmetic) -> None:
    data = json.loads(json.dumps(llava.to_dict()))
    assert (data["type"], data["version"]) == ("tokprune.Arithmetic", 1)
    assert data["rows"][0]["total"] == llava.rows[0].total(2)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(llava.table())
    for word in ("LLaVA-1.5 7B", "7.06 G parameters", "FLOPs", "KV cache", "Published, and ours", "hardware"):
        assert word in shown.get()


def test_separators_shrink_with_few_tokens_and_batches_multiply() -> None:
    known = preset("llava-next-7b")
    two = arithmetic(known, [0.01], text=10, batch=2)
    assert two.rows[0].prompt == 10 + 2880 + 48
    assert two.rows[1].prompt == 10 + 29 + 29
    assert two.rows[1].prefill == 2 * formulas.exact_prefill(known.decoder, 68)
    assert two.rows[1].cache_bytes == 2 * 2 * 32 * (68 + 63) * 32 * 128 * 2
