"""The decoder stage beside the other stages, and the one report of them all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import samples, slow_unless
from tests.decoder.reference import deep, gone_by_layer, prompts
from tokprune.config import PruneConfig
from tokprune.registry import get_method
from tokprune.report import LayerReport, Report, StreamReport


def fastv(**options: Any) -> Any:
    return get_method("fastv", **{"layer": 3, **options})


@torch.no_grad()
@pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in ("llava", "qwen2_5_vl", "llava_next")])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_behind_a_connector_method_the_ratio_is_the_connectors(family: str, positions: str) -> None:
    """Both drop: the same as the connector's run whose dropped columns the decoder method never saw."""
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:2])
    with tokprune.apply(tiny.model, ["divprune", fastv()], ratio=0.5, positions=positions) as pruning:
        both = tiny.model(**inputs).logits
        last = pruning.last
        kept = [sum(s.kept for s in last.streams if s.row == row) for row in range(2)]
        assert all(abs(s.kept - s.total / 2) <= 0.5 for s in last.streams)
        assert last.drops[0].kept == tuple((k + 1) // 2 for k in kept)
        assert not bool((last.columns_at(3) & ~last.keep).any())
        assert torch.equal(last.columns_at(2), last.keep)
    with tokprune.apply(tiny.model, "divprune", ratio=0.5, positions=positions) as pruning:
        alone = tiny.model(**inputs).logits
        assert torch.equal(pruning.last.keep, last.keep)
    assert not torch.equal(both, alone)
    with tokprune.apply(tiny.model, ["divprune", fastv(share=1.0)], ratio=0.5, positions=positions):
        same = tiny.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(same[real], alone[real])


def test_with_an_encoder_method_and_frames() -> None:
    """All stages that a clip goes through, in one call; words see what is left."""
    tiny = deep("qwen2_5_vl")
    inputs = tiny.inputs(samples("video"))
    methods = [get_method("quota"), get_method("divprune"), fastv(), get_method("tome", r=1)]
    with tokprune.apply(tiny.model, methods[:3], ratio=0.5, processor=tiny.processor) as pruning:
        out = tiny.model.generate(**inputs, max_new_tokens=3)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        kept = [s.kept for s in pruning.last.streams]
        assert pruning.last.drops[0].kept == tuple((k + 1) // 2 for k in kept)
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:1])
    with tokprune.apply(tiny.model, [methods[3], fastv()], ratio=0.25) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=3)
        kept = pruning.last.streams[0].kept
        assert kept < 64
        assert pruning.last.drops[0].kept == (round(kept / 4),)
        text = str(pruning.report())
    assert "tome" in text
    assert "from layer 3 on" in text


@torch.no_grad()
def test_one_report_of_all_five_stages() -> None:
    """Tokens per stage and per layer, both averages, and the bytes that were freed, of one clip."""
    tiny = deep("qwen2_5_vl")
    inputs = tiny.inputs(samples("video"))
    names = ("quota", "tome", "divprune", "fastv", "mustdrop_cache")
    methods = [get_method("quota"), get_method("tome", r=1), get_method("divprune"), fastv(), "mustdrop_cache"]
    with tokprune.apply(tiny.model, methods, ratio=0.5, processor=tiny.processor) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=3)
        report, streams = pruning.report(), pruning.last.streams
    kept = sum(s.kept for s in streams)
    (drop,) = report.layers
    left = sum(drop.kept)
    assert drop.kept == tuple((s.kept + 1) // 2 for s in streams)
    assert report.average() == pytest.approx((3 * kept + 2 * left) / 5)
    assert report.average(published=True) == pytest.approx(report.average())
    text, data = str(report), json.loads(report.to_json())
    assert f"{kept} visual tokens, {left} from layer 3 on; average over 5 layers {report.average():.1f}" in text
    assert all(name in text for name in names)
    assert "keys and values of" in text
    assert data["average"] == report.average()


def test_the_report_tells_tokens_of_each_layer() -> None:
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava"))
    with tokprune.apply(tiny.model, "pyramiddrop", layers=(2, 4), shares=(0.5, 0.25)) as pruning:
        assert pruning.report().average() is None
        tiny.model(**inputs)
        report, real = pruning.report(), inputs["attention_mask"].bool()
        gone = gone_by_layer(pruning, real)
        assert [(d.layer, d.kept) for d in report.layers] == [(2, (32, 64, 0)), (4, (16, 32, 0))]
        assert report.average() == report.average(published=True) == (2 * 192 + 2 * 96 + 48) / 5
        assert "192 visual tokens, 96 from layer 2 on, 48 from layer 4 on; average over 5 layers 124.8" in str(report)
        assert json.loads(report.to_json())["average"] == 124.8
        for layer in (2, 4):
            assert torch.equal(pruning.last.columns_at(layer), real & ~gone[layer])


def test_the_average_as_papers_count_it() -> None:
    """SparseVLM's 192 counts layers 2, 6 and 15 as reduced already; they work on 206.5 on average."""
    stream = StreamReport(0, "image", 576, 576, 0, 0)
    steps = ((3, 309), (7, 204), (16, 113))
    layers = tuple(LayerReport(layer, (kept,), counted_below=1) for layer, kept in steps)
    report = Report("m", ("sparsevlm",), "", "keep", (stream,), depth=32, layers=layers)
    assert round(report.average(published=True) or 0, 1) == 192.0
    assert round(report.average() or 0, 1) == 206.5


def test_a_decoder_method_is_a_config_by_itself() -> None:
    """Without a ratio, by its own amounts; with what else it needs, as JSON and back."""
    config = PruneConfig.build("fastv", schedule=((2, 0.5), (4, 0.1)))
    assert config.ratio is None
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:1])
    with tokprune.apply(tiny.model, config) as pruning:
        tiny.model(**inputs)
        assert [(d.layer, d.kept) for d in pruning.last.drops] == [(2, (32,)), (4, (6,))]
    with tokprune.apply(tiny.model, "fastv", schedule=((2, 0.5), (4, 0.1)), budget=9) as pruning:
        tiny.model(**inputs)
        assert [(d.layer, d.kept) for d in pruning.last.drops] == [(2, (32,)), (4, (9,))]
