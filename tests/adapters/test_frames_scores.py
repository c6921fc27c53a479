"""The signal `frame_scores`: the right frames reach a scorer, and the VLM itself is asked as its own forward would
be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokprune
from tests.adapters.frames_methods import Brightness, ByScore, Watch, lit, scores_of
from tests.adapters.reference import VIDEO, shared
from tokprune.adapters.base import flatten, get_adapter
from tokprune.adapters.prompting import build_inputs, inputs_of
from tokprune.errors import MissingSignalError
from tokprune.runtime.frames.asking import SIDE, Asking
from tokprune.runtime.frames.relevance import embed_frames
from tokprune.runtime.reuse import sources_of
from tokprune.runtime.scorers import VlmScorer
from tokprune.runtime.streams import Encoded, Prompts, build_streams
from tokprune.testing import build, clip, picture

PICTURES_KNOWN = [f for f in VIDEO if f not in ("molmo2", "minicpmv4_6")]


@pytest.mark.parametrize("family", PICTURES_KNOWN)
def test_a_scorer_sees_every_frame_in_order(family: str) -> None:
    tiny, scorer = shared(family), Watch()
    levels = [40, 200, 90, 10, 160, 120]
    inputs = build_inputs(tiny.model, tiny.processor, "bright?", videos=[lit(levels)])
    (scores,), report = scores_of(tiny, inputs, ByScore(), scorer=scorer)
    seen = torch.cat(scorer.seen)
    assert seen.shape[0] == len(levels), "each frame once"
    assert seen.mean((1, 2, 3)).argsort().tolist() == np.argsort(levels).tolist()
    pairs = len(scores) == len(levels) // 2
    assert pairs or len(scores) == len(levels)
    worth = [max(levels[i : i + 2]) for i in range(0, len(levels), 2)] if pairs else levels
    assert scores.argsort().tolist() == np.argsort(worth).tolist(), "a pair is as good as its better frame"
    cosine = seen.float().mean((1, 2, 3)).sigmoid().mul(torch.pi / 2).sin()
    wanted = cosine * scorer.logit_scale + scorer.logit_bias
    wanted = wanted.unflatten(0, (-1, 2)).amax(1) if pairs else wanted
    assert torch.allclose(scores, wanted, atol=1e-5)
    assert "frame_scores: Watch, whole frames" in str(report)
    assert "question: bright?" in str(report)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3"])
def test_packed_patches_become_the_very_pictures(family: str) -> None:
    """At a size that the processor leaves alone, the pictures are the frames, normalised."""
    tiny, scorer = shared(family), Watch()
    frames = clip(4, 48, 32, seed=3)
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[frames])
    video = tiny.processor.video_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (video.image_mean, video.image_std))
    scorer.mean, scorer.std = mean, std  # type: ignore[attr-defined]
    scores_of(tiny, inputs, ByScore(), scorer=scorer)
    seen = torch.cat(scorer.seen)
    shown = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    if seen.shape[-2:] != shown.shape[-2:]:  # GLM and Qwen3 count pixels of all frames: resized, but the same picture
        shown = torch.nn.functional.interpolate(shown, seen.shape[-2:], mode="bicubic", antialias=True)
        assert torch.nn.functional.cosine_similarity((seen * std + mean).flatten(1), shown.flatten(1)).min() > 0.99
    else:
        assert torch.allclose(seen, (shown - mean) / std, atol=1e-5)


def test_several_videos_and_a_picture_are_told_apart() -> None:
    for family in ("qwen2_5_vl", "internvl", "llava_onevision"):
        tiny, scorer = shared(family), Watch()
        videos = [lit([10, 20, 200, 210]), lit([250, 240, 30, 40])]
        inputs = build_inputs(tiny.model, tiny.processor, "bright?", videos=videos, images=[picture(60, 40)])
        (first, second), _ = scores_of(tiny, inputs, ByScore(), scorer=scorer)
        assert first.argmax() >= len(first) // 2 > second.argmax()
        assert scorer.pictures == 8, "the picture is not scored"


def test_entities_are_asked_as_captions_and_the_best_counts() -> None:
    tiny, scorer = shared("llava_next_video"), Brightness()
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[lit([10, 128, 250])])
    method = ByScore(entities=("a bright lamp", "night"))
    (scores,), report = scores_of(tiny, inputs, method, scorer=scorer)
    assert scorer.texts[-2:] == ["a photo of a bright lamp", "a photo of night"]
    assert scores[1] < scores[0]
    assert scores[1] < scores[2]
    assert "entities given: a bright lamp, night" in str(report)


def test_pixels_are_brought_to_the_scorers_normalisation() -> None:
    tiny, scorer = shared("llava_onevision"), Watch()
    scorer.mean, scorer.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)  # type: ignore[attr-defined]
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[lit([0, 100, 200])])
    scores_of(tiny, inputs, ByScore(), scorer=scorer)
    means = torch.cat(scorer.seen).mean((1, 2, 3)) * 255
    assert torch.allclose(means, torch.tensor([3.5, 103.5, 203.5]), atol=1.5)


@pytest.mark.parametrize("way", ["not normalised", "by 127.5", "levels to 255"])
def test_whoever_looks_at_frames_knows_how_the_processor_made_pixels(way: str) -> None:
    """A scorer with its own normalisation, one that takes the processor's, and a second VLM see the same greys."""
    tiny, levels = build("llava_onevision"), [0, 100, 200]
    for part in (tiny.processor.video_processor, tiny.processor.image_processor):
        if way == "not normalised":
            part.do_normalize = False
        elif way == "by 127.5":
            part.rescale_factor = 1 / 127.5
        else:
            part.do_rescale, part.image_mean, part.image_std = False, [120.0] * 3, [60.0] * 3
    frames = lit(levels)
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[frames])
    greys = torch.tensor(levels) + 3.5  # `lit` adds 0 to 7
    own = Watch()
    own.mean, own.std = torch.full((3,), 0.25), torch.full((3,), 0.5)  # type: ignore[attr-defined]
    scores_of(tiny, inputs, ByScore(), scorer=own)
    assert torch.allclose((torch.cat(own.seen).mean((1, 2, 3)) * 0.5 + 0.25) * 255, greys, atol=1.5)

    shown: list[float] = []

    class Second(VlmScorer):
        def scores(self, pictures: Any, prompt: str, normalize: str) -> torch.Tensor:
            shown.extend(float(np.asarray(one).mean()) for one in pictures)
            return torch.zeros(len(pictures))

    scores_of(tiny, inputs, ByScore(source="self"), scorer=Second(shared("llava").model, tiny.processor))
    assert torch.allclose(torch.tensor(shown), greys, atol=1.5)
    plain = Watch()
    embed_frames(frames, plain, tiny.processor)
    pixels = tiny.processor.image_processor(list(frames), do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(torch.cat(plain.seen).mean((1, 2, 3)), pixels[:, 0].mean((1, 2, 3)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", ["molmo2", "minicpmv4_6"])
def test_families_whose_pictures_are_not_at_hand_say_so(family: str) -> None:
    tiny = shared(family)
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4)])
    with pytest.raises(MissingSignalError, match="score in another way"):
        scores_of(tiny, inputs, ByScore(), scorer=Brightness())


# -- the VLM itself ----------------------------------------------------------------------------------------------------


def native_answer(tiny: Any, rows: torch.Tensor, planes: list[torch.Tensor], grid: tuple[int, int], words: str) -> Any:
    """Last logits of the unpruned model for a chat about one picture whose features are `rows` (h * w, D)."""
    content = [{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": words}]
    inputs = dict(inputs_of(tiny.model, tiny.processor, [[{"role": "user", "content": content}]]))
    config = tiny.model.config
    token = getattr(config, "image_patch_id", None) or config.image_token_id
    ids = inputs["input_ids"][0]
    at = (ids == token).nonzero()[:, 0]
    ids = torch.cat([ids[: at[0]], torch.full((len(rows),), token), ids[at[-1] + 1 :]])
    pooled = rows[None] if tiny.family in ("internvl", "perception_lm") else [rows]
    output = BaseModelOutputWithPooling(pooler_output=pooled)
    output.deepstack_features = [[p] for p in planes] or None
    call: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if tiny.family == "molmo2":  # tokens around the patches count as parts of the picture
        types = inputs["mm_token_type_ids"][0]
        call["mm_token_type_ids"] = torch.cat([types[: at[0]], torch.ones(len(rows)).long(), types[at[-1] + 1 :]])[None]
    if "image_grid_thw" in inputs:
        call["image_grid_thw"] = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        call["mm_token_type_ids"] = (ids == token).long()[None]
    return tiny.model(**call, mm_encoder_outputs={"image": output}).logits[0, -1]


@pytest.mark.parametrize(
    "family",
    [
        *("llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "glm4v"),
        *("molmo2", "perception_lm", "video_llama_3", "minicpmv4_6"),
    ],
)
@torch.no_grad()
def test_asking_is_the_models_own_forward(family: str) -> None:
    tiny = shared(family)
    words = "Is it bright? A. yes B. no"
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(6, seed=4)])
    caught: list[Any] = []

    class Catch(ByScore):
        def frame_worth(self, tokens: Any) -> torch.Tensor:
            caught.append(tokens)
            return super().frame_worth(tokens)

    method = Catch(source="self", entities=("x",))
    with tokprune.apply(tiny.model, method, ratio=0.5, query="q", processor=tiny.processor):
        tiny.model(**inputs)
        encoder = get_adapter(tiny.model).encode(dict(inputs))
    tokens = caught[0]
    modality = "video" if "video" in encoder else "image"
    planes = [torch.cat(flatten(p)) for p in getattr(encoder[modality], "deepstack_features", None) or ()]
    prompt = "Is any of x there? A. yes B. no"
    layout = tokens.layout
    assert layout.grids[0][0] <= SIDE, "small frames are shown whole"
    for frame, where in enumerate(layout.group_slices()):
        logits = native_answer(
            tiny, tokens.features[where], [p[where] for p in planes], layout.grids[frame], prompt
        ).float()
        pair = logits[[ord("A") - 33, ord("B") - 33]].softmax(-1)[0]  # byte tokenizer: printable bytes from "!" on
        assert abs(float(tokens.signals["frame_scores"][frame]) - float(pair)) < 1e-4, words


@pytest.mark.parametrize("option", ["final_logit_softcapping", "use_bidirectional_attention"])
def test_models_whose_answers_are_more_than_their_language_models_say_so(option: str) -> None:
    """Gemma 4 and 3n: logits are capped, and embeddings of each layer or other masks come from the model around it."""
    tiny = build("llava_next_video")
    setattr(tiny.model.config.get_text_config(), option, 30.0)
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(2)])
    with pytest.raises(MissingSignalError, match=f"{option}.*another way"):
        scores_of(tiny, inputs, ByScore(source="self"))


@torch.no_grad()
def test_smolvlm_is_asked_about_frames_not_about_tiles() -> None:
    tiny = shared("smolvlm")
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4, seed=4)])
    (scores,), report = scores_of(tiny, inputs, ByScore(source="self"))
    assert scores.shape == (4,)
    assert scores.std() > 0
    assert [s.modality for s in report.streams] == ["image"]
    with tokprune.apply(tiny.model, "random", ratio=0.5):
        before, after, _ = Asking(get_adapter(tiny.model), tiny.processor, "m").prompt("Is it?")
    text = tiny.processor.tokenizer.decode(before)
    assert text.endswith("Frame from 00:00:<fake_token_around_image><global-img>")
    assert "Is it?" in tiny.processor.tokenizer.decode(after)


@torch.no_grad()
def test_larger_frames_are_averaged() -> None:
    tiny = shared("llava_next_video")
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(2, seed=4)])
    with tokprune.apply(tiny.model, "random", ratio=0.5):
        tiny.model(**inputs)
        adapter = get_adapter(tiny.model)
        encoded = adapter.encode(dict(inputs))
        columns = adapter.placeholders(dict(inputs), encoded)["video"]
        stream = build_streams(
            adapter,
            Encoded("video", encoded["video"], columns, sources_of(encoded["video"])),
            Prompts(inputs["input_ids"], [None]),
            (),
        )[0]
    asking = Asking(adapter, tiny.processor, "m")
    import tokprune.runtime.frames.asking as module

    side, module.SIDE = module.SIDE, 2
    try:
        pooled = asking.pooled(stream, stream.tokens.features)
    finally:
        module.SIDE = side
    grids = stream.tokens.features.unflatten(0, (2, 4, 4))
    wanted = torch.nn.functional.adaptive_avg_pool2d(grids.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    assert torch.allclose(pooled, wanted, atol=1e-6)


@torch.no_grad()
def test_frames_that_the_model_itself_thinned_out() -> None:
    """VideoLLaMA 3 leaves repeated patches out: fewer tokens of a frame mean filler, and a frame without any its
    predecessor's score."""
    tiny = shared("video_llama_3")
    frames = clip(6, seed=4)
    frames[2] = frames[1]  # a repeated frame
    frames[4, :, :20] = frames[3, :, :20]  # half a frame repeated
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[frames])
    assert not bool(inputs["video_compression_mask"].all())
    (scores,), _ = scores_of(tiny, inputs, ByScore(source="self"))
    assert scores.shape == (6,)
    assert torch.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_pair_and_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asking, "letters", lambda self, letter: {"A": [0, 1], "B": [2]}[letter])
    asking = Asking.__new__(Asking)
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0]])
    asking.normalize = "pair"
    both = torch.tensor([2.0, 1.0]).logsumexp(0)
    expected = torch.stack([both, torch.tensor(0.0)]).softmax(0)[0]
    assert torch.allclose(asking.yes(logits), expected[None])
    asking.normalize = "vocab"
    assert torch.allclose(asking.yes(logits), logits.softmax(-1)[:, :2].sum(-1))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"])
def test_asking_while_generating_changes_nothing_but_the_choice(family: str) -> None:
    """The scoring passes leave no trace in caches and position records of the generation around them."""
    tiny = shared(family)
    inputs = build_inputs(tiny.model, tiny.processor, "bright?", videos=[clip(6, seed=4)])
    scores: list[torch.Tensor] = []

    class Frozen(ByScore):
        def frame_worth(self, tokens: Any) -> torch.Tensor:
            scores.append(tokens.signal("frame_scores"))
            return super().frame_worth(tokens)

    class Told(ByScore):
        needs = ()  # type: ignore[assignment]

        def frame_worth(self, tokens: Any) -> torch.Tensor:
            return scores[0].float()

    answers = []
    for method in (Frozen(source="self"), Told()):
        with tokprune.apply(tiny.model, method, ratio=0.4, query="bright?", processor=tiny.processor):
            out = tiny.model.generate(**inputs, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
            answers.append(torch.stack(out.logits))
    assert torch.equal(*answers)


def test_asking_is_not_taken_for_the_prefill() -> None:
    """Who watches the language model's hooks, as the profile does, sees one call per new token, however the frames are
    scored."""
    from tokprune.profiling.stages import find_stages, watch

    tiny = shared("llava_next_video")
    inputs = build_inputs(tiny.model, tiny.processor, "is it bright?", videos=[clip(4)])
    seen: list[str] = []
    with (
        tokprune.apply(tiny.model, "quota", ratio=0.5, score="self", decouple=True, processor=tiny.processor),
        watch(find_stages(tiny.model), seen.append, lambda part: None),
    ):
        tiny.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen.count("language") == seen.count("head") == 3
