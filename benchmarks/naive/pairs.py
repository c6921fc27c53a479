"""Each connector method beside its published formulation: the same inputs, the same kind of result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.published.dart import dart_in_llm
from tests.published.globalcom2 import globalcom2_published
from tests.published.mmtok import mmtok
from tests.published.pool import average_pool, pooled_positions
from tests.published.prumerge_plus import prumerge_plus_order, spatial_step
from tests.published.visionzip import visionzip
from tests.published.vscan import vscan_published
from tokprune.methods.connector.cdpruner import cdpruner, quality
from tokprune.methods.connector.divprune import divprune
from tokprune.methods.connector.flowcut import flowcut_scores
from tokprune.methods.connector.gprune import gprune
from tokprune.methods.connector.hiprune import hiprune
from tokprune.methods.connector.hired import hired_budgets, hired_published_budgets
from tokprune.methods.connector.holov import holov, holov_published
from tokprune.methods.connector.prumerge import best, prumerge_count, prumerge_rows
from tokprune.methods.connector.prunesid import prunesid
from tokprune.methods.connector.recoverable import recoverable
from tokprune.methods.connector.scope import scope
from tokprune.methods.connector.textmonkey import uniqueness
from tokprune.methods.connector.vispruner import vispruner
from tokprune.methods.question import text_relevance
from tokprune.ops.similarity import gram
from tokprune.ops.topk import top, top_in_groups
from tokprune.tokens import Layout

from . import attention as by_attention
from . import merging, similarity


@dataclass(frozen=True)
class Case:
    """How large the input is. tiles: of n = side * side tokens each. keep: of all tokens. D: LLM width, C: tower
    width."""

    name: str
    tiles: int
    keep: int
    side: int = 24
    heads: int = 16
    C: int = 1024
    D: int = 4096

    @property
    def n(self) -> int:
        """Tokens of one tile."""
        return self.side**2

    @property
    def each(self) -> int:
        """Budget of one tile."""
        return self.keep // self.tiles


CASES = {
    c.name: c
    for c in (
        Case("LLaVA-1.5, 58 of 576", 1, 58),
        Case("LLaVA-1.5, 128 of 576", 1, 128),
        Case("LLaVA-NeXT, 288 of 2880", 5, 288),
    )
}


@dataclass(frozen=True)
class Pair:
    """Two ways to the same result.

    inputs: arguments of both, made for a case by a seeded generator. naive: the published formulation. ours: the same
    job with the functions of tokprune.methods. differs: why the results need not be the same; empty when they must be.
    tiled: the method needs tiles. ranks: it sorts scores that it is given and does no arithmetic. least: what no form
    of the method can do without, on the same inputs; least_share: how much of that call it is; least_is: what it is.
    """

    name: str
    inputs: Callable[[Case, torch.Generator], tuple[Any, ...]]
    naive: Callable[..., Any]
    ours: Callable[..., Any]
    differs: str = ""
    tiled: bool = False
    ranks: bool = False
    least: Callable[..., Any] | None = None
    least_share: float = 1.0
    least_is: str = ""

    def fits(self, case: Case) -> bool:
        """Whether the method can run on this case."""
        return case.tiles > 1 or not self.tiled


def scene(n: int, width: int, seed: torch.Generator) -> Tensor:
    """Features like those of a picture: a few dozen things, each seen by many tokens that differ a little. (n,
    width)."""
    things = torch.randn(40, width, generator=seed)
    which = torch.randint(40, (n,), generator=seed)
    return 0.3 * things[0] + things[which] + 0.7 * torch.randn(n, width, generator=seed)


def rows(*shape: int, seed: torch.Generator) -> Tensor:
    """Attention rows: a few tokens get much, most get little. Sum to 1 along the last dimension."""
    return (1.5 * torch.randn(*shape, generator=seed)).softmax(-1)


def tiles_of(case: Case, width: int, seed: torch.Generator) -> Tensor:
    """(tiles, n, width)."""
    return torch.stack([scene(case.n, width, seed) for _ in range(case.tiles)])


def each_tile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a formulation for one image on every tile; tensors are cut along their first dimension, the rest is handed
    on."""

    def run(*arguments: Any) -> list[Any]:
        count = next(len(a) for a in arguments if isinstance(a, Tensor))
        return [function(*(a[t] if isinstance(a, Tensor) else a for a in arguments)) for t in range(count)]

    return run


# What the stream-level inputs look like: all tiles in one.


def _whole(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return scene(case.tiles * case.n, case.D, seed), case.keep


def _cdpruner_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    patches = tiles_of(case, 768, seed)
    return tiles_of(case, case.D, seed), patches, torch.randn(1, 768, generator=seed), case.each


def _cdpruner(features: Tensor, patches: Tensor, texts: Tensor, keep: int) -> Tensor:
    return cdpruner(features, quality(-text_relevance(patches, texts)), keep).sort(-1).values


def _mmtok_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    n = case.tiles * case.n
    return scene(n, case.D, seed), scene(n, case.C, seed), torch.randn(8, case.D, generator=seed), case.keep


def _dart_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    n, before, after = case.tiles * case.n, 35, 40
    length, heads = before + n + after, case.D // 128
    hidden = torch.cat([scene(before, case.D, seed), scene(n, case.D, seed), scene(after, case.D, seed)])
    keys = torch.randn(heads, length, 128, generator=seed) * (1 + torch.rand(length, 1, generator=seed))
    return hidden, keys, before, n, case.keep // 8


def _tower(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return tiles_of(case, case.C, seed), rows(case.tiles, case.n, seed=seed), case.each


def _hired_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return rows(case.n, seed=seed), rows(case.tiles, case.n, seed=seed), case.keep


def _layout(late: Tensor) -> Layout:
    tiles, n = late.shape
    side = round(n**0.5)
    across = 2 if (tiles - 1) % 2 == 0 else 1
    canvas = ((tiles - 1) // across, across) if tiles > 1 else None
    return Layout.grid(side, side, tiles, "tiles" if canvas else "image", canvas=canvas, thumbnail=canvas is not None)


_LAYOUTS: dict[tuple[int, ...], Layout] = {}  # a stream comes with its layout: making one is not the method's work


def _stream(late: Tensor) -> Layout:
    shape = tuple(late.shape)
    if shape not in _LAYOUTS:
        _LAYOUTS[shape] = _layout(late)
    return _LAYOUTS[shape]


def _hired(early: Tensor, late: Tensor, keep: int) -> Tensor:
    layout = _stream(late)
    if len(late) == 1:
        return top(late[0], keep)
    budgets = hired_budgets(early, layout, keep)
    return top_in_groups(late.flatten(), layout.group, budgets, keep)


def _hired_published(early: Tensor, late: Tensor, keep: int) -> Tensor:
    if len(late) == 1:
        return top(late[0], keep)
    budgets = hired_published_budgets(early, len(late) - 1, keep)
    return top_in_groups(late.flatten(), _stream(late).group, budgets, int(budgets.sum()))


def _two_rows(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return rows(case.tiles, case.n, seed=seed), rows(case.tiles, case.n, seed=seed), case.each


def _hiprune(compat: Any) -> Callable[..., Tensor]:
    def run(objects: Tensor, deep: Tensor, keep: int) -> Tensor:
        side = round(objects.shape[1] ** 0.5)
        return hiprune(objects, deep, keep, 0.1, (side, side), compat=compat)

    return run


def _hiprune_naive(objects: Tensor, deep: Tensor, keep: int) -> Tensor:
    return by_attention.hiprune(objects, deep, keep, width=round(objects.shape[1] ** 0.5))


def _projected(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return tiles_of(case, case.D, seed), rows(case.tiles, case.n, seed=seed), case.each


def _holov_naive(features: Tensor, attention: Tensor, keep: int) -> Tensor:
    return torch.stack(each_tile(by_attention.holov)(features, attention, keep))


def _crop_products(features: Tensor, attention: Tensor, keep: int) -> Tensor:
    crops = features.reshape(len(features) * 16, -1, features.shape[-1])  # as many tokens in each: 576 / 16
    return crops @ crops.mT


def _holov_published(features: Tensor, attention: Tensor, keep: int) -> Tensor:
    return holov_published(features, attention, keep)[0]


def _flowcut_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    shape = (case.tiles, 22, case.n)
    return rows(*shape, seed=seed), rows(*shape, seed=seed), 1 + torch.rand(shape, generator=seed), case.each


def _flowcut_naive(*arguments: Any) -> Tensor:
    return torch.stack(each_tile(by_attention.flowcut)(*arguments))


def _flowcut(attention: Tensor, likeness: Tensor, norm: Tensor, keep: int) -> Tensor:
    """All tiles at once, with the sums taken within each, as the method does on a stream."""
    tiles, blocks, n = attention.shape
    group = _stream(attention[:, 0]).group
    a, s, v = (x.transpose(0, 1).reshape(blocks, tiles * n) for x in (attention, likeness, norm))
    return top(flowcut_scores(a, s, v, 0.5, group, tiles).view(tiles, n), keep)


def _globalcom2_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    crops, side = case.tiles - 1, case.side
    tiles = (crops // 2, 2) if crops % 2 == 0 else (crops, 1)
    features = tiles_of(case, case.D, seed)[1:]
    size = (tiles[1] * side * 14, int(tiles[0] * side * 14 * 0.8))  # a little wider than its canvas: some padding
    thumbnail, scores = torch.randn(case.n, generator=seed), torch.randn(crops, case.n, generator=seed)
    return thumbnail, scores, features, tiles, size, torch.full((case.D,), 7.0), case.keep / (case.tiles * case.n)


def _visionzip_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    hidden = torch.cat([torch.randn(case.tiles, 1, case.C, generator=seed), tiles_of(case, case.C, seed)], 1)
    metric = torch.cat([torch.randn(case.tiles, 1, 64, generator=seed), tiles_of(case, 64, seed)], 1)
    contextual = max(1, round(case.each / 6.4))
    attention = rows(case.tiles, case.heads, case.n, seed=seed)
    return attention, hidden, metric, case.each - contextual, contextual


def _merge_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    attention = rows(case.tiles, case.n, seed=seed)
    return tiles_of(case, case.C, seed), attention, tiles_of(case, case.C, seed), case.each - 1


def _prumerge(x: Tensor, attention: Tensor, keys: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    kept = best(attention, keep)
    return kept, prumerge_rows(attention, keys, kept, compat="published") @ x


def _prumerge_naive(*arguments: Any) -> tuple[Tensor, Tensor]:
    kept, out = zip(*each_tile(merging.prumerge)(*arguments), strict=True)
    return torch.stack(kept), torch.stack(out)


def _prumerge_plus(x: Tensor, attention: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    count = int(prumerge_count(attention[None]))
    kept = prumerge_plus_order(attention, count, spatial_step(len(x), count))
    return kept, (prumerge_rows(attention[None], keys[None], kept[None], compat="published") @ x)[0]


def _vscan_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return tiles_of(case, case.D, seed), *_two_rows(case, seed)


def _vscan(features: Tensor, shallow: Tensor, deep: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    side = round(shallow.shape[1] ** 0.5)
    return vscan_published(features, shallow, deep, keep, (side, side))


def _vscan_naive(features: Tensor, shallow: Tensor, deep: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    side = round(shallow.shape[1] ** 0.5)
    kept, out = zip(*each_tile(merging.vscan)(features, shallow, deep, keep, side), strict=True)
    return torch.stack(kept), torch.stack(out)


def _recoverable_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    return rows(case.tiles, case.n, seed=seed), 0.2 * torch.randn(case.tiles, case.n, generator=seed)


def _pool_inputs(case: Case, seed: torch.Generator) -> tuple[Any, ...]:
    features, keep = _whole(case, seed)
    return features[None], torch.arange(len(features))[None], len(features) // keep


def _pool(features: Tensor, positions: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return average_pool(features, stride), pooled_positions(positions, stride)


CROPS = "the products of the tokens of each crop with each other, in one call"
PAIRS = (
    Pair("divprune", _whole, similarity.divprune, lambda x, keep: divprune(x[None], keep)[0].sort().values),
    Pair(
        "hired",
        _hired_inputs,
        by_attention.hired,
        _hired,
        "regions of the picture and attention mass decide the budgets, not bands and hits",
        ranks=True,
    ),
    Pair("hired (published)", _hired_inputs, by_attention.hired, _hired_published, ranks=True),
    Pair(
        "fastervlm",
        lambda case, seed: (rows(case.tiles, case.heads, case.n, seed=seed), case.each),
        by_attention.fastervlm,
        lambda scores, keep: top(scores.mean(1), keep),
        ranks=True,
    ),
    Pair("visionzip", _visionzip_inputs, merging.visionzip, visionzip),
    Pair("vispruner", _tower, by_attention.vispruner, vispruner),
    Pair(
        "cdpruner",
        _cdpruner_inputs,
        similarity.cdpruner,
        _cdpruner,
        least=lambda features, patches, texts, keep: gram(features[:, :320]),
        least_is="the products, each pair once, of the tokens heavy enough to be chosen, about 320 of 576 here",
    ),
    Pair("scope", _tower, similarity.scope, lambda x, a, keep: scope(x, a, keep).sort(-1).values),
    Pair(
        "holov",
        _projected,
        _holov_naive,
        holov,
        "diversity counts in the allocation and in the choice; what a full crop cannot take goes to others",
        least=_crop_products,
        least_is=CROPS,
    ),
    Pair("holov (published)", _projected, _holov_naive, _holov_published, least=_crop_products, least_is=CROPS),
    Pair(
        "hiprune",
        _two_rows,
        _hiprune_naive,
        _hiprune("corrected"),
        "neighbours neither wrap nor are clamped",
        ranks=True,
    ),
    Pair("hiprune (published)", _two_rows, _hiprune_naive, _hiprune("published"), ranks=True),
    Pair("prumerge", _merge_inputs, _prumerge_naive, _prumerge),
    Pair(
        "prumerge_plus",
        lambda case, seed: _merge_inputs(case, seed)[:3],
        each_tile(merging.prumerge_plus),
        each_tile(_prumerge_plus),
    ),
    Pair("dart", _dart_inputs, similarity.dart, dart_in_llm),
    Pair("mmtok", _mmtok_inputs, similarity.mmtok, lambda *a: mmtok(*a).sort().values),
    Pair("vscan", _vscan_inputs, _vscan_naive, _vscan),
    Pair("globalcom2", _globalcom2_inputs, by_attention.globalcom2, globalcom2_published, tiled=True),
    Pair(
        "textmonkey",
        lambda case, seed: (_whole(case, seed)[0][None], case.keep),
        similarity.textmonkey,
        lambda features, keep: top(uniqueness(features), keep),
        least=lambda features, keep: features[0] @ features[0].T,
        least_share=0.5,
        least_is="half of the product of all pairs of tokens",
    ),
    Pair("recoverable", _recoverable_inputs, each_tile(merging.recoverable), each_tile(recoverable)),
    Pair(
        "pool",
        _pool_inputs,
        merging.pool,
        _pool,
        "positions above 2048 are exact, not rounded to float16",
        least=lambda features, positions, stride: features.unflatten(1, (-1, stride)).sum(2),
        least_is="one sum over the same windows: each feature is read once",
    ),
    Pair("gprune", _whole, similarity.gprune, lambda x, keep: top(gprune(x), keep)),
    Pair(
        "prunesid",
        _tower,
        each_tile(similarity.prunesid),
        lambda *given: list(prunesid(*given)),
        "the groups come from a random projection; budgets follow another rule of proportion",
    ),
    Pair(
        "flowcut",
        _flowcut_inputs,
        _flowcut_naive,
        _flowcut,
        "one cut at the end instead of one in every block: the tower is not touched",
    ),
)


def results(value: Any) -> list[Tensor]:
    """The tensors of a result, flat, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in results(part)]
