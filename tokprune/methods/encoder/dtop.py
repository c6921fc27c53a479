"""DToP's rule: tokens whose class is clear leave with what they are, the most confident few of each class stay.

A building block, not a registered method: it needs heads that tell the class of every patch, which segmentation models
have and VLM towers do not. With heads that you trained:

    pruning = apply_encoder(model, DToP(heads={5: head}))     # head: (B, n, C) -> (B, n, classes) probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, Cut, EncoderMethod, Place, Reduction
from tokprune.registry import MethodInfo

Head = Callable[[Tensor], Tensor]


def undecided(probabilities: Tensor, threshold: float = 0.9, context: int = 5) -> Tensor:
    """Which tokens must go on: those that are not sure of their class, and the `context` surest of each class.

    probabilities: (B, N, classes). A token is sure above `threshold`. Equal ones: lower index first. -> (B, N) bool.
    """
    confidence, label = probabilities.max(-1)  # (B, N)
    sure = confidence > threshold
    same = label[:, :, None] == label[:, None, :]
    ahead = (confidence[:, None, :] > confidence[:, :, None]) | (
        (confidence[:, None, :] == confidence[:, :, None])
        & torch.ones_like(same[0]).tril(-1)[None]  # the token of lower index is ahead
    )
    rank = (same & ahead & sure[:, None, :]).sum(-1)
    return ~sure | (rank < context)


@dataclass(frozen=True)
class DToP(EncoderMethod):
    """DToP (ICCV 2023) with heads of your own: at the end of some blocks, decided tokens stop and keep their state.

    heads: block number -> function from patches (B, n, C) to class probabilities (B, n, classes). threshold, context: see
    `undecided`; 0.9 and 5 as in the published configuration for ADE20K with ViT-B (other published ones stop at 0.95). All
    tokens are at the tower's output, the stopped ones as they were when they stopped. One head: the paper prunes at two
    blocks, which would need a second cut.
    """

    heads: Mapping[int, Head] = field(default_factory=dict)
    threshold: float = 0.9
    context: int = 5
    place: ClassVar[Place] = "end"
    restores: ClassVar[bool] = True
    info: ClassVar[MethodInfo] = MethodInfo(
        "dtop",
        "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        2023,
        "https://arxiv.org/abs/2308.01045",
        adaptive=True,
    )

    def check(self, depth: int, target: bool) -> None:
        if len(self.heads) != 1 or not all(0 <= b < depth for b in self.heads):
            raise OptionError(
                f"DToP needs one trained head at a block from 0 to {depth - 1}, such as DToP(heads={{5: head}}); blocks given: {sorted(self.heads)}."
            )
        if target:
            raise OptionError("DToP's count follows from the picture; leave ratio and budget out, set threshold.")

    def active(self, index: int, depth: int) -> bool:
        return index in self.heads

    def reduce(self, block: BlockView) -> Reduction | None:
        prefix = block.prefix
        going = undecided(self.heads[block.index](block.x[:, prefix:]), self.threshold, self.context)
        order = torch.sort(going.to(torch.int8), dim=-1, descending=True, stable=True).indices
        fewest, most = torch.stack(going.sum(1).aminmax()).tolist()
        if fewest == block.patches:
            return None
        width = max(most, 1)
        rows = order[:, :width]
        head = torch.arange(prefix, device=rows.device).expand(len(rows), -1)
        real = torch.cat([torch.ones_like(head, dtype=torch.bool), going.gather(1, rows)], 1)
        return Reduction.kept(block, torch.cat([head, rows + prefix], 1), real)

    def rebuild(self, cut: Cut, now: Tensor) -> Tensor:
        return cut.put_back(cut.reduction.rep, now)
