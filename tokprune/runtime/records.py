"""What is known of one picture: while it is encoded (EncoderRecord), and from there to the report (StreamRecord)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.adapters.families import StreamLayout
from tokprune.adapters.foreign import ENCODER_RECORD
from tokprune.adapters.types import EncoderOutput, ModelCall
from tokprune.runtime.signals import BegunSignals, SignalSet
from tokprune.tokens import Layout, Selection, VisualTokens

if TYPE_CHECKING:
    from tokprune.runtime.decoder.frame import Drop


@dataclass
class EncoderRecord:
    """What was seen of one call of the vision tower; rides on its output until the prefill.

    It is never changed, but for what a prefill brings to the host (`encode.settle`).
    """

    modality: str
    kwargs: ModelCall
    """Of the call: pixels, grids and sizes, which generate() drops afterwards."""
    output: EncoderOutput
    """A copy of the encoder output."""
    sizes: list[int]
    """Rows of each item."""
    signals: SignalSet | None
    seconds: float
    items: Tensor | Sequence[Tensor] = ()
    """The features as they were encoded."""
    begun: BegunSignals | None = None
    """`signals` while the host does not know the sizes of the pictures; only where a prefill is about to tell them."""


def encoder_record(output: object) -> EncoderRecord | None:
    """What was seen while this output was encoded, if tokprune was there."""
    return getattr(output, ENCODER_RECORD, None)


def encoder_records(encoded: Mapping[str, EncoderOutput | None]) -> dict[str, EncoderRecord]:
    """The same by modality, of those that were seen."""
    return {modality: record for modality, output in encoded.items() if (record := encoder_record(output)) is not None}


@dataclass
class StreamRecord:
    """One image (with all its tiles) or video of one prompt: filled step by step on its way, and what the report reads.

    `pruning.last.streams` holds them, without features and signals (`finished`).
    """

    # From the encoder (streams.py)
    row: int
    """The prompt of the batch."""
    modality: str
    geometry: StreamLayout
    """Which of its rows are candidates and which separators."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """How each signal was made."""
    copies: int = 1
    """How many times the prompt stands in the batch, as beams repeat it; one record per copy in the end."""
    offset: int = 0
    """Its first row among the features of its modality."""
    visual: VisualTokens | None = field(default=None, repr=False)
    """What the method looks at, until the plan is made."""
    question: str | None = None
    """The words that the method compared with, where it reads them."""
    question_source: str | None = None
    """How the question was found."""
    encoded: EncoderRecord | None = None
    first_row: int = 0
    """Its first row in the encoder call of `encoded`."""
    whole: StreamLayout | None = None
    """Its geometry there, before the model itself dropped some of the rows."""
    note: str = ""
    # From the method (choose.py)
    selection: Selection = field(init=False, repr=False)
    indices: Tensor = field(init=False, repr=False)
    """(K,) `selection.indices` on the host."""
    spare: int = 0
    """Separators of lines without a token that stay all the same, to fill a prompt budget."""
    # From the plan (plan.py)
    separators_kept: int = 0
    columns: Tensor = field(init=False, repr=False)
    """(total + separators,) prompt columns of its rows, in encoder order."""
    candidates: Tensor = field(init=False, repr=False)
    """(total,) the column of each token as `layout` and `selection` number them."""
    signals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Those of the kept tokens that the decoder stage needs, until it has them."""

    @property
    def tokens(self) -> VisualTokens:
        """What the method looks at; gone once the plan is made."""
        if self.visual is None:
            raise AttributeError("the features of a finished prefill are not kept; the method saw them in select().")
        return self.visual

    @property
    def layout(self) -> Layout:
        """Where each candidate lies."""
        return self.geometry.layout

    @property
    def total(self) -> int:
        """Candidate tokens."""
        return self.geometry.rows.shape[0]

    @property
    def kept(self) -> int:
        """Tokens that the LLM gets, separators not counted."""
        return len(self.selection)

    @property
    def separators(self) -> int:
        """Newline tokens beside the candidates."""
        return self.geometry.separators.shape[0]

    def finished(self, copy_number: int, columns: Tensor) -> StreamRecord:
        """The record of one copy of the prompt, without features and signals. columns: (total + separators,)."""
        done = copy.copy(self)
        done.row, done.copies = self.row + copy_number, 1
        done.columns = columns
        done.candidates = columns[self.geometry.rows.to(columns.device)]
        done.visual, done.encoded, done.whole = None, None, None
        return done

    def frame_tokens(self) -> tuple[int, ...] | None:
        """Tokens kept of each frame of a video; None for an image. Asks the device."""
        if self.layout.kind != "video":
            return None
        group = self.layout.group[self.selection.indices.to(self.layout.group.device)]
        return tuple(torch.bincount(group, minlength=self.layout.num_groups).tolist())


@dataclass(frozen=True)
class PromptShare:
    """How one prompt of a batch spends its prompt budget."""

    row: int
    budget: int
    text: int
    """Tokens of this call that are no visual ones."""
    cached: int
    """Tokens that the cache brings from earlier turns."""
    visual: int = 0
    """Tokens of the pictures and the separators beside them."""


@dataclass
class LastRun:
    """The last prefill."""

    keep: Tensor
    """(B, L) prompt columns that survived."""
    streams: list[StreamRecord]
    policy: str
    """Of positions: "keep" or "compact"."""
    length: int
    """Physical width of the prompt."""
    encode_ms: float
    select_ms: float
    score_ms: float = 0.0
    note: str = ""
    """What the report says of the whole prompt."""
    prompts: list[PromptShare] = field(default_factory=list)
    """How each prompt with pictures spends its prompt budget, where one was given."""
    drops: list[Drop] = field(default_factory=list)
    """What the decoder stage dropped in front of layers of the LLM."""
    index: Tensor | None = field(default=None, repr=False)
    """(B, P) prompt column of each slot of layer 0, -1 for filler; None where the call ran as it was written."""

    def columns(self, layer: int = 0) -> Tensor:
        """(B, K) prompt column of each token that a layer of the LLM worked on in the prefill, -1 for filler.

        These are rows and columns of that layer's attentions in what forward() and generate() return. Hidden states
        have the prompt's own width.
        """
        drop = next((drop for drop in reversed(self.drops) if drop.layer <= layer), None)
        if drop is not None:
            return drop.columns
        if self.index is not None:
            return self.index
        return torch.arange(self.keep.shape[1], device=self.keep.device).masked_fill(~self.keep, -1)

    def columns_at(self, layer: int) -> Tensor:
        """(B, L) bool: prompt columns that are in a layer of the LLM."""
        columns = self.columns(layer).to(self.keep.device)
        left = torch.zeros(self.keep.shape[0], self.keep.shape[1] + 1, dtype=torch.bool, device=columns.device)
        return left.scatter(1, columns + 1, True)[:, 1:]
