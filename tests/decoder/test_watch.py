"""Watching layers: nothing changes, every prompt with a picture is shown, and what was seen makes schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokprune
from tests.decoder.reference import deep, prompts
from tokprune.errors import OptionError
from tokprune.methods.decoder.atp import ThresholdHeads, calibrate, redundancy, save_heads, spatial_scores
from tokprune.methods.decoder.fitprune import fit, sums
from tokprune.methods.decoder.watch import Watch
from tokprune.profiling.formulas import DecoderShape, prefill_share
from tokprune.registry import get_method


@torch.no_grad()
def test_nothing_changes_and_all_is_seen() -> None:
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava"))
    real = inputs["attention_mask"].bool()
    before = tiny.model(**inputs).logits
    watch = Watch(look=lambda tokens: (tokens.layer, len(tokens.visual)))
    with tokprune.apply(tiny.model, watch):
        assert torch.equal(tiny.model(**inputs).logits[real], before[real])
    assert watch.samples() == [[(layer, n) for layer in (1, 2, 3, 4)] for n in (64, 128)]
    with pytest.raises(OptionError, match="neither ratio"):
        tokprune.apply(tiny.model, Watch(look=sums), ratio=0.5)
    with pytest.raises(OptionError, match="needs a function"):
        tokprune.apply(tiny.model, Watch())


@torch.no_grad()
def test_a_fitted_schedule_costs_what_was_asked() -> None:
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:1])
    watch = Watch(look=sums)
    with tokprune.apply(tiny.model, watch):
        tiny.model(**inputs)
    shape = DecoderShape.of(tiny.model.config)
    text = inputs["input_ids"].shape[1] - 64
    found = fit(watch.samples(), lambda s: prefill_share(s, shape, 64, text), 0.7)
    assert prefill_share(found, shape, 64, text) <= 0.7
    with tokprune.apply(tiny.model, get_method("fitprune", schedule=found.steps)) as pruning:
        tiny.model(**inputs)
        kept = {drop.layer: drop.kept[0] for drop in pruning.last.drops}
    assert kept == dict(zip(found.layers, found.counts(64), strict=True))


@torch.no_grad()
def test_calibrated_and_learned_thresholds_run(tmp_path: Path) -> None:
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava"))
    watch = Watch(look=lambda t: (redundancy(t).mean(0), spatial_scores(t.row, t.col)))
    with tokprune.apply(tiny.model, watch):
        tiny.model(**inputs)
    scores, covers = zip(*(sample[0] for sample in watch.samples()), strict=True)
    pair = calibrate(scores, covers, 0.5)
    with tokprune.apply(tiny.model, "atp_llava", layers=(1,), thresholds=(pair,)) as pruning:
        tiny.model(**inputs)
        first, second, _ = pruning.last.drops[-1].kept
    assert first / 64 + second / 128 == pytest.approx(1.0, abs=2 / 64)  # half on average

    torch.manual_seed(0)
    heads = [ThresholdHeads(), ThresholdHeads()]
    path = tmp_path / "heads.safetensors"
    save_heads(heads, path)
    importance, cover = heads[0](redundancy_of(tiny, inputs)).tolist()
    with tokprune.apply(tiny.model, "atp_llava", layers=(1, 3), weights=str(path)) as pruning:
        tiny.model(**inputs)
        stays = int(((scores[0] > importance) | (covers[0] > cover)).sum())
        assert pruning.last.drops[0].kept[0] == stays
    with pytest.raises(OptionError, match="2 thresholds for 3 layers"):
        get_method("atp_llava", weights=str(path))
    with pytest.raises(OptionError, match="choose one"):
        get_method("atp_llava", weights=str(path), thresholds=(pair,) * 3)
    with pytest.raises(OptionError, match="no heads of save_heads"):
        get_method("atp_llava", weights=str(tmp_path / "absent.safetensors"))


def redundancy_of(tiny: object, inputs: object) -> torch.Tensor:
    """Both scores of the first prompt in front of layer 1."""
    both = Watch(look=redundancy)
    with tokprune.apply(tiny.model, both):  # type: ignore[attr-defined]
        tiny.model(**inputs)  # type: ignore[attr-defined]
    found: torch.Tensor = both.samples()[0][0]
    return found
