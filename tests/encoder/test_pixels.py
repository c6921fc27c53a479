"""The pixels stage in models: the tower on the kept patches alone, by hand, for every family that takes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import tokprune
from tests.adapters.checks import tolerance
from tests.adapters.conversations import conversation
from tests.adapters.reference import newlines, run, shared, slow_unless, used
from tests.encoder.all_towers import hooks, pixels
from tests.encoder.pixels_by_hand import Hand
from tests.methods.pixels.loops import best, drawn, loco, run_lengths, still
from tokprune.adapters.families import family_named
from tokprune.budget import kept
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.registry import get_method
from tokprune.testing import TinyVLM, build, picture

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
GRID = ("llava", "vipllava", "llava_next", "llava_onevision", "internvl", "gemma3", "idefics3", "aya_vision")
GRID = (*GRID, "cohere2_vision", "paligemma", "smolvlm")
CLIPS = (*PACKED, "internvl")
QUICK = ("qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "internvl")
SINGLE = ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3")  # one grid a picture: the stream is the picture of the tower
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def unpruned_afterwards() -> Iterator[None]:
    yield
    for family in tuple(used):
        tokprune.remove(shared(family).model)
    used.clear()


def given(tiny: TinyVLM, kind: str = "image", padding_side: str = "left") -> Any:
    if kind == "video":
        one = ["v ", ("video", still(6, seed=1)), " what?"]
        rows = [one] if tiny.family == "glm4v" else [one, ["a longer question ", ("video", still(6, seed=2)), " ok?"]]
        return tiny.inputs(rows)
    rows = [
        ["Hello ", ("image", drawn(60, 40, 1)), " what is this?"],
        ["Longer text before ", ("image", drawn(40, 40, 2)), " and ", ("image", drawn(40, 64, 3)), " compare."],
    ]
    return tiny.inputs(rows, padding_side)


def side_of(tiny: TinyVLM) -> int:
    base = tiny.model.base_model
    return family_named(base.config.model_type).joined_side(base, base.config)


def by_rule(x: Tensor) -> Tensor:
    return torch.stack([loco(frame)[0] for frame in x])


def distance(case: Any, pruning: Any, keep: Tensor, got: Any) -> float:
    """How far a run is from the columns that the loop keeps; newlines follow their line, which others test."""
    last, lines = pruning.last.keep, newlines(case.tiny, case.forward)
    assert torch.equal(last | lines, keep), "other units were kept than the rule keeps"
    return case.distance(last, "keep", got)


def matrix() -> Iterator[Any]:
    for family in (*PACKED, *GRID):
        yield slow_unless(family in QUICK, family, "image")
    for family in CLIPS:
        yield slow_unless(family in ("qwen3_vl",), family, "video")


@pytest.mark.parametrize(("family", "kind"), matrix())
def test_the_tower_on_kept_patches_alone(family: str, kind: str) -> None:
    """Threshold 0: prefill, first step and decode steps are those of kept patches run by hand, original positions."""
    tiny = shared(family)
    inputs = given(tiny, kind)
    case, keep = Hand(tiny, by_rule, side_of(tiny)).prompt(inputs)
    plain = case.unpruned
    before = hooks(tiny.model)
    with tokprune.apply(tiny.model, "pixelprune", positions="keep") as pruning:
        got = run(tiny, inputs)
        assert 0 < int(keep.sum()) < int(case.real.sum()), "the sample repeats nothing"
        assert distance(case, pruning, keep, got) < tolerance(family)
        assert "pixelprune" in str(pruning.report())
    assert hooks(tiny.model) == before
    assert torch.equal(tiny.model(**inputs).logits, plain.logits)


@pytest.mark.parametrize("family", [slow_unless(f == "qwen2_5_vl", f) for f in PACKED])
def test_run_lengths_of_a_clip(family: str) -> None:
    tiny = shared(family)
    inputs = given(tiny, "video")
    std = torch.tensor(tiny.processor.image_processor.image_std)

    def decide(x: Tensor) -> Tensor:
        t, h, w, _ = x.shape
        frames = x.view(t, h * w, 4, 3, 2, 16) * std[:, None, None]  # patches of a unit, channels, frames, pixels
        first, last = (frames[:, :, :, :, i].flatten(2) for i in (0, 1))
        return run_lengths(first, last, 0.1, True).view(t, h, w)

    case, keep = Hand(tiny, decide, alone=family == "glm4v").prompt(inputs)
    with tokprune.apply(tiny.model, "rlt", positions="keep", processor=tiny.processor) as pruning:
        got = run(tiny, inputs)
        assert distance(case, pruning, keep, got) < tolerance(family)
        for stream in pruning.last.streams:
            frames = stream.frame_tokens()
            assert frames[0] == stream.total // len(frames), "the first temporal patch stays whole"
            assert sum(frames[1:]) < stream.total / 2
    with tokprune.apply(tiny.model, "rlt", ratio=0.3, processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        assert [s.kept for s in pruning.last.streams] == [kept(s.total, 0.3) for s in pruning.last.streams]


@pytest.mark.parametrize("family", [slow_unless(f in ("qwen2_5_vl", "llava"), f) for f in SINGLE])
def test_an_exact_count_keeps_what_is_predicted_worst(family: str) -> None:
    tiny = shared(family)
    inputs = given(tiny)

    def decide(x: Tensor) -> Tensor:
        return torch.stack([best(loco(frame)[1], kept(frame.shape[0] * frame.shape[1], 0.4)) for frame in x])

    case, keep = Hand(tiny, decide, side_of(tiny)).prompt(inputs)
    with tokprune.apply(tiny.model, "pixelprune", ratio=0.4, positions="keep") as pruning:
        got = run(tiny, inputs)
        assert distance(case, pruning, keep, got) < tolerance(family)
        assert [s.kept for s in pruning.last.streams] == [kept(s.total, 0.4) for s in pruning.last.streams]


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in (*PACKED, *GRID)])
@torch.no_grad()
def test_counts_are_exact_and_everything_is_bit_identical(family: str) -> None:
    tiny = shared(family)
    inputs = given(tiny)
    plain = tiny.model(**inputs).logits
    for name in ("pixelprune", "blank"):
        with tokprune.apply(tiny.model, name, ratio=1.0):
            assert torch.equal(tiny.model(**inputs).logits, plain)
        for amount in ({"ratio": 0.25}, {"budget": 7}):
            with tokprune.apply(tiny.model, name, **amount) as pruning:
                pruned = tiny.model(**inputs).logits
                for s in pruning.last.streams:
                    assert s.kept == (kept(s.total, 0.25) if "ratio" in amount else min(7, s.total))
            assert not torch.allclose(pruned, plain)
    assert torch.equal(tiny.model(**inputs).logits, plain)


@pytest.mark.parametrize("family", [slow_unless(f in ("qwen2_5_vl", "llava_next"), f) for f in QUICK])
@torch.no_grad()
def test_where_nothing_repeats_nothing_changes(family: str) -> None:
    tiny = shared(family)
    noise = Image.effect_noise((64, 64), 120).convert("RGB")
    inputs = tiny.inputs([["a ", ("image", noise), " b"]])
    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "pixelprune") as pruning:
        assert torch.equal(tiny.model(**inputs).logits, plain)
        assert all(s.kept == s.total for s in pruning.last.streams)


@pytest.mark.parametrize("family", [slow_unless(f in ("qwen2_5_vl", "llava"), f) for f in QUICK])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(family: str) -> None:
    tiny = shared(family)
    noise = Image.effect_noise((64, 64), 120).convert("RGB")  # keeps all its units: then no row gets shorter
    rows = [["a ", ("image", drawn(60, 40, 1)), " b"], ["a longer one ", ("image", noise), " c d"]]
    with tokprune.apply(tiny.model, "pixelprune") as pruning:
        alone = []
        for row in rows:
            alone.append((tiny.model(**tiny.inputs([row])).logits[0, -1], pruning.last.streams[0].indices))
        for side in ("left", "right"):
            for order in ([0, 1], [1, 0]):
                inputs = tiny.inputs([rows[i] for i in order], side)
                logits, streams = tiny.model(**inputs).logits, pruning.last.streams
                for at, i in enumerate(order):
                    end = int(inputs["attention_mask"][at].nonzero()[-1])
                    torch.testing.assert_close(logits[at, end], alone[i][0], atol=TOLERANCE, rtol=1e-4)
                    assert torch.equal(streams[at].indices, alone[i][1])


@pytest.mark.parametrize("family", ["qwen2_5_vl", slow_unless(False, "llava")])
@torch.no_grad()
def test_sdpa_and_eager_agree(family: str) -> None:
    logits = []
    for attn in ("sdpa", "eager"):
        tiny = build(family, attn=attn)
        with tokprune.apply(tiny.model, "pixelprune"):
            inputs = given(tiny)
            logits.append(tiny.model(**inputs).logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=1e-4)


BEHIND: dict[str, list[Any]] = {
    "connector": ["divprune"],
    "merging connector": ["visionzip"],
    "decoder": ["fastv"],
    "cache": ["dycoke_cache"],
    "connector and decoder": ["divprune", "fastv"],
}


@pytest.mark.parametrize("behind", [slow_unless(b == "connector", b) for b in BEHIND])
@pytest.mark.parametrize("family", [slow_unless(f == "qwen3_vl", f) for f in ("qwen3_vl", "qwen2_5_vl", "llava")])
@torch.no_grad()
def test_stages_behind_choose_among_what_is_left(family: str, behind: str) -> None:
    """The ratio is the later stage's and counts of the whole picture; ids outside what the pixels left never appear."""
    tiny = shared(family)
    inputs = given(tiny)
    with tokprune.apply(tiny.model, "pixelprune") as pruning:
        tiny.model(**inputs)
        left = pruning.last.streams
    layer = {"fastv": 2 if family == "qwen3_vl" else 1, "dycoke_cache": 1}  # tiny LLMs have few
    methods = [get_method(name, **({"layer": layer[name]} if name in layer else {})) for name in BEHIND[behind]]
    with tokprune.apply(tiny.model, ["pixelprune", *methods], ratio=0.3, processor=tiny.processor) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=3)
        for stream, alone in zip(pruning.last.streams, left, strict=True):
            if behind == "cache":  # it takes no ratio beside another stage: that is the pixels' then
                assert stream.kept == kept(stream.total, 0.3)
                continue
            assert set(stream.indices.tolist()) <= set(alone.indices.tolist())
            if "connector" in behind:
                assert stream.kept == min(kept(stream.total, 0.3), alone.kept)


@pytest.mark.parametrize("family", ["qwen3_vl", slow_unless(False, "qwen2_5_vl")])
@torch.no_grad()
def test_an_encoder_method_works_on_what_is_left(family: str) -> None:
    """ToMe behind the pixels stage: with everything kept it is ToMe alone, else the survivors are among the kept."""
    tiny = shared(family)
    noise = tiny.inputs([["a ", ("image", picture(60, 40, 1)), " b"]])
    with tokprune.apply(tiny.model, get_method("tome", r=2)):
        alone = tiny.model(**noise).logits
    with tokprune.apply(tiny.model, ["pixelprune", get_method("tome", r=2)]):
        assert torch.equal(tiny.model(**noise).logits, alone)
    inputs = given(tiny)
    with tokprune.apply(tiny.model, "pixelprune") as pruning:
        tiny.model(**inputs)
        left = pruning.last.streams
    with tokprune.apply(tiny.model, ["pixelprune", get_method("tome", r=2)]) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=2)
        blocks = len(tiny.model.base_model.visual.blocks)
        for stream, alone in zip(pruning.last.streams, left, strict=True):
            assert set(stream.indices.tolist()) < set(alone.indices.tolist())
            assert stream.kept == alone.kept - min(2 * blocks, alone.kept - 1) or alone.kept < 4 * blocks
    with tokprune.apply(tiny.model, ["pixelprune", "tome", "divprune"], ratio=0.2) as pruning:
        tiny.model(**inputs)
        assert all(s.kept <= kept(s.total, 0.2) for s in pruning.last.streams)


@pytest.mark.parametrize("family", ["qwen2_5_vl", slow_unless(False, "llava")])
@torch.no_grad()
def test_a_second_turn_reads_what_the_first_left(family: str) -> None:
    """A kept cache: the second turn's picture is pruned by its own pixels, and logits are those of one long call."""
    tiny = shared(family)
    talk = conversation(tiny)
    both = {name: talk.whole[name] for name in talk.whole if name != "mm_encoder_outputs"}
    both["pixel_values"] = torch.cat([talk.first["pixel_values"], talk.second["pixel_values"]])
    with tokprune.apply(tiny.model, "pixelprune", ratio=0.4, positions="keep") as pruning:
        whole = tiny.model(**both).logits[:, -8:]
        assert [s.kept for s in pruning.last.streams] == [kept(s.total, 0.4) for s in pruning.last.streams]
        again = talk.forward_second(talk.forward_first()).logits[:, -8:]
    torch.testing.assert_close(again, whole, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("name", ["timm", "siglip"])
@torch.no_grad()
def test_a_bare_tower_drops_repeats_and_gives_full_length(name: str) -> None:
    from tests.encoder.all_towers import TOWERS, output

    model = TOWERS[name]()
    x = pixels(2)
    x[:, :, :, 8:] = 0.25
    plain, before = output(model, x), hooks(model)
    with tokprune.apply(model, "pixelprune") as pruning:
        first = output(model, x)[0]
        assert pruning.trace.survivor.sum(1).tolist() == [16 + 1, 16 + 1] or int(pruning.trace.survivor.sum()) < 64
        assert torch.isfinite(first).all()
        assert "pixelprune" in str(pruning.report())
        assert pruning.trace.merge_map(0).unique().numel() == int(pruning.trace.survivor[0].sum())
    with tokprune.apply(model, "pixelprune", ratio=1.0):
        assert all(torch.equal(a, b) for a, b in zip(output(model, x), plain, strict=True))
    with tokprune.apply(model, "blank", budget=9) as pruning:
        output(model, x)
        assert pruning.trace.survivor.sum(1).tolist() == [9, 9]
    assert hooks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(output(model, x), plain, strict=True))


def test_what_stands_for_what_is_drawn_on_the_grid() -> None:
    tiny = shared("qwen2_5_vl")
    flat = Image.new("RGB", (64, 64), "teal")
    with tokprune.apply(tiny.model, "pixelprune") as pruning:
        tiny.model(**tiny.inputs([["a ", ("image", flat), " b"]]))
        assert pruning.trace.merge_map(0).tolist() == [[0] * 8] * 8
        assert pruning.last.streams[0].kept == 1


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    llava, qwen = shared("llava").model, shared("qwen2_5_vl").model
    before = hooks(llava), hooks(qwen)
    for model, method, options, words in (
        (llava, "rlt", {"std": (0.5,)}, "single pictures"),
        (llava, ["pixelprune", "tome"], {"ratio": 0.5}, "equal"),
        (qwen, ["pixelprune", "ipcv"], {}, "whole picture"),
        (build("mistral3").model, "pixelprune", {}, "Pixtral"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            tokprune.apply(model, method, **options)
    with pytest.raises(OptionError, match="std="):
        tokprune.apply(qwen, "pixelprune", threshold=0.1)
    with pytest.raises(OptionError, match="two methods"):
        tokprune.apply(qwen, ["pixelprune", "blank"])
    assert (hooks(llava), hooks(qwen)) == before


@torch.no_grad()
def test_pooled_clips_are_refused_and_the_model_is_clean_afterwards() -> None:
    tiny = shared("llava_onevision")
    inputs = tiny.inputs([["v ", ("video", still(4)), " what?"]])
    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "pixelprune"), pytest.raises(UnsupportedModelError, match="pools"):
        tiny.model(**inputs)
    assert torch.equal(tiny.model(**inputs).logits, plain)


@torch.no_grad()
def test_the_threshold_is_measured_between_black_and_white() -> None:
    """Two greys 0.1 apart: a threshold of 0.11 joins them, one of 0.09 does not, whatever the processor divides by."""
    tiny = shared("qwen2_5_vl")
    two = Image.new("RGB", (64, 64), (100, 100, 100))
    two.paste((126, 126, 126), (32, 0, 64, 64))  # 26 / 255 = 0.102
    inputs = tiny.inputs([["a ", ("image", two), " b"]])
    for threshold, count in ((0.09, 2), (0.11, 1)):
        for way in ({"processor": tiny.processor}, {"std": tuple(tiny.processor.image_processor.image_std)}):
            with tokprune.apply(tiny.model, "pixelprune", threshold=threshold, **way) as pruning:
                tiny.model(**inputs)
                assert pruning.last.streams[0].kept == count
