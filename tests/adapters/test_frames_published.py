"""The frames methods of the house in real models: equal to brute force, also where they merge, and led by the
scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.frames_methods import Brightness, quick
from tests.adapters.reference import HYBRID, MIXED, VIDEO, prompt, run, shared
from tokprune.adapters.prompting import build_inputs
from tokprune.budget import kept
from tokprune.testing import clip

TOLERANCE, HYBRID_TOLERANCE = 1e-4, 1e-3


def merged(last: Any) -> Any:
    """What merging methods write into the embeddings of a prompt, by hand from their weights."""

    def change(row: int, plane: torch.Tensor) -> torch.Tensor:
        out = plane.clone()
        for record in last.streams:
            if record.row == row:
                kept_columns = record.candidates[record.selection.indices]
                out[kept_columns] = record.selection.apply(plane[record.candidates])
        return out

    return change


@pytest.mark.parametrize("family", [quick(f) for f in VIDEO])
@pytest.mark.parametrize("method", ["quota", "uniform_frames", "aks"])
def test_published_methods_equal_brute_force(family: str, method: str) -> None:
    case = prompt(family, "mixed" if family in MIXED else "video")
    tiny = case.tiny
    options = {"ratio": 0.3, "query": "what is this bright thing?", "processor": tiny.processor}
    with tokprune.apply(tiny.model, method, **options) as pruning:
        got = run(tiny, case.inputs)
        last, report = pruning.last, pruning.report()
    for stream in last.streams:
        video = stream.layout.kind == "video"
        assert stream.kept == (kept(stream.total, 0.3) if video else stream.total)
        if video and method != "quota":  # whole frames, the last one cut
            sizes = stream.layout.group_sizes
            cut = [n for n, size in zip(stream.frame_tokens(), sizes, strict=True) if 0 < n < size]
            assert len(cut) <= 1
    assert "frames kept" in str(report)
    limit = HYBRID_TOLERANCE if family in HYBRID else TOLERANCE
    assert case.distance(last.keep, last.policy, got, merged(last)) < limit


@pytest.mark.parametrize("method", ["quota", "uniform_frames", "aks", "scenetilling", "wfs_sb", "fps_frames"])
def test_frames_that_the_model_itself_emptied(method: str) -> None:
    """VideoLLaMA 3 leaves repeated frames out before any method sees them: frames without tokens get none, and nothing
    breaks."""
    tiny = shared("video_llama_3")
    frames = clip(6, seed=4)
    frames[2:4] = frames[1]
    inputs = build_inputs(tiny.model, tiny.processor, "what is bright?", videos=[frames])
    options = {"ratio": 0.4, "query": "what is bright?", "processor": tiny.processor}
    with tokprune.apply(tiny.model, method, **options) as pruning, torch.no_grad():
        assert torch.isfinite(tiny.model(**inputs).logits).all()
        stream = pruning.last.streams[0]
    sizes = stream.layout.group_sizes
    assert min(sizes) < max(sizes), "the clip must be one that the model thins out"
    assert sum(stream.frame_tokens()) == stream.kept == kept(stream.total, 0.4)
    assert all(n <= size for n, size in zip(stream.frame_tokens(), sizes, strict=True))


@pytest.mark.parametrize("score", ["clip", "self"])
def test_quota_follows_the_scores(score: str) -> None:
    """A clip with one bright scene: the scorer's verdict decides where the budget goes."""
    tiny = shared("qwen2_5_vl")
    frames = clip(8, seed=2) // 8
    frames[4:6] += 200
    inputs = build_inputs(tiny.model, tiny.processor, "what is bright?", videos=[frames])
    method = tokprune.get_method("quota", score=score, reducer="linspace")
    options = {"ratio": 0.25, "query": "what is bright?", "processor": tiny.processor, "scorer": Brightness()}
    with tokprune.apply(tiny.model, method, **options) as pruning:
        tiny.model(**inputs)
        stream = pruning.last.streams[0]
        counts, text = stream.frame_tokens(), str(pruning.report())
    assert sum(counts) == kept(stream.total, 0.25)
    assert ("Brightness" if score == "clip" else "itself") in text
    if score == "clip":
        assert max(counts) == counts[2] > sum(counts) // 2
    else:
        assert min(counts) > 0, "probabilities of a random model are near to each other"
