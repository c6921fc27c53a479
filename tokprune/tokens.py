"""What flows through tokprune: the visual token stream, where its tokens lie, and what a method decides about it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from tokprune.device import with_kernel
from tokprune.errors import MissingQueryError, MissingSignalError

Kind = Literal["image", "tiles", "video"]


@dataclass(frozen=True)
class Layout:
    """Where each token of a stream lies; one entry per candidate token (newline rows are not among them).

    group: (N,) tile or frame number, 0-based, ascending. row, col: (N,) place in its group's grid. grids: (height,
    width) of each group's full grid; unpadding may leave holes in it. canvas: for tiles, how many lie down and across.
    thumbnail: group 0 shows the whole picture. timestamps: for video, seconds of each group.
    """

    group: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[int, int], ...]
    kind: Kind = "image"
    canvas: tuple[int, int] | None = None
    thumbnail: bool = False
    timestamps: tuple[float, ...] | None = None

    @property
    def num_groups(self) -> int:
        """How many tiles or frames the stream has."""
        return len(self.grids)

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Tokens present in each group (fewer than its grid where padding was cut away)."""
        return tuple(torch.bincount(self.group, minlength=self.num_groups).tolist())

    @cached_property
    def group_starts(self) -> tuple[int, ...]:
        """Where each group begins in the stream, and at last where it ends."""
        return (0, *accumulate(self.group_sizes))

    def group_slices(self) -> list[slice]:
        """Slices of the stream, one per group; groups are contiguous only when `group` ascends, which Layout
        demands."""
        return [slice(start, stop) for start, stop in pairwise(self.group_starts)]

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensors on `device`; the group sizes, once counted, are not counted there again."""
        return self.with_places(self.group.to(device), self.row.to(device), self.col.to(device))

    def with_places(self, group: Tensor, row: Tensor, col: Tensor) -> Layout:
        """The same layout with copies of its tensors on some device."""
        moved = replace(self, group=group, row=row, col=col)
        if "group_sizes" in vars(self) or self.group.device.type == "cpu":
            vars(moved)["group_sizes"] = self.group_sizes
        return moved

    @staticmethod
    def grid(height: int, width: int, groups: int = 1, kind: Kind = "image", **more: object) -> Layout:
        """Layout of `groups` full height x width grids in raster order."""
        cell = torch.arange(height * width).repeat(groups)
        group = torch.arange(groups).repeat_interleave(height * width)
        row, col = torch.div(cell, width, rounding_mode="floor"), cell % width
        return Layout(group, row, col, ((height, width),) * groups, kind, **more)  # type: ignore[arg-type]

    @staticmethod
    def line(n: int) -> Layout:
        """Layout of `n` tokens of unknown geometry: one row."""
        return Layout.grid(1, n)


@dataclass(frozen=True)
class Query:
    """The question about the picture, without chat template and system prompt.

    text: the words, when known. embeddings: (T, D) rows of the LLM's embedding table for the question's tokens. pieces:
    the word that each row belongs to, when known (a long word may have several rows).
    clip: (E,) or (S, E) text embedding of a scorer, when one made it. source: how the question was found, for the
    report.
    """

    text: str | None = None
    embeddings: Tensor | None = None
    clip: Tensor | None = None
    source: str = "given"
    pieces: tuple[str, ...] | None = None


@dataclass(frozen=True)
class VisualTokens:
    """One image, tiled image or video on its way to the LLM: what a connector method looks at.

    features: (N, D) as the LLM would receive them. signals: what the method's `needs` named, each (N, ...) aligned with
    the features. query: the question, if there is one.
    """

    features: Tensor
    layout: Layout
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    query: Query | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    def signal(self, name: str) -> Tensor:
        """The signal called `name`, or an error that lists those at hand."""
        if name not in self.signals:
            at_hand = ", ".join(sorted(self.signals)) or "none"
            raise MissingSignalError(
                f"signal {name!r} is not at hand (present: {at_hand}); name it in the method's `needs`."
            )
        return self.signals[name]

    def question(self) -> Query:
        """The query, or the error that tells how to give one."""
        if self.query is None:
            raise MissingQueryError(
                "this method chooses tokens by the question, and none is known. Give it: "
                'apply(..., query="what is the colour of the car?"), or with pruning.query("..."): '
                "model.generate(...), "
                "or apply(..., processor=processor) to have it cut out of the prompt."
            )
        return self.query

    def part(self, where: slice | Tensor) -> VisualTokens:
        """The sub-stream at `where` (a slice or ascending indices) as a stream of its own, with groups renumbered from
        0."""
        lay = self.layout
        group = lay.group[where]
        if isinstance(where, slice) and where.step in (None, 1):  # known without asking the device
            start, stop, _ = where.indices(len(self))
            starts = lay.group_starts
            near = range(bisect_right(starts, start) - 1, bisect_left(starts, stop))  # no look at all frames for each
            sizes = {g: min(stop, starts[g + 1]) - max(start, starts[g]) for g in near}
        else:
            number = group
            if isinstance(where, Tensor) and where.device != group.device:  # the host knows them, and their groups
                number = torch.bucketize(where, torch.tensor(lay.group_starts[1:], device=where.device), right=True)
            sizes = dict(enumerate(torch.bincount(number, minlength=lay.num_groups).tolist()))
        present = [g for g, size in sizes.items() if size > 0]
        at = torch.tensor(present, dtype=torch.long, device=group.device)
        pieces = Layout(
            torch.searchsorted(at, group),
            lay.row[where],
            lay.col[where],
            tuple(lay.grids[g] for g in present),
            "image" if lay.kind == "tiles" and len(present) == 1 else lay.kind,
            None,
            False,
            None if lay.timestamps is None else tuple(lay.timestamps[g] for g in present),
        )
        vars(pieces)["group_sizes"] = tuple(sizes[g] for g in present)
        # Of the signals, `frame_scores` alone has one entry per group instead of per token.
        signals = {k: v[at.to(v.device)] if k == "frame_scores" else v[where] for k, v in self.signals.items()}
        return VisualTokens(self.features[where], pieces, signals, self.query)


@with_kernel("merge")
def weighted_sums(x: Tensor, target: Tensor, scale: Tensor, k: int) -> Tensor:
    """Rows that flow together, each times its weight.

    x: (B, N, D). target: (B, N) output row of each row, -1 for none. scale: (B, N). Returns (B, k, D), float32 at
    least; differentiable. Rows are added in their order, one after the other: a sum has the same bits each time, and
    whatever else flows elsewhere. So it has on a CUDA device, where gradients are not asked for; torch's own addition
    there takes rows as they come.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    batch, n, width = x.shape
    weighted = torch.where((target >= 0)[..., None], wide * scale.to(wide.dtype)[..., None], 0)  # not 0 * infinity
    row = target.clamp(min=0)
    if batch > 1:
        row = row + k * torch.arange(batch, device=x.device)[:, None]
    out = wide.new_zeros(batch * k, width)
    return out.index_add(0, row.flatten(), weighted.reshape(batch * n, width)).view(batch, k, width)


@dataclass(frozen=True)
class Merge:
    """Which inputs flow into which output, and how much: out[k] = sum over n of weight[k, n] * x[n].

    Either `target` (N,) with the output row of each input (-1: into none) and `scale` (N,) its weight, for merges where
    an input goes to one output; or `rows` (K, N), dense or sparse COO, for the general case.
    """

    target: Tensor | None = None
    scale: Tensor | None = None
    rows: Tensor | None = None

    @staticmethod
    def side_by_side(merges: Sequence[tuple[Merge, int]]) -> Merge:
        """One merge of streams that lie one after the other, from merges by target with their numbers of outputs; in
        as many operations as for one.
        """
        targets = [merge.target for merge, _ in merges if merge.target is not None]
        scales = [merge.scale for merge, _ in merges if merge.scale is not None]
        target = torch.cat(targets)
        sizes = torch.tensor([len(one) for one in targets], device="cpu")
        outputs = torch.tensor([k for _, k in merges], device="cpu")
        first = (outputs.cumsum(0) - outputs).repeat_interleave(sizes).to(target.device)
        return Merge(torch.where(target >= 0, target + first, -1), torch.cat(scales))

    def apply(self, x: Tensor, k: int) -> Tensor:
        """Merged features. x: (N, D) -> (k, D), summed in float32 at least, returned in x's dtype; differentiable."""
        if self.rows is not None:
            wide = x if x.dtype == torch.float64 else x.float()
            rows = self.rows.to(device=x.device, dtype=wide.dtype)
            return (torch.sparse.mm(rows, wide) if rows.is_sparse else rows @ wide).to(x.dtype)
        if self.target is None or self.scale is None:
            raise ValueError("a Merge needs either rows, or target and scale")
        target, scale = self.target.to(x.device), self.scale.to(x.device)
        return weighted_sums(x[None], target[None], scale[None], k)[0].to(x.dtype)

    def dense(self, k: int, n: int) -> Tensor:
        """The (k, n) weight matrix in float32, for composition and pictures."""
        if self.rows is not None:
            return (self.rows.to_dense() if self.rows.is_sparse else self.rows).float()
        if self.target is None or self.scale is None:
            raise ValueError("a Merge needs either rows, or target and scale")
        out = torch.zeros(k, n, dtype=torch.float32, device=self.target.device)
        inputs = torch.arange(n, device=self.target.device)
        used = self.target >= 0
        out[self.target[used], inputs[used]] = self.scale[used].float()
        return out


@dataclass(frozen=True)
class Selection:
    """What a method decided: which slots survive and, when it merges, what flows into them.

    indices: (K,) ascending positions in the stream. weights: merge rows aligned with `indices`. features: (K, D)
    explicit replacement, last resort (DeepStack planes cannot follow it). info: tensors for pictures and reports.
    """

    indices: Tensor
    weights: Merge | None = None
    features: Tensor | None = None
    info: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.indices.shape[0]

    def apply(self, features: Tensor) -> Tensor:
        """The tokens that the LLM receives for this stream. features: (N, D) -> (K, D)."""
        if self.features is not None:
            return self.features.to(features)
        if self.weights is not None:
            return self.weights.apply(features, len(self))
        return features[self.indices.to(features.device)]
