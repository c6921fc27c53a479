"""The harness of the golden vectors itself, and the promise that no vector lies around untested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import golden_vectors
from tests.golden_vectors import GoldenCase, cases_of, claimed, claims, files, fits, orphans, partial, unclaimed

# Vectors that lie in the folder ahead of the stage that will claim them. Take a name out when its test exists.
PLANNED: frozenset[str] = frozenset()


def test_every_vector_is_claimed() -> None:
    left = unclaimed(PLANNED)
    assert not left, f"no test claims these golden vectors (write @claims(<prefix>) above one): {left}"


def test_one_test_of_every_vector_reads_all_of_it() -> None:
    assert not partial(), f"no test without `part` claims {partial()}"


def test_no_case_of_a_file_is_passed_over() -> None:
    for path in files():
        assert not orphans(path), f"{path.name} holds a case without the anchor of its test"


def test_a_case_without_the_anchor_is_found(vectors: Path) -> None:
    np.savez(vectors / "tome_bipartite_z.npz", **{"a/metric": np.zeros(1), "a/x": np.zeros(1), "b/x": np.zeros(1)})
    assert orphans(vectors / "tome_bipartite_z.npz") == ["b/x"]


def test_what_is_stored_twice_says_the_same() -> None:
    for path in files():
        for case in cases_of(path):
            if "mask" in case and "kept_sorted" in case:
                mask, kept = case["mask"].bool(), case["kept_sorted"]
                rows = zip(mask.view(-1, mask.shape[-1]), kept.view(-1, kept.shape[-1]), strict=True)
                assert all(torch.equal(m.nonzero()[:, 0], k) for m, k in rows), case
            if "kept_idx_sorted" in case and "kept_idx_topk_order" in case:
                assert torch.equal(case["kept_idx_sorted"], case["kept_idx_topk_order"].sort().values), case


def test_there_are_vectors() -> None:
    assert files(), f"no .npz under {golden_vectors.folder()}"


def test_claims_are_found_without_import() -> None:
    assert "methods/connector/test_divprune.py" in claimed()["divprune"]


def test_a_prefix_ends_at_an_underscore() -> None:
    assert fits("prumerge_a", "prumerge")
    assert fits("wfs_sb", "wfs_sb")
    assert not fits("prumergeplus_a", "prumerge")


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of vectors that the harness reads instead of the real one."""
    monkeypatch.setattr(golden_vectors, "folder", lambda: tmp_path)
    monkeypatch.setattr(golden_vectors, "files", lambda: tuple(sorted(tmp_path.rglob("*.npz"))))
    return tmp_path


def run_all(test) -> int:  # type: ignore[no-untyped-def]
    (mark,) = test.pytestmark
    for case in mark.args[1]:
        test(case=case)
    return len(mark.args[1])


def test_an_empty_match_fails(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKPRUNE_GOLDEN", raising=False)

    @claims(*["nothing_here"])
    def test(case: GoldenCase) -> None:
        pass

    with pytest.raises(pytest.fail.Exception, match="no golden vector nothing_here"):
        run_all(test)


def test_an_empty_match_in_a_folder_of_ones_own_is_no_failure(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKPRUNE_GOLDEN", str(vectors))

    @claims(*["nothing_here"])
    def test(case: GoldenCase) -> None:
        pass

    assert run_all(test) == 0


def test_a_file_without_the_anchor_fails(vectors: Path) -> None:
    np.savez(vectors / "toy_a.npz", something=np.zeros(3))

    @claims(*["toy"], anchor="features")
    def test(case: GoldenCase) -> None:
        pass

    with pytest.raises(pytest.fail.Exception, match="holds no case"):
        run_all(test)


def test_an_unreadable_file_fails(vectors: Path) -> None:
    (vectors / "toy_a.npz").write_bytes(b"not a zip")

    @claims(*["toy"], anchor="features")
    def test(case: GoldenCase) -> None:
        pass

    with pytest.raises(pytest.fail.Exception, match="cannot read"):
        run_all(test)


def test_new_files_and_cases_are_run(vectors: Path) -> None:
    (vectors / "deep").mkdir()
    np.savez(vectors / "deep" / "toy_a.npz", features=np.full(2, 1.0))
    np.savez(vectors / "toy_b.npz", a_features=np.full(2, 2.0), b_features=np.full(2, 3.0), a_lv_features=np.zeros(1))
    np.savez(vectors / "toy_c.npz", **{"c0/features": np.full(2, 4.0), "c0/x_features": np.zeros(1), "w/k": np.ones(1)})
    seen = []

    @claims(*["toy"], anchor="features", unused={"*_features": "not the anchor"})
    def test(case: GoldenCase) -> None:
        seen.append((case.path.stem, case.name, case["features"][0].item()))

    assert run_all(test) == 4
    assert sorted(seen) == [("toy_a", "", 1.0), ("toy_b", "a", 2.0), ("toy_b", "b", 3.0), ("toy_c", "c0", 4.0)]


def test_arrays_that_a_test_leaves_unread_fail_it(vectors: Path) -> None:
    arrays = {"features": np.zeros(2), "kept_sorted": np.ones(1), "seed": np.int64(3), "min_margin": np.float64(0.1)}
    np.savez(vectors / "toy_a.npz", **arrays)

    @claims(*["toy"], anchor="features", unused={"se*": "the inputs are stored"})
    def returns_early(case: GoldenCase) -> None:
        assert case["features"].shape == (2,)

    @claims(*["toy"], anchor="features", unused={"se*": "the inputs are stored"})
    def compares(case: GoldenCase) -> None:
        assert case["features"].shape != case["kept_sorted"].shape

    @claims(*["toy"], anchor="features", part="the features")
    def a_part(case: GoldenCase) -> None:
        assert case["features"].shape == (2,)

    @claims(*["toy"], anchor="features", part="nothing at all")
    def nothing(case: GoldenCase) -> None:
        pass

    with pytest.raises(pytest.fail.Exception, match="did not read: kept_sorted"):
        run_all(returns_early)
    with pytest.raises(pytest.fail.Exception, match="read nothing"):
        run_all(nothing)
    assert run_all(compares) == run_all(a_part) == 1


def test_a_file_with_named_cases_and_arrays_of_its_own_has_all_of_them(vectors: Path) -> None:
    """The arrays of no case are a case, and do not hide the others."""
    np.savez(
        vectors / "toy.npz",
        a_features=np.zeros(1),
        b_features=np.zeros(2),
        labels_in=np.zeros(3),
        labels_out=np.ones(3),
    )
    seen = []

    @claims(*["toy"], anchor=("features", "labels_in"))
    def test(case: GoldenCase) -> None:
        seen.append((case.name, *sorted(case)))
        for key in case:
            assert case[key].numel()

    assert run_all(test) == 3
    assert seen == [("a", "features"), ("b", "features"), ("", "labels_in", "labels_out")]


def test_an_unclaimed_file_is_listed(vectors: Path) -> None:
    np.savez(vectors / "stray_a.npz", x=np.zeros(1))
    np.savez(vectors / "later_a.npz", x=np.zeros(1))
    assert unclaimed(frozenset({"later"})) == ["stray_a.npz"]


def test_a_case_reads_its_own_then_the_shared_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", **{"m0/x": np.zeros((2, 3)), "m0/ratio": np.float64(0.1), "w/k": np.ones(4)})
    (case,) = cases_of(tmp_path / "toy.npz", "x")
    assert case["x"].shape == (2, 3)
    assert case.number("ratio") == 0.1
    assert case["w/k"].shape == (4,)
    assert "ratio" in case
    assert "k" not in case
    assert case.keys() == ["x", "ratio"]
    with pytest.raises(KeyError, match="no array 'y'"):
        case["y"]
