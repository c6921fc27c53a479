"""From encoder outputs to visual token streams, and from a method's decisions back to encoder rows."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.families import EncoderCall, PlaceholderRun, StreamLayout, placeholder_runs
from tokprune.adapters.hooks import Attachments, PerThread
from tokprune.errors import MissingSignalError, PromptError, TokpruneError
from tokprune.methods.base import ConnectorMethod
from tokprune.runtime.probe import AttentionProbe
from tokprune.runtime.reuse import are_copies, arranged
from tokprune.runtime.signals import SignalSet, compute_signals, signal_probe
from tokprune.tokens import Layout, Query, Selection, VisualTokens

# Needs that do not come from the vision tower's call.
QUERY_NEEDS = ("clip_text", "frame_scores")
# Which rows the encoder stage left as groups' own places; given by its handle, not by a probe.
SURVIVORS = "encoder_survivor"


@dataclass
class EncoderRecord:
    """What was seen while a modality was encoded; rides on the encoder output until the prefill, and is never changed.

    output: a copy of the encoder output. items: its features as they were given, a tuple or a tensor. sizes: rows of each.
    """

    modality: str
    kwargs: dict[str, Any]
    output: Any
    sizes: list[int]
    signals: SignalSet | None
    seconds: float
    items: Any = ()


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
        if self.probe is not None and self.probe.listens:
            from tokprune.runtime.encoder.stage import refuse_two_reductions

            refuse_two_reductions(self.probe.tower, adapter.model, reduces=False)

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
            from tokprune.runtime.encoder.handoff import survivor_rows

            signals = SignalSet() if signals is None else signals
            signals.values[SURVIVORS] = survivor_rows(
                self.encoder, EncoderCall(self.adapter.base, modality, arguments, output)
            )
        sizes = [f.shape[0] for f in flatten(output.pooler_output)]
        seen = copy.copy(output)
        if not isinstance(seen.pooler_output, Tensor):
            seen.pooler_output = tuple(seen.pooler_output)  # the list may be changed by whoever holds it
        output.tokprune_record = EncoderRecord(modality, arguments, seen, sizes, signals, seconds, seen.pooler_output)


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


def _runs(
    adapter: Adapter, ids: Tensor | None, columns: Tensor, copies: int, x: Tensor | None = None
) -> list[PlaceholderRun] | None:
    """The prompt's placeholder runs, for the families whose tiles are told apart by them; copies of a prompt count once."""
    if not adapter.family.reads_runs:
        return None
    if ids is None and x is not None and x.ndim == 3:
        ids = ids_of(adapter.base.get_input_embeddings(), x, ~columns)
    if ids is None:
        ids = torch.zeros_like(columns, dtype=torch.long)  # lengths still tell contiguous tiles
    return placeholder_runs(ids[::copies], columns[::copies])


@torch.no_grad()
def ids_of(table: Any, embeds: Tensor, where: Tensor) -> Tensor:
    """Token ids (B, L) of embeddings (B, L, D) that are rows of the table, 0 for others and outside `where` (B, L).

    table: the embedding module; called piece by piece, for its weight may be offloaded and its output scaled.
    """
    ids = torch.zeros(where.shape, dtype=torch.long, device=embeds.device)
    wanted = embeds[where]
    found = torch.zeros(len(wanted), dtype=torch.long, device=embeds.device)
    count = int(getattr(table, "num_embeddings", 0))
    for start in range(0, count, 4096):
        piece = table(torch.arange(start, min(start + 4096, count), device=embeds.device)).to(wanted)
        near = (wanted[:, None, :4] == piece[None, :, :4]).all(-1).nonzero()  # (M, 2) a few numbers of each agree
        near = near[(wanted[near[:, 0]] == piece[near[:, 1]]).all(-1)]
        found[near[:, 0]] = near[:, 1] + start
    ids[where] = found
    return ids


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


def _first_copies(source: list[int], output: Any, per_row: Sequence[int], copies: int) -> list[int]:
    """The items of every first prompt of `copies` equal ones."""
    if copies == 1:
        return source
    ends = list(accumulate(per_row))
    row, done, out = 0, 0, []
    for item, features in zip(source, flatten(output.pooler_output), strict=True):
        while done >= ends[row]:
            row += 1
        if row % copies == 0:
            out.append(item)
        done += features.shape[0]
    return out


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
    source: list[int] | None = None,
    x: Tensor | None = None,
) -> list[Stream]:
    """The streams of one modality of a prefill, one per image or video of each prompt.

    columns: (B, L) bool placeholder columns. queries: one per prompt. ids: (B, L) the prompt, when known. survivors: (R,)
    rows the model itself left over. decode: token ids to text, when a processor is at hand.
    source: which recorded item each item of the output is (sources_of). x: ids or embeddings of the prompts.
    Beams and return sequences repeat whole prompts; a prompt's streams are built once, with `copies` > 1.
    """
    features = torch.cat(flatten(output.pooler_output))  # (R, D)
    per_row = columns.sum(1).tolist()
    if sum(per_row) != features.shape[0]:
        raise PromptError(
            f"{modality}: the prompt has {sum(per_row)} placeholder tokens but the encoder gave {features.shape[0]} features; "
            "the processor and the model do not belong together, or the prompt was cut."
        )
    record: EncoderRecord | None = getattr(output, "tokprune_record", None)
    copies, found = 1, None
    if record is not None and source is not None and (survivors is None or len(source) == len(record.items)):
        if len(source) > len(record.items) and len(source) % len(record.items) == 0 and x is not None:
            many = len(source) // len(record.items)
            copies = many if are_copies(x, per_row, features, queries, many) else 1
        source = _first_copies(source, output, per_row, copies)
        runs = None if survivors is not None else _runs(adapter, ids, columns, copies, x)
        found = arranged(adapter, record, source, runs, decode)
    prompts = list(range(0, len(per_row), copies))
    needed = [n for n in needs if n not in QUERY_NEEDS]
    if found is not None:
        record, geometries, firsts = found
    else:
        if needed:
            why = (
                "are not those that tokprune saw being encoded"
                if record
                else "were encoded before tokprune was applied"
            )
            raise MissingSignalError(
                f"the {modality} features {why}, so the signals {', '.join(needed)} are not known. Pass the pixels, or encode again "
                "after apply and pass the outputs as they come."
            )
        record, copies, prompts = None, 1, list(range(len(per_row)))
        ends = {*accumulate(f.shape[0] for f in flatten(output.pooler_output)), *accumulate(per_row)} - {0}
        geometries = [_unknown(stop - start) for start, stop in pairwise([0, *sorted(ends)])]
        firsts = [0] * len(geometries)
    streams: list[Stream] = []
    feature_rows = 0
    queue = iter(zip(geometries, firsts, strict=True))
    for b in prompts:
        todo = per_row[b]
        first = feature_rows
        while todo > 0:
            geometry, start = next(queue)
            stay = None
            span = slice(start, start + geometry.total)
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
            raise PromptError(
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
            check_form(method, selection, stream)
            n, k = len(stream.tokens), len(selection)
            if k != stream.keep and (method.exact or not 0 < k <= n):
                raise TokpruneError(
                    f"method {method.info.name!r} kept {k} tokens of {n} where {stream.keep} were asked for."
                )
            stream.selection = selection
    return time.perf_counter() - start


def check_form(method: ConnectorMethod, selection: Any, stream: Stream) -> None:
    """Refuse a decision of the wrong kind or shape: what can be told without asking the device."""
    name, n = method.info.name, len(stream.tokens)
    if not isinstance(selection, Selection):
        raise TokpruneError(
            f"method {name!r} returned {type(selection).__name__}; it must return a Selection per stream."
        )
    indices = selection.indices
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        given = (
            f"{indices.dtype} of shape {tuple(indices.shape)}"
            if isinstance(indices, Tensor)
            else type(indices).__name__
        )
        raise TokpruneError(f"method {name!r} gave indices as {given}; they must be a (K,) tensor of torch.int64.")
    k = len(selection)
    if selection.features is not None and tuple(selection.features.shape) != (k, stream.tokens.features.shape[1]):
        raise TokpruneError(
            f"method {name!r} gave features of shape {tuple(selection.features.shape)} for {k} slots of width "
            f"{stream.tokens.features.shape[1]}."
        )
    merge = selection.weights
    rows, target = (None, None) if merge is None else (merge.rows, merge.target)
    if rows is not None and tuple(rows.shape) != (k, n):
        raise TokpruneError(f"method {name!r} gave merge rows of shape {tuple(rows.shape)}; {(k, n)} is needed.")
    if target is not None and tuple(target.shape) != (n,):
        raise TokpruneError(f"method {name!r} gave merge targets of shape {tuple(target.shape)}; {(n,)} is needed.")


def check_values(indices: Tensor, n: int) -> None:
    """Refuse indices, on the host already, that do not ascend, repeat or leave the stream's `n` tokens."""
    bad = bool((indices.diff() <= 0).any()) or (len(indices) > 0 and not 0 <= int(indices[0]) <= int(indices[-1]) < n)
    if bad:
        raise TokpruneError(
            f"a method returned indices that are not ascending, distinct and between 0 and {n - 1}: {indices[:8].tolist()}"
            f"{' …' if len(indices) > 8 else ''}. Return Selection(indices.unique()) or sort them; every token is kept once."
        )


def kept_rows(stream: Stream) -> tuple[Tensor, Tensor, int]:
    """Encoder rows of a stream that survive, relative to the stream.

    Returns slots (K,) of the selected candidates in the order of the selection, all kept rows as a (total,) bool, and how
    many separators are among them (a newline stays iff a token of its line does).
    """
    selection, geometry = stream.selection, stream.geometry
    if selection is None:
        raise TokpruneError("no selection was made for this stream.")
    indices = selection.indices.to(geometry.rows.device)
    check_values(indices, len(stream.tokens))
    slots = geometry.rows[indices]
    keep = torch.zeros(geometry.total, dtype=torch.bool, device=geometry.rows.device)
    keep[slots] = True
    separators = torch.isin(geometry.separator_line, geometry.line[indices])
    keep[geometry.separators[separators]] = True
    return slots, keep, int(separators.sum())
