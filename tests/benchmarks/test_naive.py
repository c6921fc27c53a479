"""The published formulations that benchmarks/methods.py races against: right by the golden vectors, and equal to
ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.naive import attention, merging, similarity
from benchmarks.naive.pairs import PAIRS, Case, Pair, results
from tests.golden_vectors import GoldenCase, claims
from tests.published.dart import picks_per_pivot
from tokprune.methods.connector.flowcut import flowcut_scores
from tokprune.methods.connector.hired import hired_budgets
from tokprune.methods.connector.prunesid import suppress
from tokprune.tokens import Layout

ROOT = Path(__file__).resolve().parents[2]
ONE = Case("one tile", 1, 29, side=12, heads=4, C=64, D=256)
TILES = Case("five tiles", 5, 155, side=12, heads=4, C=64, D=256)
PUBLISHED = {
    *("divprune", "hired", "fastervlm", "visionzip", "vispruner", "cdpruner", "scope", "holov", "hiprune", "prumerge"),
    *(
        "prumerge_plus",
        "dart",
        "mmtok",
        "vscan",
        "globalcom2",
        "textmonkey",
        "recoverable",
        "pool",
        "gprune",
        "prunesid",
    ),
    "flowcut",
}


def double(inputs: tuple) -> tuple:
    """In float64 two orders of summation do not disagree about a pick."""
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("case", [ONE, TILES], ids=lambda c: c.name)
@pytest.mark.parametrize("pair", [p for p in PAIRS if not p.differs], ids=lambda p: p.name)
def test_both_ways_give_the_same(pair: Pair, case: Case) -> None:
    if not pair.fits(case):
        pytest.skip("needs tiles")
    for seed in range(2):
        inputs = double(pair.inputs(case, torch.Generator().manual_seed(seed)))
        naive, ours = results(pair.naive(*inputs)), results(pair.ours(*inputs))
        assert len(naive) == len(ours)
        for a, b in zip(naive, ours, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def test_every_published_method_has_a_pair_that_must_agree_or_says_why_not() -> None:
    assert {p.name.split()[0] for p in PAIRS} == PUBLISHED
    free = {p.name for p in PAIRS if p.differs}
    assert free == {"hired", "holov", "hiprune", "pool", "prunesid", "flowcut"}


@pytest.mark.parametrize("pair", [p for p in PAIRS if p.differs], ids=lambda p: p.name)
def test_those_that_may_differ_choose_equally_many(pair: Pair) -> None:
    inputs = pair.inputs(TILES, torch.Generator().manual_seed(0))
    ours = results(pair.ours(*inputs))
    naive = results(pair.naive(*inputs))
    if pair.name == "hired":  # the published counts are cut to whole numbers and lose some
        assert len(naive[0]) <= len(ours[0]) == TILES.keep
    else:
        assert [x.shape for x in naive] == [x.shape for x in ours]


# The exceptions, and what of them agrees all the same.


def test_hired_differs_in_the_budgets_alone() -> None:
    early, late = torch.rand(144), torch.rand(5, 144)
    layout = Layout.grid(12, 12, 5, "tiles", canvas=(2, 2), thumbnail=True)
    early.view(12, 12)[:, 6:] = 0  # everything happens on the left: two of four regions, a part of every band
    kept = attention.hired(early, late, 100)
    bands = torch.bincount(kept // 144, minlength=5)[1:]
    regions = hired_budgets(early.repeat(5), layout, 100)[1:]
    assert (bands > 0).all()
    assert regions[1] == regions[3] == 0


def test_pool_positions_agree_up_to_2048() -> None:
    pair = next(p for p in PAIRS if p.name == "pool")
    (tokens, places), (ours, exact) = (
        f(*pair.inputs(replace(TILES, side=24, keep=576), torch.Generator().manual_seed(0)))
        for f in (pair.naive, pair.ours)
    )
    torch.testing.assert_close(tokens, ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(places[exact < 1900], exact[exact < 1900])
    assert not torch.equal(places, exact)


def test_prunesid_suppresses_the_same_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    x, scores, group = (
        torch.randn(90, 8, generator=g),
        torch.rand(90, generator=g),
        torch.randint(6, (90,), generator=g),
    )
    for threshold in (0.1, 0.4, 2.0):
        naive = sorted(i for s in similarity.prunesid_survivors(x, scores, group, threshold) for i in s)
        ours = suppress(x, scores, group, torch.tensor(threshold)).nonzero()[:, 0].tolist()
        assert naive == ours


def test_flowcut_without_dropping_scores_the_same() -> None:
    a, s, v = (torch.rand(22, 50, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(attention.flowcut_scores(a, s, v), flowcut_scores(a, s, v))
    kept = attention.flowcut(a, s, v, 17)
    assert len(kept.unique()) == 17


# The golden vectors, so that what is raced against is what was published.


@claims("divprune", anchor="features", part="results of the published formulation")
def test_divprune(case: GoldenCase) -> None:
    if "order" not in case:
        pytest.skip("the published choice repeats tokens here")
    kept = similarity.divprune(case["features"], len(case["order"]))
    assert torch.equal(kept, case["order"].sort().values)


@claims("hired", anchor="cls_attn_final", part="results of the published formulation")
def test_hired(case: GoldenCase) -> None:
    late = case["cls_attn_final"].sum(1)
    tiles, n = late.shape
    keep = int(tiles * n * case.number("rate"))
    if "cls_attn_init" not in case:
        assert torch.equal(attention.hired(late[0], late, keep), case["kept_sorted"])
        return
    kept = attention.hired(case["cls_attn_init"].sum(1)[0], late, keep, case.number("alpha"))
    assert torch.equal(kept, case["mask"].flatten().nonzero()[:, 0])


@claims("fastervlm", anchor="cls_attn", part="results of the published formulation")
def test_fastervlm(case: GoldenCase) -> None:
    assert torch.equal(attention.fastervlm(case["cls_attn"], case.number("T")), case["kept_sorted"])


@claims("visionzip", anchor="out_tokens", part="results of the published formulation")
def test_visionzip(case: GoldenCase) -> None:
    if "tile_tokens" in case:
        pytest.skip("reassembly of tiles: no choice in it")
    sizes = case.number("dominant_total"), case.number("contextual")
    out, kept = merging.visionzip(case["cls_attn"], case["hidden_states"], case["metric"], *sizes)
    assert torch.equal(kept, case["kept_idx_topk_order"])
    torch.testing.assert_close(out, case["out_tokens"], atol=1e-5, rtol=1e-5)


@claims("vispruner", anchor="features", part="results of the published formulation")
def test_vispruner(case: GoldenCase) -> None:
    rows = case["cls_attn"].mean(1)
    kept = attention.vispruner(case["features"], rows, case.number("T"), case.number("important_ratio"))
    assert torch.equal(kept, case["kept_sorted"])


@claims("cdpruner", anchor="features", part="results of the published formulation")
def test_cdpruner(case: GoldenCase) -> None:
    kept = similarity.cdpruner(case["features"], case["image_embeds"], case["text_embeds"], case.number("T"))
    assert torch.equal(kept, case["kept_sorted"])


@claims("scope", anchor="features", part="results of the published formulation")
def test_scope(case: GoldenCase) -> None:
    kept = similarity.scope(case["features"], case["cls_attn_headsum"], case.number("K"))
    assert torch.equal(kept, case["kept_sorted"])


@claims("holov", anchor="features", part="results of the published formulation")
def test_holov(case: GoldenCase) -> None:
    kept = attention.holov(case["features"][0], case["cls_attn"][0], case.number("K"), case.number("num_crops"))
    assert torch.equal(kept, case["out_index_in_order"])


@claims("hiprune", anchor="object_attn_colmean", part="results of the published formulation")
def test_hiprune(case: GoldenCase) -> None:
    objects, deep = case["object_attn_colmean"][:, 1:], case["deep_attn_colmean"][:, 1:]
    keep, alpha = int(case.number("total_budget") / len(objects)), round(case.number("alpha"), 6)
    assert torch.equal(attention.hiprune(objects, deep, keep, alpha, case.number("grid")), case["kept_sorted"])


@claims("prumerge", anchor="hidden_states", part="results of the published formulation")
def test_prumerge(case: GoldenCase) -> None:
    row = case["cls_attn"][0]
    count = merging.prumerge_count(row) if case.number("adaptive") else len(row) // 8
    kept, out = merging.prumerge(case["hidden_states"][0, 1:], row, case["k"][0, 1:], count)
    assert torch.equal(kept, case["kept_topk_order"][0])
    torch.testing.assert_close(out, case["out_tokens"][0], atol=1e-5, rtol=1e-5)


@claims("prumergeplus", anchor="hidden_states", part="results of the published formulation")
def test_prumerge_plus(case: GoldenCase) -> None:
    kept, out = merging.prumerge_plus(case["hidden_states"][0, 1:], case["cls_attn"][0], case["k"][0, 1:])
    assert torch.equal(kept, case["kept_order"])
    torch.testing.assert_close(out, case["out_tokens"][0], atol=1e-5, rtol=1e-5)


@claims("dart_llava", "dart_qwen", anchor="hidden_norm", part="results of the published formulation")
def test_dart(case: GoldenCase) -> None:
    length, image, text = (case.number(name) for name in ("image_len", "pivot_image", "pivot_text"))
    most, reduction = case.number("max_trunc"), round(case.number("reduction_ratio"), 6)
    each = picks_per_pivot(length, image + text, None if reduction < 0 else reduction, None if most < 0 else most)
    hidden, keys, start = case["hidden_norm"][0], case["keys"][0], case.number("image_start")
    kept = similarity.dart(hidden, keys, start, length, each, image, text, case["pivot_visit_order"])
    assert torch.equal(kept, case["retained_sorted"])


@claims("mmtok", anchor="vision_proj", part="results of the published formulation")
def test_mmtok(case: GoldenCase) -> None:
    inputs = (case["vision_proj"], case["vision_clip"], case["text_embeds"], case.number("K"))
    kept = similarity.mmtok(*inputs, round(case.number("alpha"), 6), exclude=case["exclude"])
    assert torch.equal(kept, case["kept_sorted"])


@claims("vscan", anchor="features", part="results of the published formulation")
def test_vscan(case: GoldenCase) -> None:
    rows = zip(case["features"], case["cls_attn_shallow"], case["cls_attn_deep"], strict=True)
    for inputs, expected, tokens in zip(rows, case["kept_sorted"], case["out_tokens"], strict=True):
        kept, out = merging.vscan(*inputs, case.number("T"))
        assert torch.equal(kept, expected)
        torch.testing.assert_close(out, tokens, atol=1e-4, rtol=1e-4)


@claims("globalcom2", anchor="base_cls_attn", part="results of the published formulation")
def test_globalcom2(case: GoldenCase) -> None:
    across, down = case["grid_wh"].tolist()
    newline = torch.full((case["features"].shape[-1],), case.number("newline_value"))
    scales, kept, out = attention.globalcom2(
        case["base_cls_attn"],
        case["crop_cls_attn"],
        case["features"],
        (down, across),
        tuple(case["orig_size_wh"].tolist()),
        newline,
        case.number("retention"),
        case.number("temperature"),
    )
    torch.testing.assert_close(scales, case["scales"], atol=1e-6, rtol=1e-5)
    assert torch.equal(kept, case["thumb_kept_order"])
    assert torch.equal(out, case["out_tokens"])


@claims("textmonkey", anchor="features", part="results of the published formulation")
def test_textmonkey(case: GoldenCase) -> None:
    assert torch.equal(similarity.textmonkey(case["features"], case.number("r")), case["kept_sorted"])


@claims("recoverable", anchor="hidden_states", part="results of the published formulation")
def test_recoverable(case: GoldenCase) -> None:
    visual, text = merging.recoverable(case["cls_attn"][0], case["text_similarity"][0])
    assert set(visual.nonzero()[:, 0].tolist()) == set(case["kept_visual"].flatten().tolist())
    assert set(text.nonzero()[:, 0].tolist()) == set(case["kept_text"].flatten().tolist())


@claims("llavolta", anchor=("features", "hidden"), part="results of the published formulation")
def test_pool(case: GoldenCase) -> None:
    if "hidden" in case:
        pytest.skip("the same pooling inside the LLM")
    tokens, places = merging.pool(case["features"], case["positions"], int(case.number("stride")))
    torch.testing.assert_close(tokens, case["out_tokens"], atol=1e-5, rtol=1e-5)
    assert torch.equal(places, case["out_positions_upstream"])


# The script.


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/methods.py as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_methods", ROOT / "benchmarks" / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_methods", module)
    spec.loader.exec_module(module)
    return module


def test_the_rule(script: ModuleType) -> None:
    quick, slow = [10.0, 11.0, 12.0, 10.5, 10.2], [15.0, 16.0, 17.0, 15.5, 15.2]
    assert script.verdict(quick, slow) == "slower"
    assert script.verdict(slow, quick) == "faster"
    assert script.verdict(quick, [x * 1.02 for x in quick]) == "even"
    assert script.verdict([0.1] * 5, [0.25] * 5) == "dispatch"
    assert script.verdict(quick, [10.0, 11.0, 30.0, 40.0, 10.2]) == "even"  # two disturbed rounds of five


def test_the_script_writes_what_it_measured(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        assert script.main(["--quick", "--methods", "dart,vscan", "--json", str(tmp_path / "out.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    data = json.loads((tmp_path / "out.json").read_text())
    assert {r["method"] for r in data["rows"]} == {"dart", "vscan"}
    assert all(r["same"] == 1 and r["ratio"] < 1 and r["published"]["cpu_ms"] > 0 for r in data["rows"])
    assert data["environment"]["threads"] == 1
    assert data["commit"]
    assert "Slower than published: none." in capsys.readouterr().out


def test_a_slow_method_is_an_error(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = next(p for p in script.PAIRS if p.name == "dart")
    monkeypatch.setattr(script, "PAIRS", (replace(pair, naive=pair.ours, ours=pair.naive),))
    threads = torch.get_num_threads()
    try:
        assert script.main(["--quick"]) == 1
    finally:
        torch.set_num_threads(threads)


def test_unknown_methods_are_named(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--methods", "divprnue"])
    assert "divprnue" in capsys.readouterr().err
