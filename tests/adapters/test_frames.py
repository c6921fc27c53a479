"""The frames stage in real models: budgets per frame, equal to brute force, and the model unharmed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tokprune
from tests.adapters.frames_methods import Brightness, ByScore, Rising, quick
from tests.adapters.reference import HYBRID, MIXED, VIDEO, prompt, prompt_of, run, shared
from tokprune.adapters.prompting import build_inputs
from tokprune.budget import kept
from tokprune.errors import MissingSignalError, OptionError
from tokprune.methods.frames_base import FramesMethod
from tokprune.testing import clip, picture

TOLERANCE, HYBRID_TOLERANCE = 1e-4, 1e-3
CASES = [quick(f, k) for k, families in (("video", VIDEO), ("mixed", MIXED)) for f in families]


def rising(sizes: tuple[int, ...], keep: int) -> list[int]:
    class Stream:
        class layout:
            group_sizes = sizes

    return Rising().allocate(Stream, keep)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_frames_method_alone_equals_brute_force(family: str, kind: str, positions: str) -> None:
    case = prompt(family, kind)
    tiny = case.tiny
    # With the processor, so that InternVL's frames are told from pictures.
    with tokprune.apply(tiny.model, Rising(), ratio=0.25, positions=positions, processor=tiny.processor) as pruning:
        got = run(tiny, case.inputs)
        last, report = pruning.last, pruning.report()
    videos = [s for s in last.streams if s.layout.kind == "video"]
    images = [s for s in last.streams if s.layout.kind != "video"]
    assert len(videos) == 2
    assert len(images) == (3 if kind == "mixed" else 0)
    for stream in videos:
        counts = list(stream.frame_tokens())
        assert sum(counts) == kept(stream.total, 0.25)
        assert counts == rising(stream.layout.group_sizes, sum(counts))
        assert counts[0] == 0
        assert counts[-1] > counts[1] or len(counts) == 2
    for stream in images:
        assert stream.kept == stream.total
        assert "no connector method" in stream.note
    assert "frames kept" in str(report)
    assert (kind == "mixed") == ("not a video" in str(report))
    assert case.distance(last.keep, positions, got) < (HYBRID_TOLERANCE if family in HYBRID else TOLERANCE)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_connector_method_inside_the_frames_equals_brute_force(family: str, kind: str) -> None:
    case = prompt(family, kind)
    tiny = case.tiny
    stages = [Rising(), "divprune"]
    with tokprune.apply(tiny.model, stages, ratio=0.25, positions="keep", processor=tiny.processor) as pruning:
        got = run(tiny, case.inputs)
        last = pruning.last
    for stream in last.streams:
        assert stream.kept == kept(stream.total, 0.25)
        if stream.layout.kind == "video":
            assert list(stream.frame_tokens()) == rising(stream.layout.group_sizes, stream.kept)
        else:
            assert "divprune" in stream.note
    assert case.distance(last.keep, "keep", got) < (HYBRID_TOLERANCE if family in HYBRID else TOLERANCE)


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_several_videos_in_one_prompt_have_budgets_of_their_own(family: str) -> None:
    tiny = shared(family)
    parts = [
        ["a ", ("video", clip(4, seed=3)), " b ", ("video", clip(4, seed=4)), " c?"],
        ["d ", ("video", clip(4, seed=5)), " e?"],
    ]
    case = prompt_of(tiny, parts)  # type: ignore[arg-type]
    with tokprune.apply(tiny.model, Rising(), ratio=0.3, positions="keep", processor=tiny.processor) as pruning:
        got = run(tiny, case.inputs)
        last = pruning.last
    assert [s.row for s in last.streams] == [0, 0, 1]
    for stream in last.streams:
        assert list(stream.frame_tokens()) == rising(stream.layout.group_sizes, kept(stream.total, 0.3))
    assert case.distance(last.keep, "keep", got) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_kept_frames_stay_at_their_time(family: str) -> None:
    """Frames that vanish leave a gap on the time axis of M-RoPE; nothing moves up."""
    case = prompt(family, "video")
    with tokprune.apply(case.tiny.model, Rising(), ratio=0.2) as pruning:
        got = run(case.tiny, case.inputs)
        last = pruning.last
    assert last.policy == "keep"
    stream = last.streams[0]
    columns = stream.columns[last.keep[0, stream.columns]]
    times = case.generate.positions[0, 0, columns]
    first = case.generate.positions[0, 0, stream.columns].min()
    assert stream.frame_tokens()[0] == 0
    assert times.min() > first
    assert case.distance(last.keep, "keep", got) < TOLERANCE


@pytest.mark.parametrize("family", [quick(f) for f in VIDEO])
def test_everything_kept_is_the_unpruned_model(family: str) -> None:
    case = prompt(family, "video")
    tiny, scorer = case.tiny, Brightness()
    for method in (Rising(), [Rising(), "divprune"], ByScore()):
        with tokprune.apply(
            tiny.model, method, ratio=1.0, query="bright?", processor=tiny.processor, scorer=scorer
        ) as pruning:
            got = run(tiny, case.inputs)
            assert pruning.report().kept == pruning.report().total
        assert torch.equal(got.logits, case.unpruned.logits)
        assert torch.equal(got.tokens, case.unpruned.tokens)
    assert scorer.pictures == 0, "frames are not scored for nothing"


@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_5_vl", "internvl", "video_llama_3"])
def test_rows_do_not_depend_on_their_neighbours(family: str) -> None:
    tiny = shared(family)
    rows = [["a ", ("video", clip(4, seed=1)), " b?"], ["a longer one ", ("video", clip(4, seed=2)), " c?"]]
    options = {"ratio": 0.3, "query": "bright?", "processor": tiny.processor, "scorer": Brightness()}
    with tokprune.apply(tiny.model, [ByScore(), "divprune"], **options) as pruning:
        tiny.model(**tiny.inputs(rows))
        together = [s.selection.indices for s in pruning.last.streams]
        for row, expected in zip(rows, together, strict=True):
            tiny.model(**tiny.inputs([row]))
            assert torch.equal(pruning.last.streams[0].selection.indices, expected)


def test_beams_score_a_video_once() -> None:
    tiny, scorer = shared("llava_next_video"), Brightness()
    inputs = tiny.inputs([["a ", ("video", clip(4, seed=1)), " b?"]])
    with tokprune.apply(tiny.model, ByScore(), ratio=0.3, query="bright?", scorer=scorer):
        tiny.model.generate(**inputs, max_new_tokens=3, num_beams=3)
    assert scorer.pictures == 4


def test_encoder_frames_and_connector_stage_together() -> None:
    tiny = shared("llava_next_video")
    inputs = tiny.inputs([["a ", ("video", clip(4, seed=1)), " b?"]])
    with torch.no_grad():
        before = tiny.model(**inputs).logits
    stages = [tokprune.get_method("tome", r=4), Rising(), "divprune"]
    with tokprune.apply(tiny.model, stages, ratio=0.2) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=2)
        stream = pruning.last.streams[0]
        assert stream.kept == kept(stream.total, 0.2)
        counts = stream.frame_tokens()
        assert counts[0] == 0
        assert sorted(counts) == list(counts)
        assert "tome" in str(pruning.report())
    with torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, before)


def test_one_frame_gets_the_whole_budget() -> None:
    tiny, scorer = shared("llava_next_video"), Brightness()
    inputs = tiny.inputs([["a ", ("video", clip(1, seed=1)), " b?"]])
    with tokprune.apply(tiny.model, ByScore(), ratio=0.5, query="bright?", scorer=scorer) as pruning:
        tiny.model(**inputs)
        assert pruning.last.streams[0].frame_tokens() == (8,)


def test_absolute_budget_is_per_video() -> None:
    case = prompt("llava_onevision", "mixed")
    with tokprune.apply(case.tiny.model, [Rising(), "random"], budget=10) as pruning:
        case.tiny.model(**case.inputs)
        assert [s.kept for s in pruning.last.streams] == [10] * 5


def test_frames_without_a_processor_are_pictures_and_the_report_says_so() -> None:
    case = prompt("internvl", "video")
    with tokprune.apply(case.tiny.model, Rising(), ratio=0.25) as pruning:
        case.tiny.model(**case.inputs)
        assert pruning.report().kept == pruning.report().total
        assert "processor=processor" in str(pruning.report())


# -- errors ------------------------------------------------------------------------------------------------------------


class Broken(Brightness):
    def embed_picture(self, pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")


def state_of(model: Any) -> tuple[Any, ...]:
    base = model.base_model
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return sorted(model.__dict__), sorted(base.__dict__), hooks


class PatchesOnly:
    def embed_text(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 2)


@pytest.mark.parametrize("through", ["forward", "generate"])
def test_an_exception_while_scoring_leaves_the_model_usable(through: str) -> None:
    case = prompt("llava_next_video", "video")
    tiny = case.tiny
    clean = state_of(tiny.model)
    scorer = Broken()
    with tokprune.apply(tiny.model, ByScore(), ratio=0.25, query="bright?", scorer=scorer) as pruning:
        call = tiny.model if through == "forward" else tiny.model.generate
        with pytest.raises(RuntimeError, match="out of memory"):
            call(**case.inputs)
        text = tiny.processor.tokenizer("hello", return_tensors="pt")
        assert torch.isfinite(tiny.model(**text).logits).all()
        scorer.__class__ = Brightness  # it works again, and so does the pruned model
        got = run(tiny, case.inputs)
        assert case.distance(pruning.last.keep, pruning.last.policy, got) < TOLERANCE
    assert state_of(tiny.model) == clean
    assert torch.equal(run(tiny, case.inputs).logits, case.unpruned.logits)


def test_nan_scores_never_reach_the_model() -> None:
    class Nan(Brightness):
        def embed_picture(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().embed_picture(pixels) * torch.nan

    case = prompt("qwen2_5_vl", "video")
    with tokprune.apply(case.tiny.model, ByScore(), ratio=0.25, query="bright?", scorer=Nan()) as pruning:
        got = run(case.tiny, case.inputs)
        assert torch.isfinite(got.logits).all()
        assert [s.kept for s in pruning.last.streams] == [kept(s.total, 0.25) for s in pruning.last.streams]


def test_what_is_missing_is_named() -> None:
    case = prompt("llava_next_video", "video")
    model, processor = case.tiny.model, case.tiny.processor
    with (
        tokprune.apply(model, ByScore(), ratio=0.2, query="q"),
        pytest.raises(MissingSignalError, match=r"scorer=.open_clip"),
    ):
        model(**case.inputs)
    with (
        tokprune.apply(model, ByScore(), ratio=0.2, query="q", scorer=PatchesOnly()),
        pytest.raises(MissingSignalError, match="no embed_picture"),
    ):
        model(**case.inputs)
    with (
        tokprune.apply(model, ByScore(source="self"), ratio=0.2, query="q"),
        pytest.raises(MissingSignalError, match="processor=processor"),
    ):
        model(**case.inputs)
    with (
        tokprune.apply(model, ByScore(), ratio=0.2, scorer=Brightness()),
        pytest.raises(tokprune.errors.MissingQueryError, match="query="),
    ):
        model(**case.inputs)
    with torch.no_grad():
        encoded = model.base_model.get_video_features(
            pixel_values_videos=case.inputs["pixel_values_videos"], return_dict=True
        )
    call = {k: v for k, v in case.inputs.items() if k != "pixel_values_videos"}
    with (
        tokprune.apply(model, ByScore(), ratio=0.2, query="q", scorer=Brightness(), processor=processor) as pruning,
    ):
        # Encoded outside: one line of unknown geometry, so no frames to score, and the report says so.
        model(**call, mm_encoder_outputs={"video": encoded})
        assert "geometry unknown" in str(pruning.report())


def test_methods_that_are_none_are_refused() -> None:
    class Fake(tokprune.methods.base.Method):
        stage = "frames"
        info = Rising.info

    tiny = shared("llava_next_video")
    with pytest.raises(OptionError, match=r"must derive from .*FramesMethod"):
        tokprune.apply(tiny.model, Fake(), ratio=0.2)
    with pytest.raises(OptionError, match="two methods for the stage 'frames'"):
        tokprune.apply(tiny.model, [Rising(), Rising()], ratio=0.2)
    assert isinstance(Rising(), FramesMethod)


def test_budgets_of_pictures_beside_a_video() -> None:
    """A picture beside a video keeps all its tokens, and the report says why; a connector method prunes it."""
    tiny = shared("qwen2_vl")
    frames = np.repeat(clip(1, seed=9), 4, 0)
    inputs = build_inputs(tiny.model, tiny.processor, "what?", videos=[frames], images=[picture(60, 40)])
    with tokprune.apply(tiny.model, Rising(), ratio=0.1) as pruning:
        tiny.model(**inputs)
        kinds = {s.layout.kind: s for s in pruning.last.streams}
        assert kinds["image"].kept == kinds["image"].total
        assert kinds["video"].kept == kept(kinds["video"].total, 0.1)
        assert "['rising', 'divprune']" in str(pruning.report())
