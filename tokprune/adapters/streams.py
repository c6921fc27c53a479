"""From encoder outputs to visual token streams, and from a method's decisions back to encoder rows."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.attach import Attachments, PerThread
from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.families import EncoderCall, PlaceholderRun, StreamLayout, placeholder_runs, stream_layouts
from tokprune.adapters.probe import AttentionProbe
from tokprune.adapters.signals import SignalSet, compute_signals, signal_probe
from tokprune.errors import MissingSignalError, TokpruneError
from tokprune.methods.base import ConnectorMethod
from tokprune.tokens import Layout, Query, Selection, VisualTokens

# Needs that do not come from the vision tower's call.
QUERY_NEEDS = ("clip_text", "frame_scores")
# Which rows the encoder stage left as groups' own places; given by its handle, not by a probe.
SURVIVORS = "encoder_survivor"


@dataclass
class EncoderRecord:
    """What was seen while a modality was encoded; rides on the encoder output until the prefill."""

    modality: str
    kwargs: dict[str, Any]
    output: Any
    sizes: list[int]
    signals: SignalSet | None
    seconds: float


@dataclass
class _Call:
    """Whether this thread is inside an observed encoder call."""

    open: bool = False


class Recorder:
    """Observes get_image_features and get_video_features of one model: generate() encodes before the prefill, and drops
    pixels, grids and sizes afterwards, so layout and signals must be taken there.

    What the probe sees belongs to one call of one thread; other models may hold the same tower and call it meanwhile.
    """

    def __init__(self, adapter: Adapter, needs: Sequence[str], scorer: Any = None, encoder: Any = None) -> None:
        self.adapter, self.scorer, self.encoder = adapter, scorer, encoder
        self.needs = tuple(n for n in needs if n not in QUERY_NEEDS and n != SURVIVORS)
        self.threads = PerThread(_Call)
        self.on = Attachments(self)
        self.probe: AttentionProbe | None = signal_probe(adapter.base, self.needs) if self.needs else None

    def anchor(self) -> Any:
        """The model that is observed."""
        return self.adapter.model

    def install(self) -> None:
        """Start observing; instance attributes and hooks only."""
        base = self.adapter.base
        if self.probe is not None:
            self.probe.install(own_calls=True)
        for name in ("get_image_features", "get_video_features"):
            if hasattr(base, name):
                self.on.instead(base, name, "_call", name.split("_")[1])

    def remove(self) -> None:
        """Stop observing."""
        self.on.remove()
        if self.probe is not None:
            self.probe.remove()

    def _call(self, modality: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.threads.now.open:  # Qwen3-VL encodes videos with its own get_image_features
            return original(*args, **kwargs)
        self.threads.now.open = True
        try:
            return self._observe(original, modality, args, kwargs)
        finally:
            self.threads.now.open = False
            if self.probe is not None:
                self.probe.clear()

    def _observe(self, original: Any, modality: str, args: Any, kwargs: Any) -> Any:
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
    def _record(self, modality: str, arguments: dict[str, Any], output: Any, seconds: float) -> None:
        if getattr(output, "pooler_output", None) is None:
            return
        signals = None
        if self.needs:
            inside = (self.scorer, self.encoder)
            signals = compute_signals(self.adapter.base, modality, arguments, output, self.probe, self.needs, *inside)
        if self.encoder is not None:
            from tokprune.adapters.splice.handoff import survivor_rows

            signals = SignalSet() if signals is None else signals
            signals.values[SURVIVORS] = survivor_rows(
                self.encoder, EncoderCall(self.adapter.base, modality, arguments, output)
            )
        sizes = [f.shape[0] for f in flatten(output.pooler_output)]
        output.tokprune_record = EncoderRecord(modality, arguments, copy.copy(output), sizes, signals, seconds)


@dataclass
class Stream:
    """One image or video of one prompt: its columns, and the method's view of it.

    record, first_row, whole: the encoder call it comes from, its first row there, and its geometry before the model itself
    dropped some of the rows. note: what the method has to say about it.
    """

    row: int
    copies: int
    modality: str
    offset: int
    geometry: StreamLayout
    tokens: VisualTokens
    sources: Mapping[str, str] = field(default_factory=dict)
    record: EncoderRecord | None = None
    first_row: int = 0
    whole: StreamLayout | None = None
    note: str = ""
    keep: int = 0
    selection: Selection | None = None


def _runs(adapter: Adapter, ids: Tensor | None, columns: Tensor, copies: int) -> list[PlaceholderRun] | None:
    """The prompt's placeholder runs, for the families whose tiles are told apart by them; copies of a prompt count once."""
    if not adapter.family.reads_runs:
        return None
    if ids is None:
        ids = torch.zeros_like(columns, dtype=torch.long)  # embeddings only: lengths still tell contiguous tiles
    return placeholder_runs(ids[::copies], columns[::copies])


def _unknown(n: int) -> StreamLayout:
    """A stream of which only the number of tokens is known."""
    none = torch.zeros(0, dtype=torch.long)
    return StreamLayout(
        rows=torch.arange(n),
        total=n,
        layout=Layout.line(n),
        separators=none,
        separator_line=none,
        line=torch.zeros(n, dtype=torch.long),
        note="encoded before tokprune saw it: geometry unknown",
    )


def _subset(geometry: StreamLayout, kept: Tensor) -> tuple[StreamLayout, Tensor]:
    """A stream after the model itself dropped some of its rows. kept: (total,) bool. Returns it and the candidates left."""
    new_row = kept.cumsum(0) - 1
    stay = kept[geometry.rows]
    lay = geometry.layout
    layout = replace(lay, group=lay.group[stay], row=lay.row[stay], col=lay.col[stay])
    separators = kept[geometry.separators]
    return (
        replace(
            geometry,
            rows=new_row[geometry.rows[stay]],
            total=int(kept.sum()),
            layout=layout,
            line=geometry.line[stay],
            separators=new_row[geometry.separators[separators]],
            separator_line=geometry.separator_line[separators],
        ),
        stay,
    )


def build_streams(
    adapter: Adapter,
    modality: str,
    output: Any,
    columns: Tensor,
    queries: Sequence[Query | None],
    needs: Sequence[str],
    ids: Tensor | None = None,
    survivors: Tensor | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Stream]:
    """The streams of one modality of a prefill, one per image or video of each prompt.

    columns: (B, L) bool placeholder columns. queries: one per prompt. ids: (B, L) the prompt, when known. survivors: (R,)
    rows the model itself left over. decode: token ids to text, when a processor is at hand.
    Beams and return sequences repeat whole prompts; a prompt's streams are built once, with `copies` > 1.
    """
    features = torch.cat(flatten(output.pooler_output))  # (R, D)
    per_row = columns.sum(1).tolist()
    if sum(per_row) != features.shape[0]:
        raise TokpruneError(
            f"{modality}: the prompt has {sum(per_row)} placeholder tokens but the encoder gave {features.shape[0]} features; "
            "the processor and the model do not belong together, or the prompt was cut."
        )
    record: EncoderRecord | None = getattr(output, "tokprune_record", None)
    recorded = 0 if record is None else sum(record.sizes) if survivors is None else int(survivors.sum())
    if recorded == 0 or features.shape[0] % recorded:
        record, copies = None, 1
    else:
        copies = features.shape[0] // recorded
    prompts = list(range(0, len(per_row), copies))
    needed = [n for n in needs if n not in QUERY_NEEDS]
    if record is None:
        if needed:
            raise MissingSignalError(
                f"the {modality} features were encoded before tokprune was applied, so the signals {', '.join(needed)} are not "
                "known. Pass the pixels, or encode again after apply."
            )
        sizes = [f.shape[0] for f in flatten(output.pooler_output)]
        geometries = [_unknown(n) for n in sizes]
    else:
        runs = None if survivors is not None else _runs(adapter, ids, columns, copies)
        geometries = stream_layouts(adapter.base, modality, record.kwargs, record.output, runs=runs, decode=decode)
    streams: list[Stream] = []
    signal_rows = 0  # rows of the recorded signals already used, before the model's own dropping
    feature_rows = 0
    queue = iter(geometries)
    for b in prompts:
        todo = per_row[b]
        first = feature_rows
        while todo > 0:
            geometry = next(queue)
            stay = None
            span = slice(signal_rows, signal_rows + geometry.total)
            signal_rows += geometry.total
            rows, whole = geometry.rows, geometry
            if survivors is not None:
                geometry, stay = _subset(geometry, survivors[span].to(geometry.rows.device))
            if geometry.total == 0:
                continue
            device = features.device
            local = features[first + per_row[b] - todo :][: geometry.total]
            values = {}
            if record is not None and record.signals is not None:
                for name, value in record.signals.values.items():
                    value = value[span][rows.to(value.device)]
                    values[name] = (value if stay is None else value[stay.to(value.device)]).to(device)
            tokens = VisualTokens(
                local[geometry.rows.to(device)].detach(), geometry.layout.to(device), values, queries[b]
            )
            sources = {} if record is None or record.signals is None else record.signals.sources
            offset = first + per_row[b] - todo
            streams.append(Stream(b, copies, modality, offset, geometry, tokens, sources, record, span.start, whole))
            todo -= geometry.total
        if todo < 0:
            raise TokpruneError(
                f"{modality}: an image's features straddle two prompts of the batch; check the number of images per prompt."
            )
        feature_rows = first + per_row[b] * copies
    return streams


def choose(method: ConnectorMethod, streams: Sequence[Stream], keep_of: Any) -> float:
    """Let the method decide about every stream; fills `keep` and `selection`. Returns the seconds it took.

    keep_of: tokens to keep of n. A stream that may keep all its tokens is passed through untouched, so that ratio=1 is
    exact for methods that merge, too. Methods that balance images of one prompt do so through `budgets`.
    """
    start = time.perf_counter()
    by_prompt: dict[int, list[Stream]] = {}
    for stream in streams:
        stream.keep = keep_of(len(stream.tokens))
        by_prompt.setdefault(stream.row, []).append(stream)
    for members in by_prompt.values():
        keeps = method.budgets([s.tokens for s in members], [s.keep for s in members])
        for stream, keep in zip(members, keeps, strict=True):
            stream.keep = int(keep)
    active = [s for s in streams if s.keep < len(s.tokens) or method.drops_at_full_budget]
    for stream in streams:
        if stream.keep >= len(stream.tokens) and not method.drops_at_full_budget:
            stream.selection = Selection(torch.arange(len(stream.tokens), device=stream.tokens.features.device))
    if active:
        chosen = method.select_batch([s.tokens for s in active], [s.keep for s in active])
        for stream, selection in zip(active, chosen, strict=True):
            n, k = len(stream.tokens), len(selection)
            if k != stream.keep and (method.exact or not 0 < k <= n):
                raise TokpruneError(
                    f"method {method.info.name!r} kept {k} tokens of {n} where {stream.keep} were asked for."
                )
            if selection.features is not None and selection.features.shape[0] != k:
                raise TokpruneError(
                    f"method {method.info.name!r} gave {selection.features.shape[0]} features for {k} slots."
                )
            stream.selection = selection
    return time.perf_counter() - start


def kept_rows(stream: Stream) -> tuple[Tensor, Tensor, int]:
    """Encoder rows of a stream that survive, relative to the stream.

    Returns slots (K,) of the selected candidates in the order of the selection, all kept rows as a (total,) bool, and how
    many separators are among them (a newline stays iff a token of its line does).
    """
    selection, geometry = stream.selection, stream.geometry
    if selection is None:
        raise TokpruneError("no selection was made for this stream.")
    indices = selection.indices.to(geometry.rows.device)
    slots = geometry.rows[indices]
    keep = torch.zeros(geometry.total, dtype=torch.bool, device=geometry.rows.device)
    keep[slots] = True
    separators = torch.isin(geometry.separator_line, geometry.line[indices])
    keep[geometry.separators[separators]] = True
    return slots, keep, int(separators.sum())
