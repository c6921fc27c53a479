"""Step 1 of the prefill: encode the pictures, and note what will be needed of that."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.families import EncoderCall
from tokprune.adapters.families.base import SHRUNK
from tokprune.adapters.foreign import ENCODER_RECORD, ENCODERS
from tokprune.adapters.hooks import Attachments, PerThread
from tokprune.adapters.types import EncoderOutput, Model, ModelCall, Original
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.host import to_host
from tokprune.runtime.probe import AttentionProbe
from tokprune.runtime.records import EncoderRecord, encoder_records
from tokprune.runtime.signal_blocks import of_tower, signal_probe
from tokprune.runtime.signals import BegunSignals, PatchScorer, SignalSet

if TYPE_CHECKING:
    from tokprune.runtime.encoder.stage import EncoderStage

SURVIVORS = "encoder_survivor"
"""The signal which rows the encoder stage left as groups' own places; from that stage, not from a probe."""
WORTH = "pixel_worth"
"""The signal by which a pixels method ranks rows; from that stage, too."""


def _sizes_in(arguments: ModelCall) -> list[str]:
    """Names of the arguments of an encoder call that say how large each picture is; the host reads them often."""
    ends = ("_sizes", "_sizes_videos", "_grid_thw", "_grids", "_num_images", SHRUNK)
    return [name for name, value in arguments.items() if name.endswith(ends) and isinstance(value, Tensor)]


def settle(records: Sequence[EncoderRecord], asked: Sequence[Tensor] = ()) -> list[Tensor]:
    """`asked` on the host. What families read of the encoder calls comes along, stays in their records, and lets
    signals that were begun be finished.
    """
    wanted = [(r.kwargs, name, cast(Tensor, r.kwargs[name])) for r in records for name in _sizes_in(r.kwargs)]
    made = [r.signals.values for r in records if r.signals is not None]
    wanted += [(values, SURVIVORS, values[SURVIVORS]) for values in made if SURVIVORS in values]
    bounds = [[] if r.begun is None else r.begun.bounds for r in records]
    # Numbers with a point travel as the whole numbers of their bits.
    whole = [v.view(torch.int32) if v.dtype == torch.float32 else v for _, _, v in wanted]
    host = iter(to_host(*asked, *whole, *(ends for some in bounds for ends in some)))
    answers = [next(host) for _ in asked]
    for kwargs, name, value in wanted:
        found = next(host)
        kwargs[name] = found.view(torch.float32) if value.dtype == torch.float32 else found
    for record, some in zip(records, bounds, strict=True):
        ends = [next(host) for _ in some]
        if record.begun is not None:
            record.signals, record.begun = record.begun.finish(ends), None
    return answers


def encode(
    adapter: Adapter, call: ModelCall, records: Mapping[str, EncoderRecord] | None = None
) -> dict[str, EncoderOutput]:
    """The encoder outputs of a call by modality: those that came with it, and its pixels encoded now.

    records: what was seen of outputs that lost it on the way.
    """
    encoded: dict[str, EncoderOutput] = adapter.encode(call)
    for modality, output in encoded.items():
        if output is not None:
            adapter.family.expose(output)
            if getattr(output, "pooler_output", None) is None:
                raise UnsupportedModelError(
                    f"{type(adapter.model).__name__} ({adapter.config.model_type}) encodes {modality}s to a "
                    f"{type(output).__name__} without pooler_output; tokprune does not know its features."
                )
    for modality, record in (records or {}).items():
        if encoded.get(modality) is not None and not hasattr(encoded[modality], ENCODER_RECORD):
            encoded[modality] = copy.copy(encoded[modality])
            setattr(encoded[modality], ENCODER_RECORD, record)
    return encoded


@dataclass
class _Call:
    """Where this thread is."""

    open: bool = False
    """Inside an observed encoder call."""
    prefill: bool = False
    """What is encoded is read by a prefill right behind, which brings sizes to the host."""


class Recorder:
    """Observes get_image_features and get_video_features of one model: generate() encodes before the prefill, and drops
    pixels, grids and sizes afterwards, so layout and signals must be taken there.

    What the probe sees belongs to one call of one thread; other models may hold the same tower and call it meanwhile.
    """

    def __init__(
        self,
        adapter: Adapter,
        needs: Sequence[str],
        scorer: PatchScorer | None = None,
        encoder: EncoderStage | None = None,
    ) -> None:
        self.adapter, self.scorer, self.encoder = adapter, scorer, encoder
        self.needs = tuple(n for n in of_tower(needs) if n not in (SURVIVORS, WORTH))
        self.threads = PerThread(_Call)
        self.on = Attachments(self)
        self.probe: AttentionProbe | None = signal_probe(adapter.base, self.needs) if self.needs else None
        if self.probe is not None and self.probe.listens:
            from tokprune.runtime.encoder.stage import refuse_two_reductions

            refuse_two_reductions(self.probe.tower, adapter.model, reduces=False)

    def anchor(self) -> Model:
        """The model that is observed."""
        return self.adapter.model

    def install(self) -> None:
        """Start observing; instance attributes and hooks only."""
        base = self.adapter.base
        if self.probe is not None:
            self.probe.install(own_calls=True)
        for name in ENCODERS:
            if hasattr(base, name):
                self.on.instead(base, name, "_call", name.split("_")[1])

    def remove(self) -> None:
        """Stop observing."""
        self.on.remove()
        if self.probe is not None:
            self.probe.remove()

    @contextlib.contextmanager
    def before_prefill(self) -> Iterator[None]:
        """What this thread encodes inside is read by a prefill right behind: signals wait for its transfer to the
        host.
        """
        self.threads.now.prefill = True
        try:
            yield
        finally:
            self.threads.now.prefill = False

    def _call(self, modality: str, original: Original, *args: object, **kwargs: object) -> object:
        if self.threads.now.open:  # Qwen3-VL encodes videos with its own get_image_features
            return original(*args, **kwargs)
        self.threads.now.open = True
        try:
            return self._observe(original, modality, args, kwargs)
        finally:
            self.threads.now.open = False
            if self.probe is not None:
                self.probe.clear()

    def _observe(self, original: Original, modality: str, args: tuple[object, ...], kwargs: ModelCall) -> object:
        start = time.perf_counter()
        with contextlib.nullcontext() if self.probe is None else self.probe.listening():
            output = original(*args, **kwargs)
        seconds = time.perf_counter() - start
        arguments = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        with torch.no_grad():
            self._record(modality, arguments, output, seconds)
        return output

    @torch.compiler.disable
    def _record(self, modality: str, arguments: ModelCall, output: EncoderOutput, seconds: float) -> None:
        self.adapter.family.expose(output)
        if getattr(output, "pooler_output", None) is None:
            return
        sizes = [f.shape[0] for f in flatten(output.pooler_output)]
        seen = copy.copy(output)
        if not isinstance(seen.pooler_output, Tensor):
            seen.pooler_output = tuple(seen.pooler_output)  # the list may be changed by whoever holds it
        call = EncoderCall(self.adapter.base, modality, arguments, seen)
        record = EncoderRecord(modality, arguments, seen, sizes, None, seconds, seen.pooler_output)
        if self.probe is not None:
            record.begun = BegunSignals(call, self.probe, self.needs, self.scorer, self.encoder)
        if self.encoder is not None or (self.needs and not self.threads.now.prefill):
            settle([record])
        if self.encoder is not None:
            self._note_survivors(self.encoder, record, call)
        setattr(output, ENCODER_RECORD, record)

    def _note_survivors(self, encoder: EncoderStage, record: EncoderRecord, call: EncoderCall) -> None:
        """What the encoder stage left, as signals."""
        from tokprune.runtime.encoder.handoff import survivor_rows, worth_rows

        record.signals = SignalSet() if record.signals is None else record.signals
        record.signals.values[SURVIVORS] = survivor_rows(encoder, call)
        if encoder.pixels is not None:
            record.signals.values[WORTH] = worth_rows(encoder, call)


def encoding_ms(encoded: Mapping[str, EncoderOutput | None]) -> float:
    """Milliseconds that encoding these outputs took, as far as tokprune saw it."""
    return sum(record.seconds for record in encoder_records(encoded).values()) * 1e3
