"""A budget for the whole prompt: met exactly by any mix of pictures, clips and text, and nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.checks import tolerance
from tests.adapters.reference import MIXED, VIDEO, prompt, run, samples, shared, slow_unless
from tests.spelling import with_cache
from tokprune import PruneConfig, get_method
from tokprune.errors import BudgetError, OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.testing import FAMILIES, Part, clip, picture

QUICK = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl")


def mix(rng: random.Random, family: str) -> list[list[Part]]:
    """A ragged batch: rows of one to three pictures or clips of random sizes, and perhaps one of words alone."""
    rows: list[list[Part]] = []
    frames = rng.choice([2, 4])  # some processors stack the clips of a batch
    for _ in range(rng.randint(1, 3)):
        row: list[Part] = ["word " * rng.randint(1, 9)]
        for _ in range(1 if family == "molmo2" else rng.randint(1, 3)):  # its processor takes one clip a prompt
            if family in VIDEO and (family not in MIXED or rng.random() < 0.3):
                row.append(("video", clip(frames, seed=rng.randint(0, 99))))
            else:
                size = (rng.choice([28, 40, 60, 90]), rng.choice([28, 40, 60, 90]))
                row.append(("image", picture(*size, rng.randint(0, 99))))
            row.append(" and " * rng.randint(1, 3))
        rows.append(row)
    if rng.random() < 0.5:
        rows.insert(rng.randint(0, len(rows)), ["only words here, and many of them " * rng.randint(1, 4)])
    return rows


def kept_of(model: Any, inputs: Any, config: PruneConfig) -> tuple[Tensor, Any]:
    """(B, L) columns kept by a forward, and the report."""
    with tokprune.apply(model, config) as pruning, torch.no_grad():
        model(**inputs)
        return pruning.last.keep, pruning.report()


def check(family: str, seed: int) -> None:
    """Budget, floor and words of a random mix at a random budget; a row alone keeps what it keeps among others."""
    rng = random.Random(f"{family} {seed}")
    tiny, parts = shared(family), mix(rng, family)
    inputs = tiny.inputs(parts, rng.choice(["left", "right"]))
    everything, _ = kept_of(tiny.model, inputs, PruneConfig.build("uniform", prompt_budget=10**6))
    whole = everything.sum(1)
    assert torch.equal(everything, inputs["attention_mask"].bool()), "a large budget keeps all"
    _, report = kept_of(tiny.model, inputs, PruneConfig.build("uniform", budget=1))
    pictures = {p.row: p for p in report.streams}
    least = max(int(whole[r]) - sum(s.total + s.separators for s in report.streams if s.row == r) for r in pictures)
    least += 2 * max(sum(s.row == r for s in report.streams) for r in pictures)  # a token and its newline each
    budget = rng.randint(least, max(least, int(whole.max())))
    method = rng.choice(["random", "divprune", "uniform"])
    keep, report = kept_of(tiny.model, inputs, PruneConfig.build(method, prompt_budget=budget))
    for row in range(len(parts)):
        wanted = min(budget, int(whole[row])) if row in pictures else int(whole[row])
        assert int(keep[row].sum()) == wanted, (family, seed, budget, str(report))
    assert all(s.kept >= 1 for s in report.streams)
    for share in report.prompts:
        visual = sum(s.kept + s.separators_kept for s in report.streams if s.row == share.row)
        assert share.visual == visual
        assert share.text + visual == int(keep[share.row].sum())
    row = rng.choice(sorted(pictures))
    alone = tiny.inputs([parts[row]])
    (kept,), _ = kept_of(tiny.model, alone, PruneConfig.build(method, prompt_budget=budget))
    assert torch.equal(kept[alone["attention_mask"][0].bool()], keep[row][inputs["attention_mask"][row].bool()])


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_random_mixes_meet_the_budget_exactly(family: str) -> None:
    for seed in range(6 if family in QUICK else 3):
        check(family, seed)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_what_runs_is_the_brute_force_of_what_was_kept(family: str, positions: str) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "divprune", prompt_budget=40, positions=positions) as pruning:
        got = run(case.tiny, case.inputs)
        keep = pruning.last.keep
    assert keep.sum(1).tolist() == [40, 40]
    assert case.distance(keep, positions, got) < tolerance(family)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_budget_that_holds_everything_changes_no_bit(family: str) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "divprune", prompt_budget=int(case.real.sum(1).max())):
        got = run(case.tiny, case.inputs)
    assert torch.equal(got.logits, case.unpruned.logits)
    assert torch.equal(got.steps, case.unpruned.steps)


def shares(model: Any, inputs: Any, method: Any, **given: Any) -> list[int]:
    _, report = kept_of(model, inputs, PruneConfig.build(method, prompt_budget=60, query="what is it?", **given))
    assert {p.text + p.visual for p in report.prompts} == {60}
    return [s.kept for s in report.streams]


def test_rules_share_the_same_tokens_out_differently() -> None:
    tiny = shared("llava")
    flat = picture(60, 60, 1).resize((2, 2)).resize((60, 60), 0)
    inputs = tiny.inputs([["a ", ("image", flat), " b ", ("image", picture(60, 60, 5)), " what?"]])
    fair = shares(tiny.model, inputs, "divprune")
    assert max(fair) - min(fair) <= 1
    assert shares(tiny.model, inputs, "divprune", prompt_rule="proportional") == fair
    busy = shares(tiny.model, inputs, "divprune", prompt_rule="adaptive_budget")
    assert busy[0] < fair[0]
    assert sum(busy) == sum(fair)
    assert shares(tiny.model, inputs, get_method("adaptive_budget", method=get_method("divprune"))) == busy
    assert shares(tiny.model, inputs, get_method("adaptive_budget"), prompt_rule="proportional") == fair
    steep = get_method("adaptive_budget", density=1.0, least=0.0)
    assert shares(tiny.model, inputs, "random", prompt_rule=steep)[0] < busy[0]
    fake = Words()
    assert sum(shares(tiny.model, inputs, "uniform", prompt_rule=fake)) == sum(fair)


class Words(ConnectorMethod):
    """A rule of a user: all that can go to the last picture does."""

    info = get_method("uniform").info

    def budgets(self, batch: Any, keeps: Any) -> list[int]:
        return [1] * (len(keeps) - 1) + [sum(keeps) - len(keeps) + 1]


def test_catp_shares_by_the_question() -> None:
    tiny = shared("llava")
    inputs = tiny.inputs(samples("image"))
    with tokprune.apply(
        tiny.model, "divprune", prompt_budget=50, prompt_rule="catp", processor=tiny.processor, query="a cat"
    ) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=1)
    assert pruning.last.keep.sum(1).tolist() == [50, 50]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_frames_stage_alone_and_with_a_method_inside(family: str) -> None:
    """Pictures beside a video stay whole where nothing was given for them, and the video takes what is left."""
    tiny = shared(family)
    inputs = tiny.inputs(samples("mixed"))
    full = inputs["attention_mask"].sum(1)
    for method in ("uniform_frames", ["uniform_frames", "divprune"], ["scenetilling", "divprune"]):
        budget = int(full.max()) - 9
        keep, report = kept_of(tiny.model, inputs, PruneConfig.build(method, prompt_budget=budget))
        assert keep.sum(1).tolist() == full.clamp(max=budget).tolist(), report
        whole = [s.kept == s.total for s in report.streams if s.modality == "image"]
        assert all(whole) == (method == "uniform_frames")
        assert all(sum(s.frames) == s.kept for s in report.streams if s.modality == "video")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_behind_the_encoder_stage_the_survivors_share(family: str) -> None:
    tiny = shared(family)
    inputs = tiny.inputs(samples("image"))
    for budget in (40, 44, 400):
        methods = [get_method("tome", r=4), get_method("divprune")]
        keep, report = kept_of(tiny.model, inputs, PruneConfig.build(methods, prompt_budget=budget))
        left, _ = kept_of(tiny.model, inputs, PruneConfig.build(get_method("tome", r=4)))
        assert keep.sum(1).tolist() == [min(budget, n) for n in left.sum(1).tolist()], report


def test_decoder_stage_goes_on_from_there() -> None:
    tiny = shared("llava")
    with tokprune.apply(
        tiny.model, [get_method("divprune"), get_method("fastv", layer=1)], prompt_budget=40
    ) as pruning:
        tiny.model.generate(**tiny.inputs(samples("image")), max_new_tokens=3)
    assert pruning.last.keep.sum(1).tolist() == [40, 40]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_generation_without_a_cache_and_with_beams_keeps_the_same(family: str) -> None:
    """The answer is no part of the prompt, however often it is read again."""
    tiny = shared(family)
    inputs = tiny.inputs(samples("image"))
    with tokprune.apply(tiny.model, "divprune", prompt_budget=40) as pruning:
        cached = tiny.model.generate(**inputs, max_new_tokens=5)
        keep = pruning.last.keep
        assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=5, use_cache=False), cached)
        assert torch.equal(pruning.last.keep[:, : keep.shape[1]], keep)
        tiny.model.generate(**inputs, max_new_tokens=3, num_beams=2)
        assert [p.row for p in pruning.report().prompts] == list(range(len(pruning.last.keep)))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_later_turn_counts_what_the_cache_holds(family: str) -> None:
    from transformers import DynamicCache

    tiny = shared(family)
    model = tiny.model
    first = tiny.inputs([["Hello ", ("image", picture(60, 40, 1)), " what is this?"]])
    second = tiny.inputs([[" And ", ("image", picture(40, 60, 2)), " now?"]])
    cache = DynamicCache(config=model.config.get_text_config())
    with tokprune.apply(model, "divprune", prompt_budget=70) as pruning, torch.no_grad():
        model(**first, **with_cache(cache), use_cache=True)
        held = int(pruning.last.keep.sum())
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        call = {**second, "attention_mask": mask, **with_cache(cache)}
        assert held == min(70, int(first["attention_mask"].sum()))
        if held == 70:
            with pytest.raises(BudgetError, match="of earlier turns"):
                model(**call)
    with tokprune.apply(model, "divprune", prompt_budget=held + 40) as pruning, torch.no_grad():
        model(**call)
        (share,) = pruning.report().prompts
        assert (share.cached, share.text + share.visual) == (held, 40)
        assert cache.get_query_offset() == held + 40


def test_prompts_that_it_cannot_hold_are_refused_and_leave_the_model_clean() -> None:
    tiny = shared("llava")
    inputs = tiny.inputs(samples("image"))
    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "divprune", prompt_budget=35) as pruning:
        with pytest.raises(BudgetError, match=r"prompt 1 has 34 tokens of text beside 2 .* Give prompt_budget=36"):
            tiny.model(**inputs)
        assert pruning.last is None
    assert torch.equal(tiny.model(**inputs).logits, plain)
    with tokprune.apply(tiny.model, "divprune", prompt_budget=36) as pruning:
        tiny.model(**inputs)
        assert [s.kept for s in pruning.report().streams][1:] == [1, 1]
        assert "prompt 1: 36 of 36 tokens: 34 text, 2 visual" in str(pruning.report())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_budget": 0}, "prompt_budget=0 is not a number"),
        ({"prompt_budget": 1.5}, "such as prompt_budget=2048"),
        ({"prompt_budget": 64, "ratio": 0.5}, "both ratio=0.5 and prompt_budget=64"),
        ({"ratio": 0.5, "prompt_rule": "catp"}, "give one"),
        ({"prompt_budget": 64, "prompt_rule": "divprune"}, "is no rule"),
        ({"prompt_budget": 64, "prompt_rule": 3}, "is no rule"),
        ({"prompt_budget": 64, "method": "prumerge"}, "keeps as many as it likes"),
        ({"prompt_budget": 64, "method": "tome", "r": 2}, "has no say there"),
        ({"prompt_budget": 64, "method": "fastv"}, "has no say there"),
    ],
)
def test_what_no_prompt_budget_can_be_met_with_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, OptionError), match=message):
        PruneConfig.build(**{"method": "divprune", **given})


def test_the_config_comes_back_from_json(tmp_path: Path) -> None:
    for rule in (None, "proportional", "catp", get_method("adaptive_budget", density=1.0)):
        config = PruneConfig.build("divprune", prompt_budget=64, prompt_rule=rule)
        config.save(tmp_path / "config.json")
        assert PruneConfig.load(tmp_path / "config.json") == config
    assert "prompt_budget" not in PruneConfig.build("divprune", ratio=0.5).to_dict()
    with pytest.raises(BudgetError, match="depends on its whole prompt"):
        config.count(10)
