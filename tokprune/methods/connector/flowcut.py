"""FlowCut: importance of a token as it builds up along the layers of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Block, option
from tokprune.ops.numeric import wide
from tokprune.ops.topk import group_sum, grouped_top
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens

# Every block up to the third last, 0 … 21 of CLIP-L's 24, as relative depths.
BLOCKS = (0, *(round(block / 23, 3) for block in range(1, 22)))


def flowcut_scores(
    attention: Tensor,
    value_attention: Tensor,
    value_norm: Tensor,
    momentum: float = 0.5,
    group: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Importance after the last of L blocks, a running mean over them (sections 3.3 and 3.4 of the paper).

    attention: (L, N) [CLS] rows a, mean over heads. value_attention: (L, N), s, similarity of [CLS]'s value to each
    token's, after softmax, mean over heads. value_norm: (L, N) L1 norm of the head-mean values (`mean_value_norm`).
    Score of a block: (a / sum of a + s / sum of s) * norm; what came before counts `momentum`, the block 1 - momentum.
    group: (N,), within which the sums are taken, None for one. Returns (N,).
    """
    if group is None:
        group = torch.zeros(attention.shape[-1], dtype=torch.long, device=attention.device)
    tiny = torch.finfo(attention.dtype).tiny
    share = attention / group_sum(attention, group, groups).clamp_min(tiny)
    likeness = value_attention / group_sum(value_attention, group, groups).clamp_min(tiny)
    score = (share + likeness) * value_norm
    total = score[0]
    for block in score[1:]:
        total = momentum * total + (1 - momentum) * block
    return total


@register_method(
    "flowcut",
    paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    year=2025,
    url="https://arxiv.org/abs/2505.19536",
    complexity="O(LN + N log N)",
    memory="O(LN)",
    checked=Checked(
        "TungChintao/FlowCut",
        agrees="the accumulated score of an unpruned tower and its top tokens",
        differs="tokens leave inside the tower there, so scores and features of later blocks change; no LLM stage; its "
        "Qwen2-VL form",
    ),
)
@dataclass(frozen=True)
class FlowCut(ConnectorMethod):
    """FlowCut (NeurIPS 2025), connector form: attention, value likeness and value norm accumulated over blocks, then
    one cut.

    blocks: where scores are taken, as relative depths; the default is every block of CLIP-L up to 21 of 0 … 23, as
    published. momentum: weight of the past, 0.5 as published. Tiles and frames get equal budgets, as published.

    What differs from the publication, which prunes inside the tower: there every second block (1, 3, … 21) drops tokens
    by what has accumulated so far (how many follows from the entropy of the block's attention), so later blocks see
    fewer tokens, their features and scores change, and a dropped token is never scored again. Here the tower runs in
    full: scores are those of the unpruned tower, all tokens compete to the end, the features are untouched, the entropy
    schedule has no place, and encoder time is not saved. The score of given signals is the published one; published
    accuracy, which rests on the changed features, does not carry over. The stage that the authors add inside the LLM
    for LLaVA-NeXT is not part of it. Their Qwen2-VL code scores by the attention of the mean query times the value
    norm, without value likeness, and drops single patches, so that units of the merger mix what is left; here such
    towers, which have no [CLS], answer with received attention, and whole units stay.
    """

    blocks: tuple[Block, ...] = option(BLOCKS, filled=True)
    momentum: float = option(0.5, low=0, below=1)

    @property
    def needs(self) -> tuple[str, ...]:
        kinds = ("cls_attention", "value_attention", "value_norm")
        return tuple(f"{kind}:{block}" for kind in kinds for block in self.blocks)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        signals = torch.stack([wide(tokens.signal(name)) for name in self.needs])  # (3 L, N)
        attention, likeness, norm = check_finite(signals, "the signals of the vision tower").chunk(3)
        layout = tokens.layout
        group = layout.group.to(signals.device)
        scores = flowcut_scores(attention, likeness, norm, self.momentum, group, layout.num_groups)
        budgets = equal(keep, layout.group_sizes)
        return Selection(grouped_top(scores, group, budgets), info={"scores": scores})
