"""What may be dropped inside the LLM: the visual tokens of each prompt of a call, as they entered it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokprune.runtime.records import StreamRecord

EACH = ("slots", "picture", "row", "col", "line")
"""What is known of each candidate."""


@dataclass(frozen=True)
class Candidates:
    """The visual tokens of one prompt that are left, in the order of the prompt. Slots are those of layer 0, new in
    this call.
    """

    slots: Tensor
    """(V,) ascending."""
    picture: Tensor
    """(V,) number of the picture in the prompt."""
    row: Tensor
    """(V,) in its picture's (tile's, frame's) grid."""
    col: Tensor
    """(V,)."""
    line: Tensor
    """(V,) number of the line, unique in the prompt, whose separator goes with the last token of it."""
    signals: Mapping[str, Tensor]
    """(V, ...) each."""
    separators: Tensor
    """(S,) slots of separators, -1 of those that are gone."""
    separator_line: Tensor
    """(S,)."""
    total: int
    """Tokens that entered the LLM."""
    fixed: int = 0
    """Of these, those that always stay: 1 where the prompt's last token, whose state is the answer's, is visual."""
    final: int | None = None
    """How many are to be left behind the last drop, where ratio or budget say so."""

    def __len__(self) -> int:
        return self.slots.shape[0]

    def chosen(self, indices: Tensor) -> Candidates:
        """Those that stay, and the separators whose line has one of them. indices: (K,) ascending."""
        kept = {name: getattr(self, name)[indices] for name in EACH}
        alive = torch.isin(self.separator_line, kept["line"])
        return replace(
            self,
            **kept,
            signals={name: value[indices.to(value.device)] for name, value in self.signals.items()},
            separators=torch.where(alive, self.separators, -1),
        )


def spared(rows: Sequence[Candidates], last: int) -> list[Candidates]:
    """The candidates, and separators, without the prompt's last token, slot `last`. One look at the device for all."""
    some = [c for c in rows if len(c)]
    ends = torch.stack([c.slots[-1] for c in some]).tolist() if some else []
    at_end = {id(c) for c, end in zip(some, ends, strict=True) if end == last}
    out = []
    for c in rows:
        separators = torch.where(c.separators == last, -1, c.separators)
        without = c.chosen(torch.arange(len(c) - 1, device=c.slots.device)) if id(c) in at_end else c
        out.append(replace(without, separators=separators, fixed=int(id(c) in at_end)))
    return out


def candidates_of(
    streams: Sequence[StreamRecord],
    slot: Tensor,
    signals: Sequence[Mapping[str, Tensor]],
    count: Callable[[int], int] | None,
) -> list[Candidates]:
    """The candidates of each prompt.

    streams: of all prompts, finished. slot: (B, L) slot of each kept prompt column. signals: of each stream, (K, ...).
    count: keep count of a picture's n tokens, where ratio or budget are for the decoder stage.
    """
    return [
        _of_row([(s, g) for s, g in zip(streams, signals, strict=True) if s.row == row], slot[row], count)
        for row in range(slot.shape[0])
    ]


def _of_row(
    members: list[tuple[StreamRecord, Mapping[str, Tensor]]], slot: Tensor, count: Callable[[int], int] | None
) -> Candidates:
    device, none = slot.device, slot.new_zeros(0)
    parts: dict[str, list[Tensor]] = {name: [none] for name in EACH}
    separators, lines = [none], [none]
    if len(members) > 1:
        # Streams come by modality; pictures are numbered as they stand in the prompt, known on the host by their
        # columns.
        firsts = torch.stack([s.columns.min() for s, _ in members]).tolist()
        members = [members[i] for i in sorted(range(len(members)), key=firsts.__getitem__)]
    for number, (stream, _) in enumerate(members):
        geometry, layout, at = stream.geometry, stream.layout, stream.indices
        line = geometry.line[at.to(geometry.line.device)]
        parts["slots"].append(slot[stream.candidates[at.to(stream.candidates.device)].to(device)])
        parts["picture"].append(torch.full((len(at),), number, device=device))
        parts["row"].append(layout.row[at.to(layout.row.device)].to(device))
        parts["col"].append(layout.col[at.to(layout.col.device)].to(device))
        parts["line"].append((line.to(device) * len(members)) + number)
        columns = stream.columns.to(device)[geometry.separators.to(device)]
        kept = torch.isin(geometry.separator_line, line).to(device)
        separators.append(torch.where(kept, slot[columns], -1))
        lines.append((geometry.separator_line.to(device) * len(members)) + number)
    joined = {name: torch.cat(values) for name, values in parts.items()}
    by_place = torch.argsort(joined["slots"])
    names = members[0][1] if members else ()
    told = {name: torch.cat([values[name] for _, values in members]) for name in names}
    final = None if count is None else sum(count(s.kept) for s, _ in members)
    return Candidates(
        **{name: value[by_place] for name, value in joined.items()},
        signals={name: value[by_place.to(value.device)] for name, value in told.items()},
        separators=torch.cat(separators),
        separator_line=torch.cat(lines),
        total=sum(s.kept for s, _ in members),
        fixed=0,
        final=final,
    )
