"""IPCV: one block's stillest tokens skip the blocks after it and come back, rebuilt from their neighbours, at
the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import round_of
from tokprune.errors import OptionError
from tokprune.methods.base import top
from tokprune.methods.encoder_base import BlockView, Cut, EncoderMethod, Place, Reduction, at_depths
from tokprune.methods.options import Block, Compat, option
from tokprune.ops.blocks import row_blocks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import distances
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method


def movement(x: Tensor, before: Tensor) -> Tensor:
    """How far a block moved each token. (B, N, C) twice -> (B, N)."""
    return (wide(x) - wide(before)).norm(dim=-1)


def neighbours(x: Tensor, kept: Tensor, count: int, across: bool = False) -> tuple[Tensor, Tensor]:
    """The tokens that are not kept, and their nearest kept ones by Euclidean distance.

    x: (B, N, C), kept: (B, K) -> (B, M) ascending indices of the others, (B, M, count) numbers into `kept`, or into all
    B * K kept ones if they are sought `across` the batch; count is at most as many. Equal distances: lower number
    first.
    """
    batch, n, width = x.shape
    stay = torch.zeros(batch, n, dtype=torch.bool, device=x.device).scatter(1, kept, True)
    order = torch.sort(stay.to(torch.int8), dim=-1, stable=True).indices
    gone = order[:, : n - kept.shape[1]]
    rows = wide(x)

    there = rows_at(rows, kept)
    if across:
        there = there.reshape(1, -1, width).expand(batch, -1, -1)
    old, found = rows_at(rows, gone), []
    for part in row_blocks(gone.shape[1], there.shape[1]):
        distance = distances(old[:, part], there)  # (B, m, K or B K)
        found.append(torch.sort(distance, dim=-1, stable=True).indices[..., :count].contiguous())
    return gone, torch.cat(found, 1)


def rebuilt(old: Tensor, then: Tensor, now: Tensor, nearest: Tensor, across: bool = False) -> Tensor:
    """Tokens that were left out, moved by the mean move of their neighbours.

    old: (B, M, C) them at the cut. then, now: (B, K, C) the kept ones at the cut and now. nearest: (B, M, k), as
    `neighbours` gives them.
    """
    move = now.float() - then.float() if now.dtype != torch.float64 else now - then  # with gradient
    batch, m, k = nearest.shape
    if across:
        move = move.reshape(1, -1, move.shape[2]).expand(batch, -1, -1)
    near = move.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, move.shape[2])).view(batch, m, k, -1)
    return (old + near.mean(2)).to(old.dtype)


@register_method(
    "ipcv",
    paper="IPCV: Information-Preserving Compression for MLLM Visual Encoders",
    year=2025,
    url="https://arxiv.org/abs/2512.18747",
    complexity="O(N²C)",
    memory="O(NC)",
    checked=Checked(
        "Perkzi/IPCV",
        agrees="InternVL2's tower on one picture, and on several with compat='published'; Qwen2-VL's on one with "
        "compat",
        differs="neighbours across pictures, counts rounded down and single patches of units (compat); borders of "
        "several "
        "pictures in Qwen2-VL; the stage in the LLM, which is DART's or FastV's",
    ),
    presets={"qwen2_vl": {"first": 2, "steady": 7}},
)
@dataclass(frozen=True)
class IPCV(EncoderMethod):
    """IPCV (2025): the tokens that a block moved least leave the tower there and come back at its end, so the LLM
    still gets all.

    keep: share of the patches that goes on. first: the block behind which they leave, 0-based or a fraction of the
    depth. steady: for so many blocks after it the others take part in attention, rebuilt, and skip only the MLP.
    neighbours: a rebuilt token is what it was at the cut, moved by the mean move of its nearest kept tokens there. The
    defaults are those of the authors' script for InternVL2 (behind block 6 of 24, three blocks), preset="qwen2_vl"
    those for Qwen2-VL. To thin what the LLM reads as well, add a connector method: [get_method("ipcv", keep=0.5),
    "divprune"].

    What differs from the published code: it seeks the neighbours of a token in all pictures and tiles of the call, so
    that an answer depends on what else is in the batch; here within its own picture or tile. It rounds the number of
    kept tokens down; here to the nearest, halves up. Where patches are joined behind the tower it drops single ones,
    for Qwen2-VL out of all pictures of the call at once; here whole units leave, picture by picture. compat="published"
    does all of this as there, but for the borders of several pictures in one call of Qwen2-VL, which are one patch off
    there.
    """

    keep: float = option(0.35, above=0, high=1)
    first: Block = 0.261
    steady: int = option(3, low=0)
    neighbours: int = option(10, low=1)
    compat: Compat = "corrected"
    place: ClassVar[Place] = "end"
    restores: ClassVar[bool] = True

    def check(self, depth: int, target: bool) -> None:
        at_depths((self.first,), depth)
        if target:
            raise OptionError(
                "ipcv gives all tokens back at the tower's end; say keep=0.5 (the share that goes on inside), not a "
                "ratio or budget."
            )

    @property
    def single_patches(self) -> bool:
        """Whether patches leave one by one, out of all pictures of a call where they are one sequence."""
        return self.compat == "published"

    def cut_at(self, depth: int) -> int:
        """The block behind which tokens leave."""
        return at_depths((self.first,), depth)[0]

    def active(self, index: int, depth: int) -> bool:
        return index == self.cut_at(depth) or self.whole(index, depth)

    def place_at(self, index: int, depth: int) -> Place:
        return "end" if index == self.cut_at(depth) else "middle"

    def whole(self, index: int, depth: int) -> bool:
        return 0 < index - self.cut_at(depth) <= self.steady

    def reduce(self, block: BlockView) -> Reduction | None:
        if block.cut is not None:
            return Reduction.kept(block, block.cut.reduction.rep)
        n, prefix = block.patches, block.prefix
        if self.compat == "published":  # down, and with the rounding errors of a reduction that is taken from 1
            keep = max(1, int(n * (1 - round(1 - self.keep, 9))))
        else:
            keep = max(1, round_of(n, self.keep))
        if keep >= n or block.entering is None:
            return None
        moved = movement(block.x[:, prefix:], block.entering[:, prefix:])
        return Reduction.kept_patches(block, top(moved, keep))

    def rebuild(self, cut: Cut, now: Tensor) -> Tensor:
        rep = cut.reduction.rep
        if "gone" not in cut.notes:
            gone, nearest = neighbours(cut.x, rep, self.neighbours, self.compat == "published")
            cut.notes.update(gone=gone, nearest=nearest)
        gone, nearest = cut.notes["gone"], cut.notes["nearest"]
        old, then = rows_at(cut.x, gone), rows_at(cut.x, rep)
        return cut.put_back(rep, now, cut.put_back(gone, rebuilt(old, then, now, nearest, self.compat == "published")))
