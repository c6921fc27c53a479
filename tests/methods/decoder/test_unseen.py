"""The golden tests of the decoder, cache and schedule methods on vectors that nobody has stored: other shapes, shares,
counts and batches, ties, large values.

The code under test is called as the golden tests call it; what they expect comes from slow forms of the published rules
(`unseen`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.decoder import test_compaction
from tests.encoder import test_mustdrop_merge
from tests.golden_vectors import GoldenCase, left_unread
from tests.methods.connector import test_gemfilter, test_pool, test_quecc
from tests.methods.decoder import test_golden, test_last_token, unseen

PAIRS: dict[str, tuple[unseen.Maker, Callable[..., None]]] = {
    "fastv_topk": (unseen.fastv, test_last_token.test_fastv_keeps_what_the_published_code_keeps),
    "pyramiddrop_rank_drop": (
        unseen.pyramiddrop,
        test_last_token.test_pyramiddrop_keeps_what_the_published_code_keeps,
    ),
    "sparsevlm_cluster_merge": (unseen.sparsevlm_clusters, test_golden.test_sparsevlm_clusters),
    "sparsevlm_stage": (unseen.sparsevlm_stage, test_golden.test_sparsevlm_stage),
    "sparsevlm_v1_rank": (unseen.sparsevlm_rank, test_golden.test_sparsevlm_rank),
    "mustdrop_dual_filter": (unseen.mustdrop_filter, test_golden.test_mustdrop_filter),
    "mustdrop_spatial_merge": (unseen.mustdrop_windows, test_mustdrop_merge.test_golden),
    "mustdrop_kv_compose": (unseen.mustdrop_cache, test_compaction.test_survivors_are_those_of_the_published_chain),
    "fitprune_select": (unseen.fitprune, test_golden.test_fitprune),
    "gemfilter_index": (unseen.gemfilter, test_gemfilter.test_golden),
    "promptdistill_select_pool0": (partial(unseen.promptdistill, pooled=False), test_golden.test_promptdistill),
    "promptdistill_select_pool1": (partial(unseen.promptdistill, pooled=True), test_golden.test_promptdistill),
    "llavolta_avgpool": (unseen.llavolta, test_golden.test_llavolta),
    "llavolta": (unseen.llavolta, test_pool.test_golden),
    "quecc": (unseen.quecc, test_quecc.test_golden),
}
TIES = {"fastv_topk", "pyramiddrop_rank_drop", "promptdistill_select_pool0"}  # equal inputs give equal scores


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PAIRS)
def test_unseen_vectors(name: str, count: int, tmp_path: Path) -> None:
    make, test = PAIRS[name]
    seen = 0
    for seed in range(count):
        kind = ("plain", "twice", "sharp")[seed % 3]
        arrays, narrow = make(np.random.default_rng(seed), kind)
        if narrow < 2e-6 and not (narrow == 0 and kind == "twice" and name in TIES):
            continue  # float32 may decide otherwise
        path = tmp_path / str(seed) / f"{name}.npz"
        path.parent.mkdir()
        np.savez(path, **arrays)  # type: ignore[arg-type]
        case = GoldenCase(path)
        test.__wrapped__(case=case)  # type: ignore[attr-defined]
        assert not left_unread(case, {})
        seen += 1
    assert seen > count / 4
