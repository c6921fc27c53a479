"""PruneSID: group tokens by principal component, then keep the attended and non-redundant ones of each group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Seed
from tokprune.ops import blocks
from tokprune.ops.blocks import whole
from tokprune.ops.grid import stacks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import gram, unit
from tokprune.ops.topk import rank_in_group, ranks, rows_at, true_indices
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


@torch.no_grad()
def randomised_pca(samples: Tensor, rank: int, seed: int = 0, rounds: int = 2) -> Tensor:
    """Loadings of the variables on the first `rank` principal directions (Halko et al., SIAM Review 2011, algorithms
    4.4, 5.1).

    samples: (..., S, V), S observations of V variables, centred here. rank: at most min(S, V). Returns (..., V, rank),
    orthonormal columns, in float32 (float64 stays); the sign of a column is arbitrary. The random draw depends on
    `seed` alone, on any device, is the same for every item of a batch, and leaves torch's global generator as it was.
    It is the draw of torch.pca_lowrank on a CPU behind torch.manual_seed(seed), so both give the same directions.
    """
    samples = wide(samples)
    return _pca(samples - samples.mean(-2, keepdim=True), rank, seed, rounds)


def _pca(centred: Tensor, rank: int, seed: int, rounds: int = 2) -> Tensor:
    """`randomised_pca` of samples whose mean is 0."""
    tall = centred.shape[-2] >= centred.shape[-1]
    matrix = centred if tall else centred.mT
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(matrix.shape[-1], rank, generator=generator, dtype=centred.dtype).to(centred.device)
    # Products of few columns are written as products of few rows: on a CPU they take half the time.
    basis = torch.linalg.qr((draw.mT @ matrix.mT).mT).Q
    for _ in range(rounds):  # power iterations sharpen a slowly falling spectrum
        basis = torch.linalg.qr((basis.mT @ matrix).mT).Q
        basis = torch.linalg.qr((basis.mT @ matrix.mT).mT).Q
    left, _, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return right.mT if tall else basis @ left


Importance = Literal["attention", "loading"]


@torch.no_grad()
def semantic_loadings(features: Tensor, groups: int, seed: int = 0) -> Tensor:
    """How much each token loads on each principal component (the paper's PSCA).

    features: (..., N, C), squashed by a sigmoid; channels are the samples, tokens the variables. Returns (..., N, G),
    positive; a token belongs to the component on which it loads most.
    """
    rank = min(groups, *features.shape[-2:])
    squashed = torch.sigmoid(wide(features))
    squashed -= squashed.mean(-1, keepdim=True)  # in place: making room takes as long as the arithmetic
    return _pca(squashed.mT, rank, seed).abs()


@torch.no_grad()
def suppress(features: Tensor, scores: Tensor, group: Tensor, threshold: Tensor) -> Tensor:
    """Survivors of non-maximum suppression inside each group.

    The best token that is left survives and removes those of its group whose cosine with it exceeds the threshold, and
    so on; tokens without a positive score never survive. features: (..., N, C), scores, group: (..., N), threshold:
    (...,). Returns (..., N) bool.
    """
    return _suppress(unit(features), scores, group, threshold)


def _suppress(rows: Tensor, scores: Tensor, group: Tensor, threshold: Tensor) -> Tensor:
    """`suppress` for features of unit length."""
    n = rows.shape[-2]
    if not whole(n, n):
        return _suppress_in_order(rows, scores, group, threshold)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        shape = scores.shape
        scores, group, threshold = scores.reshape(-1, n), group.reshape(-1, n), threshold.reshape(-1)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, torch.sort(group.gather(-1, order), dim=-1, stable=True).indices)
        sorted_rows = rows_at(rows.reshape(-1, *rows.shape[-2:]), order)
        removes = _removed_in_groups(sorted_rows, group, threshold)
        survives = _survivors(removes, scores.gather(-1, order) > 0)
        return torch.zeros_like(survives).scatter(-1, order, survives).view(shape)
    order = ranks(scores)
    removes = gram(rows) > threshold[..., None, None]  # (..., N, N): column removes row, if it survives
    removes &= (group[..., None, :] == group[..., :, None]) & (order[..., None, :] < order[..., :, None])
    return _survivors(removes, scores > 0)


def _removed_in_groups(rows: Tensor, group: Tensor, threshold: Tensor) -> Tensor:
    """Which token (column) removes which (row), from the products within groups alone: (B, N, N) bool.

    rows: (B, N, C), group after group, the best of each first. group: (B, N) in any order. threshold: (B,).
    """
    removes = torch.zeros(*rows.shape[:2], rows.shape[1], dtype=torch.bool)
    for own, number, limit, out in zip(rows, group, threshold, removes, strict=True):
        start = 0
        for size in torch.bincount(number).tolist():
            part = slice(start, start + size)
            torch.gt(gram(own[part]), limit, out=out[part, part])
            start += size
    return removes.tril_(-1)


def _survivors(removes: Tensor, alive: Tensor) -> Tensor:
    """Who is left when each survivor removes its row's tokens. removes: (..., N, N), alive: (..., N) bool."""
    survives = torch.zeros_like(alive)
    for step in range(alive.shape[-1]):
        # All tokens at once that nobody better can remove any more: the same survivors as one by one, in few rounds.
        safe = alive & ~_any(removes, alive)
        survives |= safe
        alive = alive & ~safe & ~_any(removes, safe)
        if (alive.device.type == "cpu" or step % 8 == 7) and not alive.any():
            break
    return survives


def _suppress_in_order(rows: Tensor, scores: Tensor, group: Tensor, threshold: Tensor) -> Tensor:
    """`_suppress`, from the best to the worst, some at a time: first what earlier survivors remove, then each other."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    rows = rows.gather(-2, order[..., None].expand_as(rows))
    worth, groups = scores.gather(-1, order), group.gather(-1, order)
    found = torch.zeros_like(order, dtype=torch.bool)
    for start in range(0, order.shape[-1], blocks.ROWS):
        part = slice(start, start + blocks.ROWS)
        alike = rows[..., part, :] @ rows[..., :start, :].mT > threshold[..., None, None]  # (..., m, start)
        alike &= groups[..., part, None] == groups[..., None, :start]
        left = worth[..., part].masked_fill(_any(alike, found[..., :start]), 0) if start else worth[..., part]
        found[..., part] = _suppress(rows[..., part, :], left, groups[..., part], threshold)
    return torch.zeros_like(found).scatter(-1, order, found)


def _any(entries: Tensor, mask: Tensor) -> Tensor:
    """Whether a row of (..., M, N) bool has an entry where the mask (..., N) is set."""
    return (entries & mask[..., None, :]).view(torch.int8).amax(-1) > 0  # of bool, any() takes several times as long


def group_budgets(sizes: Tensor, survivors: Tensor, keep: int, slots: int) -> Tensor:
    """Tokens of each group, `keep` in sum.

    Each group takes one; the rest is shared in proportion to the survivors (running sums, rounded), but a group takes
    at most its survivors and at most 5 ceil(slots / 64). If that is not enough for `slots` in all, every bound rises by
    one until it is, up to the group's size. What bounds cut off goes to the groups with most survivors, each filled up
    in turn.

    sizes, survivors: (..., G). slots: what the published code counts, `keep` and its [CLS]. Returns (..., G) long.
    """
    bound = survivors.minimum(sizes).clamp_max(5 * math.ceil(slots / 64))
    low, high = torch.zeros_like(bound[..., :1]), sizes.amax(-1, keepdim=True)
    for _ in range(int(sizes.shape[-1] + keep + 64).bit_length() + 20):
        middle = (low + high) // 2
        enough = (bound + middle).minimum(sizes).sum(-1, keepdim=True) >= slots
        low, high = torch.where(enough, low, middle + 1).minimum(high), torch.where(enough, middle, high)
    bound = (bound + high).minimum(sizes)
    first = sizes.clamp_max(1)
    rest = (keep - first.sum(-1, keepdim=True)).clamp_min(0)
    part = survivors.float() / survivors.sum(-1, keepdim=True).clamp_min(1)
    until = (part.cumsum(-1) * rest).round().long()
    out = (first + until.diff(dim=-1, prepend=torch.zeros_like(until[..., :1]))).minimum(bound)
    most = survivors.argsort(-1, descending=True)  # not stable, as there: this is the order of equal counts on a CPU
    room = (bound - out).gather(-1, most)
    missing = first.sum(-1, keepdim=True) + rest - out.sum(-1, keepdim=True)
    filled = (missing - (room.cumsum(-1) - room)).clamp_min(0).minimum(room)
    return out.scatter_add(-1, most, filled)


@torch.no_grad()
def prunesid(features: Tensor, attention: Tensor | None, keep: int, seed: int = 0) -> Tensor:
    """The whole choice for pictures or tiles of equal size. features: (..., N, C) -> (..., keep) ascending indices.

    attention: (..., N) says what is important, as in the published code for towers with [CLS]: (keep + 1) // 4 groups,
    threshold of suppression (keep + 1) / 32 times the mean cosine of all pairs. None: the form of the published
    Qwen2-VL code, where a token is important that loads highly on its component; keep // 4 groups, at least 4,
    threshold max(18 keep / N, 1) times the mean of the similarity matrix with its lower half set to 0.
    """
    x = wide(features)
    n = x.shape[-2]
    if keep >= n:
        return torch.arange(n, device=x.device).expand(*x.shape[:-1])
    slots = keep if attention is None else keep + 1  # [CLS] takes one of theirs
    rows = unit(x)
    squares = torch.linalg.vector_norm(rows, dim=(-2, -1)).square()
    pairs = (rows.sum(-2).square().sum(-1) - squares) / 2  # sum of the cosines of all pairs of two different tokens
    loadings = semantic_loadings(
        x, max(1, slots // 4) if attention is not None else min(max(slots // 4, 4), keep), seed
    )
    strongest, group = loadings.max(-1)
    if attention is None:
        scores, threshold = strongest, max(18 * keep / n, 1) * (pairs + squares) / n**2
    else:
        scores, threshold = wide(attention), slots / 32 * pairs / (n * (n - 1) / 2)
    alive = _suppress(rows, scores, group, threshold)
    empty = torch.zeros(*group.shape[:-1], loadings.shape[-1], dtype=torch.long, device=x.device)
    sizes, survivors = (empty.scatter_add(-1, group, m.long()) for m in (torch.ones_like(alive), alive))
    budgets = group_budgets(sizes, survivors, keep, slots)
    # Survivors first, the better first; then what suppression removed, by score too.
    rank = rank_in_group(ranks(scores) * -1 + alive.long() * n, group)
    return true_indices(rank < budgets.gather(-1, group), keep)


@register_method(
    "prunesid",
    paper="Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity",
    year=2026,
    url="https://arxiv.org/abs/2603.09480",
    complexity="O(N²C + KN)",
    memory="O(ND)",
    deterministic=False,
    checked=Checked(
        "ZhengyaoFang/PruneSID",
        agrees="the kept patches of both forms (LLaVA, Qwen2-VL) behind the same seed: groups, survivors and budgets",
        differs="the [CLS] slot; its random draws, which are not seeded",
    ),
    presets={"qwen2_vl": {"importance": "loading"}},
)
@dataclass(frozen=True)
class PruneSID(ConnectorMethod):
    """PruneSID (ICLR 2026): principal semantic components for coverage, suppression inside groups against repetition.

    importance: "attention", the published form for towers with [CLS], reads the tower's features before the projector
    and the [CLS] attention; "loading", the published form for Qwen2-VL, reads the projected features alone. The
    principal components come from a random projection: the published code draws from the global generator, and two runs
    keep sets that agree to about a half; here `seed` fixes it, and seed=s is what the published code does behind
    torch.manual_seed(s) on a CPU. Tiles and frames get equal budgets and are treated one by one, as published.

    Differences from the published code: our streams hold patches only, so that `keep` patches are what it keeps of keep
    + 1 tokens, one of them [CLS]; its Qwen form keeps at least 16 tokens. Its paper varies the budget between images by
    their redundancy; that is what `adaptive_budget` is for.
    """

    importance: Importance = "attention"
    seed: Seed = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """The tower's features before the projector and its [CLS] attention."""
        return ("encoder_features", "cls_attention") if self.importance == "attention" else ()

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        if self.importance == "attention":
            features = check_finite(tokens.signal("encoder_features"), "the tower's features")
            attention = check_finite(tokens.signal("cls_attention"), "the [CLS] attention")
        else:
            features, attention = check_finite(tokens.features, "the visual features"), None
        sizes = tokens.layout.group_sizes
        kept = [
            where.gather(
                1, prunesid(features[where], None if attention is None else attention[where], count, self.seed)
            )
            for where, count, _ in stacks(sizes, equal(keep, sizes), features.device)
        ]
        return Selection(torch.cat([k.flatten() for k in kept]).sort().values)
