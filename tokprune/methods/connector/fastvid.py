"""FastVID: scenes by frame similarity, the attended tokens of each frame, and the rest merged into a few
anchor frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal, equal_spaced, floor_of, in_proportion
from tokprune.errors import OptionError
from tokprune.methods.attended import attended, scene_lengths
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.options import Compat, option
from tokprune.ops.cluster import Distances, centre_scores
from tokprune.ops.frames import by_segment, frame_means, raster
from tokprune.ops.similarity import most_similar, unit
from tokprune.ops.topk import rank_in_group, ranks, true_indices
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, Merge, Selection, VisualTokens

NEIGHBOURS = 4  # of the density of context tokens
BLOCK = 16  # frames whose distances are in memory together


def anchors(length: int, stride: int) -> list[int]:
    """Frames of a scene that hold its context tokens: every stride-th, counted from the last; the last comes first."""
    return list(range(length - 1, -1, -stride))


def fastvid_split(
    budget: int, sizes: Sequence[int], share: float = 0.4, stride: int = 4, even: bool = True
) -> tuple[list[int], list[int]]:
    """Salient and context tokens of each frame of a scene, with the sum `budget` (section 3.3; the code for
    LLaVA-Video).

    floor(share * budget) tokens are context, in equal parts in the anchor frames, the others salient, in equal parts in
    all frames. What full anchors cannot take becomes salient elsewhere. even: odd units at even distances; otherwise as
    published: to the first frames and to the last anchors. sizes: tokens of each frame, together at least `budget`.
    """
    places = anchors(len(sizes), stride)
    wanted = floor_of(budget, share) if even else int(share * budget)
    salient = (equal_spaced if even else equal)(budget - wanted, sizes)
    room = [sizes[t] - salient[t] for t in places]
    over = max(0, wanted - sum(room))
    others = [0 if t in set(places) else n - k for t, (n, k) in enumerate(zip(sizes, salient, strict=True))]
    salient = [k + more for k, more in zip(salient, equal(over, others), strict=True)]
    context = [0] * len(sizes)
    for t, count in zip(places, equal(wanted - over, room), strict=True):
        context[t] = count
    return salient, context


def fastvid_onevision_split(
    per_frame: int, length: int, share: float = 0.4, stride: int = 4
) -> tuple[list[int], list[int]]:
    """The same in the published code for LLaVA-OneVision: counts are cut to whole numbers, and what is cut
    off is lost.
    """
    context, places = int(share * per_frame), anchors(length, stride)
    each = context * length // len(places)
    return [per_frame - context] * length, [each if t in places else 0 for t in range(length)]


def fastvid_qwen_split(
    budget: int, frames: int, size: int, share: float = 0.4, stride: int = 4
) -> tuple[list[int], list[int]]:
    """The same in the published code for Qwen2.5-VL; what a frame cannot hold is lost. size: tokens of each frame.

    The first frames get the odd salient tokens, the last anchors the odd context tokens; at least one token and at most
    half of a frame is context.
    """
    context, places = [0] * frames, anchors(frames, stride)
    total = max(int(budget * share), 1)
    for i, t in enumerate(places):
        context[t] = min(total // len(places) + (i < total % len(places)), size // 2)
    rest = budget - total
    salient = [min(rest // frames + (t < rest % frames), size - context[t]) for t in range(frames)]
    return salient, context


def changing_frames(frames: Tensor, lengths: Sequence[int], ignore: float | None) -> list[list[int]]:
    """Frames of each scene whose cosine with the next one is below `ignore`, and the scene's last; None: all of them.

    frames: (T, C), one vector per frame. The numbers count within the scene.
    """
    if ignore is None:
        return [list(range(length)) for length in lengths]
    rows = unit(frames)
    repeats = [*((rows[1:] * rows[:-1]).sum(-1) >= ignore).tolist(), False]
    out, begin = [], 0
    for length in lengths:
        out.append([t for t in range(length) if t == length - 1 or not repeats[begin + t]])
        begin += length
    return out


def scattered(values: Sequence[int], at: Sequence[int], length: int) -> list[int]:
    """`values` at the places `at` of a list of `length`, 0 elsewhere."""
    found = dict(zip(at, values, strict=True))
    return [found.get(t, 0) for t in range(length)]


def fastvid_choice(
    features: Tensor, attention: Tensor, layout: Layout, salient: Sequence[int], context: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Each frame's salient tokens, by attention, and context centres, by density peaks among its other tokens.

    features: (N, C), attention: (N,), salient, context: (T,) counts. Returns two (N,) bool.
    """
    device = features.device
    counts = torch.tensor([list(salient), list(context)], device=device)
    attended = rank_in_group(attention, layout.group) < counts[0][layout.group]
    place = raster(layout)
    centre = torch.zeros_like(attended)
    for rows in torch.tensor([t for t, k in enumerate(context) if k > 0], dtype=torch.long, device=device).split(BLOCK):
        cells = place[rows]  # (B, P)
        free = (cells >= 0) & ~attended[cells.clamp(min=0)]
        score = centre_scores(Distances(features[cells.clamp(min=0)]), NEIGHBOURS, free)
        chosen = ranks(score) < counts[1][rows][:, None]
        spot = torch.where(chosen & free, cells, len(centre))  # all others: one place behind the last
        centre = (
            centre
            | torch.zeros(len(centre) + 1, dtype=torch.bool, device=device).index_fill(0, spot.flatten(), True)[:-1]
        )
    return attended, centre


def fastvid_rows(
    features: Tensor,
    attended: Tensor,
    centre: Tensor,
    pieces: Sequence[tuple[slice, int, Sequence[tuple[slice, int]]]],
    keep: int,
    beta: float = 0.6,
    own: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of a scene that are not salient into the centres of each of its anchor frames.

    pieces: for each scene where its tokens lie, how many are salient, and for each anchor frame where its tokens lie
    and how many are centres. A token joins the most similar (cosine) centre of every anchor frame; a centre with n
    members becomes w centre + (1 - w) mean of members, w = max(1 / (n + 1), beta). own: a centre counts among its own
    frame's members, as in the published code for LLaVA-OneVision.

    Returns the kept positions (keep,) and sparse rows (keep, N).
    """
    n, device = features.shape[0], features.device
    indices = true_indices(attended | centre, keep)
    slot = torch.full((n,), -1, device=device).scatter(0, indices, torch.arange(keep, device=device))
    alone = true_indices(attended, sum(count for _, count, _ in pieces))
    entries = [(slot[alone], alone, features.new_ones(len(alone)))]
    for where, count, frames in pieces:
        free = true_indices(~attended[where], where.stop - where.start - count) + where.start
        rows = unit(features[free])
        for frame, many in frames:
            heads = true_indices(centre[frame], many) + frame.start
            nearest = most_similar(rows, unit(features[heads]))[1]  # (M,)
            itself = centre[free] & (free >= frame.start) & (free < frame.stop)
            joins = torch.ones_like(itself) if own else ~itself
            nearest = torch.where(itself, torch.searchsorted(heads, free).clamp(max=many - 1), nearest)
            members = features.new_zeros(many).index_add(0, nearest, joins.to(features))
            stays = (1 / (members + 1)).clamp(min=beta).masked_fill(members == 0, 1.0)
            value = joins * ((1 - stays) / members.clamp(min=1))[nearest] + itself * stays[nearest]
            entries.append((slot[heads[nearest]], free, value))
    row, column, value = (torch.cat([e[i] for e in entries]) for i in range(3))
    return indices, torch.sparse_coo_tensor(
        torch.stack([row, column]), value, (keep, n), check_invariants=False
    ).coalesce()


def pieces_of(
    sizes: Sequence[int], lengths: Sequence[int], salient: Sequence[int], context: Sequence[int]
) -> list[tuple[slice, int, list[tuple[slice, int]]]]:
    """The scenes that have centres and those that have not, as `fastvid_rows` takes them. All counts are per frame."""
    out, frame, start = [], 0, 0
    for length in lengths:
        begin, heads, count = start, [], 0
        for t in range(frame, frame + length):
            if context[t] > 0:
                heads.append((slice(start, start + sizes[t]), context[t]))
            start, count = start + sizes[t], count + salient[t]
        out.append((slice(begin, start), count, heads))
        frame += length
    return out


@register_method(
    "fastvid",
    paper="FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2503.11187",
    complexity="O(NnD) for n tokens per frame; merging O(NKD) within a scene",
    memory="O(ND)",
    merges=True,
    presets={"qwen2_5_vl": {"tau": 0.84, "ignore": 0.95}},
    checked=Checked(
        "LunarShen/FastVID",
        "kept tokens and merged features: golden vectors for LLaVA-OneVision and LLaVA-Video, 300 random videos for "
        "Qwen2.5-VL",
        "the default's exact counts; frame vectors are mean tokens; noise on densities",
    ),
)
@dataclass(frozen=True)
class FastVID(ConnectorMethod):
    """FastVID (NeurIPS 2025): cut into scenes, keep what is attended to, merge the rest of a scene into dense anchor
    tokens.

    Scenes: cuts at the c - 1 least similar neighbouring frames and wherever the cosine is below tau (section 3.2; here
    of the frames' mean tokens, there of SigLIP's pooled output). share: context tokens of the budget (d = 0.4), stride:
    one anchor frame per so many (p = 4), beta: least weight of a context centre against the mean of those that joined
    it.

    Exact: scenes share the budget in proportion to their tokens, salient and context tokens as in the authors' code for
    LLaVA-Video. What compat="published" restores, from their code for LLaVA-OneVision: fewer than the budget stay, as
    each division is cut to whole numbers, and centres are members of themselves. There, and here with an error that
    says so: fewer frames than c; a share of the budget of less than one context token per frame; more context tokens
    than an anchor frame has (ratios above 0.45). With the corrected code all of these work; what an anchor cannot hold
    becomes salient.

    ignore: frames that resemble the next one of their scene at least so much keep none of their own tokens, so that the
    budget of a still scene goes to few frames (None: all frames keep some). The authors use it for Qwen2.5-VL
    (preset="qwen2_5_vl"), with a code of its own that compat="published" follows then: no remainder is lost, at most
    half of a frame is context, and the surplus of full frames is lost. Here a scene whose changing frames cannot hold
    its budget uses all of them.

    longest: corrected only, frames. Merging compares every token of a scene with all of its centres, which is quadratic
    in the scene's length; a longer scene merges in pieces of so many frames, and a long still video takes linear time.

    A picture or tile is a scene of one frame, and its own anchor.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    c: int = option(8, low=1)
    tau: float = 0.9
    share: float = option(0.4, low=0, high=1)
    stride: int = option(4, low=1)
    ignore: float | None = option(None, low=-1, high=1)
    beta: float = option(0.6, low=0, high=1)
    longest: int = option(64, low=1)
    compat: Compat = "corrected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest % self.stride:
            raise OptionError(
                f"longest={self.longest} must be a multiple of stride={self.stride}, so that anchors stay."
            )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, attention, layout = attended(tokens, keep)
        sizes, published = layout.group_sizes, self.compat == "published"
        lengths = scene_lengths(features, layout, self.c, self.tau)
        changing = changing_frames(frame_means(features, layout), lengths, self.ignore)
        if published:
            salient, context = self.published_counts(layout, changing, lengths, keep)
        else:
            salient, context = self.counts(sizes, changing, lengths, keep)
        if not published:
            lengths = [part for length in lengths for part in _pieces(length, self.longest)]
        chosen, centre = fastvid_choice(features, attention, layout, salient, context)
        total = sum(salient) + sum(context)
        pieces = pieces_of(sizes, lengths, salient, context)
        indices, rows = fastvid_rows(
            features, chosen, centre, pieces, total, self.beta, own=published and self.ignore is None
        )
        return Selection(indices, Merge(rows=rows), info={"scores": attention, "salient": chosen})

    def counts(
        self, sizes: Sequence[int], changing: Sequence[Sequence[int]], lengths: Sequence[int], keep: int
    ) -> tuple[list[int], list[int]]:
        """Salient and context tokens of each frame, `keep` together."""
        salient: list[int] = []
        context: list[int] = []
        own = by_segment(sizes, lengths)
        shares = in_proportion(keep, torch.tensor([sum(scene) for scene in own])).tolist()
        for scene, at, budget in zip(own, changing, shares, strict=True):
            if budget > sum(scene[t] for t in at):
                at = range(len(scene))
            parts = fastvid_split(budget, [scene[t] for t in at], self.share, self.stride)
            salient += scattered(parts[0], at, len(scene))
            context += scattered(parts[1], at, len(scene))
        return salient, context

    def published_counts(
        self, layout: Layout, changing: Sequence[Sequence[int]], lengths: Sequence[int], keep: int
    ) -> tuple[list[int], list[int]]:
        """The same by the published rule, or the error for what the published code cannot do."""
        sizes, hint = layout.group_sizes, "use compat='corrected'."
        if len(set(sizes)) > 1 or (layout.kind == "video" and len(sizes) < self.c):
            raise OptionError(f"compat='published' needs at least {self.c} frames, all of one size; {hint}")
        per_frame, size = keep // len(sizes), sizes[0]
        salient: list[int] = []
        context: list[int] = []
        for at, length in zip(changing, lengths, strict=True):
            if self.ignore is None:
                parts = fastvid_onevision_split(per_frame, length, self.share, self.stride)
            elif length == 1:
                few = max(int(per_frame * self.share), 1)
                parts = [per_frame - few], [few]
            else:
                split = fastvid_qwen_split(per_frame * length, len(at), size, self.share, self.stride)
                parts = scattered(split[0], at, length), scattered(split[1], at, length)
            salient, context = salient + parts[0], context + parts[1]
        most = max(s + c for s, c in zip(salient, context, strict=True))
        if max(context) == 0 or most > size or per_frame == 0:
            raise OptionError(
                f"compat='published' cannot keep {per_frame} of {size} tokens per frame: an anchor frame would hold "
                f"{max(context)} context tokens; {hint}"
            )
        return salient, context


def _pieces(length: int, longest: int) -> list[int]:
    """A scene in pieces of `longest` frames from its end, so that anchor frames stay what they are."""
    rest = length % longest
    return ([rest] if rest else []) + [longest] * (length // longest)
