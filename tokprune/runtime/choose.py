"""Step 3 of the prefill: the method decides about every stream, and what it returns is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokprune.errors import TokpruneError
from tokprune.methods.base import ConnectorMethod
from tokprune.runtime.records import StreamRecord
from tokprune.tokens import Selection


def choose(method: ConnectorMethod, streams: Sequence[StreamRecord], count: Callable[[int], int]) -> None:
    """Let the method decide about every stream; fills `selection`.

    count: keep count of n tokens (`PruneConfig.count`). A stream that may keep all its tokens is passed through
    untouched, so that ratio=1 is exact for methods that merge, too.
    """
    keeps = _keep_counts(method, streams, count)
    active = []
    for stream, keep in zip(streams, keeps, strict=True):
        n = len(stream.tokens)
        if keep < n or method.drops_at_full_budget:
            active.append((stream, keep))
        else:
            stream.selection = Selection(torch.arange(n, device=stream.tokens.features.device))
    if not active:
        return
    selections = method.select_batch([stream.tokens for stream, _ in active], [keep for _, keep in active])
    for (stream, keep), selection in zip(active, selections, strict=True):
        check_form(method, selection, stream)
        n, k = len(stream.tokens), len(selection)
        if k != keep and (method.exact or not 0 < k <= n):
            raise TokpruneError(f"method {method.info.name!r} kept {k} tokens of {n} where {keep} were asked for.")
        stream.selection = selection


def _keep_counts(method: ConnectorMethod, streams: Sequence[StreamRecord], count: Callable[[int], int]) -> list[int]:
    """The keep count of each stream; a method may balance those of one prompt by its `budgets`."""
    keeps = [count(len(stream.tokens)) for stream in streams]
    by_prompt: dict[int, list[int]] = {}
    for i, stream in enumerate(streams):
        by_prompt.setdefault(stream.row, []).append(i)
    for members in by_prompt.values():
        balanced = method.budgets([streams[i].tokens for i in members], [keeps[i] for i in members])
        for i, keep in zip(members, balanced, strict=True):
            keeps[i] = int(keep)
    return keeps


def check_form(method: ConnectorMethod, selection: object, stream: StreamRecord) -> None:
    """Refuse a decision of the wrong kind or shape: what can be told without asking the device."""
    name, n = method.info.name, len(stream.tokens)
    if not isinstance(selection, Selection):
        raise TokpruneError(
            f"method {name!r} returned {type(selection).__name__}; it must return a Selection per stream."
        )
    indices: object = selection.indices
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        form = type(indices).__name__
        if isinstance(indices, Tensor):
            form = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise TokpruneError(f"method {name!r} gave indices as {form}; they must be a (K,) tensor of torch.int64.")
    k, width = len(selection), stream.tokens.features.shape[1]
    if selection.features is not None and tuple(selection.features.shape) != (k, width):
        raise TokpruneError(
            f"method {name!r} gave features of shape {tuple(selection.features.shape)} for {k} slots of width {width}."
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
            f"a method returned indices that are not ascending, distinct and between 0 and {n - 1}: "
            f"{indices[:8].tolist()}"
            f"{' …' if len(indices) > 8 else ''}. Return Selection(indices.unique()) or sort them; every token is kept "
            "once."
        )


def kept_rows(stream: StreamRecord) -> tuple[Tensor, Tensor, int]:
    """Encoder rows of a stream that survive, relative to the stream.

    Returns slots (K,) of the selected candidates in the order of the selection, all kept rows as a (total,) bool, and
    how many separators are among them (a newline stays iff a token of its line does).
    """
    geometry = stream.geometry
    indices = stream.selection.indices.to(geometry.rows.device)
    check_values(indices, stream.total)
    slots = geometry.rows[indices]  # (K,)
    keep = torch.zeros(geometry.total, dtype=torch.bool, device=geometry.rows.device)
    keep[slots] = True
    separators = torch.isin(geometry.separator_line, geometry.line[indices])  # (S,)
    keep[geometry.separators[separators]] = True
    return slots, keep, int(separators.sum())
