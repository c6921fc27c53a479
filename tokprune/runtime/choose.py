"""Step 3 of the prefill: the method decides about every stream, and what it returns is checked."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from tokprune.errors import TokpruneError
from tokprune.methods.base import Checks, ConnectorMethod, deferred_checks
from tokprune.ops.numeric import full_precision
from tokprune.runtime.host import to_host
from tokprune.runtime.records import StreamRecord
from tokprune.tokens import Merge, Selection


def choose(method: ConnectorMethod, streams: Sequence[StreamRecord], asked: Sequence[int]) -> None:
    """Let the method decide about every stream; fills `selection`.

    asked: keep count of each stream (`PruneConfig.count`, or its share of a prompt budget). A stream that may keep all
    its tokens is passed through untouched, so that ratio=1 is exact for methods that merge, too.
    """
    if not streams:
        return
    with full_precision(streams[0].tokens.features.device):
        _choose(method, streams, _keep_counts(method, streams, asked))


def _choose(method: ConnectorMethod, streams: Sequence[StreamRecord], keeps: Sequence[int]) -> None:
    """The same for known keep counts."""
    active = []
    for stream, keep in zip(streams, keeps, strict=True):
        n = len(stream.tokens)
        if keep < n or method.drops_at_full_budget:
            active.append((stream, keep))
        else:
            stream.selection, stream.indices = Selection(torch.arange(n)), torch.arange(n)
    if not active:
        return
    with deferred_checks() as checks:
        selections: object = method.select_batch([stream.tokens for stream, _ in active], [keep for _, keep in active])
    if not isinstance(selections, list | tuple) or len(selections) != len(active):
        given = f"{len(selections)} of them" if isinstance(selections, list | tuple) else type(selections).__name__
        raise TokpruneError(
            f"method {method.info.name!r} returned {given} for {len(active)} streams; select_batch must return a list "
            f"with a Selection per stream."
        )
    for (stream, keep), selection in zip(active, selections, strict=True):
        n = len(stream.tokens)
        k = len(check_form(method.info.name, selection, n, stream.tokens.features.shape[1]))
        if k != keep and (method.exact or not 0 < k <= n):
            raise TokpruneError(f"method {method.info.name!r} kept {k} tokens of {n} where {keep} were asked for.")
        stream.selection = selection
    _fetch([stream for stream, _ in active], checks)


def _fetch(streams: Sequence[StreamRecord], checks: Checks) -> None:
    """Bring what was chosen to the host, with all that is left to check: the prefill's second wait."""
    merges = [(w.target, len(s.selection)) for s in streams if (w := s.selection.weights) and w.target is not None]
    above = []
    if merges:
        device = merges[0][0].device
        sizes, keeps = (torch.tensor(numbers) for numbers in zip(*((len(t), k) for t, k in merges), strict=True))
        slots = keeps.repeat_interleave(sizes).to(device)
        above = [(torch.cat([target.to(device) for target, _ in merges]) >= slots).any()[None]]
    flags, indices = checks.flags(), [stream.selection.indices for stream in streams]
    host = to_host(*indices, *above, *flags)
    checks.raise_unless(host[len(indices) + len(above) :])
    for stream, chosen in zip(streams, host, strict=False):
        stream.indices = chosen.long()
    if above and host[len(indices)]:
        top, keep = next((int(t.amax()), keep) for t, keep in merges if int(t.amax()) >= keep)
        raise TokpruneError(f"a method merges tokens into slot {top}, but keeps {keep} slots.")


def _keep_counts(method: ConnectorMethod, streams: Sequence[StreamRecord], asked: Sequence[int]) -> list[int]:
    """The keep count of each stream; a method may balance those of one prompt by its `budgets`."""
    keeps = list(asked)
    by_prompt: dict[int, list[int]] = {}
    for i, stream in enumerate(streams):
        by_prompt.setdefault(stream.row, []).append(i)
    for members in by_prompt.values():
        fair = [keeps[i] for i in members]
        tokens = [streams[i].tokens for i in members]
        balanced = _checked(method, method.budgets(tokens, list(fair)), fair, [len(t) for t in tokens])
        for i, keep in zip(members, balanced, strict=True):
            keeps[i] = keep
    return keeps


def _checked(method: ConnectorMethod, balanced: object, asked: list[int], sizes: list[int]) -> list[int]:
    """Budgets as whole numbers; refuses those that are none, leave a stream out or give more than there is to give.

    Frames methods leave pictures beside a video whole, whatever they cost; these do not count.
    """
    try:
        keeps = [index(keep) for keep in balanced]  # type: ignore[attr-defined]
    except TypeError:
        keeps = []
    fits = len(keeps) == len(sizes) and all(1 <= keep <= size for keep, size in zip(keeps, sizes, strict=True))
    if not fits or sum(k for k, n in zip(keeps, sizes, strict=True) if k < n) > sum(asked):
        raise TokpruneError(
            f"method {method.info.name!r} gave budgets {balanced!r} for streams of {sizes} tokens; one whole number "
            f"for each is needed, from 1 to its tokens, in sum {sum(asked)} as in {asked}."
        )
    return keeps


def check_form(name: str, selection: object, n: int, width: int) -> Selection:
    """Refuse a decision of the wrong kind or shape about n tokens of that width: what can be told without asking the
    device.
    """
    if not isinstance(selection, Selection):
        raise TokpruneError(
            f"method {name!r} returned {type(selection).__name__}; it must return a Selection per stream."
        )
    indices: object = selection.indices
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        form = _form(indices)
        raise TokpruneError(f"method {name!r} gave indices as {form}; they must be a (K,) tensor of torch.int64.")
    k = len(selection)
    merge: object = selection.weights
    if merge is not None and not isinstance(merge, Merge):
        raise TokpruneError(f"method {name!r} gave weights as {type(merge).__name__}; a Merge is needed.")
    if merge is not None and selection.features is not None:
        raise TokpruneError(f"method {name!r} gave features and weights; one of them says what the tokens become.")
    parts: list[tuple[str, object, tuple[int, ...]]] = [("features", selection.features, (k, width))]
    if merge is not None:
        parts += [("merge rows", merge.rows, (k, n)), ("merge targets", merge.target, (n,))]
        parts += [("merge scales", merge.scale, (n,))]
        if merge.rows is None and (merge.target is None or merge.scale is None):
            raise TokpruneError(f"method {name!r} gave a Merge with neither rows nor both target and scale.")
    for part, given, shape in parts:
        whole = part == "merge targets"
        if given is None or (
            isinstance(given, Tensor) and tuple(given.shape) == shape and (not whole or given.dtype == torch.int64)
        ):
            continue
        kind = "torch.int64 of shape " if whole else "shape "
        raise TokpruneError(f"method {name!r} gave {part} as {_form(given)}; a tensor of {kind}{shape} is needed.")
    return selection


def _form(given: object) -> str:
    """What a value is, for an error."""
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def check_values(indices: Tensor, n: int) -> None:
    """Refuse indices, on the host already, that do not ascend, repeat or leave the stream's `n` tokens."""
    if bool((indices.diff() <= 0).any()) or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < n):
        raise TokpruneError(
            f"a method returned indices that are not ascending, distinct and between 0 and {n - 1}: "
            f"{indices[:8].tolist()}{' …' if len(indices) > 8 else ''}. Return Selection(indices.unique()) or sort "
            "them; every token is kept once."
        )


def kept_rows(stream: StreamRecord) -> tuple[Tensor, Tensor, int]:
    """Encoder rows of a stream that survive, relative to the stream.

    Returns slots (K,) of the selected candidates in the order of the selection, all kept rows as a (total,) bool, and
    how many separators are among them (a newline stays iff a token of its line does; `spare` ones beside them).
    """
    geometry, indices = stream.geometry, stream.indices
    check_values(indices, stream.total)
    slots = geometry.rows[indices]  # (K,)
    keep = torch.zeros(geometry.total, dtype=torch.bool, device=geometry.rows.device)
    keep[slots] = True
    separators = torch.isin(geometry.separator_line, geometry.line[indices])  # (S,)
    if stream.spare:
        separators[(~separators).nonzero()[: stream.spare, 0]] = True
    keep[geometry.separators[separators]] = True
    return slots, keep, int(separators.sum())
