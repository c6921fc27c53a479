"""Published formulations of the methods that merge tokens."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def visionzip(
    attention: Tensor, hidden: Tensor, metric: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """VisionZip: masks cut the stream apart, a one-hot matrix adds the rest to the context tokens.

    attention: (B, H, N). hidden: (B, N + 1, C), metric: (B, N + 1, d), [CLS] first. dominant counts [CLS]. Returns
    tokens (B, dominant + contextual, C) and kept indices (B, dominant), [CLS] = 0, best first.
    """
    batch, length, channels = hidden.shape
    best = attention.sum(1).topk(dominant - 1, dim=1).indices + 1
    kept = torch.cat([torch.zeros(batch, 1, dtype=torch.long), best], dim=1)
    rest = torch.ones(batch, length, dtype=torch.bool).scatter_(1, kept, False)
    lead = hidden[~rest].view(batch, dominant, channels)
    others = hidden[rest].view(batch, length - dominant, channels)
    keys = metric[rest].view(batch, length - dominant, -1)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    m = keys.shape[1]
    target = torch.arange(0, m, max(1, m // contextual))[:contextual]
    merge = torch.ones(m, dtype=torch.bool)
    merge[target] = False
    likeness = keys[:, merge] @ keys[:, target].transpose(1, 2)
    assigned = torch.zeros_like(likeness).scatter_(2, likeness.argmax(2)[..., None], 1)
    counts = assigned.sum(1).clamp(min=1)[..., None]
    brought = assigned.transpose(1, 2) @ others[:, merge] / counts
    return torch.cat([lead, others[:, target] + brought], dim=1), kept


def _merge(x: Tensor, attention: Tensor, keys: Tensor, kept: Tensor, neighbours: int) -> Tensor:
    """Kept tokens one by one: the stream without the token, its 32 nearest, their sum by attention; the dropped ones'
    sum last."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    dropped = torch.ones(len(x), dtype=torch.bool)
    dropped[kept] = False
    rest = dropped.nonzero()[:, 0]
    out = []
    for i in range(len(kept)):
        others = torch.cat([kept[:i], kept[i + 1 :], rest])
        nearest = others[(keys[others] @ keys[kept[i]]).topk(neighbours).indices]
        out.append(x[kept[i]] + (attention[nearest][:, None] * x[nearest]).sum(0))
    out.append((attention[rest][:, None] * x[rest]).sum(0))
    return torch.stack(out)


def prumerge_count(attention: Tensor) -> int:
    """Upper outliers of the box plot, on the host. (N,)."""
    values = attention.float().numpy()
    low, high = np.percentile(values, 25), np.percentile(values, 75)
    return int((values > high + 1.5 * (high - low)).sum())


def prumerge(x: Tensor, attention: Tensor, keys: Tensor, keep: int, neighbours: int = 32) -> tuple[Tensor, Tensor]:
    """LLaVA-PruMerge. (N, C), (N,), (N, C) -> kept (keep,), best first, and tokens (keep + 1, C)."""
    kept = attention.topk(keep).indices
    return kept, _merge(x, attention, keys, kept, neighbours)


def prumerge_plus(x: Tensor, attention: Tensor, keys: Tensor, neighbours: int = 32) -> tuple[Tensor, Tensor]:
    """PruMerge+ at the count that the image chooses. (N, C), (N,), (N, C) -> kept (K,) and tokens (K + 1, C)."""
    n, count = len(x), prumerge_count(attention)
    best = attention.topk(count).indices
    step = int(int(n / count) / 3)
    taken = set(best.tolist())
    sampled = [i for i in range(0, n - 1, step) if i not in taken]
    kept = torch.cat([best, torch.tensor(sampled, dtype=torch.long)])
    return kept, _merge(x, attention, keys, kept, neighbours)


def vscan(
    features: Tensor, shallow: Tensor, deep: Tensor, keep: int, side: int = 24, windows: int = 4
) -> tuple[Tensor, Tensor]:
    """VScan, stage 1: windows one by one, then every dropped token against every kept one by broadcasting.

    features: (N, D). shallow, deep: (N,). Returns kept indices (K,), ascending, and tokens (K, D).
    """
    each, size = keep // 2 // windows**2, side // windows
    place = torch.arange(side * side).view(side, side)
    local = []
    for i in range(windows):
        for j in range(windows):
            cells = place[i * size : (i + 1) * size, j * size : (j + 1) * size].reshape(-1)
            local.append(cells[shallow[cells].topk(each).indices])
    near = torch.cat(local)
    far = deep.clone()
    far[near] = 0
    kept = torch.unique(torch.cat([near, far.topk(keep - keep // 2).indices]))
    dropped = torch.ones(len(features), dtype=torch.bool)
    dropped[kept] = False
    rest = features[dropped]
    home = F.cosine_similarity(rest[:, None], features[kept][None], dim=-1).argmax(1)
    out = features[kept].clone().index_add_(0, home, rest)
    count = 1 + torch.bincount(home, minlength=len(kept))
    return kept, out / count[:, None]


def local_outliers(values: Tensor, neighbours: int = 20, threshold: float = 1.5) -> Tensor:
    """Local outlier factor from all pairs of distances. (N,) -> (N,) bool."""
    line = values.double()
    gap = (line[:, None] - line[None]).abs()
    gap.fill_diagonal_(torch.inf)
    near, who = gap.topk(neighbours, dim=1, largest=False)
    reach = torch.maximum(near, near[:, -1][who])
    density = 1 / (reach.mean(1) + 1e-10)
    return density[who].mean(1) / density > threshold


def recoverable(attention: Tensor, relevance: Tensor, neighbours: int = 20) -> tuple[Tensor, Tensor]:
    """Recoverable Compression, the choice: visual outliers, then those that the question brings back. (N,) -> two (N,)
    masks."""
    n = len(attention)
    share = int(local_outliers(attention, neighbours).sum()) / n
    visual = torch.zeros(n, dtype=torch.bool)
    visual[attention.topk(int(n * share)).indices] = True
    left = relevance.clone()
    left[visual] = relevance.min()
    share = int(local_outliers(left, neighbours).sum()) / n
    text = torch.zeros(n, dtype=torch.bool)
    open_places = torch.nonzero(~visual)[:, 0]
    text[open_places[left[open_places].topk(int((n - int(visual.sum())) * share)).indices]] = True
    return visual, text


def pool(features: Tensor, positions: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """LLaVolta: one-dimensional average pooling, positions as the mean in float16. (1, N, D), (1, N)."""
    tokens = F.avg_pool1d(features.transpose(1, 2), stride, stride).transpose(1, 2)
    places = F.avg_pool1d(positions[:, None].half(), stride, stride)[:, 0].long()
    return tokens, places
