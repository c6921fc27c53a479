"""The published numbers: whole, current in the docs, found by name, and set beside a run that matches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.evaluation.runs import ENVIRONMENT
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, CellResult, Sample, SweepSettings
from tokprune.evaluation.reference import known_model, model_of, models, select, to_text
from tokprune.evaluation.reference.beside import beside
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import KEPT
from tools.reference_page import reference_page


def tables():
    return [(m, t) for m in models().values() for t in m.tables]


@pytest.mark.parametrize(
    ("model", "table", "label", "amount", "column", "value"),
    [
        ("llava-1.5-7b", "restore", "DivPrune", "64", "POPE", 85.3),
        ("llava-1.5-7b", "eadp", "CDPruner", "32", "GQA", 57.0),
        ("llava-1.5-7b", "in_llm_common", "FastV", "192", "POPE", 64.8),
        ("llava-1.5-7b", "in_llm_rerun", "PDrop", "128", "MME", 1403),
        ("llava-1.5-7b", "divprune", "DivPrune", "56", "MME-P", 1328),
        ("llava-next-7b", "hired", "HiRED", "20 %", "DocVQA", 60.8),
        ("llava-next-7b", "in_llm", "MustDrop", "320", "TextVQA", 59.9),
        ("qwen2.5-vl-7b", "restore", "HoloV", "11 %", "average%", 83.5),
        ("llava-video-7b", "quota", "QuoTA", "12544", "VideoMME", 65.9),
        ("qwen3-vl-8b", "vidcom2", "VidCom2", "25 %", "MVBench", 67.5),
        ("vit-imagenet", "tome", "MAE ViT-L/16, trained with ToMe r=8", "", "top1", 85.09),
    ],
)
def test_spot_checks(model, table, label, amount, column, value):
    """Numbers read from the sources by hand, at every model that has more than one row."""
    (found,) = [t for t in models()[model].tables if t.id == table]
    (entry,) = [e for e in found.entries if e.label == label and e.amount == amount]
    assert entry.values[found.columns.index(column)] == value


def test_every_table_names_its_source_and_is_in_range():
    assert len(tables()) > 40
    assert len({(t.model, t.id) for _, t in tables()}) == len(tables())
    for model, table in tables():
        assert table.source
        for entry in table.entries:
            assert any(v is not None for v in entry.values), (table.id, entry)
            assert entry.ratio is None or 0 < entry.ratio <= 1
            for benchmark, value in zip(table.benchmarks, entry.values, strict=True):
                if value is None or not benchmark.task:
                    continue
                top = {"MME": 2800, "MME-P": 2000, "MME-C": 800, "OCRBench": 1000}.get(benchmark.name, 100)
                assert 0 < value <= top, (model.name, table.id, entry.label, benchmark.name)


def test_pruned_rows_do_not_beat_the_full_model_by_much():
    """A digit typed wrong would stand out: within a table a pruned score is rarely above the full one by a tenth."""
    for _, table in tables():
        full = next((e for e in table.entries if e.label == "all tokens"), None)
        for entry in table.entries if full is not None else ():
            for benchmark, ours, theirs in zip(table.benchmarks, entry.values, full.values, strict=True):
                if benchmark.task and ours is not None and theirs is not None:
                    assert ours <= 1.1 * theirs or benchmark.name == "MLVU", (table.id, entry.label, benchmark.name)


def test_methods_that_we_have_carry_our_name():
    from tokprune.registry import list_methods

    ours = {e.method for _, t in tables() for e in t.entries} & set(list_methods())
    assert {
        "divprune",
        "hired",
        "visionzip",
        "prumerge_plus",
        "cdpruner",
        "vidcom2",
        "fastvid",
        "random",
        "none",
    } <= ours


def test_tasks_are_lmms_eval_names():
    """Against the installed task folders: the YAML file of every task that a column means is there."""
    lmms_eval = pytest.importorskip("lmms_eval")
    folder = Path(lmms_eval.__file__).parent / "tasks"
    named = set()
    for path in folder.rglob("*"):
        if path.is_file() and (path.suffix in (".yaml", ".yml") or "yaml" in path.name):
            text = path.read_text(encoding="utf-8", errors="replace")
            named |= set(re.findall(r"^(?:task|group): *[\"']?([A-Za-z0-9_]+)", text, re.MULTILINE))
    wanted = {b.task for _, t in tables() for b in t.benchmarks if b.task}
    assert wanted <= named


def test_select_reduces_rows_and_columns():
    (model,) = select("llava-1.5-7b", ["divprune"], ["gqa", "POPE"])
    assert model.tables
    for table in model.tables:
        assert set(table.columns) <= {"GQA", "POPE"}
        assert {e.method for e in table.entries} <= {"divprune", "none"}
    text = to_text([model])
    assert "| DivPrune | 64 | 57.1 | 85.3 |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "llava-1.5-7"}, "llava-1.5-7b"),
        ({"methods": ["divprun"]}, "divprune"),
        ({"tasks": ["gqaa"]}, "gqa"),
        ({"model": "pllava-7b", "methods": ["divprune"]}, "leave"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(arguments, words):
    with pytest.raises(OptionError, match=words):
        select(**arguments)


def test_checkpoints_lead_to_their_model():
    assert model_of("llava-hf/llava-1.5-7b-hf").name == "llava-1.5-7b"
    assert model_of("/models/llava-1.5-7b-hf/").name == "llava-1.5-7b"
    assert model_of("demo") is None
    assert known_model("llava-1.5-7b")
    assert not known_model("llava-hf/llava-1.5-7b-hf")


def run(model, *cells):
    results = []
    for task, method, ratio, kept, metrics in cells:
        sample = Sample(task, 0, "a", "a", {})
        results.append(
            CellResult(Cell(task, method, ratio), metrics, next(iter(metrics)), (sample,), costs={KEPT: kept})
        )
    return Sweep(SweepSettings(model, limit=500), ENVIRONMENT, results)


def test_beside_a_run_stand_the_rows_of_the_same_cell():
    sweep = run(
        "llava-hf/llava-1.5-7b-hf",
        ("gqa", "none", 1.0, 576, {"exact_match": 0.612}),
        ("gqa", "divprune", 1 / 9, 64, {"exact_match": 0.565}),
        ("mme", "divprune", 0.098, 56, {"mme_perception_score": 1330.0, "mme_cognition_score": 280.0}),
        ("gqa", "divprune", 0.5, 288, {"exact_match": 0.6}),
    )
    found = beside(sweep)
    rows = {(r[0], r[1], r[2], r[3], r[4]) for r in found.body}
    assert ("GQA", "divprune", "64", "56.5", "57.1") in rows  # RESTORE
    assert ("GQA", "divprune", "64", "56.5", "57.5") in rows  # EADP
    assert ("MME-P", "divprune", "56", "1330", "1328") in rows
    assert ("GQA", "none", "576", "61.2", "61.9") in rows
    assert not any(r[2] == "288" for r in found.body)
    assert "500 questions" in found.notes


def test_beside_an_unknown_model_says_for_which_there_are():
    found = beside(run("demo", ("tokprune_scenes", "none", 1.0, 256, {"accuracy": 0.9})))
    assert found.body == []
    assert "llava-1.5-7b-hf" in found.notes
    other = beside(run("llava-hf/llava-1.5-7b-hf", ("tokprune_scenes", "none", 1.0, 256, {"accuracy": 0.9})))
    assert "gqa" in other.notes


def test_page_explains_itself():
    text = reference_page(list(models().values()))
    assert text.startswith("# Published numbers")
    for model in models().values():
        assert f"## {model.title}" in text
