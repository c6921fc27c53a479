"""The wrappers: exact budgets, composition, what each of them adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from tests.methods.streams import LAYOUTS, changed, method_with_defaults, question, stream
from tokprune.config import PruneConfig
from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.divprune import DivPrune, divprune
from tokprune.methods.connector.fastervlm import FasterVLM
from tokprune.methods.connector.hired import HiRED
from tokprune.methods.connector.pool import Pool
from tokprune.methods.connector.random import Random
from tokprune.methods.connector.uniform import Uniform
from tokprune.methods.connector.wrappers import MergeDropped, PerTile, Protect, Relevance, Wrapper
from tokprune.registry import get_method, list_methods
from tokprune.tokens import Layout, Merge, Query, Selection, VisualTokens

NESTED = [
    PerTile(MergeDropped(DivPrune())),
    MergeDropped(PerTile(DivPrune())),
    PerTile(Protect(MergeDropped(Random(seed=2)), border=1), split="proportional"),
    MergeDropped(Pool()),
    MergeDropped(MergeDropped(Uniform())),
    MergeDropped(PerTile(Pool(dims=2), split="hired")),
    PerTile(Relevance(DivPrune(), weight=1.0), split="globalcom2"),
    Protect(PerTile(Pool()), border=0, indices=(0, -1)),
    Protect(Relevance(FasterVLM()), border=1),
    Relevance(HiRED(alpha=0.3), weight=0.25),
    Relevance(DivPrune(), source="clip", sign=-1),
]


@pytest.mark.parametrize("method", NESTED, ids=lambda m: f"{type(m).__name__}-{type(m.method).__name__}")
@pytest.mark.parametrize("where", ["one", "two", "seven", "image", "tiles", "unpadded", "video"])
def test_nested_wrappers_are_exact(method: Wrapper, where: str) -> None:
    tokens = stream(LAYOUTS[where], method.needs)
    n = len(tokens)
    for keep in {1, 2, 3, n // 3, n // 2 | 1, n - 1, n} & set(range(1, n + 1)):
        chosen = method.select(tokens, keep)
        assert chosen.indices.shape == (keep,)
        assert (chosen.indices.diff() > 0).all()
        out = chosen.apply(tokens.features)
        assert out.shape == (keep, tokens.features.shape[1])
        if chosen.weights is not None:
            dense = chosen.weights.dense(keep, n)
            assert dense.shape == (keep, n)
            torch.testing.assert_close(dense @ tokens.features, out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", NESTED, ids=lambda m: f"{type(m).__name__}-{type(m.method).__name__}")
def test_configs_of_nested_wrappers_round_trip(method: Wrapper) -> None:
    config = PruneConfig.build(method, budget=64)
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", [n for n in list_methods("connector") if n != "none"])
def test_every_method_can_be_wrapped(name: str) -> None:
    inner = method_with_defaults(name)
    for wrapper in (PerTile(inner), Protect(inner, border=1), MergeDropped(inner)):
        assert set(inner.needs) <= set(wrapper.needs)
        assert wrapper.query_aware == inner.query_aware
        for where in ("image", "unpadded", "video"):
            tokens = stream(LAYOUTS[where], wrapper.needs)
            for keep in (2, 31):
                try:
                    chosen = wrapper.select(tokens, keep)
                except OptionError as error:
                    assert isinstance(wrapper, MergeDropped)
                    assert "explicit features" in str(error)  # noqa: PT017 - the one reason to refuse
                    continue
                assert len(chosen) == keep
                assert torch.isfinite(chosen.apply(tokens.features)).all()


def test_names_and_options_through_the_registry() -> None:
    assert get_method("per_tile", method="fastervlm", split="proportional") == PerTile(
        FasterVLM(), split="proportional"
    )
    assert PerTile(DivPrune()) == PerTile("divprune")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="wraps a connector method"):
        PerTile(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="equal"):
        PerTile(DivPrune(), split="even")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"alpha=2 is not a number in \[0, 1\]"):
        PerTile(DivPrune(), split="hired", alpha=2)


# PerTile


def test_each_tile_is_pruned_as_a_picture_of_its_own() -> None:
    tokens = stream(LAYOUTS["unpadded"])
    chosen = PerTile(DivPrune()).select(tokens, 20).indices
    assert torch.bincount(tokens.layout.group[chosen]).tolist() == [4] * 5
    for own in tokens.layout.group_slices():
        alone = divprune(tokens.features[None, own], 4)[0].sort().values + own.start
        mine = chosen[(chosen >= own.start) & (chosen < own.stop)]
        assert torch.equal(mine, alone)


def test_batches_of_tiles_equal_single_calls() -> None:
    method = PerTile(MergeDropped(DivPrune()))
    batch = [stream(LAYOUTS[w], seed=s) for s, w in enumerate(["tiles", "video", "unpadded", "image"])]
    for tokens, together in zip(batch, method.select_batch(batch, [7, 8, 9, 10]), strict=True):
        alone = method.select(tokens, len(together))
        assert torch.equal(alone.indices, together.indices)
        torch.testing.assert_close(alone.apply(tokens.features), together.apply(tokens.features))


def test_splits_give_what_they_say() -> None:
    tokens = stream(LAYOUTS["unpadded"], ("cls_attention:0", "cls_logits:-1"))  # 16 + 4 * 12 tokens
    assert PerTile(split="equal").shares(tokens, 30) == [6] * 5
    assert PerTile(split="proportional").shares(tokens, 32) == [8, 6, 6, 6, 6]
    early = torch.zeros(64)
    early[:16].view(4, 4)[:2, 2:] = 1.0  # all attention on the top right
    busy = replace(tokens, signals={"cls_attention:0": early, "cls_logits:-1": 10 * early})
    assert PerTile(split="hired").shares(busy, 20) == [10, 0, 10, 0, 0]
    assert PerTile(split="hired", alpha=0.1).shares(busy, 30) == [3, 5, 12, 5, 5]
    shares = PerTile(split="globalcom2").shares(busy, 20)
    assert sum(shares) == 20
    assert shares[2] > shares[1] == shares[3] == shares[4]
    video = stream(LAYOUTS["video"])
    assert PerTile(split="hired").shares(video, 10) == [2] * 5
    assert PerTile(split="globalcom2").shares(video, 11) == [3, 2, 2, 2, 2]


def test_a_budget_below_the_number_of_tiles_drops_tiles() -> None:
    tokens = stream(LAYOUTS["video"])
    chosen = PerTile(MergeDropped(DivPrune())).select(tokens, 2)
    assert tokens.layout.group[chosen.indices].tolist() == [0, 1]


@dataclass(frozen=True)
class Seen(ConnectorMethod):
    """Checks what an inner method is shown."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """The first ones."""
        layout = tokens.layout
        assert layout.num_groups == 1
        assert len(layout.group_sizes) == 1
        assert layout.group_sizes[0] == len(tokens)
        assert int(layout.group.max()) == 0
        assert tokens.signals["frame_scores"].shape == (1,)
        assert layout.timestamps is not None
        assert len(layout.timestamps) == 1
        return Selection(torch.arange(keep))


def test_inner_methods_see_one_frame_with_its_own_signals() -> None:
    tokens = stream(LAYOUTS["video"], ("frame_scores",))
    assert PerTile(Seen()).select(tokens, 10).indices.tolist() == [0, 1, 12, 13, 24, 25, 36, 37, 48, 49]


# MergeDropped


def test_dropped_tokens_are_averaged_into_the_nearest() -> None:
    tokens = stream(LAYOUTS["image"])
    kept = DivPrune().select(tokens, 9).indices
    unit = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    expected = []
    dropped = [i for i in range(64) if i not in kept.tolist()]
    nearest = {i: int((unit[i] @ unit[kept].T).argmax()) for i in dropped}
    for slot, index in enumerate(kept.tolist()):
        members = [index, *(i for i in dropped if nearest[i] == slot)]
        expected.append(tokens.features[members].mean(0))
    chosen = MergeDropped(DivPrune()).select(tokens, 9)
    assert torch.equal(chosen.indices, kept)
    torch.testing.assert_close(chosen.apply(tokens.features), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_weights_carry_over_to_other_planes() -> None:
    tokens = stream(LAYOUTS["image"])
    plane = torch.randn(64, 5)
    chosen = MergeDropped(DivPrune()).select(tokens, 9)
    assert chosen.weights is not None
    assert torch.equal(chosen.weights.apply(plane, 9), chosen.apply(plane))
    torch.testing.assert_close(chosen.weights.dense(9, 64).sum(1), torch.ones(9))


@dataclass(frozen=True)
class PairMean(ConnectorMethod):
    """Output i is the weighted mean of tokens 2i and 2i + 1; the rest flows nowhere."""

    form: str = "rows"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """As the class says."""
        slot = torch.arange(keep)
        rows = torch.zeros(keep, len(tokens))
        rows[slot, 2 * slot], rows[slot, 2 * slot + 1] = 0.75, 0.25
        if self.form == "sparse":
            return Selection(2 * slot, Merge(rows=rows.to_sparse()))
        if self.form == "target":
            target = torch.arange(len(tokens)) // 2
            scale = torch.tensor([0.75, 0.25]).repeat(len(tokens) // 2)
            return Selection(2 * slot, Merge(target=torch.where(target < keep, target, -1), scale=scale))
        return Selection(2 * slot, Merge(rows=rows))


@pytest.mark.parametrize("form", ["rows", "sparse", "target"])
def test_merging_on_top_of_a_merge_is_composition(form: str) -> None:
    tokens = stream(LAYOUTS["image"])
    x = tokens.features
    inner = (0.75 * x[0:8:2] + 0.25 * x[1:8:2]).double()  # 4 outputs of 8 tokens
    unit = torch.nn.functional.normalize
    nearest = (unit(x[8:].double(), dim=-1) @ unit(inner, dim=-1).T).argmax(-1)
    expected = torch.stack(
        [(inner[k] + x[8:][nearest == k].double().sum(0)) / (1 + (nearest == k).sum()) for k in range(4)]
    )
    chosen = MergeDropped(PairMean(form)).select(tokens, 4)
    torch.testing.assert_close(chosen.apply(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["rows", "sparse", "target"])
def test_tiles_keep_their_merge(form: str) -> None:
    tokens = stream(LAYOUTS["video"])
    chosen = PerTile(PairMean(form)).select(tokens, 10)
    x = tokens.features.reshape(5, 12, -1)
    expected = (0.75 * x[:, 0:4:2] + 0.25 * x[:, 1:4:2]).flatten(0, 1)
    torch.testing.assert_close(chosen.apply(tokens.features), expected)


@dataclass(frozen=True)
class Explicit(ConnectorMethod):
    """Hands out features."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """The first ones, doubled."""
        return Selection(torch.arange(keep), features=2 * tokens.features[:keep])


def test_explicit_features_pass_through_tiles_and_cannot_be_merged() -> None:
    tokens = stream(LAYOUTS["video"])
    out = PerTile(Explicit()).select(tokens, 10).apply(tokens.features)
    assert torch.equal(out, 2 * tokens.features.reshape(5, 12, -1)[:, :2].flatten(0, 1))
    with pytest.raises(OptionError, match="explicit features"):
        MergeDropped(Explicit()).select(tokens, 10)


def test_into_none_is_the_method_alone() -> None:
    tokens = stream(LAYOUTS["image"])
    assert MergeDropped(DivPrune(), into="none").select(tokens, 9).weights is None
    with pytest.raises(OptionError, match="into"):
        MergeDropped(DivPrune(), into="mean")  # type: ignore[arg-type]


# Protect


def test_protected_tokens_stay_and_the_method_chooses_the_rest() -> None:
    tokens = stream(LAYOUTS["image"])
    edge = {i for i in range(64) if i // 8 in (0, 7) or i % 8 in (0, 7)}
    inside = torch.tensor(sorted(set(range(64)) - edge))
    chosen = Protect(DivPrune()).select(tokens, 28 + 6).indices.tolist()
    assert edge <= set(chosen)
    alone = inside[divprune(tokens.features[None, inside], 6)[0]]
    assert set(chosen) - edge == set(alone.tolist())


def test_protected_places_may_count_from_the_end() -> None:
    tokens = stream(LAYOUTS["image"])
    chosen = Protect(Random(), border=0, indices=(-1, 5)).select(tokens, 4).indices.tolist()
    assert {5, 63} <= set(chosen)


def test_more_protected_than_the_budget_are_chosen_among() -> None:
    tokens = stream(LAYOUTS["image"], ("cls_attention",))
    row = torch.arange(64.0)
    tokens = replace(tokens, signals={"cls_attention": row})
    assert Protect(FasterVLM()).select(tokens, 3).indices.tolist() == [61, 62, 63]
    assert Protect(FasterVLM(), border=0, indices=(3, 9, 20)).select(tokens, 2).indices.tolist() == [9, 20]


def test_where_nothing_is_protected_the_method_is_alone() -> None:
    whole = stream(LAYOUTS["image"], ("cls_attention",))
    tokens = whole.part(torch.tensor([8 * row + col for row in range(1, 7) for col in range(1, 7)]))
    assert not Protect(FasterVLM()).protected(tokens).any()
    chosen, alone = Protect(FasterVLM()).select(tokens, 5), FasterVLM().select(tokens, 5)
    assert torch.equal(chosen.indices, alone.indices)
    assert torch.equal(chosen.info["scores"], alone.info["scores"])


def test_protecting_around_a_merge() -> None:
    tokens = stream(LAYOUTS["image"])
    chosen = Protect(Pool(), border=0, indices=(10,)).select(tokens, 8)
    slot = chosen.indices.tolist().index(10)
    assert chosen.weights is not None
    rows = chosen.weights.dense(8, 64)
    assert rows[slot].nonzero().flatten().tolist() == [10]
    assert float(rows[:, 10].sum()) == 1.0
    assert (rows != 0).sum(0).tolist() == [1] * 64


def test_protect_refuses_what_it_cannot_do() -> None:
    with pytest.raises(OptionError, match="nothing to protect"):
        Protect(DivPrune(), border=0)
    with pytest.raises(OptionError, match="border=-1"):
        Protect(DivPrune(), border=-1)
    with pytest.raises(OptionError, match="whole numbers"):
        Protect(DivPrune(), indices=(1.5,))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="do not lie in this stream of 64"):
        Protect(DivPrune(), indices=(64,)).select(stream(LAYOUTS["image"]), 3)


# Relevance


def test_weight_zero_is_the_method_and_weight_one_the_relevance() -> None:
    tokens = stream(LAYOUTS["image"], ("cls_attention",))
    for inner in (FasterVLM(), DivPrune()):
        assert torch.equal(Relevance(inner, weight=0).select(tokens, 11).indices, inner.select(tokens, 11).indices)
    query = question().embeddings
    assert query is not None
    unit = torch.nn.functional.normalize
    cosine = (unit(tokens.features, dim=-1) @ unit(query, dim=-1).T).mean(-1)
    best = cosine.topk(11).indices.sort().values
    assert torch.equal(Relevance(FasterVLM(), weight=1).select(tokens, 11).indices, best)
    worst = (-cosine).topk(11).indices.sort().values
    assert torch.equal(Relevance(FasterVLM(), weight=1, sign=-1).select(tokens, 11).indices, worst)


def test_conditional_diversity_is_the_rule_written_out() -> None:
    tokens = stream(Layout.grid(5, 6))
    query = question().embeddings
    assert query is not None
    unit = torch.nn.functional.normalize
    x = unit(tokens.features.double(), dim=-1)
    worth = (x @ unit(query.double(), dim=-1).T).mean(-1)
    gain = 0.5 + 0.5 * ((worth - worth.min()) / (worth.max() - worth.min())).clamp_min(1e-6)
    distance = 1 - x @ x.T
    picks = [max(range(30), key=lambda i: float(gain[i] * min(distance[i, j] for j in range(30) if j != i)))]
    while len(picks) < 8:
        rest = [i for i in range(30) if i not in picks]
        picks.append(max(rest, key=lambda i: float(gain[i] * min(distance[i, j] for j in picks))))
    assert Relevance(DivPrune()).select(tokens, 8).indices.tolist() == sorted(picks)


def test_the_question_changes_the_choice() -> None:
    tokens = stream(LAYOUTS["image"])
    other = replace(tokens, query=Query(embeddings=question(seed=7).embeddings))
    method = Relevance(DivPrune(), weight=1.0)
    assert not torch.equal(method.select(tokens, 11).indices, method.select(other, 11).indices)


def test_clip_relevance_asks_for_its_signals() -> None:
    method = Relevance(FasterVLM(), source="clip")
    assert method.needs == ("cls_attention", "clip_image", "clip_text")
    assert method.query_aware
    tokens = stream(LAYOUTS["image"], method.needs)
    assert len(method.select(tokens, 5)) == 5
    with pytest.raises(MissingQueryError, match="clip"):
        method.select(replace(tokens, query=Query("words only")), 5)
    with pytest.raises(MissingQueryError, match="embeddings"):
        Relevance(FasterVLM()).select(replace(tokens, query=Query("words only")), 5)
    with pytest.raises(OptionError, match="have shape"):
        Relevance(FasterVLM()).select(replace(tokens, query=Query(embeddings=torch.randn(2, 3))), 5)


def test_relevance_refuses_where_the_maths_has_no_place() -> None:
    for inner in (Pool(), Uniform()):
        with pytest.raises(OptionError, match="cannot be mixed"):
            Relevance(inner)
    with pytest.raises(OptionError, match="Wrap its inside"):
        Relevance(PerTile(FasterVLM()))
    for weight in (-0.1, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(OptionError, match="weight"):
            Relevance(DivPrune(), weight=weight)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="sign"):
        Relevance(DivPrune(), sign=0)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="source"):
        Relevance(DivPrune(), source="siglip")  # type: ignore[arg-type]


def test_half_precision_and_equal_relevance() -> None:
    tokens = changed(stream(LAYOUTS["image"], ("cls_attention",)), lambda x: x.bfloat16())
    same = replace(tokens, features=torch.ones_like(tokens.features))
    for inner in (FasterVLM(), DivPrune()):
        for stream_ in (tokens, same):
            assert len(Relevance(inner).select(stream_, 13).indices.unique()) == 13
