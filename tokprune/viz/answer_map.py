"""What a token of the answer paid to each visual token in one layer of the LLM, lined up with the picture."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import tokprune
from tokprune.adapters.base import get_adapter
from tokprune.adapters.query import tokenizer_of
from tokprune.errors import OptionError
from tokprune.runtime.answer_rows import AnswerRow, AnswerRows
from tokprune.runtime.handle import installed_on
from tokprune.runtime.records import StreamRecord
from tokprune.runtime.signal_blocks import block_index
from tokprune.tokens import Layout
from tokprune.types import VLM, Inputs, Processor

SIGNAL = "llm_attention"


@dataclass(frozen=True)
class AnswerMap:
    """Attention to one picture."""

    values: Tensor
    """(N,) attention to each token of the stream, mean over heads, NaN where the layer did not see the token. A merged
    token counts for all that flowed into it."""
    layout: Layout
    """Where the tokens lie."""
    answer: str
    """The whole answer."""
    tokens: tuple[str, ...]
    """The pieces of the answer whose rows the values are the mean of."""
    source: str
    """In words, for the legend."""


def answer_map(
    model: VLM,
    processor: Processor,
    inputs: Inputs,
    layer: int | float | str,
    token: int | str = 0,
    *,
    picture: int = 0,
    max_new_tokens: int = 32,
) -> AnswerMap:
    """Where the model looked for a token of its greedy answer, as layer `layer` of the LLM has it.

    The row is that of the query from which the token came: for the first token the prompt's last one, for others the
    token before. Made from the query and the cached keys of one layer, with whatever attention kernel the model runs.
    A pruning that is on the model stays on: then kept tokens alone have values.

    layer: number, negative from the end, or a fraction of the depth. token: number of a token of the answer, negative
    from its end, or a word of it (of several tokens the mean; the first time it occurs). picture: which picture or clip
    of the prompts. Raises OptionError for a token, word or picture that is not there.
    """
    adapter = get_adapter(model)
    index = block_index(layer, len(adapter.text_model.layers), "the LLM")
    installed = installed_on(adapter.model)
    plain = contextlib.nullcontext() if installed is not None else tokprune.apply(model, "none", ratio=1.0)
    with plain, AnswerRows(adapter, index) as seen, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        installed = installed_on(adapter.model)
        last = None if installed is None or installed.connector is None else installed.connector.last
        rows = seen.rows
    streams = [] if last is None else last.streams
    if not -len(streams) <= picture < len(streams):
        raise OptionError(f"picture={picture} does not exist: the prompts hold {len(streams)}, counted from 0.")
    stream = streams[picture]
    ids = out[stream.row, inputs["input_ids"].shape[1] :].tolist()
    pieces, answer = _pieces(processor, ids)
    chosen = _steps(token, pieces[: len(rows)])
    values = torch.stack([_lined_up(rows[k], stream) for k in chosen]).mean(0)
    words = tuple(pieces[k] for k in chosen)
    source = f"layer {index} of the LLM, for {''.join(words).strip()!r} in {answer!r}"
    return AnswerMap(values.cpu(), stream.layout, answer, words, source)


def _pieces(processor: Processor, ids: list[int]) -> tuple[list[str], str]:
    """What each token adds to the text of the answer, and that text."""
    decode = tokenizer_of(processor).decode
    texts = [decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    return [b[len(a) :] for a, b in itertools.pairwise(texts)], texts[-1].strip()


def _steps(token: int | str, pieces: list[str]) -> list[int]:
    """Numbers of the tokens that are meant."""
    if isinstance(token, int):
        if not -len(pieces) <= token < len(pieces):
            raise OptionError(f"token {token} does not exist: the answer has {len(pieces)}, counted from 0: {pieces}.")
        return [token % len(pieces)]
    text, word = "".join(pieces), token.strip()
    start = text.lower().find(word.lower()) if word else -1
    if start < 0:
        raise OptionError(
            f"the answer {text.strip()!r} does not hold {token!r}; name a word of it, or a token by number."
        )
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    begins = [0, *ends[:-1]]
    return [k for k, (a, b) in enumerate(zip(begins, ends, strict=True)) if a < start + len(word) and b > start]


def _lined_up(row: AnswerRow, stream: StreamRecord) -> Tensor:
    """The attention to each token of a stream, (N,)."""
    columns, weights = row.columns[stream.row], row.weights[stream.row]
    size = int(max(columns.max(), stream.candidates.max())) + 1
    dense = weights.new_full((size,), torch.nan)
    dense[columns[columns >= 0]] = weights[columns >= 0]
    values = dense[stream.candidates.to(dense.device)]  # (N,)
    merge, slots = stream.selection.weights, stream.selection.indices.to(dense.device)
    if merge is None:
        return values
    flows = merge.dense(len(slots), stream.total).to(dense.device).abs()  # (K, N)
    own = values[slots]
    flows = flows * own.isfinite()[:, None]
    mean = (flows * own.nan_to_num()[:, None]).sum(0) / flows.sum(0)  # 0 / 0 where nothing flows: NaN
    return torch.where(values.isnan(), mean, values)
