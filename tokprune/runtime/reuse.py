"""Encoder outputs that come again: repeated for beams, used for several questions, put in another order by the user.

What was seen while a picture was encoded (EncoderRecord) belongs to that picture. It is used for features that are
found among those of the record, item by item, and for no others; it is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import is_

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.families import PlaceholderRun, StreamLayout, stream_layouts
from tokprune.adapters.types import EncoderOutput
from tokprune.runtime.records import EncoderRecord, encoder_record
from tokprune.tokens import Query


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two items hold the same features; free where they are one tensor."""
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(device=a.device, dtype=a.dtype)))


def sources_of(output: EncoderOutput) -> list[int] | None:
    """Which recorded item each item of an encoder output is; None without a record, or when one is not among them."""
    record = encoder_record(output)
    if record is None:
        return None
    items, known = output.pooler_output, record.items
    if items is known or (isinstance(items, Tensor) and isinstance(known, Tensor) and same(items, known)):
        return list(range(len(known)))
    sources: list[int] = []
    for item in items:
        guess = sources[-1] + 1 if sources else 0
        order = [*range(guess, len(known)), *range(min(guess, len(known)))]
        source = next((i for alike in (is_, same) for i in order if alike(item, known[i])), None)
        if source is None:
            return None
        sources.append(source)
    return sources


def are_copies(
    x: Tensor, per_row: Sequence[int], features: Tensor, queries: Sequence[Query | None], copies: int
) -> bool:
    """Whether a batch is every prompt `copies` times in a row, pictures and question included, as beams make it.

    x: (B, L) ids or (B, L, D) embeddings. per_row: features of each prompt. features: (R, D).
    """
    if copies < 1 or x.shape[0] % copies:
        return False
    first = [b - b % copies for b in range(x.shape[0])]
    if not torch.equal(x, x[first]) or any(per_row[b] != per_row[f] for b, f in enumerate(first)):
        return False
    texts = [None if q is None else q.text for q in queries]
    if any(texts[b] != texts[f] for b, f in enumerate(first)):
        return False
    rows = features.split(list(per_row))
    return all(torch.equal(rows[b], rows[f]) for b, f in enumerate(first) if b != f)


def arranged(
    adapter: Adapter,
    record: EncoderRecord,
    source: list[int],
    runs: list[PlaceholderRun] | None,
    decode: Callable[[list[int]], str] | None,
) -> tuple[EncoderRecord, list[StreamLayout], list[int]] | None:
    """The record for items `source`, their geometries, and the first recorded row of each; None when it cannot be told.

    Geometry follows the record's pictures; where only the prompt tells which tiles make a picture, its items are put in
    order.
    """
    base, modality = adapter.base, record.modality
    whole = source == list(range(len(record.items)))
    if not whole and adapter.family.reads_runs:
        record = _permuted(record, source)
        whole = True
    geometries = stream_layouts(base, modality, record.kwargs, record.output, runs=runs, decode=decode)
    firsts = [0, *accumulate(g.total for g in geometries)]
    if whole:
        return record, geometries, firsts[:-1]
    starts = [0, *accumulate(record.sizes)]
    by_item = {starts.index(first): s for s, first in enumerate(firsts[:-1]) if first in starts}
    order, i = [], 0
    while i < len(source):
        s = by_item.get(source[i])
        if s is None or firsts[s + 1] not in starts:
            return None
        stop = starts.index(firsts[s + 1])
        span = list(range(source[i], stop))
        if source[i : i + len(span)] != span:
            return None
        order.append(s)
        i += len(span)
    return record, [geometries[s] for s in order], [firsts[s] for s in order]


def _permuted(record: EncoderRecord, source: list[int]) -> EncoderRecord:
    """A record as if the items had been encoded in the order of `source`."""
    count = len(record.items)

    def move(value: object) -> object:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == count:
            return value[source]
        return [value[i] for i in source] if isinstance(value, list) and len(value) == count else value

    starts = [0, *accumulate(record.sizes)]
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in source])
    items = [record.items[i] for i in source]
    output = copy.copy(record.output)
    output.pooler_output = torch.stack(items) if isinstance(record.items, Tensor) else items
    signals = record.signals
    if signals is not None:
        signals = replace(signals, values={k: v[rows.to(v.device)] for k, v in signals.values.items()})
    kwargs = {name: move(value) for name, value in record.kwargs.items()}
    return replace(
        record,
        kwargs=kwargs,
        output=output,
        items=output.pooler_output,
        sizes=[record.sizes[i] for i in source],
        signals=signals,
    )
