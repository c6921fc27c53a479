"""Still and moving tokens of a video's scenes: what still places share over time, each frame's rest, and what flows where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokprune.budget import in_proportion
from tokprune.ops.segments import numbers
from tokprune.ops.topk import true_indices
from tokprune.tokens import Merge, Selection


class Pools(NamedTuple):
    """Tokens that compete with one another: the moving tokens of a frame, or the still places of a scene, averaged over time.

    The T pools of frames come first, then the S of scenes. place: (T, P) positions in the stream, -1 for none. scene: (T,) scene of
    each frame. first, length: (S,) its first frame, how many it has. still: (S, P) bool. moving: (T, P) bool.
    tokens: N of the stream.
    """

    place: Tensor
    scene: Tensor
    first: Tensor
    length: Tensor
    still: Tensor
    moving: Tensor
    tokens: int

    @property
    def sizes(self) -> Tensor:
        """Tokens of each pool, (T + S,)."""
        return torch.cat([self.moving, self.still]).sum(-1)

    @property
    def order(self) -> Tensor:
        """Numbers of the pools in the order of the stream, each scene's still pool ahead of its frames. (T + S,)."""
        frames = torch.arange(len(self.scene), device=self.scene.device)
        return torch.cat([frames * 2 + 1, self.first * 2]).argsort()

    @property
    def home(self) -> Tensor:
        """Position in the stream that stands for each cell of each pool; still ones sit in the scene's first frame. (T + S, P)."""
        return torch.cat([self.place, self.place[self.first]])

    def shares(self, keep: int) -> Tensor:
        """`keep` tokens over the pools, in proportion to their sizes. (T + S,) long."""
        sizes, order = self.sizes, self.order
        return torch.empty_like(sizes).scatter(0, order, in_proportion(keep, sizes[order]))

    def means(self, features: Tensor) -> Tensor:
        """Mean over time of every place of every scene, where its frames all have it. features: (N, C) -> (S, P, C)."""
        out = []
        for place in self.place.split(self.length.tolist()):  # scene by scene: no copy of the whole video
            out.append(features[place.clamp(min=0)].mean(0))
        return torch.stack(out)

    def flow(self, into: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Carry what happens in the pools over to the stream.

        into: (T + S, P) cell of the pool that each cell flows into, -1 for none. weight: (T + S, P), how much of it; a still
        cell's is split over the scene's frames. Returns for each token, (N,), the position that it flows into and its weight.
        """
        frames, width = self.place.shape
        goal = torch.where(into >= 0, self.home.gather(1, into.clamp(min=0)), -1)
        share = torch.cat([weight[:frames], weight[frames:] / self.length[:, None]]) * (into >= 0)
        row = torch.where(self.moving, torch.arange(frames, device=into.device)[:, None], frames + self.scene[:, None])
        column = torch.arange(width, device=into.device).expand_as(row)
        # From the raster to the stream: every token has one cell, and holes all go to one more place behind the last.
        count = self.tokens
        spot = torch.where(self.place >= 0, self.place, count).flatten()
        target = torch.empty(count + 1, dtype=torch.long, device=into.device)
        much = torch.empty(count + 1, dtype=share.dtype, device=into.device)
        target = target.scatter(0, spot, goal[row, column].flatten())
        return target[:count], much.scatter(0, spot, share[row, column].flatten())[:count]


def still_and_moving(
    place: Tensor, tokens: int, lengths: Sequence[int], alike: Tensor, threshold: float, at_least: int = 0
) -> Pools:
    """Split every scene into still places and moving tokens.

    place: (T, P) positions in the stream of `tokens`, -1 for none. lengths: frames of each scene. alike: (S, P), how constant each place
    is; still is what lies above `threshold` and is there in all of a scene's frames, of which there are at least two.
    at_least: how many tokens the pools must hold. A still place holds one for all its frames; if that is not enough, the
    least constant places move again (lower place first), as many as it takes.
    """
    present, device = place >= 0, place.device
    scene, length = numbers(lengths, device), torch.tensor(list(lengths), device=device)
    missing = torch.zeros_like(alike, dtype=torch.long).index_add(0, scene, (~present).long())
    still = (alike > threshold) & (missing == 0) & (length > 1)[:, None]
    least = torch.sort(alike.masked_fill(~still, torch.inf).flatten(), stable=True).indices
    gain = ((length - 1)[:, None] * still).flatten()[least]
    held = tokens - gain.sum()
    again = (gain > 0) & (held + gain.cumsum(0) - gain < at_least)
    still = still & ~torch.zeros_like(still).flatten().scatter(0, least, again).view_as(still)
    return Pools(place, scene, length.cumsum(0) - length, length, still, present & ~still[scene], tokens)


def selection(target: Tensor, weight: Tensor, keep: int, **info: Tensor) -> Selection:
    """The selection in which each token flows to the position `target` (N,), -1 for nowhere; `keep` positions flow to themselves."""
    indices = true_indices(target == torch.arange(len(target), device=target.device), keep)
    row = torch.where(target >= 0, torch.searchsorted(indices, target.clamp(min=0)), -1)
    return Selection(indices, Merge(target=row, scale=weight), info=info)
