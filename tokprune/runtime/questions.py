"""The question of each prompt of a prefill: given by the user, or cut out of the prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.query import build_queries, current_question, read, words_between
from tokprune.adapters.types import EncoderOutput, ModelCall
from tokprune.errors import MissingQueryError
from tokprune.runtime.options import Options
from tokprune.runtime.plan import Columns, tokens_of
from tokprune.runtime.records import StreamRecord
from tokprune.runtime.reuse import are_copies
from tokprune.tokens import Query


def questions_of(
    adapter: Adapter,
    options: Options,
    call: ModelCall,
    columns: Columns,
    encoded: Mapping[str, EncoderOutput],
    prompt_length: int | None,
) -> list[Query | None]:
    """One Query per prompt, where the method reads them.

    prompt_length: how many of the columns are the prompt, where generate() wrote the rest.
    """
    if not options.method.query_aware:
        return [None] * columns.visible.shape[0]
    question, processor = current_question(options) or options.query, options.processor
    if question is None and processor is not None and columns.segments is not None:
        raise MissingQueryError(
            "a packed row holds several samples, each with a question of its own, and the prompt does not tell which "
            'picture a question is about. Give one for all: with pruning.query("..."), or run the samples as rows of a '
            "batch."
        )
    visible, ids = columns.visible, columns.ids
    batch = visible.shape[0]
    rows: list[Tensor | None] = [None] * batch
    if ids is not None:
        rows = [ids[b, :prompt_length][visible[b, :prompt_length]] for b in range(batch)]  # (L_b,) each
    if question is not None and not isinstance(question, str) and len(question) and batch % len(question) == 0:
        copies = batch // len(question)
        if copies > 1 and _repeated(call, columns, encoded, copies):  # beams repeat prompts
            question = [one for one in question for _ in range(copies)]
    tokens = [getattr(adapter.config, name, None) for name in ("image_token_id", "video_token_id")]
    placeholders = [token for token in tokens if token is not None]
    table, device = adapter.base.get_input_embeddings(), tokens_of(call).device
    return build_queries(processor, table, rows, question, placeholders, options.scorer, device)


def _repeated(call: ModelCall, columns: Columns, encoded: Mapping[str, EncoderOutput], copies: int) -> bool:
    """Whether the batch is every prompt and its pictures `copies` times."""
    x = tokens_of(call)
    for modality, where in columns.placeholders.items():
        if encoded.get(modality) is None:
            continue
        features, counts = torch.cat(flatten(encoded[modality].pooler_output)), where.sum(1).tolist()  # (R, D), (B,)
        if sum(counts) == len(features) and not are_copies(x, counts, features, [None] * len(counts), copies):
            return False
    return True


def give_examples(
    adapter: Adapter, options: Options, call: ModelCall, columns: Columns, streams: Sequence[StreamRecord]
) -> None:
    """Give each picture the words between it and the next one of its prompt, its in-context example, as its question.

    Pictures with no words between them share those behind the last of them. The last of a prompt keeps the prompt's
    question.
    """
    ids, processor = columns.ids, options.processor
    if processor is None or ids is None or columns.segments is not None:
        raise MissingQueryError(
            "text='example' reads the words behind each picture off the prompt: pass input_ids, one sample per row, "
            "and apply(..., processor=processor); or take text='question'."
        )
    spans: list[tuple[int, int, int, StreamRecord]] = []  # row, first and last column
    for modality, where in columns.placeholders.items():
        rows, places = (t.tolist() for t in where.nonzero(as_tuple=True))
        for stream in (s for s in streams if s.modality == modality):
            first, last = stream.offset, stream.offset + stream.geometry.total - 1
            spans.append((rows[first], places[first], places[last], stream))
    spans.sort(key=lambda span: span[:2])
    query, table, device = None, adapter.base.get_input_embeddings(), tokens_of(call).device
    for (row, _, last, stream), after in reversed(list(zip(spans, [*spans[1:], None], strict=True))):
        if after is None or after[0] != row:
            query = stream.tokens.query
        else:
            shown = columns.visible[row, last + 1 : after[1]]
            words = words_between(processor, ids[row, last + 1 : after[1]][shown])
            if words:
                query = read(processor, table, words, "the words behind the picture", options.scorer, device)
        stream.visual = dataclasses.replace(stream.tokens, query=query)
        stream.question = None if query is None else query.text
        stream.question_source = None if query is None else query.source
