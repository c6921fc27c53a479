"""Published formulations of the methods that compare features with each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def divprune(features: Tensor, keep: int) -> Tensor:
    """DivPrune: at every step the rows of all chosen tokens are gathered and reduced anew. (N, D) -> (keep,)
    ascending."""
    x = _rows(features)
    distance = 1 - x @ x.T
    chosen = distance.topk(2, dim=0, largest=False).values[1].argmax().view(1)
    for _ in range(keep - 1):
        nearest = torch.min(distance[chosen], dim=0).values
        chosen = torch.cat([chosen, nearest.argmax().view(1)])
    return chosen.sort().values


def cdpruner(features: Tensor, patches: Tensor, texts: Tensor, keep: int) -> Tensor:
    """CDPruner: relevance against the question, then greedy MAP with a growing Cholesky factor.

    features: (B, N, D). patches: (B, N, E), texts: (M, E) of the CLIP model. Returns (B, keep) ascending.
    """
    relevance = -(_rows(patches) @ _rows(texts).T).mean(-1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    x = _rows(features)
    kernel = relevance[:, :, None] * (x @ x.transpose(1, 2)) * relevance[:, None, :]
    batch, n, _ = kernel.shape
    image = torch.arange(batch)
    factor = torch.zeros(keep, batch, n, dtype=kernel.dtype)
    volume = kernel.diagonal(dim1=1, dim2=2).clone()
    chosen = torch.empty(keep, batch, dtype=torch.long)
    for i in range(keep):
        j = volume.argmax(-1)
        chosen[i] = j
        known = torch.einsum("kb,kbn->bn", factor[:i, image, j], factor[:i])
        row = (kernel[image, j] - known) / volume[image, j].sqrt()[:, None]
        factor[i] = row
        volume = volume - row.square()
        volume[image, j] = -torch.inf
    return chosen.T.sort(-1).values


def scope(features: Tensor, attention: Tensor, keep: int, alpha: float = 1.0) -> Tensor:
    """SCOPE: every pick builds the whole N x N table of gains. (B, N, C), (B, N) -> (B, keep) ascending."""
    x = _rows(features)
    similarity = x @ x.transpose(1, 2)
    batch, n, _ = x.shape
    image = torch.arange(batch)
    cover = torch.zeros(batch, n, dtype=x.dtype)
    free = torch.ones(batch, n, dtype=torch.bool)
    chosen = []
    for _ in range(keep):
        gain = torch.clamp(similarity - cover[:, :, None], min=0).sum(1) * attention**alpha
        j = gain.masked_fill(~free, -torch.inf).argmax(-1)
        free[image, j] = False
        cover = torch.maximum(cover, similarity[image, :, j])
        chosen.append(j)
    return torch.stack(chosen, 1).sort(-1).values


def mmtok(
    projected: Tensor, vision: Tensor, text: Tensor, keep: int, alpha: float = 0.5, exclude: Tensor | None = None
) -> Tensor:
    """MMTok: greedy coverage of words and patches. (N, D), (N, C), (M, D) -> (keep,) ascending."""
    x, v = _rows(projected), _rows(vision)
    words = torch.softmax(_rows(text) @ x.T / 0.02, dim=1) / len(text)
    patches = torch.softmax(v @ v.T / 0.2, dim=1) / len(v)
    rows = torch.cat([words, alpha * patches])
    best = torch.zeros(len(rows), dtype=rows.dtype)
    barred = torch.zeros(len(v), dtype=torch.bool)
    if exclude is not None:
        barred[exclude] = True
    chosen = []
    for _ in range(keep):
        gain = torch.clamp(rows - best[:, None], min=0).sum(0)
        j = int(gain.masked_fill(barred, -torch.inf).argmax())
        barred[j] = True
        best = torch.maximum(best, rows[:, j])
        chosen.append(j)
    return torch.tensor(sorted(chosen))


def dart(
    hidden: Tensor,
    keys: Tensor,
    image_start: int,
    image_tokens: int,
    per_pivot: int,
    image_pivots: int = 4,
    text_pivots: int = 4,
    visit: Tensor | None = None,
) -> Tensor:
    """DART inside the LLM: Python sets of what is chosen and what is left, the host waiting at every pivot.

    hidden: (S, D). keys: (H, S, hd). The visit goes in the order given, by default image pivots, then text pivots.
    Returns ascending positions.
    """
    flat = keys.transpose(0, 1).reshape(keys.shape[1], -1)
    strength = flat.abs().sum(-1)
    end = image_start + image_tokens
    image = (strength[image_start:end].topk(image_pivots).indices + image_start).tolist()
    text = (strength[end:].topk(text_pivots).indices + end).tolist()
    kept, left = set(image), set(range(image_start, end)) - set(image)
    for pivot in image + text if visit is None else visit.tolist():
        candidates = torch.tensor(sorted(left))
        likeness = torch.nn.functional.cosine_similarity(hidden[candidates], hidden[pivot][None], dim=-1)
        picked = candidates[likeness.topk(per_pivot, largest=False).indices].tolist()
        kept |= set(picked)
        left -= set(picked)
    return torch.tensor(sorted(kept))


def textmonkey(features: Tensor, keep: int) -> Tensor:
    """TextMonkey's filter: a dense triangle is built for every call. (B, N, D) -> (B, keep) ascending."""
    x = _rows(features)
    similarity = x @ x.transpose(1, 2)
    n = x.shape[1]
    earlier = torch.tril(torch.ones(n, n)).to(similarity)
    most = (similarity - 2 * earlier[None]).max(dim=-1).values
    return most.topk(keep, largest=False).indices.sort(-1).values


def gprune(features: Tensor, keep: int) -> Tensor:
    """G-Prune: the share matrix is raised to its fifth power. (N, D) -> (keep,) ascending."""
    x = _rows(features)
    similarity = x @ x.T
    similarity[similarity < 0.5] = 0
    similarity = similarity / 0.03
    similarity[similarity == 0] = -5000
    shares = torch.softmax(similarity, dim=-1)
    degree = (shares > 0).sum(0)
    score = features.norm(dim=-1)[None] @ torch.linalg.matrix_power(shares, 5)
    return (score[0] / degree).topk(keep).indices.sort().values


def prunesid_survivors(features: Tensor, attention: Tensor, group: Tensor, threshold: float) -> list[list[int]]:
    """PruneSID's suppression, group by group and token by token: the survivors of each group, best first."""
    x = _rows(features)
    survivors = []
    for g in range(int(group.max()) + 1):
        left = torch.nonzero(group == g)[:, 0]
        left = left[attention[left].argsort(descending=True)]
        kept: list[int] = []
        while len(left):
            best = left[0]
            kept.append(int(best))
            left = left[1:]
            left = left[(x[left] @ x[best]) <= threshold]
        survivors.append(kept)
    return survivors


def prunesid(features: Tensor, attention: Tensor, keep: int) -> Tensor:
    """PruneSID: groups by principal component, suppression inside them, budgets by survivors. (N, C), (N,) ->
    (keep,)."""
    slots, n = keep + 1, len(features)  # with [CLS]
    _, _, loadings = torch.pca_lowrank(torch.sigmoid(features).T, q=max(1, slots // 4))
    group = loadings.abs().argmax(-1)
    x = _rows(features)
    threshold = float((x @ x.T).triu(1).sum()) / (n * (n - 1) / 2) * slots / 32
    survivors = prunesid_survivors(features, attention, group, threshold)
    members = [torch.nonzero(group == g)[:, 0].tolist() for g in range(len(survivors))]
    bounds = [min(len(s), 5 * math.ceil(slots / 64)) for s in survivors]
    while sum(bounds) < min(slots, n):
        bounds = [min(b + 1, len(m)) for b, m in zip(bounds, members, strict=True)]
    budgets = [min(1, len(m)) for m in members]
    rest, total, until = max(0, keep - sum(budgets)), sum(map(len, survivors)), 0.0
    for g, alive in enumerate(survivors):
        budgets[g] += round((until + len(alive)) / total * rest) - round(until / total * rest)
        until += len(alive)
    budgets = [min(b, most) for b, most in zip(budgets, bounds, strict=True)]
    for g in sorted(range(len(survivors)), key=lambda g: -len(survivors[g])):
        budgets[g] += min(bounds[g] - budgets[g], keep - sum(budgets))
    chosen = []
    for alive, group_members, b in zip(survivors, members, budgets, strict=True):
        others = sorted(set(group_members) - set(alive), key=lambda i: -float(attention[i]))
        chosen += (alive + others)[:b]
    return torch.tensor(sorted(chosen[:keep]))
