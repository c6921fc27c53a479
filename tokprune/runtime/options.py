"""What the stages of a prefill need to know of a pruning set-up, and what rides along with one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokprune.adapters.types import Processor, RotaryTable, Scorer
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.frames_base import PerFrame
from tokprune.runtime.execute import PrunedForward
from tokprune.runtime.records import EncoderRecord
from tokprune.runtime.tripwires import Passage

if TYPE_CHECKING:
    from tokprune.runtime.decoder.stage import DecoderStage
    from tokprune.runtime.encoder.stage import EncoderStage


@dataclass
class Options:
    """What the prefill needs to know of a pruning set-up."""

    method: ConnectorMethod
    count: Callable[[int], int]
    """Keep count of n tokens."""
    positions: str = "auto"
    query: str | Sequence[str] | None = None
    processor: Processor = None
    scorer: Scorer = None
    encoder: EncoderStage | None = None
    """The encoder stage of the same model, whose survivors are the candidates."""
    frames: PerFrame | None = None
    """The frames method with what works inside the frames; `method` is it, or wraps it."""
    ratio: float | None = None
    """The share that the connector is asked to keep, where it is asked for one."""
    prompt_budget: int | None = None
    """Tokens of a whole prompt, where that is given instead of `count`."""
    packing: str = "padded"
    """How rows that keep different numbers are read: padded to one length, in groups of like length, or as it pays."""
    cached: bool = False
    """A decoder or cache stage follows: it needs the record even of a prompt that keeps everything."""
    decoder: DecoderStage | None = None
    """The decoder stage of the same model."""

    def may_drop(self, n: int) -> bool:
        """Whether any of n visual tokens could have to go."""
        return self.prompt_budget is not None or self.count(n) < n

    @property
    def needs(self) -> tuple[str, ...]:
        """Signals that the vision tower is read for."""
        return tuple(dict.fromkeys((*self.method.needs, *(self.decoder.method.needs if self.decoder else ()))))


@dataclass(eq=False)
class GenerateStep:
    """Rides from prepare_inputs_for_generation to the base model as a keyword."""

    physical: bool
    """The call is translated already."""
    records: dict[str, EncoderRecord] = field(default_factory=dict)
    """What was seen of the encoder, by modality: accelerate's hooks rebuild encoder outputs on the way and would lose
    what rides on them, but leave an object like this one alone."""
    prompt_length: int | None = None
    """Of the prompt that generate() was given, where a call holds words of the answer as well."""
    decode: bool = False
    """It is a decode step."""
    open: bool = False
    """No key is hidden by a mask."""


@dataclass
class ThreadState:
    """What this thread's call of the model is in the middle of."""

    forward: PrunedForward | None = None
    physical_prefill: bool = False
    """Inside a chunked prefill whose prompt is shortened already."""
    prompt_length: int | None = None
    """Length of the prompt that this thread's generate() began with."""
    rotary_table: RotaryTable | None = None
    passage: Passage = field(default_factory=Passage)
