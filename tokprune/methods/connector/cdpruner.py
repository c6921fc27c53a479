"""CDPruner: keep the most diverse set among the tokens that the question is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep, picked, solve_alike
from tokprune.methods.options import Compat, option
from tokprune.methods.question import CLIP_SIGNALS, Relevance, question_relevance
from tokprune.ops.blocks import Rows, whole
from tokprune.ops.select import greedy_map, map_by_rows
from tokprune.ops.similarity import gram, unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def quality(relevance: Tensor, theta: float | None = None) -> Tensor:
    """Raw relevance as the weight of each token: min-max over everything given, smallest about 1e-6, largest 1.

    relevance: (..., N), any scale -> same shape; all equal: 1 for every token. theta: in [0, 1), stresses relevance
    over diversity by exp(alpha r) with alpha = theta / (2 (1 - theta)); None leaves the weights linear, as published. A
    common factor of all weights does not change the choice; it is set so that nothing overflows.
    """
    low, high = relevance.amin(), relevance.amax()
    weight = (relevance - low + 1e-6) / (high - low + 1e-6)
    return weight if theta is None else torch.exp(theta / (2 * (1 - theta)) * (weight - 1))


def cdpruner(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Greedy MAP of the determinantal point process whose kernel is w_i cos(x_i, x_j) w_j (section 3 of the paper).

    features: (B, N, D), weight: (B, N) from `quality` -> (B, keep) indices in the order of choice. When the features
    span no further direction, the tokens of largest weight follow.
    """
    features, n = features.detach(), features.shape[-2]
    if features.device.type == "cpu" and n >= 256 and 6 * keep <= n and not torch.compiler.is_compiling():
        return _of_heaviest(features, weight, keep)
    return _of_all(features, weight, keep)


def _of_all(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """`cdpruner` from the kernel of all tokens."""
    n = features.shape[-2]
    if whole(n, n):
        return greedy_map(_kernel(features, weight), keep, weight)
    found = []
    for rows, by in zip(unit(features), weight, strict=True):
        lazy = Rows(lambda which, rows=rows, by=by: by[which, None] * (rows[which] @ rows.T) * by)  # type: ignore[misc]
        own = by.square() * rows.square().sum(-1)  # (N,)
        row_of = lambda pick, volume, lazy=lazy: lazy.row(pick, volume[0])[None]  # noqa: E731
        found.append(map_by_rows(row_of, own[None], keep, by[None])[0])
    return torch.cat(found)


def _kernel(features: Tensor, weight: Tensor, own: bool = False) -> Tensor:
    """(..., N, D), (..., N) -> (..., N, N). own: nobody else needs the features."""
    return gram(unit(features, own)).mul_(weight[..., :, None]).mul_(weight[..., None, :])


def _of_heaviest(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """`cdpruner` from a part of each kernel, on a CPU.

    A token never adds more than its squared weight, and picks add less and less: those whose squared weight is below
    what the last pick added need not be looked at. How much that is says a choice among the heaviest few; where
    more tokens could reach it, all those are looked at, and so on. Pictures that look at fewer are filled up with
    tokens of no weight, which add nothing.
    """
    batch, n = weight.shape
    found = torch.empty(batch, keep, dtype=torch.long)
    sizes = [_rounded(max(2 * keep, n // 8), n)] * batch
    left = list(range(batch))
    while left:
        size = max(sizes[i] for i in left)
        if size >= n or not whole(size, size):
            found[left] = _of_all(features[left], weight[left], keep)
            return found
        some, heavy = torch.zeros(len(left), size, dtype=torch.long), weight.new_full((len(left), size), -1.0)
        kernel = weight.new_zeros(len(left), size, size)
        room = features.new_empty(size, features.shape[-1])  # one for all: asking for memory costs more than a copy
        for row, i in enumerate(left):
            few = weight[i].topk(sizes[i]).indices.sort().values  # ascending: ties still go to the lower index
            some[row, : len(few)], heavy[row, : len(few)] = few, weight[i, few]
            rows = torch.index_select(features[i], 0, few, out=room[: len(few)])
            kernel[row, : len(few), : len(few)] = _kernel(rows, weight[i, few], own=True)
        row_of = lambda pick, _, kernel=kernel: kernel[torch.arange(len(kernel)), pick]  # noqa: E731
        order, added = map_by_rows(row_of, kernel.diagonal(dim1=-2, dim2=-1), keep, heavy)
        floor = (1 - 1e-4) * added[:, -1:]  # less than what was added: a cosine of 1 may be rounded up
        reach = (weight[left].square() >= floor).sum(-1).tolist()
        again = []
        for row, i in enumerate(left):
            if reach[row] <= sizes[i]:
                found[i] = some[row, order[row]]
            else:
                sizes[i] = _rounded(reach[row], n)
                again.append(i)
        left = again
    return found


def _rounded(size: int, n: int) -> int:
    """Up to a whole number of vectors, so that filling up changes no remainder of a product; n at most."""
    return min(n, -(-size // 32) * 32)


@register_method(
    "cdpruner",
    paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    year=2025,
    url="https://arxiv.org/abs/2506.10967",
    complexity="O(N²D + K²N)",
    memory="O(KN + ND)",
    query_aware=True,
    checked=Checked(
        "Theia-4869/CDPruner",
        agrees="the order of choice on random and clustered features, single pictures and batches of tiles "
        '(relevance="clip", sign=-1)',
        differs='tiles compete by default (compat="published": each on its own); more tokens than the kernel has '
        "rank; equal relevance everywhere",
    ),
)
@dataclass(frozen=True)
class CDPruner(ConnectorMethod):
    """CDPruner (NeurIPS 2025): a determinantal point process over visual tokens, conditioned on the question.

    relevance: "clip" is the published form (patch and text embeddings of the CLIP model whose tower the LLaVA models
    use); "embeddings" compares the projected features with the LLM embeddings of the question's words: ours, for models
    without a CLIP text tower, and the default because it works on every model. sign: the published code takes the
    negative cosine in CLIP's space, where patches of the named object score low (its authors report this for CLIP
    only); None does so for "clip" and takes the plain cosine for "embeddings". theta: the paper's relevance-diversity
    balance, off by default as in the published code.

    compat="published" gives each tile the same budget; the default lets all tiles or frames of a stream compete, so
    that the thumbnail and its tiles do not keep the same things twice. Always corrected, because the published result
    is not usable: more tokens asked than the kernel's rank (NaN or arbitrary picks there; relevance order here) and
    equal relevance everywhere (0/0 and repeated picks there; pure diversity here).
    """

    relevance: Relevance = "embeddings"
    sign: Literal[1, -1] | None = option(
        None, hint="1: near the question = relevant, -1: the reverse, None: by relevance."
    )
    theta: float | None = option(None, low=0, below=1, hint="0 is pure diversity, towards 1 relevance dominates.")
    compat: Compat = "corrected"

    @property
    def needs(self) -> tuple[str, ...]:
        """The scorer's embeddings, when they decide what is relevant."""
        return CLIP_SIGNALS if self.relevance == "clip" else ()

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams; parts of equal size and budget share one greedy loop."""
        problems, places, scores = [], [], []
        for i, (tokens, keep) in enumerate(zip(batch, keeps, strict=True)):
            check_keep(keep, len(tokens))
            features = check_finite(tokens.features, "the visual features").detach()
            sign = self.sign or (-1 if self.relevance == "clip" else 1)
            scores.append(quality(sign * question_relevance(tokens, self.relevance), self.theta))
            parts = [slice(0, len(tokens))] if self.compat == "corrected" else tokens.layout.group_slices()
            for part, share in zip(parts, equal(keep, [p.stop - p.start for p in parts]), strict=True):
                if share:
                    problems.append(([features[part], scores[i][part]], share))
                    places.append((i, part.start))
        chosen = picked(solve_alike(problems, cdpruner), places, len(batch))
        return [Selection(indices, info={"scores": score}) for indices, score in zip(chosen, scores, strict=True)]
