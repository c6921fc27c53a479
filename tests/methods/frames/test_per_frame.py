"""PerFrame: a frames method and a connector method as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.frames.clips import ragged, video
from tests.methods.streams import LAYOUTS, method_with_defaults, stream
from tokprune import registry
from tokprune.errors import BudgetError, OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.divprune import DivPrune, divprune
from tokprune.methods.connector.fastervlm import FasterVLM
from tokprune.methods.connector.wrappers import MergeDropped, PerTile, Relevance
from tokprune.methods.connector.wrappers.adaptive_budget import AdaptiveBudget
from tokprune.methods.frames.quota import Quota
from tokprune.methods.frames.uniform_frames import UniformFrames
from tokprune.methods.frames_base import FramesMethod, PerFrame
from tokprune.registry import MethodInfo, list_methods
from tokprune.tokens import Selection, VisualTokens

QUOTA = Quota(score="self")


@dataclass(frozen=True)
class Fixed(FramesMethod):
    """Shares as given."""

    counts: tuple[int, ...] = ()
    info = MethodInfo("fixed", "a test", video=True)

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        """As the class says."""
        return list(self.counts)


@dataclass(frozen=True)
class Counting(ConnectorMethod):
    """Notes how it is called."""

    calls: list[list[int]] = None  # type: ignore[assignment]
    info = MethodInfo("counting", "a test")

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """The first ones."""
        self.calls.append(list(keeps))
        for tokens in batch:
            assert tokens.layout.num_groups == 1
            assert tokens.layout.group_sizes == (len(tokens),)
        return [Selection(torch.arange(k)) for k in keeps]


def test_each_frame_is_pruned_by_the_connector_method_with_its_share() -> None:
    tokens = video(6, (4, 5))
    chosen = PerFrame(QUOTA, DivPrune()).select(tokens, 40)
    counts = QUOTA.allocate(tokens, 40)
    assert chosen.info["frame_tokens"].tolist() == counts
    torch.testing.assert_close(chosen.info["frame_worth"], tokens.signals["frame_scores"])
    for own, count in zip(tokens.layout.group_slices(), counts, strict=True):
        mine = chosen.indices[(chosen.indices >= own.start) & (chosen.indices < own.stop)]
        alone = divprune(tokens.features[None, own], count)[0].sort().values + own.start if count else mine[:0]
        assert torch.equal(mine, alone)


def test_frames_without_a_share_vanish_and_whole_ones_are_not_asked() -> None:
    calls: list[list[int]] = []
    tokens = video(4, (2, 3))
    chosen = PerFrame(Fixed((6, 0, 2, 6)), Counting(calls)).select_batch([tokens, tokens], [14, 14])
    assert calls == [[2, 2]]  # both videos, one call
    for one in chosen:
        assert one.indices.tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 18, 19, 20, 21, 22, 23]
        assert "frame_worth" not in one.info


@pytest.mark.parametrize("name", [n for n in list_methods("connector") if n != "none"])
def test_every_connector_method_works_inside_the_frames(name: str) -> None:
    inner = method_with_defaults(name)
    method = PerFrame(QUOTA, inner)
    assert set(method.needs) == {"frame_scores", *inner.needs}
    assert method.query_aware
    tokens = stream(LAYOUTS["video"], method.needs)
    for keep in (2, 31):
        chosen = method.select(tokens, keep)
        assert chosen.indices.shape == (keep,)
        assert (chosen.indices.diff() > 0).all()
        assert torch.isfinite(chosen.apply(tokens.features)).all()
    picture = stream(LAYOUTS["image"], method.needs)
    assert len(method.select(picture, 9)) == 9


def test_wrappers_go_inside_and_merges_follow() -> None:
    tokens = video(6, (4, 5))
    method = PerFrame(UniformFrames(spread="tokens"), MergeDropped(Relevance(DivPrune())))
    chosen = method.select(tokens, 31)
    assert chosen.weights is not None
    dense = chosen.weights.dense(31, 120)
    torch.testing.assert_close(dense @ tokens.features, chosen.apply(tokens.features), atol=1e-5, rtol=1e-5)
    group = tokens.layout.group
    crossing = dense * (group[chosen.indices][:, None] != group[None])
    assert not crossing.any(), "a token flowed into another frame"
    same = PerFrame(UniformFrames(spread="tokens"), DivPrune()).select(tokens, 30)
    assert torch.equal(same.indices, PerTile(DivPrune()).select(tokens, 30).indices)


def test_pictures_stay_whole_without_a_connector_method_and_say_so() -> None:
    picture, tiles, clip = (stream(LAYOUTS[w], ("frame_scores",)) for w in ("image", "tiles", "video"))
    alone, both = PerFrame(QUOTA), PerFrame(QUOTA, DivPrune())
    assert alone.budgets([picture, tiles, clip], [6, 5, 7]) == [64, 48, 7]
    assert len(alone.select(picture, 6)) == 64
    assert torch.equal(alone.select(picture, 6).apply(picture.features), picture.features)
    assert "all tokens stay" in alone.note(picture)
    assert "'quota'" in alone.note(tiles)
    assert alone.note(clip) == both.note(clip) == ""
    assert both.budgets([picture, tiles, clip], [6, 5, 7]) == [6, 5, 7]
    assert torch.equal(both.select(picture, 6).indices, DivPrune().select(picture, 6).indices)
    assert "divprune" in both.note(picture)
    given = [10, 20]
    shared = PerFrame(QUOTA, AdaptiveBudget(DivPrune())).budgets([picture, clip], given)
    assert sum(shared) == 30
    assert shared != given


def test_facts_of_the_composition() -> None:
    method = PerFrame(QUOTA, FasterVLM())
    assert method.info.name == "quota + fastervlm"
    assert method.needs == ("frame_scores", "cls_attention")
    assert method.exact
    assert not method.narrows
    assert PerFrame(UniformFrames()).info.name == "uniform_frames"
    assert not PerFrame(UniformFrames()).query_aware
    assert PerFrame(UniformFrames(), Relevance(DivPrune())).query_aware
    assert not PerFrame(Quota(score="self", compat="published")).exact


def test_a_batch_is_its_streams() -> None:
    method = PerFrame(QUOTA)
    batch = [video(6), ragged(), video(3, (2, 2), 5), stream(LAYOUTS["image"])]
    for tokens, keep, together in zip(batch, [31, 12, 5, 9], method.select_batch(batch, [31, 12, 5, 9]), strict=True):
        alone = method.select(tokens, keep)
        assert torch.equal(alone.indices, together.indices)
        torch.testing.assert_close(alone.apply(tokens.features), together.apply(tokens.features))


def test_what_it_refuses() -> None:
    tokens = video(3, (2, 2))
    with pytest.raises(OptionError, match="frames stage"):
        PerFrame(DivPrune())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="connector method"):
        PerFrame(QUOTA, UniformFrames())  # type: ignore[arg-type]
    for counts in ((5, 0, 0), (1, 1), (2, 2, 2), (-1, 4, 2), (0, 0, 0)):
        with pytest.raises(OptionError, match="'fixed' shared 5"):
            PerFrame(Fixed(counts), DivPrune()).select(tokens, 5)
    for keep in (0, 13):
        with pytest.raises(BudgetError):
            PerFrame(QUOTA).select(tokens, keep)


def test_the_method_of_the_page_works(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "frames.md").read_text(encoding="utf-8")
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class FirstMinute" in block]
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    scope: dict[str, Any] = {"__name__": __name__}
    exec(source, scope)
    tokens = video(6, (2, 3))  # two frames a second
    method = scope["FirstMinute"](until=1.0)
    assert method.allocate(tokens, 10) == [5, 5, 0, 0, 0, 0]
    for keep in range(1, 37):
        assert sum(PerFrame(method).select(tokens, keep).info["frame_tokens"].tolist()) == keep
