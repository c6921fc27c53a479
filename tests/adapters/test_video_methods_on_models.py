"""The video methods in real models, end to end: several videos, videos and pictures, against a reference of their own
decisions.

What a method decides is tested beside it; here its decision, merges included, is worked out by hand on what the
unpruned model's language model saw, and must give the pruned model's logits at the prompt and in every decode step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import HYBRID, MIXED, VIDEO, Change, Prompt, prompt, prompt_of, run, shared, slow_unless
from tokprune.budget import kept
from tokprune.registry import list_methods, method_class
from tokprune.testing import Part, clip, picture

METHODS = [n for n in list_methods("connector") if method_class(n).info.video]
RATIO = 0.4

# A family of each kind of video: frames as features, with time in M-RoPE, as pictures between words, and with
# DeepStack.
QUICK = ("llava_next_video", "qwen2_5_vl", "internvl", "qwen3_vl")
# Methods of each kind: picked from all frames, merged over time by target, merged by dense rows.
KINDS = ("vidcom2", "holitom", "fastvid")


def moving(frames: int, seed: int) -> Any:
    """A clip in which half of every frame stands still, so that merging over time has something to merge."""
    still, film = clip(1, seed=seed + 50), clip(frames, seed=seed)
    film[:, :, : film.shape[2] // 2] = still[:, :, : film.shape[2] // 2]
    return film


# Their processors pack clips of different length into one batch; the others want equal ones, natively.
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "video_llama_3")


def parts(family: str, kind: str) -> list[list[Part]]:
    """Two prompts of unequal length: one clip and two; or a clip and a picture, and a picture, a clip and a picture."""
    more = 6 if family in PACKED else 4
    if family == "molmo2":  # one clip per prompt, says its processor
        return [["v ", ("video", moving(4, 1)), " what?"], ["and then ", ("video", moving(4, 3)), " which is it?"]]
    if kind == "videos":
        return [
            ["v ", ("video", moving(4, 1)), " what?"],
            ["first ", ("video", moving(more, 2)), " and then ", ("video", moving(4, 3)), " which is it?"],
        ]
    return [
        ["v ", ("video", moving(4, 1)), " and ", ("image", picture(60, 40, 1)), " what?"],
        [
            *("first ", ("image", picture(40, 60, 3)), " then ", ("video", moving(more, 2))),
            *(" then text and ", ("image", picture(40, 40, 7)), " ok?"),
        ],
    ]


_cases: dict[tuple[str, str], Prompt] = {}


def given(family: str, kind: str) -> Prompt:
    """The prompts of a kind, watched once for all methods."""
    tiny = shared(family)
    if (family, kind) not in _cases:
        _cases[family, kind] = prompt_of(tiny, parts(family, kind))
    return _cases[family, kind]


def written_by_hand(last: Any) -> Change:
    """The kept tokens of each stream as its selection mixes them from the unpruned features."""

    def change(row: int, plane: Tensor) -> Tensor:
        plane = plane.clone()
        for stream in last.streams:
            if stream.row == row:
                columns = stream.candidates
                plane[columns[stream.selection.indices]] = stream.selection.apply(plane[columns])
        return plane

    return change


def matrix() -> Iterator[Any]:
    for family in VIDEO:
        for kind in ("videos", "mixed"):
            if kind == "videos" or family in MIXED:
                for method in METHODS:
                    quick = family in QUICK and method in KINDS and (kind == "mixed" or family == "internvl")
                    yield slow_unless(quick, family, kind, method)


@pytest.mark.parametrize(("family", "kind", "method"), matrix())
def test_video_method_equals_its_decision_written_by_hand(family: str, kind: str, method: str) -> None:
    case = given(family, kind)
    with tokprune.apply(case.tiny.model, method, ratio=RATIO, processor=case.tiny.processor) as pruning:
        got = run(case.tiny, case.inputs, new_tokens=3)
        last = pruning.last
    for stream in last.streams:
        assert stream.kept == kept(stream.total, RATIO), f"{stream.modality} of prompt {stream.row}"
    videos = [s for s in last.streams if s.layout.kind == "video"]
    clips = sum(part[0] == "video" for row in parts(family, kind) for part in row if not isinstance(part, str))
    assert len(videos) == clips, "every clip is one stream of its frames"
    assert all(s.layout.num_groups > 1 for s in videos)
    positions = last.policy
    tolerance = 1e-3 if family in HYBRID else 1e-4
    assert case.distance(last.keep, positions, got, written_by_hand(last)) < tolerance


@pytest.mark.parametrize("family", [slow_unless(f in ("qwen2_vl", "internvl"), f) for f in (*QUICK, "qwen2_vl")])
def test_what_merges_over_time_does_merge_in_models(family: str) -> None:
    """On clips whose left half stands still, HoliTom's kept tokens hold features of several frames."""
    case = given(family, "videos")
    with tokprune.apply(case.tiny.model, "holitom", ratio=RATIO, processor=case.tiny.processor) as pruning:
        run(case.tiny, case.inputs, new_tokens=1)
        stream = pruning.last.streams[0]
    rows = stream.selection.weights.dense(len(stream.selection), stream.total) > 0
    frames = stream.layout.group
    assert any(len(set(frames[row].tolist())) > 1 for row in rows)


@pytest.mark.parametrize("family", [slow_unless(f == "llava_next_video", f) for f in VIDEO if f not in HYBRID])
def test_a_clip_is_pruned_as_alone(family: str) -> None:
    """A second clip in the batch changes nothing of what a method keeps of the first."""
    tiny = shared(family)
    one = [["v ", ("video", moving(4, 1)), " what?"]]
    for method in KINDS:
        with tokprune.apply(tiny.model, method, ratio=RATIO, processor=tiny.processor) as pruning:
            tiny.model.generate(**tiny.inputs(one), max_new_tokens=1)
            alone = pruning.last.streams[0].selection.indices
            tiny.model.generate(**tiny.inputs([*one, ["v ", ("video", moving(4, 2)), " what?"]]), max_new_tokens=1)
            first = next(s for s in pruning.last.streams if s.row == 0)
        assert torch.equal(first.selection.indices, alone)


def test_samples_of_the_reference_are_clips() -> None:
    """The shared samples are watched elsewhere with methods that look at single tokens; here they must be streams of
    frames."""
    case = prompt("llava_onevision", "video")
    with tokprune.apply(case.tiny.model, "evs", ratio=RATIO) as pruning:
        case.tiny.model.generate(**case.inputs, max_new_tokens=1)
    assert [s.layout.kind for s in pruning.last.streams] == ["video", "video"]
