"""Published formulations of the methods that rank tokens by attention in the vision tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _marked(mask: Tensor) -> Tensor:
    """Ascending indices of equally many True entries per row. (B, N) -> (B, K)."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def fastervlm(rows: Tensor, keep: int) -> Tensor:
    """FasterVLM: top of the head mean, as a mask. (B, H, N) -> (B, keep) ascending."""
    best = rows.mean(1).topk(keep, dim=-1).indices
    return _marked(torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.bool).scatter_(1, best, True))


def hired(early: Tensor, late: Tensor, keep: int, alpha: float = 0.5) -> Tensor:
    """HiRED: hits of an early row decide budgets, a late row decides tokens.

    early: (N,) of the thumbnail. late: (T, N), thumbnail first. Both summed over heads. Returns ascending positions in
    the stream, possibly fewer than `keep`.
    """
    tiles, n = late.shape
    mask = torch.zeros(tiles, n, dtype=torch.bool)
    if tiles == 1:
        mask[0, late[0].topk(keep).indices] = True
        return mask.view(-1).nonzero()[:, 0]
    full = min(int(keep * alpha), n)
    rest = min(keep - full, (tiles - 1) * n)
    mask[0, late[0].topk(full).indices] = True
    if rest > 0:
        hit = torch.zeros(n)
        hit[early.topk(int(n * (1 - alpha))).indices] = 1
        counts = hit.reshape(tiles - 1, -1).sum(1)
        budgets = (counts / counts.sum() * rest).int().clamp(max=n)
        for i, budget in enumerate(budgets.tolist()):
            mask[i + 1, late[i + 1].topk(budget).indices] = True
    return mask.view(-1).nonzero()[:, 0]


def vispruner(features: Tensor, attention: Tensor, keep: int, important_ratio: float = 0.5) -> Tensor:
    """VisPruner: important tokens, then duplicates removed eight at a time. (B, N, C), (B, N) -> (B, keep) ascending.

    The index is built with the length of the even half, so that odd lengths work (published: a crash).
    """
    x = features / features.norm(dim=-1, keepdim=True)
    order = attention.argsort(dim=-1, descending=True)
    important = int(keep * important_ratio)
    diverse = keep - important
    image = torch.arange(len(order))[:, None]
    left = order[:, important:] if diverse else order[:, :0]
    while (drop := min(8, left.shape[1] - diverse)) > 0:
        even, odd = left[:, 0::2], left[:, 1::2]
        likeness = (x[image, even] @ x[image, odd].transpose(1, 2)).max(dim=-1).values
        survivors = likeness.argsort(dim=-1, descending=True)[:, drop:]
        left = torch.cat([even[image, survivors], odd], dim=1)
    chosen = torch.cat([order[:, :important], left], dim=1)
    return _marked(torch.zeros_like(order, dtype=torch.bool).scatter_(1, chosen, True))


def hiprune(objects: Tensor, deep: Tensor, keep: int, alpha: float = 0.1, width: int = 24) -> Tensor:
    """HiPrune: anchors with clamped neighbours, registers for the rest. (B, N), (B, N) -> (B, keep) ascending."""
    n = objects.shape[1]
    out = []
    for middle, late in zip(objects, deep, strict=True):
        best = middle.topk(round(keep * alpha / 5)).indices
        around = torch.cat([best, best - 1, best + 1, best - width, best + width]).clamp(0, n - 1)
        anchors = torch.unique(around)
        left = late.clone()
        left[anchors] -= 1
        registers = left.topk(keep - len(anchors)).indices
        out.append(torch.cat([anchors, registers]).sort().values)
    return torch.stack(out)


def holov(features: Tensor, attention: Tensor, keep: int, crops: int = 16) -> Tensor:
    """HoloV: one crop after the other. (N, D), (N,) -> (keep,) in output order, -1 for each zero vector."""
    n = len(attention)
    bounds, start = [], 0
    for crop in range(crops):
        end = start + n // crops + (crop < n % crops)
        bounds.append((start, end))
        start = end
    means = []
    for start, end in bounds:
        x = features[start:end]
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
        similarity = x @ x.T
        others = 1 - torch.eye(end - start, dtype=x.dtype)
        similarity = similarity * others
        mean = similarity.sum(1) / (end - start - 1)
        variance = ((similarity - mean[:, None]) ** 2).sum(1) / (end - start - 1)
        own = attention[start:end] * 1e3
        scale = own.abs().mean() / (variance.abs().mean() + 1e-6)
        means.append((own + 0.09 * variance * scale).mean())
    weight = torch.stack(means)
    weight = weight / (weight.sum() + 1e-6)
    quota = (weight * keep).floor().long()
    rest = keep - int(quota.sum())
    if rest > 0:
        quota[weight.topk(min(rest, crops)).indices] += 1
    chosen = []
    for (start, end), count in zip(bounds, quota.tolist(), strict=True):
        if count >= end - start:
            chosen.append(torch.arange(start, end))
        elif count > 0:
            chosen.append(start + attention[start:end].topk(count).indices)
    out = torch.cat(chosen)[:keep]
    return torch.cat([out, torch.full((keep - len(out),), -1)])


def flowcut_scores(attention: Tensor, likeness: Tensor, norm: Tensor) -> Tensor:
    """FlowCut's importance after the last of L blocks, without dropping. Three times (L, N) -> (N,)."""
    score = None
    for a, s, v in zip(attention, likeness, norm, strict=True):
        now = (a / a.sum() + s / s.sum()) * v
        score = now if score is None else 0.5 * score + 0.5 * now
    return score


def flowcut(attention: Tensor, likeness: Tensor, norm: Tensor, keep: int) -> Tensor:
    """FlowCut with its schedule: every second block drops tokens, as many as the entropy of its attention says.

    Three times (L, N), the signals of an unpruned tower -> (keep,) ascending. (In the tower, features would change
    too.)
    """
    blocks, n = attention.shape
    left = torch.arange(n)
    score = torch.zeros(n, dtype=attention.dtype)
    for block in range(blocks):
        a, s, v = attention[block, left], likeness[block, left], norm[block, left]
        now = (a / a.sum() + s / s.sum()) * v
        score = now if block == 0 else 0.5 * score + 0.5 * now
        after = blocks - 1 - block
        if after % 2:
            continue
        share = a / a.sum()
        entropy = -(share * share.log()).sum() / torch.log(torch.tensor(float(len(left))))
        drop = len(left) - keep
        if after:
            drop = min(drop, round(drop / after**0.5 * (1 - float(entropy) ** 2)))
        stays = score.topk(len(left) - drop).indices.sort().values
        left, score = left[stays], score[stays]
    return left


def globalcom2(
    thumbnail: Tensor,
    crops: Tensor,
    features: Tensor,
    tiles: tuple[int, int],
    size: tuple[int, int],
    newline: Tensor,
    ratio: float = 0.25,
    temperature: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """GlobalCom2: crop by crop.

    thumbnail: (N,), crops: (T, N) scores. features: (T, N, D). tiles: (down, across). size: (width, height). Returns
    scales (T,), the thumbnail's tokens, best first, and the crops' tokens with newlines in canvas order, rounded to
    float16.
    """
    down, across = tiles
    count, n, width = features.shape
    side = int(n**0.5)
    grid = thumbnail.view(side, side)
    high, wide = side // down, side // across
    sums = []
    for i in range(down):
        for j in range(across):
            bottom, right = (i + 1) * high if i < down - 1 else side, (j + 1) * wide if j < across - 1 else side
            sums.append(grid[i * high : bottom, j * wide : right].sum())
    spread = torch.softmax(torch.stack(sums) / temperature, dim=0)
    scales = torch.clamp(ratio * (1 + spread - spread.mean()), max=1.0)
    kept = thumbnail.topk(int(n * ratio)).indices

    height, length = down * side, across * side
    top, left = 0, 0
    if size[0] / size[1] > length / height:
        top = (height - int(size[1] * (length / size[0]))) // 2
    else:
        left = (length - int(size[0] * (height / size[1]))) // 2
    shown = torch.zeros(height, length, dtype=torch.bool)
    shown[top : height - top, left : length - left] = True

    picture = (height - 2 * top, length - 2 * left)
    guide = grid.new_zeros(height, length)
    guide[shown] = F.interpolate(grid[None, None], size=picture, mode="bilinear", align_corners=False).flatten()
    canvas = torch.zeros(height, length, width, dtype=features.dtype)
    stays = torch.zeros(height, length, dtype=torch.bool)
    for t in range(count):
        i, j = divmod(t, across)
        where = (slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side))
        part = guide[where].reshape(-1)
        present = shown[where].reshape(-1)
        score = crops[t] / crops[t][present].norm() + part / part.norm()
        score = score.masked_fill(~present, -torch.inf)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[score.topk(int(int(present.sum()) * float(scales[t]))).indices] = True
        room = int(present.sum())  # the published code numbers the unpadded tokens anew
        moved = torch.zeros(n, width, dtype=features.dtype)
        moved[:room] = features[t][present]
        kept_here = torch.zeros(n, dtype=torch.bool)
        kept_here[:room] = mask[present]
        canvas[where] = moved.view(side, side, width)
        stays[where] = kept_here.view(side, side)
    canvas = torch.cat([canvas, newline.expand(height, 1, width)], dim=1)
    stays = torch.cat([stays, torch.ones(height, 1, dtype=torch.bool)], dim=1)
    return scales, kept, canvas[stays].half().to(features.dtype)
