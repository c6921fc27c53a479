"""VisionZip: keep the tokens that [CLS] attends to, merge the rest into a few context tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal, round_of
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.ops.grid import stacks
from tokprune.ops.merge import join_nearest
from tokprune.ops.numeric import wide
from tokprune.ops.topk import rows_at, true_indices
from tokprune.registry import Checked, register_method
from tokprune.tokens import Merge, Selection, VisualTokens


def visionzip_plan(
    attention: Tensor, keys: Tensor, dominant: int, contextual: int, compat: Compat = "corrected"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which patches stay, and which flow together (section 3.2 of the paper).

    attention: (B, N). keys: (B, N, d), compared by cosine. Returns the dominant patches (B, dominant), best first; the
    contextual targets (B, contextual), ascending: every step-th of the remaining patches; for each patch the position
    of the patch it flows into, itself when it stays and -1 when it flows nowhere, and its weight there (B, N). Weights
    of a context token: target and mean of the others, half each; "published": both in full, so that they add up to two.
    """
    batch, n = attention.shape
    order = torch.sort(attention, dim=-1, descending=True, stable=True).indices
    best = order[:, :dominant]
    stays = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, best, True)
    into = torch.where(stays, torch.arange(n, device=order.device), -1)
    weight = stays.to(attention.dtype)
    if contextual == 0:
        return best, best[:, :0], into, weight
    remaining = true_indices(~stays, n - dominant)  # (B, M) in raster order
    m = n - dominant
    places = torch.arange(contextual, device=order.device) * max(1, m // contextual)
    targets = places.expand(batch, -1)
    context, size = join_nearest(rows_at(keys, remaining), targets)
    is_target = torch.zeros(m, dtype=torch.bool, device=order.device).scatter_(0, places, True)
    count = size.gather(1, context).to(weight) - 1  # (B, M) others of the same context token, its target not counted
    part = torch.where(is_target, 1.0, 1.0 / count.clamp_min(1))
    if compat == "corrected":
        part = torch.where(count > 0, part / 2, part)
    target_position = remaining.gather(1, targets)
    into = into.scatter(1, remaining, target_position.gather(1, context))
    return best, target_position, into, weight.scatter(1, remaining, part)


@register_method(
    "visionzip",
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    year=2025,
    url="https://arxiv.org/abs/2412.04467",
    complexity="O(N log N + NKd)",
    memory="O(Nd)",
    merges=True,
    checked=Checked(
        "dvlab-research/VisionZip",
        agrees='dominant tokens, context tokens and their order on a canvas with compat="published"',
        differs="the [CLS] slot; merging behind the projector",
    ),
)
@dataclass(frozen=True)
class VisionZip(ConnectorMethod):
    """VisionZip (CVPR 2025): dominant tokens by [CLS] attention, the rest merged into contextual tokens by key
    similarity.

    contextual_share: share of the budget that goes to context tokens; 10/64 is the published 54 + 10, 108 + 20, 162 +
    30 (the code's own default is 191 + 30). Tiles and frames get equal budgets, as published. A context token sits at
    the position of its target.

    What differs from the published code:
    - It always feeds the projected [CLS] state and counts it among the dominant ones. Our streams hold patches only:
      the whole budget is spent on patches.
    - It merges before the projector; here the weights act on projected features (and DeepStack planes), an
      approximation wherever the projector is not linear.
    - It adds the mean of the merged tokens to the target, which about doubles the norm; here target and mean count half
      each, so that the token stays in the range that the LLM knows. compat="published" adds.
    - It divides by zero without context tokens, prunes nothing when images come as a list, and knows only 24 x 24
      grids.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention", "keys:-2")
    contextual_share: float = option(10 / 64, low=0, below=1)
    compat: Compat = "corrected"

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose slots and say what flows into each; on an accelerator for streams of equal groups in one go."""
        alike: dict[object, list[int]] = {}
        for i, (tokens, keep) in enumerate(zip(batch, keeps, strict=True)):
            check_keep(keep, len(tokens))
            device = tokens.signal("cls_attention").device
            alike.setdefault(i if device.type == "cpu" else (keep, tokens.layout.group_sizes, device), []).append(i)
        out: dict[int, Selection] = {}
        for members in alike.values():
            out.update(zip(members, self._select_alike([batch[i] for i in members], keeps[members[0]]), strict=True))
        return [out[i] for i in range(len(batch))]

    def _select_alike(self, batch: Sequence[VisualTokens], keep: int) -> list[Selection]:
        """`select_batch` for B streams of equal groups, which lie one after the other here."""
        n, sizes, streams = len(batch[0]), batch[0].layout.group_sizes, len(batch)
        scores = [wide(tokens.signal("cls_attention")) for tokens in batch]
        attention = check_finite(torch.cat(scores), "the [CLS] attention values")  # (B * N,)
        keys = torch.cat([wide(tokens.signal("keys:-2")).mean(1) for tokens in batch])  # (B * N, d)
        keys = check_finite(keys, "the keys of the vision tower")
        into = torch.full((streams * n,), -1, device=attention.device)
        weight = torch.zeros_like(attention)
        slots = []
        for where, count, _ in stacks(sizes * streams, equal(keep, sizes) * streams, attention.device):
            contextual = min(count - 1, round_of(count, self.contextual_share))
            best, targets, local, part = visionzip_plan(
                attention[where], keys[where], count - contextual, contextual, self.compat
            )
            slots.append(where.gather(1, torch.cat([best, targets], dim=1)).flatten())
            into[where] = torch.where(local >= 0, where.gather(1, local.clamp(min=0)), -1)
            weight[where] = part
        indices = torch.cat(slots).sort().values  # (B * keep,)
        before = torch.arange(streams, device=indices.device)[:, None]
        row = (torch.searchsorted(indices, into).view(streams, n) - keep * before).masked_fill(
            into.view(streams, n) < 0, -1
        )
        chosen = indices.view(streams, keep) - n * before
        parts = zip(chosen, row, weight.view(streams, n), scores, strict=True)
        return [Selection(c, Merge(target=t, scale=w), info={"scores": s}) for c, t, w, s in parts]
