"""Prompts of whole videos for every family: what the processor is given, and that it is what the family's own way
gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters.reference import VIDEO, shared
from tokprune.adapters.media import as_clip
from tokprune.adapters.prompting import answer, build_inputs, inputs_of, takes_videos
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.testing import FAMILIES, clip, picture
from tokprune.video import Video

APART = ("perception_lm", "glm4v", "minicpmv4_6", "molmo2", "smolvlm")


def video(seconds: list[float], indices: list[int] | None = None, fps: float = 30.0, seed: int = 1) -> Video:
    frames = clip(max(len(seconds), 1), seed=seed)[: len(seconds)]
    return Video(
        frames=frames,
        timestamps=np.array(seconds),
        indices=np.array(range(len(seconds)) if indices is None else indices),
        total=3000,
        fps=fps,
        duration=100.0,
        size=frames.shape[1:3],
        path=Path("clip.mp4"),
        backend="pyav",
        reason="",
        rule="given",
    )


@pytest.mark.parametrize("family", VIDEO)
def test_same_inputs_as_the_familys_own_chat(family: str) -> None:
    tiny = shared(family)
    frames = clip(4, seed=1)
    mine = build_inputs(tiny.model, tiny.processor, " what?", videos=[(frames, [0, 0.5, 1, 1.5])])
    theirs = tiny.chat([[("video", frames), " what?"]])
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert mine[name].dtype == value.dtype
            assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_about_a_clip(family: str) -> None:
    tiny = shared(family)
    inputs = build_inputs(tiny.model, tiny.processor, "what?", videos=[clip(4, seed=1)])
    assert takes_videos(tiny.processor) == (family in VIDEO)
    other = build_inputs(tiny.model, tiny.processor, "what?", videos=[clip(4, seed=2)])
    pixels = next(name for name in inputs if "pixel_values" in name)
    assert not torch.equal(inputs[pixels], other[pixels])
    with torch.no_grad():
        a, b = (tiny.model(**x).logits[:, -1] for x in (inputs, other))
    assert (a - b).abs().max() > 1e-3, "the clip must reach the answer"
    words = answer(tiny.model, tiny.processor, inputs, max_new_tokens=3)
    assert len(words) == 1
    assert "what?" not in words[0]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("molmo2",)])
def test_several_clips_and_a_picture_in_one_prompt(family: str, recwarn: pytest.WarningsRecorder) -> None:
    tiny = shared(family)
    one = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4, seed=1)])
    two = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4, seed=1), clip(4, seed=2)])
    mixed = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4, seed=1)], images=[picture(60, 40)])
    assert one["input_ids"].shape[1] < two["input_ids"].shape[1]
    assert one["input_ids"].shape[1] < mixed["input_ids"].shape[1]
    warned = [str(w.message) for w in recwarn if "given as pictures" in str(w.message)]
    assert bool(warned) == (family in APART)
    with torch.no_grad():
        assert torch.isfinite(tiny.model(**mixed).logits).all()


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision", "internvl"])
def test_stacked_families_refuse_clips_of_different_length(family: str) -> None:
    tiny = shared(family)
    with pytest.raises(OptionError, match=r"\[4, 6\].*same frames="):
        build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4), clip(6)])


def test_packed_families_take_clips_of_different_length() -> None:
    tiny = shared("qwen2_5_vl")
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4), clip(8)])
    assert inputs["video_grid_thw"][:, 0].tolist() == [2, 4]


def test_true_times_of_a_part_of_a_file_with_a_variable_rate() -> None:
    """Ten to sixteen seconds of a 100 s file, sampled unevenly: neither its mean rate nor its length tells when."""
    seconds = [10.0, 11.7, 13.0, 16.0]
    part = video(seconds, indices=[100, 110, 500, 510])
    tiny = shared("qwen3_vl")
    ids = build_inputs(tiny.model, tiny.processor, "q", videos=[part])["input_ids"]
    text = tiny.processor.tokenizer.decode(ids[0])
    assert "<10.8 seconds>" in text.replace("10.9", "10.8")  # the middle of a pair, 10.85
    assert "<14.5 seconds>" in text
    tiny = shared("qwen2_5_vl")
    step = build_inputs(tiny.model, tiny.processor, "q", videos=[part])["second_per_grid_ts"]
    assert float(step[0]) == pytest.approx(2 * 6.0 / 3, rel=1e-3)
    tiny = shared("video_llama_3")
    ids = build_inputs(tiny.model, tiny.processor, "q", videos=[part])["input_ids"]
    text = tiny.processor.tokenizer.decode(ids[0])
    assert all(f"Time {s:.1f}s:" in text for s in seconds)


def test_frames_as_pictures_of_smolvlm_tell_their_times() -> None:
    tiny = shared("smolvlm")
    ids = build_inputs(tiny.model, tiny.processor, "q", videos=[video([0.0, 61.0, 62.0])])["input_ids"]
    text = tiny.processor.tokenizer.decode(ids[0])
    assert [text.count(f"Frame from {t}:") for t in ("00:00", "01:01", "01:02")] == [1, 1, 1]


def test_history_stands_before_the_question_and_the_media_in_its_first_turn() -> None:
    tiny = shared("llava_onevision")
    inputs = build_inputs(
        tiny.model, tiny.processor, "And now?", videos=[clip(4)], history=[("What is it?", "A red ball.")]
    )
    text = tiny.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.index("<video>") < text.index("What is it?") < text.index("A red ball.") < text.index("And now?")
    assert text.endswith("<|im_start|>assistant\n")


def test_a_batch_of_questions_answers_as_one_by_one() -> None:
    tiny = shared("llava_next_video")
    questions, videos = ["q?", "a longer question?"], [[clip(4, seed=1)], [clip(4, seed=2)]]
    inputs = build_inputs(tiny.model, tiny.processor, questions, videos=videos)
    together = answer(tiny.model, tiny.processor, inputs, max_new_tokens=5)
    alone = [
        answer(tiny.model, tiny.processor, build_inputs(tiny.model, tiny.processor, q, videos=v), max_new_tokens=5)[0]
        for q, v in zip(questions, videos, strict=True)
    ]
    assert together == alone
    with pytest.raises(OptionError, match="one list per question"):
        build_inputs(tiny.model, tiny.processor, questions, videos=videos[:1])


def test_media_stand_where_the_chat_puts_them() -> None:
    tiny = shared("qwen2_vl")
    chat = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "first "},
                {"type": "image", "image": picture(40, 40)},
                {"type": "text", "text": " then "},
                {"type": "video", "video": clip(4)},
            ],
        },
    ]
    ids = inputs_of(tiny.model, tiny.processor, [chat])["input_ids"][0].tolist()
    config = tiny.model.config
    assert ids.index(config.image_token_id) < ids.index(config.video_token_id)
    assert "Be brief." in tiny.processor.tokenizer.decode(ids)


def test_a_model_of_one_picture_is_refused_with_the_reason() -> None:
    tiny = shared("llava")
    template = tiny.processor.chat_template
    tiny.processor.chat_template = "<image>{{ messages[0]['content'][-1]['text'] }}"
    try:
        with pytest.raises(UnsupportedModelError, match="shows 1 of 4 images"):
            build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4)])
    finally:
        tiny.processor.chat_template = template


def test_a_template_that_refuses_a_chat_is_an_error_not_another_prompt() -> None:
    tiny = shared("llava")
    template = tiny.processor.chat_template
    tiny.processor.chat_template = "{{ raise_exception('no history, please') }}"
    try:
        with pytest.raises(OptionError, match="no history, please"):
            build_inputs(tiny.model, tiny.processor, "q", images=[picture()])
    finally:
        tiny.processor.chat_template = template


def test_seconds_keep_their_precision_in_half_precision_models() -> None:
    from tokprune.testing import build

    tiny = build("qwen2_5_vl", dtype=torch.bfloat16)
    seconds = [0.0, 0.7, 1.4, 2.1]
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[(clip(4), seconds)])
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(1.4, abs=1e-3)


def test_what_is_no_video_is_refused() -> None:
    tiny = shared("llava_next_video")

    def ask(videos: object, **more: object) -> None:
        build_inputs(tiny.model, tiny.processor, "q", videos=videos, **more)  # type: ignore[arg-type]

    for wrong, match in (
        (["clip.mp4"], "read_video"),
        (clip(4), "videos=\\[...\\]"),
        ([clip(4).astype(np.float32)], "uint8"),
        ([clip(4)[0]], "uint8 frames"),
        ([clip(4)[:0]], "T >= 1"),
        ([(clip(4), [0.0, 1.0])], "one per frame"),
        ([(clip(4), [3.0, 2.0, 1.0, 0.0])], "ascending"),
        ([video([])], "no frames"),
    ):
        with pytest.raises(OptionError, match=match):
            ask(wrong)
    with pytest.raises(OptionError, match="an image is a PIL picture"):
        ask(None, images=["a.png"])
    with pytest.raises(OptionError, match="at least 1"):
        answer(tiny.model, tiny.processor, {}, max_new_tokens=0)


def test_frames_come_as_arrays_tensors_and_pictures() -> None:
    from PIL import Image

    frames = clip(3, seed=5)
    for given in (torch.from_numpy(frames), [Image.fromarray(f) for f in frames], list(frames)):
        found = as_clip(given)
        assert np.array_equal(found.frames, frames)
        assert found.seconds.tolist() == [0.0, 0.5, 1.0]
    two = as_clip([frames[0], frames[1]])  # two frames, not a pair of frames and seconds
    assert len(two) == 2
