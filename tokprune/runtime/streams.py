"""Step 2 of the prefill: cut encoder outputs into visual token streams, one record per image or video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.families import PlaceholderRun, StreamLayout, placeholder_runs
from tokprune.adapters.types import EncoderOutput
from tokprune.errors import MissingSignalError, PromptError
from tokprune.runtime.encode import SURVIVORS
from tokprune.runtime.host import to_device
from tokprune.runtime.records import EncoderRecord, StreamRecord, encoder_record
from tokprune.runtime.reuse import are_copies, arranged
from tokprune.runtime.signal_blocks import of_tower
from tokprune.tokens import Layout, Query, VisualTokens


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, as far as streams are told by them."""

    x: Tensor
    """(B, L) token ids, or (B, L, D) embeddings where only they are known."""
    queries: Sequence[Query | None]
    """The question of each prompt."""
    decode: Callable[[list[int]], str] | None = None
    """Token ids to text, when a processor is at hand."""
    ids: Tensor | None = None
    """(B, L) token ids, when known; on the host."""


@dataclass(frozen=True)
class Encoded:
    """What the encoder gave for one modality of a batch."""

    modality: str
    output: EncoderOutput
    columns: Tensor
    """(B, L) bool, the placeholders that it fills; on the host."""
    source: list[int] | None = None
    """Which recorded item each item of the output is (`sources_of`)."""
    survivors: Tensor | None = None
    """(R,) bool, rows that the model itself left over, where it drops some."""


@dataclass(frozen=True)
class _Geometry:
    """The layouts of a modality's streams in the order of its rows, each prompt counted once for its copies."""

    layouts: list[StreamLayout]
    first_rows: list[int]
    record: EncoderRecord | None = None
    copies: int = 1


def build_streams(adapter: Adapter, encoded: Encoded, prompts: Prompts, needs: Sequence[str]) -> list[StreamRecord]:
    """The streams of one modality of a prefill, one per image or video of each prompt.

    needs: signals that the method reads. Beams and return sequences repeat whole prompts; a prompt's streams are built
    once, with `copies` > 1.
    """
    features = torch.cat(flatten(encoded.output.pooler_output))  # (R, D)
    per_prompt = encoded.columns.sum(1).tolist()
    if sum(per_prompt) != features.shape[0]:
        raise PromptError(
            f"{encoded.modality}: the prompt has {sum(per_prompt)} placeholder tokens but the encoder gave "
            f"{features.shape[0]} features; the processor and the model do not belong together, or the prompt was cut."
        )
    geometry = _recorded(adapter, encoded, prompts, features, per_prompt)
    if geometry is None:
        geometry = _unrecorded(encoded, per_prompt, of_tower(needs))
    queue = iter(zip(geometry.layouts, geometry.first_rows, strict=True))
    streams: list[StreamRecord] = []
    left_over: list[Tensor | None] = []
    start = 0
    for b in range(0, len(per_prompt), geometry.copies):
        end = start + per_prompt[b]
        while start < end:
            layout, first_row = next(queue)
            stream, stay = _stream(encoded, geometry, layout, b, (start, first_row))
            if stream.geometry.total:
                query = prompts.queries[b]
                if query is not None:
                    stream.question, stream.question_source = query.text, query.source
                streams.append(stream)
                left_over.append(stay)
                start += stream.geometry.total
        if start > end:
            raise PromptError(
                f"{encoded.modality}: an image's features straddle two prompts of the batch; check the number of "
                "images per prompt."
            )
        start += per_prompt[b] * (geometry.copies - 1)
    if streams:
        _show(streams, left_over, features, prompts.queries)
    return streams


def _stream(
    encoded: Encoded, geometry: _Geometry, layout: StreamLayout, row: int, at: tuple[int, int]
) -> tuple[StreamRecord, Tensor | None]:
    """A stream without its features, and which candidates of `layout` the model left, (N,) bool, where it dropped some.

    at: its first row among the features of this call, and among those of the recorded one.
    """
    left, stay = layout, None
    if encoded.survivors is not None:
        survivors = encoded.survivors[at[1] : at[1] + layout.total]
        left, stay = _subset(layout, survivors.to(layout.rows.device))
    record = geometry.record
    sources = {} if record is None or record.signals is None else record.signals.sources
    stream = StreamRecord(row, encoded.modality, left, sources, geometry.copies, at[0], note=left.note)
    stream.encoded, stream.first_row, stream.whole = record, at[1], layout
    return stream, stay


def _show(
    streams: list[StreamRecord], stays: list[Tensor | None], features: Tensor, queries: Sequence[Query | None]
) -> None:
    """Give every stream of a modality what the method looks at, cut out of features (R, D) and signals in one go.

    stays: of each, (N,) bool as of `_stream`.
    """
    rows = torch.cat([stream.offset + stream.geometry.rows for stream in streams])  # (sum of N,)
    layouts = [stream.geometry.layout for stream in streams]
    of_layouts = [part for lay in layouts for part in (lay.group, lay.row, lay.col)]
    at, *moved = to_device(features.device, rows, *of_layouts)
    sizes = [stream.total for stream in streams]
    parts = features.detach()[at].split(sizes)
    signals = _signals_of(streams, stays, features.device)
    places = iter(moved)
    for i, (stream, lay, part) in enumerate(zip(streams, layouts, parts, strict=True)):
        there = lay.with_places(next(places), next(places), next(places))
        own = {name: values[i] for name, values in signals.items()}
        stream.visual = VisualTokens(part, there, own, queries[stream.row])


def _signals_of(
    streams: list[StreamRecord], stays: list[Tensor | None], device: torch.device
) -> dict[str, Sequence[Tensor]]:
    """By name, the signal of every stream's candidates, (N, ...) each."""
    record = streams[0].encoded  # of one encoder call, all of them
    if record is None or record.signals is None:
        return {}
    wholes = [(s.first_row, s.geometry.rows if s.whole is None else s.whole.rows) for s in streams]
    known = [first + (rows if stay is None else rows[stay]) for (first, rows), stay in zip(wholes, stays, strict=True)]
    rows, found, at = torch.cat(known), {}, {}
    for name, value in record.signals.values.items():
        if value.device not in at:
            at[value.device] = to_device(value.device, rows)[0]
        of_streams = value[at[value.device]]
        if name != SURVIVORS:  # what is left of the encoder's tokens is counted on the host
            of_streams = of_streams.to(device)
        found[name] = of_streams.split([len(one) for one in known])
    return found


def _recorded(
    adapter: Adapter, encoded: Encoded, prompts: Prompts, features: Tensor, per_prompt: list[int]
) -> _Geometry | None:
    """The layouts by what was seen while the pictures were encoded; None where these are others."""
    record, source = encoder_record(encoded.output), encoded.source
    if record is None or source is None:
        return None
    # Some families encode the frames of a video with get_image_features; the placeholders tell what it is.
    record = replace(record, modality=encoded.modality)
    count = len(record.items)
    if encoded.survivors is not None and len(source) != count:
        return None
    copies = 1
    if len(source) > count and len(source) % count == 0:
        repeats = len(source) // count
        copies = repeats if are_copies(prompts.x, per_prompt, features, prompts.queries, repeats) else 1
    source = _first_copies(source, encoded.output, per_prompt, copies)
    runs = None if encoded.survivors is not None else _runs(adapter, prompts, encoded.columns, copies)
    arranged_record = arranged(adapter, record, source, runs, prompts.decode)
    if arranged_record is None:
        return None
    record, layouts, first_rows = arranged_record
    return _Geometry(layouts, first_rows, record, copies)


def _unrecorded(encoded: Encoded, per_prompt: list[int], needed: list[str]) -> _Geometry:
    """One line of tokens for each item of an output that was encoded before tokprune saw it."""
    if needed:
        seen = encoder_record(encoded.output) is not None
        why = "are not those that tokprune saw being encoded" if seen else "were encoded before tokprune was applied"
        raise MissingSignalError(
            f"the {encoded.modality} features {why}, so the signals {', '.join(needed)} are not known. Pass the "
            "pixels, or encode again after apply and pass the outputs as they come."
        )
    items = [f.shape[0] for f in flatten(encoded.output.pooler_output)]
    ends = {*accumulate(items), *accumulate(per_prompt)} - {0}
    layouts = [_line(stop - start) for start, stop in pairwise([0, *sorted(ends)])]
    return _Geometry(layouts, [0] * len(layouts))


def _line(n: int) -> StreamLayout:
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
    """A stream after the model itself dropped some of its rows. kept: (total,) bool. Returns it and the candidates
    left.
    """
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


def _first_copies(source: list[int], output: EncoderOutput, per_prompt: Sequence[int], copies: int) -> list[int]:
    """The items of every first prompt of `copies` equal ones."""
    if copies == 1:
        return source
    ends = list(accumulate(per_prompt))
    row, done, out = 0, 0, []
    for item, features in zip(source, flatten(output.pooler_output), strict=True):
        while done >= ends[row] and row < len(ends) - 1:  # behind the last picture there may be empty items
            row += 1
        if row % copies == 0:
            out.append(item)
        done += features.shape[0]
    return out


def _runs(adapter: Adapter, prompts: Prompts, columns: Tensor, copies: int) -> list[PlaceholderRun] | None:
    """The prompt's placeholder runs, for the families whose tiles are told apart by them; copies of a prompt count
    once.
    """
    if not adapter.family.reads_runs:
        return None
    ids = prompts.ids
    if ids is None:
        ids = ids_of(adapter.base.get_input_embeddings(), prompts.x, ~columns.to(prompts.x.device))
    return placeholder_runs(ids[::copies], columns[::copies])


@torch.no_grad()
def ids_of(table: nn.Module, embeds: Tensor, where: Tensor) -> Tensor:
    """Token ids (B, L) of embeddings (B, L, D) that are rows of the table, 0 for others and outside `where` (B, L).

    table: the embedding module; called piece by piece, for its weight may be offloaded and its output scaled.
    """
    ids = torch.zeros(where.shape, dtype=torch.long, device=embeds.device)
    wanted = embeds[where]  # (W, D)
    numbers = torch.zeros(len(wanted), dtype=torch.long, device=embeds.device)
    for start, piece in _pieces(table, wanted):
        near = (wanted[:, None, :4] == piece[None, :, :4]).all(-1).nonzero()  # (M, 2) a few numbers of each agree
        near = near[(wanted[near[:, 0]] == piece[near[:, 1]]).all(-1)]
        numbers[near[:, 0]] = near[:, 1] + start
    ids[where] = numbers
    return ids


def _pieces(table: nn.Module, like: Tensor, size: int = 4096) -> Iterator[tuple[int, Tensor]]:
    """The embeddings of a table, `size` rows at a time, with the first one's number."""
    count = int(getattr(table, "num_embeddings", 0))  # type: ignore[arg-type]
    for start in range(0, count, size):
        yield start, table(torch.arange(start, min(start + size, count), device=like.device)).to(like)
