"""One budget for a whole prompt: what its text leaves for the pictures, and a choice that meets it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokprune.adapters.dialect import cache_in
from tokprune.adapters.types import ModelCall
from tokprune.config import PruneConfig
from tokprune.errors import BudgetError, OptionError, TokpruneError
from tokprune.methods.base import ConnectorMethod
from tokprune.runtime.cache_record import get_state, physical_length
from tokprune.runtime.choose import choose, kept_rows
from tokprune.runtime.options import Options
from tokprune.runtime.plan import Columns
from tokprune.runtime.records import PromptShare, StreamRecord
from tokprune.tokens import Selection

ROUNDS = 4
"""How often a method may be asked, where the newlines that stay depend on what it chooses."""


class PromptRoom:
    """The pictures of one prompt, and the counts of tokens between which a choice fills the room left for them.

    A newline stays iff a token of its line does, and counts. So `low` tokens are known to fit and more than `high` not
    to; where the search ends in between, newlines of empty lines fill the rest. That always suffices: `low` is at least
    the room less all newlines.
    """

    def __init__(self, method: ConnectorMethod, streams: Sequence[StreamRecord], share: PromptShare) -> None:
        self.streams, self.share = streams, share
        bounds = [method.bounds(stream.tokens) for stream in streams]
        self.least, self.most = [low for low, _ in bounds], [high for _, high in bounds]
        newlines = [stream.separators for stream in streams]
        self.room = share.budget - share.text - share.cached
        needed = sum(low + min(low, lines) for low, lines in zip(self.least, newlines, strict=True))
        if needed > self.room:
            before = f" and {share.cached} of earlier turns" if share.cached else ""
            raise BudgetError(
                f"prompt {share.row} has {share.text} tokens of text{before} beside {len(streams)} picture(s), which "
                f"need {needed} at least; prompt_budget={share.budget} leaves {max(self.room, 0)}. Give "
                f"prompt_budget={share.budget - self.room + needed} or more, fewer pictures, or less text."
            )
        everything = sum(self.most)
        self.high = min(self.room, everything)
        self.low = min(max(self.room - sum(newlines), self.room // 2, sum(self.least)), self.high)
        self.asked = self.low
        self.best: list[tuple[Selection, Tensor]] = []
        self.filled = 0  # by `best`, newlines included

    @property
    def keeps(self) -> list[int]:
        """The keep count of each picture for `asked` tokens."""
        return PruneConfig.shares(self.asked, [len(s.tokens) for s in self.streams], self.least, self.most)

    @property
    def settled(self) -> bool:
        """Whether no other count could fill more."""
        return bool(self.best) and (self.low >= self.high or self.filled == self.room)

    def note(self) -> None:
        """Look at what was chosen for `asked` tokens, and decide how many to ask for next."""
        taken = sum(len(stream.selection) for stream in self.streams)
        lines = sum(kept_rows(stream)[2] for stream in self.streams)
        if taken != self.asked:
            raise TokpruneError(f"{taken} tokens were kept where prompt {self.share.row} asked for {self.asked}.")
        first = not self.best
        if taken + lines <= self.room:
            self.low, self.filled = self.asked, taken + lines
            self.best = [(stream.selection, stream.indices) for stream in self.streams]
        else:
            self.high = self.asked - 1
        guess = self.room - lines
        self.asked = guess if first and self.low < guess <= self.high else (self.low + self.high + 1) // 2

    def finish(self) -> PromptShare:
        """Settle for the best choice, fill what is left with newlines, and tell what the pictures take."""
        spare = self.room - self.filled if self.low < sum(self.most) else 0
        for stream, (selection, indices) in zip(self.streams, self.best, strict=True):
            stream.selection, stream.indices, stream.spare = selection, indices, 0
            stream.spare = min(spare, stream.separators - kept_rows(stream)[2])
            spare -= stream.spare
            self.filled += stream.spare
        return replace(self.share, visual=self.filled)


@dataclass(frozen=True)
class Demand:
    """How much of each stream of a call is to stay, before the method may balance that."""

    streams: Sequence[StreamRecord]
    asked: Sequence[int]
    reduced: list[StreamRecord]
    """Those that may lose tokens."""
    prompts: list[PromptRoom]
    """Where a prompt budget says it."""

    @staticmethod
    def of(
        options: Options, streams: Sequence[StreamRecord], columns: Columns, call: ModelCall, prompt_length: int | None
    ) -> Demand:
        """By ratio or budget, stream by stream, or by a prompt budget; refuses prompts that it cannot hold.

        All that the LLM holds at the end of the prefill counts for a prompt budget: text and placeholders of other
        kinds, then what a cache brings from earlier turns. Columns after `prompt_length`, which generate() wrote, do
        not: a prompt that is read again without a cache keeps what it kept.
        """
        prompts: list[PromptRoom] = []
        if options.prompt_budget is None:
            asked = [options.count(len(stream.tokens)) for stream in streams]
        else:
            if columns.segments is not None:
                raise OptionError(
                    "prompt_budget is of a prompt, and this row packs several samples; give ratio or budget."
                )
            present, cached = columns.present[:, :prompt_length].sum(1), _cached(columns, call)
            for row in sorted({stream.row for stream in streams}):
                members = [stream for stream in streams if stream.row == row]
                text = int(present[row]) - sum(stream.geometry.total for stream in members)
                share = PromptShare(row, options.prompt_budget, text, int(cached[row]))
                prompts.append(PromptRoom(options.method, members, share))
            keeps = {id(s): k for one in prompts for s, k in zip(one.streams, one.keeps, strict=True)}
            asked = [keeps[id(stream)] for stream in streams]
        always = options.method.drops_at_full_budget
        reduced = [s for s, keep in zip(streams, asked, strict=True) if always or keep < len(s.tokens)]
        return Demand(streams, asked, reduced, prompts)

    def choose(self, method: ConnectorMethod) -> list[PromptShare]:
        """Let the method decide; fills `selection` of the streams, and tells how each copy of a prompt spends its
        prompt budget, where there is one.
        """
        if not self.prompts:
            choose(method, self.streams, self.asked)
            return []
        pending = self.prompts
        for _ in range(ROUNDS):
            asked = [(stream, keep) for one in pending for stream, keep in zip(one.streams, one.keeps, strict=True)]
            choose(method, [stream for stream, _ in asked], [keep for _, keep in asked])
            for one in pending:
                one.note()
            pending = [one for one in pending if not one.settled]
            if not pending:
                break
        shares = [(one.streams[0].copies, one.finish()) for one in self.prompts]
        return [replace(share, row=share.row + copy) for copies, share in shares for copy in range(copies)]


def _cached(columns: Columns, call: ModelCall) -> Tensor:
    """(B,) tokens that the cache of a call holds of each prompt."""
    cache, batch = cache_in(call), columns.visible.shape[0]
    held, state = physical_length(cache), get_state(cache)
    if state is not None:
        return (state.on_host().columns(held) >= 0).sum(1)
    if columns.mask is not None and columns.mask.shape[1] > columns.visible.shape[1]:
        return columns.mask[:, : -columns.visible.shape[1]].sum(1)
    return torch.full((batch,), held)
