"""The contract of an encoder method: what it sees of one block of a vision tower, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import Method
from tokprune.ops.blocks import row_blocks
from tokprune.ops.merge import Matching, merge_weighted
from tokprune.ops.numeric import wide
from tokprune.ops.topk import rows_at

Place = Literal["entrance", "middle", "end"]


@dataclass(frozen=True)
class Entrance:
    """What stands before the first block: for methods that choose patch sizes.

    picture: (B, 3, H, W) levels from 0 to 255 in float32. grid: height and width in patches. coarse: 1, 2, ... -> what
    would enter the first block if patches were 2, 4, ... times as large: (B, h, w, C), of the whole large patches.
    """

    picture: Tensor
    grid: tuple[int, int]
    coarse: Callable[[int], Tensor]


@dataclass
class BlockView:
    """One block of a vision tower, as an encoder method sees it.

    A row of `x` is a token, or, where the connector joins `fold` tokens to one (2 x 2 mergers, pixel shuffle), such a
    unit with its tokens' channels side by side; then the prefix is not among the rows.

    x: (B, N, C) hidden states where the cut is made. index: 0-based block. depth: how many of the `blocks` feed the
    output that is used. prefix: leading rows that are no patches ([CLS], distillation, registers). start: patch rows at
    the tower's entrance. target: patch rows wanted at its end, if the user gave a ratio or budget. size: (B, N, 1)
    original tokens that each row stands for, None before the first merge; 0 marks padding. qkv: makes this block's
    queries, keys and values, each (B, H, S, hd) token by token, the prefix first. scale: of the attention logits.
    hidden_prefix: prefix tokens that stand in qkv. cls: whether the first of them is a [CLS] token. rotate: turns q and
    k as the block's rotary embedding does. bias: what the block added to its attention logits, (B, 1, 1 or S, S) or
    None. entering: (B, N, C) what entered the block, for cuts at its end. cut: where this run left the full sequence
    before, for methods that restore it. entrance: for cuts before the first block, whose index is -1.
    """

    x: Tensor
    index: int
    depth: int
    prefix: int
    start: int
    qkv: Callable[[], tuple[Tensor, Tensor, Tensor]]
    scale: float
    target: int | None = None
    size: Tensor | None = None
    fold: int = 1
    hidden_prefix: int = 0
    cls: bool = False
    blocks: int = 0
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    bias: Tensor | None = None
    entering: Tensor | None = None
    cut: Cut | None = None
    entrance: Entrance | None = None
    _made: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def patches(self) -> int:
        """Patch rows that enter the cut."""
        return self.x.shape[1] - self.prefix

    def _head(self, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) in float32 at least."""
        if self._made is None:
            self._made = self.qkv()
        return wide(self._made[which])

    def _folded(self, values: Tensor, dim: int) -> Tensor:
        """Mean over the tokens of each unit. values: tokens without the prefix along `dim`."""
        return values if self.fold == 1 else values.unflatten(dim, (-1, self.fold)).mean(dim + 1)

    def _attention(self, rows: slice) -> Tensor:
        q, k = self._head(0), self._head(1)
        if self.rotate is not None:
            q, k = self.rotate(q, k)
        logits = q[:, :, rows] @ k.transpose(-1, -2) * self.scale
        if self.bias is not None:
            logits = logits + (self.bias if self.bias.shape[2] == 1 else self.bias[:, :, rows]).to(logits.dtype)
        return logits.softmax(-1)

    def metric(self) -> Tensor:
        """Keys, mean over heads: what token merging compares. (B, N, hd) in float32, the prefix included."""
        keys = self._head(1).mean(1)
        return keys if self.fold == 1 else self._folded(keys[:, self.hidden_prefix :], 1)

    def cls_attention(self) -> Tensor:
        """What [CLS] pays to each patch row, per head: softmax over all keys, the prefix dropped. (B, H, patches).

        A tower without [CLS] answers with the mean attention that each row receives.
        """
        if not self.cls:
            return self._folded(self.received_attention()[..., self.hidden_prefix :], 2)
        return self._folded(self._attention(slice(1))[:, :, 0, self.hidden_prefix :], 2)

    def value_norm(self) -> Tensor:
        """Length of each patch row's value, heads side by side. (B, patches) in float32."""
        norm = self._head(2).square().sum((1, 3)).sqrt()
        return self._folded(norm[:, self.hidden_prefix :], 1)

    def received_attention(self) -> Tensor:
        """Attention that each token gets, mean over the queries, block by block. (B, H, S) in float32."""
        heads, n = self._head(1).shape[1:3]
        total: Tensor | int = 0
        for part in row_blocks(n, heads * n):
            total = total + self._attention(part).sum(-2)
        return total / n  # type: ignore[return-value]

    def attention_map(self) -> Tensor:
        """The whole attention of the block, token by token. (B, H, S, S) in float32; rows are queries."""
        return self._attention(slice(None))

    def attention(self) -> Tensor:
        """Attention between the rows of `x`, (B, H, N, N); of units: summed over keys, mean over queries, rows sum
        to 1.
        """
        full = self.attention_map()
        if self.fold == 1:
            return full
        full = full[..., self.hidden_prefix :, self.hidden_prefix :]
        full = full.unflatten(-1, (-1, self.fold)).sum(-1).unflatten(-2, (-1, self.fold)).mean(-2)
        return full / full.sum(-1, keepdim=True)

    def sizes(self) -> Tensor:
        """`size`, or ones. (B, N, 1) in float32 at least."""
        return wide(self.x).new_ones(*self.x.shape[:2], 1) if self.size is None else self.size


@dataclass(frozen=True)
class Reduction:
    """K rows in place of N.

    x: (B, K, C). rep: (B, K) input row at which each output row sits, -1 for padding. assign: (B, N) output row into
    which each input flows, -1 when it is dropped. size: (B, K, 1) original tokens in each row, 0 for padding.
    """

    x: Tensor
    rep: Tensor
    assign: Tensor
    size: Tensor

    @staticmethod
    def merged(block: BlockView, matching: Matching) -> Reduction:
        """Rows merged by a matching, each the mean of its inputs weighted by size."""
        x, size = merge_weighted(matching, block.x, block.size)
        return Reduction(x, matching.rep, matching.assign, size)

    @staticmethod
    def kept(block: BlockView, rows: Tensor, real: Tensor | None = None) -> Reduction:
        """Some rows, the others dropped. rows: (B, K) in the order of output. real: (B, K) False for padding."""
        x = rows_at(block.x, rows)
        size = block.sizes().gather(1, rows[..., None])
        assign = torch.full(block.x.shape[:2], -1, dtype=torch.long, device=rows.device)
        out = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        if real is None:
            return Reduction(x, rows, assign.scatter(1, rows, out), size)
        assign = assign.scatter_reduce(1, rows, torch.where(real, out, -1), "amax")  # padding loses against a real row
        x = x * real[..., None].to(x.dtype)
        return Reduction(x, torch.where(real, rows, -1), assign, size * real[..., None])

    @staticmethod
    def kept_patches(block: BlockView, patches: Tensor, real: Tensor | None = None) -> Reduction:
        """The prefix and some patches. patches: (B, K), counted behind the prefix. real: (B, K) False for padding."""
        head = torch.arange(block.prefix, device=patches.device).expand(len(patches), -1)
        there = None if real is None else torch.cat([torch.ones_like(head, dtype=torch.bool), real], 1)
        return Reduction.kept(block, torch.cat([head, patches + block.prefix], 1), there)

    def with_rest(self, block: BlockView, row: Tensor, rest: Tensor, scores: Tensor) -> Reduction:
        """One more row behind the others, (B, 1, C), into which all patches go that were dropped.

        rest: (B, m) these patches, counted behind the prefix. scores: (B, n) of the patches; the row sits at the best.
        """
        seat = rest.gather(1, scores.gather(1, rest).argmax(1, keepdim=True)) + block.prefix
        size = block.sizes()[:, block.prefix :].gather(1, rest[..., None]).sum(1, keepdim=True)
        return Reduction(
            torch.cat([self.x, row], 1),
            torch.cat([self.rep, seat], 1),
            torch.where(self.assign < 0, self.x.shape[1], self.assign),
            torch.cat([self.size, size], 1),
        )


@dataclass(frozen=True)
class Cut:
    """Where a method that restores the full sequence left it.

    x: (B, N, C) rows before. reduction: which of them went on, and as what. notes: for the method's own use.
    """

    x: Tensor
    reduction: Reduction
    notes: dict[str, Tensor] = field(default_factory=dict)

    def put_back(self, rep: Tensor, now: Tensor, full: Tensor | None = None) -> Tensor:
        """`full` (or the rows as they were) with the rows at `rep` (B, K) as they are `now` (B, K, C); -1 is
        padding.
        """
        full = self.x if full is None else full
        index = torch.where(rep >= 0, rep, full.shape[1])[..., None].expand_as(now)  # padding goes to a row beyond
        return torch.nn.functional.pad(full, (0, 0, 0, 1)).scatter(1, index, now.to(full.dtype))[:, :-1]


@dataclass(frozen=True)
class EncoderMethod(Method):
    """Base of methods that reduce tokens between the blocks of a vision tower.

    Subclasses implement `reduce`, and `active` when not every block reduces. `place`: where the block is cut, between
    attention and MLP, at its end, or (only before the first block) at the tower's entrance. `restores`: the full
    sequence comes back at the end of the tower, and wherever `whole` says, by `rebuild`.
    """

    stage: ClassVar[str] = "encoder"
    place: ClassVar[Place] = "middle"
    restores: ClassVar[bool] = False

    @property
    def size_bias(self) -> bool:
        """Whether attention counts a merged row as often as it has members (proportional attention): the option
        `proportional`, where a method has it.
        """
        return bool(getattr(self, "proportional", False))

    @property
    def scheduled(self) -> bool:
        """Whether its own options say how much it removes, so that it needs no ratio of its own."""
        return True

    @property
    def single_patches(self) -> bool:
        """For methods that restore the sequence: patches leave one by one where the connector joins several to a unit,
        and where all pictures of a call are one sequence, their patches compete.
        """
        return False

    def check(self, depth: int, target: bool) -> None:
        """Refuse settings that do not fit a tower of `depth` blocks. target: a ratio or budget was given."""

    def active(self, index: int, depth: int) -> bool:
        """Whether block `index` of `depth` may reduce."""
        return True

    def place_at(self, index: int, depth: int) -> Place:
        """Where block `index` is cut."""
        return self.place

    def whole(self, index: int, depth: int) -> bool:
        """Whether block `index` gets the full sequence again, for methods that restore it."""
        return False

    def rebuild(self, cut: Cut, now: Tensor) -> Tensor:
        """The full sequence of a method that `restores`: what it was at the cut and what went on is `now`.

        now: (B, K, C) in the order of the cut's reduction -> (B, N, C).
        """
        raise OptionError(f"{type(self).__name__} does not implement rebuild(cut, now).")

    def reduce(self, block: BlockView) -> Reduction | None:
        """What to leave of the block's rows; None leaves them alone."""
        raise OptionError(f"{type(self).__name__} does not implement reduce(block).")


def at_depths(blocks: Sequence[int | float], depth: int) -> tuple[int, ...]:
    """0-based block numbers, ascending. Whole numbers stand for themselves, fractions in (0, 1) for a relative
    depth.
    """
    out = set()
    for block in blocks:
        number = min(round(block * depth), depth - 1) if isinstance(block, float) and 0 < block < 1 else int(block)
        number += depth if number < 0 else 0
        if not 0 <= number < depth:
            raise OptionError(
                f"block {block!r} is not in a tower of which {depth} blocks feed the output (0 to {depth - 1})."
            )
        out.add(number)
    return tuple(sorted(out))
