"""DToP: patches whose class is clear leave with what they are; the most confident few of each class go on as
context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, Cut, EncoderMethod, Place, Reduction
from tokprune.methods.options import option
from tokprune.ops.topk import rank_in_group
from tokprune.registry import Checked, register_method


class Head(Protocol):
    """Tells the class of each patch: (B, n, C) -> (B, n, classes) probabilities."""

    def __call__(self, patches: Tensor, /) -> Tensor: ...


def undecided(probabilities: Tensor, threshold: float = 0.9, context: int = 5, real: Tensor | None = None) -> Tensor:
    """Which tokens must go on: those that are not sure of their class, and the `context` surest of each class.

    probabilities: (B, N, classes). A token is sure above `threshold`. Equal ones: lower index first. real: (B, N) False
    for padding, which never goes on. -> (B, N) bool.
    """
    confidence, label = probabilities.max(-1)  # (B, N)
    sure = confidence > threshold
    sure = sure if real is None else sure & real
    going = ~sure | (rank_in_group(confidence.masked_fill(~sure, -1), label) < context)
    return going if real is None else going & real


@register_method(
    "dtop",
    paper="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
    year=2023,
    url="https://arxiv.org/abs/2308.01045",
    complexity="O(N log N)",
    memory="O(NC)",
    adaptive=True,
    checked=Checked(
        "zbwxp/Dynamic-Token-Pruning",
        agrees="which patches stop at a head, 400 random sets of class probabilities",
        differs="its heads, trained for segmentation, were not at hand",
    ),
)
@dataclass(frozen=True)
class DToP(EncoderMethod):
    """DToP (ICCV 2023): at the end of some blocks, patches whose class is clear stop and keep the state that they have.

    heads: block number -> trained head, a function from patches (B, n, C) to class probabilities (B, n, classes);
    segmentation models have such heads, VLM towers do not, so without them the method refuses to run: apply(model,
    "dtop", heads={5: first, 7: second}), the blocks of the published ViT-B. threshold: a class is clear above this
    probability; 0.9 as in its configuration for ADE20K (the other published ones stop at 0.95). context: so many of the
    surest patches of each class go on for the others to look at. All patches are at the tower's output, the stopped
    ones as they were when they stopped. Towers that pack their pictures (Qwen2-VL and later) take one head.
    """

    heads: Mapping[int, Head] = option(factory=dict, hint="Heads are functions that you trained: heads={5: head}.")
    threshold: float = option(0.9, low=0, high=1)
    context: int = option(5, low=0)
    place: ClassVar[Place] = "end"
    restores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for block, head in self.heads.items():
            if not isinstance(block, int) or not callable(head):
                raise OptionError(
                    f"dtop: heads maps a block's number to a function, such as heads={{5: head}}, not {block!r} to "
                    f"{head!r}."
                )

    def check(self, depth: int, target: bool) -> None:
        if not self.heads or not all(0 <= b < depth for b in self.heads):
            raise OptionError(
                f"dtop needs a trained head at a block from 0 to {depth - 1}, such as heads={{5: head}}; blocks given: "
                f"{sorted(self.heads)}. Without training take tome, pitome or evit."
            )
        if target:
            raise OptionError("dtop's count follows from the picture; leave ratio and budget out, set threshold.")

    def active(self, index: int, depth: int) -> bool:
        return index in self.heads

    def reduce(self, block: BlockView) -> Reduction | None:
        prefix = block.prefix
        real = block.sizes()[:, prefix:, 0] > 0
        going = undecided(self.heads[block.index](block.x[:, prefix:]), self.threshold, self.context, real)
        order = torch.sort(going.to(torch.int8), dim=-1, descending=True, stable=True).indices
        fewest, most = torch.stack(going.sum(1).aminmax()).tolist()
        if fewest == block.patches:
            return None
        rows = order[:, : max(most, 1)]
        out = Reduction.kept_patches(block, rows, going.gather(1, rows))
        if block.cut is not None:  # those that stop here keep this state
            notes, rep = block.cut.notes, block.cut.notes.get("rep", block.cut.reduction.rep)
            notes["full"] = block.cut.put_back(rep, block.x, notes.get("full"))
            notes["rep"] = torch.where(out.rep >= 0, rep.gather(1, out.rep.clamp(min=0)), -1)
        return out

    def rebuild(self, cut: Cut, now: Tensor) -> Tensor:
        return cut.put_back(cut.notes.get("rep", cut.reduction.rep), now, cut.notes.get("full"))
