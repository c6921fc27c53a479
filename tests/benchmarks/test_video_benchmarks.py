"""The video benchmarks run on a handful of questions, and what they reuse between settings changes no answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("av", reason="PyAV (the video extra) reads the clips")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, imported as `python benchmarks/x.py` finds them."""
    import importlib

    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("clip_cells", "video_qa", "query_vs_uniform", "video_decoding")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in names:
            sys.modules.pop(name, None)


def cell(scripts: Any, hits: list[int], name: str = "x") -> Any:
    return scripts["clip_cells"].Cell(name, 0.1, None, hits=hits, accuracy=sum(hits) / len(hits), questions=len(hits))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (5, 5, 0.5655, 1.0)]
)
def test_wilson(scripts: Any, right: int, n: int, low: float, high: float) -> None:
    """Against published tables of the score interval."""
    assert scripts["clip_cells"].wilson(right, n) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_balanced_takes_types_in_turn(scripts: Any) -> None:
    from tokprune.demo.clips import ClipExample

    examples = [ClipExample(Path(f"{i}"), "?", "a", kind, 3, None) for i, kind in enumerate("aaaabbc")]
    chosen = scripts["clip_cells"].balanced(examples, 6)
    assert [e.type for e in chosen] == ["a", "b", "c", "a", "b", "a"]
    assert len(scripts["clip_cells"].balanced(examples, 99)) == 7


def test_paired_comparison_counts_questions(scripts: Any) -> None:
    base, other = cell(scripts, [1, 0, 0, 1, 0, 0, 0, 0]), cell(scripts, [1, 1, 1, 0, 1, 1, 1, 1], "y")
    (row,) = scripts["clip_cells"].paired(base, [other])
    assert (row["better"], row["worse"]) == (6, 1)
    assert row["difference"] == pytest.approx(5 / 8)
    assert row["low"] < 5 / 8 < row["high"]
    assert row["p"] == pytest.approx(2 * (1 + 7) / 2**7)  # exact McNemar, 1 of 7


def test_packaged_questions_have_their_files(scripts: Any) -> None:
    examples = scripts["clip_cells"].packaged_clips()
    if not examples:
        pytest.skip("the package has no task data")
    assert len(examples) >= 500
    assert all(e.path.is_file() and e.question and e.answer for e in examples)


def test_video_qa_end_to_end(scripts: Any, tmp_path: Path) -> None:
    out = tmp_path / "qa.json"
    names = "random,evs,quota,divprune per frame"
    scripts["video_qa"].main(
        ["--questions", "6", "--limit", "3", "--methods", names, "--ratios", "0.1", "--out", str(out)]
    )
    data = json.loads(out.read_text())
    assert data["questions"] == 3
    assert [c["method"] for c in data["cells"]] == ["none", *names.split(",")]
    assert not any(c["error"] for c in data["cells"])
    full, *pruned = data["cells"]
    assert full["kept"] == full["total"] == 512
    assert all(c["kept"] == 51 and len(c["hits"]) == 3 for c in pruned)
    cost = {c["method"]: c["gflops"] for c in data["cells"]}
    assert cost["evs"] < cost["none"] < cost["quota"], "a scorer's look at the frames is part of the cost"
    assert {(c["method"], c["against"]) for c in data["comparisons"]} == {(n, "random") for n in names.split(",")[1:]}
    for kind in ("accuracy", "pareto"):
        assert (tmp_path / f"qa_{kind}.png").stat().st_size > 5000


def test_unknown_method_names_the_nearest(scripts: Any) -> None:
    from tokprune.errors import OptionError

    with pytest.raises(OptionError, match="vidcom2"):
        scripts["video_qa"].main(["--methods", "vidcom"])


def test_every_video_method_is_in_the_catalogue(scripts: Any) -> None:
    from tokprune.registry import list_methods, method_class

    known = scripts["video_qa"].catalogue()
    video = {n for n in list_methods("connector") if method_class(n).info.video} | set(list_methods("frames"))
    assert video - set(known) == {"fps_frames"}


def test_what_is_remembered_changes_nothing(scripts: Any) -> None:
    """Remembered features and scorer embeddings give the answers and counts of a fresh run; watched towers are run
    anew."""
    cells = scripts["clip_cells"]
    examples = cells.packaged_clips()[:2]
    if not examples:
        pytest.skip("the package has no task data")
    import torch

    clips = cells.Clips(examples)
    base = clips.model.base_model
    runs: list[int] = []
    handle = base.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    seen: list[torch.Tensor] = []
    look = base.language_model.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["inputs_embeds"]) if kw["inputs_embeds"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    try:
        first = clips.ask(cells.Setting("evs", ("evs",), ratio=0.1))
        assert len(runs) == 1
        second = clips.ask(cells.Setting("evs", ("evs",), ratio=0.1))
        assert len(runs) == 1, "the tower ran again"
        assert torch.equal(seen[0], seen[1])
        assert (first.hits, first.kept, first.per_type) == (second.hits, second.kept, second.per_type)
        clips.ask(cells.Setting("fastvid", ("fastvid",), ratio=0.1))
        assert len(runs) == 2, "a method that watches the tower must see it run"
    finally:
        handle.remove()
        look.remove()
    assert "get_video_features" not in base.__dict__


def test_query_against_uniform_end_to_end(scripts: Any, tmp_path: Path) -> None:
    out = tmp_path / "query.json"
    scripts["query_vs_uniform"].main(["--questions", "2", "--budgets", "64", "--out", str(out)])
    data = json.loads(out.read_text())
    full, *cells = data["cells"]
    assert full["total"] == 2048
    assert [c["kept"] for c in cells] == [64] * len(cells)
    assert {c["method"] for c in data["comparisons"]} == {
        "quota, embeddings",
        "quota, clip",
        "aks, clip",
        "wfs_sb, clip",
    }
    assert all(c["against"].startswith("uniform") and c["verdict"] for c in data["comparisons"])


@pytest.mark.parametrize(
    ("difference", "p", "word"), [(0.2, 0.01, "better"), (-0.2, 0.01, "worse"), (0.2, 0.2, "no difference shown")]
)
def test_verdicts(scripts: Any, difference: float, p: float, word: str) -> None:
    assert scripts["query_vs_uniform"].verdict({"difference": difference, "p_holm": p}) == word


def test_video_decoding_end_to_end(scripts: Any, tmp_path: Path) -> None:
    """Two seconds instead of sixty: every frame number is read back, and a backend that cannot run says why."""
    out = tmp_path / "decoding.json"
    options = ["--seconds", "2", "--gops", "30", "--frames", "8", "--repeats", "1", "--out", str(out)]
    scripts["video_decoding"].main(options)
    data = json.loads(out.read_text())
    cells = {c["backend"]: c for c in data["cells"]}
    assert cells["auto"]["wrong"] == 0
    assert cells["auto"]["returned"] == 8
    assert all(c.get("error") or c["wrong"] == 0 for c in cells.values())
    (verdict,) = data["verdicts"]
    assert verdict["fastest_right"] in cells
    assert verdict["default"] == "auto"


def test_a_wrong_or_failed_backend_is_never_the_fastest(scripts: Any) -> None:
    def row(name: str, cpu: float | None, wrong: int = 0, **more: Any) -> dict[str, Any]:
        return {"gop": 30, "frames": 8, "backend": name, "median_cpu_s": cpu, "wrong": wrong, "returned": 8, **more}

    rows = [row("auto", 2.0), row("decord", 1.0, wrong=3), row("torchcodec", None, error="no FFmpeg")]
    (verdict,) = scripts["video_decoding"].verdicts(rows)
    assert verdict["fastest_right"] == "auto"
    assert verdict["ratio"] == 1.0
    assert verdict["left_out"] == {"decord": "3 of 8 frames wrong", "torchcodec": "no FFmpeg"}
    (verdict,) = scripts["video_decoding"].verdicts([row("auto", 2.0), row("decord", 1.6)])
    assert (verdict["fastest_right"], verdict["ratio"]) == ("decord", 1.25)
