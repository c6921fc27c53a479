"""Recoverable Compression: keep what stands out to the eye, recover what the question is about, merge the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.methods.question import CLIP_SIGNALS, Relevance, question_relevance
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.ops.topk import ranks, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.tokens import Merge, Selection, VisualTokens


def local_outlier_factor(values: Tensor, neighbours: int = 20) -> Tensor:
    """How much sparser each value lies than its nearest values do; about 1 inside a crowd, larger outside.

    values: (..., N) -> (..., N) in float64 (differences between attention shares are tiny). With k = min(neighbours, N
    - 1), N_k(i) the k values nearest to i, and kd(j) the distance of j to its k-th nearest (Breunig et al., SIGMOD
    2000, definitions 3 to 7): reach(i, j) = max(|i - j|, kd(j)); density(i) = 1 / (mean over j in N_k(i) of reach(i, j)
    + 1e-10); factor(i) = mean over j in N_k(i) of density(j) / density(i). On a line the k nearest lie within k places
    of the sorted order, so this takes O(N k) time and memory. Of equally distant neighbours the smaller value is taken.
    """
    n = values.shape[-1]
    k = min(neighbours, n - 1)
    if k < 1:
        return torch.ones_like(values, dtype=torch.float64)
    line, order = torch.sort(values.double(), dim=-1, stable=True)
    steps = torch.cat([torch.arange(-k, 0, device=values.device), torch.arange(1, k + 1, device=values.device)])
    near = torch.arange(n, device=values.device)[:, None] + steps  # (N, 2k) places in the sorted order
    outside = (near < 0) | (near >= n)
    near = near.clamp(0, n - 1)
    gap = (line[..., near] - line[..., None]).abs().masked_fill(outside, torch.inf)
    gap, pick = (x[..., :k] for x in torch.sort(gap, dim=-1, stable=True))  # (..., N, k)
    near = near.expand((*gap.shape[:-1], 2 * k)).gather(-1, pick)
    far = gap[..., -1]  # (..., N) distance to the k-th nearest

    def of_neighbours(x: Tensor) -> Tensor:
        return x.gather(-1, near.flatten(-2)).unflatten(-1, (n, k))

    density = 1 / (torch.maximum(gap, of_neighbours(far)).mean(-1) + 1e-10)
    factor = of_neighbours(density).mean(-1) / density
    return torch.empty_like(factor).scatter(-1, order, factor)


def outliers(values: Tensor, neighbours: int = 20, threshold: float = 1.5) -> Tensor:
    """Which values are outliers: a local outlier factor above `threshold`. (..., N) -> (..., N) bool.

    1.5 is the customary threshold, and what the published methods here rely on.
    """
    return local_outlier_factor(values, neighbours) > threshold


def _share(scores: Tensor, of: Tensor, neighbours: int, high_only: bool) -> Tensor:
    """floor(of * share of outliers among the scores), a 0-d tensor. high_only: outliers below the median do
    not count.
    """
    found = outliers(scores, neighbours)
    if not high_only:  # as published, in its float64, which makes 1/49 of 49 less than 1
        return (of * (found.sum().double() / len(scores))).floor().long()
    found &= scores > scores.median()
    return torch.div(of * found.sum(), len(scores), rounding_mode="floor")


@torch.no_grad()
def recoverable(
    attention: Tensor, relevance: Tensor, neighbours: int = 20, high_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Which tokens stand out visually and which the question brings back (sections on filtering and recovery).

    attention: (N,) single-head [CLS] row. relevance: (N,) similarity to the question. The share of local outliers among
    the scores says how many of the highest scores stay: first of the attention, then, among the others (the chosen
    ones' relevance is set to the minimum), of the relevance. Returns two disjoint (N,) bool masks, visual and text.
    """
    n = torch.tensor(len(attention), device=attention.device)
    visual_count = _share(attention, n, neighbours, high_only)
    visual = ranks(attention) < visual_count
    left = torch.where(visual, relevance.amin(), relevance)
    text_count = _share(left, n - visual_count, neighbours, high_only)
    text = ranks(left.masked_fill(visual, -torch.inf)) < text_count
    return visual, text


@register_method(
    "recoverable",
    paper="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
    year=2025,
    url="https://arxiv.org/abs/2409.01179",
    complexity="O(KNC)",
    memory="O(KN)",
    query_aware=True,
    merges=True,
    checked=Checked(
        "banjiuyufen/Recoverable-Compression",
        agrees='visual outliers and tokens recovered by the text with compat="published"',
        differs="the merging stage, which reads keys at wrong places there; the text vector of the last padded "
        "position",
    ),
)
@dataclass(frozen=True)
class Recoverable(ConnectorMethod):
    """Recoverable Compression (AAAI 2025): visual outliers, text-guided recovery, and merging of what remains.

    relevance: "clip" is the published form; "embeddings" (the default, ours) compares projected features with the LLM
    embeddings of the question's words and works on every model. neighbours = 20 for the outlier factor and 32 for
    merging are the published numbers; text_weight is how much the question counts against the keys when neighbours are
    sought (published: 50 / sqrt(768), on cosines).

    Here the count is exact. Outliers beyond `keep` are cut in proportion; slots that outliers leave free go to the
    remaining tokens of highest attention, each of which takes up its nearest dropped tokens, weighted by attention.
    Merging happens on projected features, before the projector in the publication, and without its extra slot for the
    sum of the rest.

    Differences of the published code, whose counts compat="published" keeps: it counts outliers at the low end as well
    (here only those above the median), and adds neighbours to a token without normalising (here a weighted mean). Its
    merging stage multiplies its share of centres by the number of tokens already kept instead of all, which leaves few
    of them on photographs and often none on random features, and reads keys at wrong places; its text vector is that of
    the last padded position. These are not reproduced.
    """

    relevance: Relevance = "embeddings"
    neighbours: int = option(20, low=1)
    merge_neighbours: int = option(32, low=0)
    text_weight: float = 50 / 768**0.5
    compat: Compat = "corrected"

    @property
    def needs(self) -> tuple[str, ...]:
        """[CLS] row and keys of the tower's last block, and the scorer's embeddings when they decide what is
        relevant.
        """
        return ("cls_attention_1head:-1", "keys:-1", *(CLIP_SIGNALS if self.relevance == "clip" else ()))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream and merge the others into those that are not outliers."""
        check_keep(keep, len(tokens))
        attention = wide(check_finite(tokens.signal("cls_attention_1head:-1"), "the [CLS] attention"))
        score = question_relevance(tokens, self.relevance)
        visual, text = recoverable(attention, score, self.neighbours, self.compat == "corrected")
        # More outliers than slots: the same share of both kinds. Tensors throughout, so that the host need not wait.
        own, both = visual.sum(), (visual.sum() + text.sum()).clamp_min(keep)
        first = torch.div(2 * own * keep + both, 2 * both, rounding_mode="floor")
        visual &= ranks(attention.masked_fill(~visual, -torch.inf)) < first
        text &= ranks(score.masked_fill(~text, -torch.inf)) < keep - first
        main = visual | text
        indices = top_by_tier(main.long(), attention, keep)
        rows = self._rows(tokens, indices, main, attention, score)
        return Selection(indices, Merge(rows=rows), info={"scores": attention, "visual": visual, "text": text})

    def _rows(self, tokens: VisualTokens, kept: Tensor, main: Tensor, attention: Tensor, score: Tensor) -> Tensor:
        """Merge weights (K, N): outliers as they are, each other kept token with its nearest dropped ones."""
        keys = unit(wide(check_finite(tokens.signal("keys:-1"), "the keys")).flatten(1))
        n = len(tokens)
        dropped = torch.ones(n, dtype=torch.bool, device=kept.device).scatter(0, kept, False)
        near = (keys[kept] @ keys.T + self.text_weight * score).masked_fill(~dropped, -torch.inf)  # (K, N)
        value, pick = (x[:, : self.merge_neighbours] for x in torch.sort(near, dim=-1, descending=True, stable=True))
        open_to_merge = (~main[kept])[:, None] & ~torch.isneginf(value)
        own, brought = attention[kept][:, None], attention[pick] * open_to_merge
        if self.compat == "published":
            own = torch.ones_like(own)
        else:  # a weighted mean; without any weight, the token itself
            total = own + brought.sum(-1, keepdim=True)
            alone = main[kept][:, None] | (total <= 0)
            own, brought = torch.where(alone, 1.0, own / total), torch.where(alone, 0.0, brought / total)
        rows = torch.zeros_like(near).scatter(1, pick, brought.to(near.dtype))
        return rows.scatter(1, kept[:, None], own.to(near.dtype))
