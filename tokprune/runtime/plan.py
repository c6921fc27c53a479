"""Step 4 of the prefill: which prompt columns stay, with which features and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.dialect import cache_in, logical_length
from tokprune.adapters.families import EncoderCall
from tokprune.adapters.families.base import SHRUNK
from tokprune.adapters.types import EncoderOutput, ModelCall
from tokprune.errors import UnsupportedModelError
from tokprune.ops.numeric import full_precision
from tokprune.runtime.cache_record import PruneState, get_state
from tokprune.runtime.choose import kept_rows
from tokprune.runtime.encode import settle
from tokprune.runtime.host import to_device
from tokprune.runtime.masks import check_mask
from tokprune.runtime.positions import restarts, translate
from tokprune.runtime.records import StreamRecord, encoder_records
from tokprune.tokens import Merge, Selection


@dataclass(frozen=True)
class Columns:
    """What is known of the columns of a call before anything is chosen; all (B, L), on the host."""

    visible: Tensor
    """The mask shows the token (to somebody, where it says so for each query)."""
    present: Tensor
    """It is no padding: a token in the middle that the mask hides, or a hidden picture, keeps its place."""
    placeholders: dict[str, Tensor]
    """Per modality, columns that features fill, hidden ones too."""
    segments: Tensor | None = None
    """Number of the sample in a packed row, or None."""
    packed: bool = False
    """transformers would keep these samples apart by their positions."""
    mask: Tensor | None = None
    """(B, keys) bool: the two-dimensional mask of the call, with what stands before its columns."""
    ids: Tensor | None = None
    """(B, L) token ids, where the call has them."""

    @staticmethod
    def of(adapter: Adapter, call: ModelCall, encoded: Mapping[str, EncoderOutput]) -> Columns:
        """Of the columns of `call`, whose mask covers those before them as well.

        The first wait of a prefill: the sizes of the pictures come along.
        """
        x, mask, past = tokens_of(call), call.get("attention_mask"), cache_in(call)
        check_mask(mask)
        marks = adapter.placeholders(call, encoded)
        given = [mask] if isinstance(mask, Tensor) and mask.ndim == 2 else []
        breaks = None
        if mask is None and past is None and call.get("position_ids") is not None:
            breaks = restarts(adapter.positions(call, x), adapter.rotary_axes)
        ids = [] if call.get("input_ids") is None else [call["input_ids"]]
        asked = [*marks.values(), *given, *ids, *([] if breaks is None else [breaks])]
        records = [*encoder_records(encoded).values()]
        for record in records:
            seen = EncoderCall(adapter.base, record.modality, record.kwargs, record.output)
            if SHRUNK not in record.kwargs and (small := adapter.family.looks_at(seen)) is not None:
                record.kwargs[SHRUNK] = small
        host = settle(records, asked)
        placeholders = dict(zip(marks, host, strict=False))
        keys = host[len(marks)].bool() if given else None
        visible = torch.ones(x.shape[:2], dtype=torch.bool) if keys is None else keys[:, -x.shape[1] :]  # (B, L)
        after = visible.flip(1).cumsum(1).flip(1) > 0
        present = (visible.cumsum(1) > 0) & after  # (B, L) between the first and the last visible token
        for columns in placeholders.values():
            present = present | columns
        new = None if breaks is None else host[len(asked) - 1]  # (B, L) where a sample begins
        segments = None if new is None or not new.any() else new.cumsum(-1)
        packed = segments is not None and not adapter.caches(call)
        words = host[len(marks) + len(given)] if ids else None
        return Columns(visible, present, placeholders, segments, packed, keys, words)


@dataclass
class Features:
    """The encoder rows of one modality: which of them stay, and what they hold after merging."""

    output: EncoderOutput
    """As the encoder gave it."""
    row: Tensor
    """(B, L) encoder row that fills each column, -1 elsewhere; on the host, like the next two."""
    where: Tensor
    """(R, 2) prompt and column of each row."""
    sizes: list[int]
    """Rows of each item of the output."""
    stays: Tensor
    """(R,) bool."""
    planes: list[Tensor]
    """(R, D) each: the features first, then DeepStack planes."""
    deepstack: bool
    """Whether the model has DeepStack planes."""

    @staticmethod
    def of(output: EncoderOutput, columns: Tensor) -> Features:
        """Before anything is dropped. columns: (B, L) bool, the placeholders that the rows fill."""
        where = columns.nonzero()  # (R, 2)
        row = torch.full(columns.shape, -1, dtype=torch.long)  # (B, L)
        row[columns] = torch.arange(where.shape[0])
        items = flatten(output.pooler_output)
        sizes = [item.shape[0] for item in items]
        deepstack = getattr(output, "deepstack_features", None)
        planes = [torch.cat(items), *(torch.cat(flatten(plane)) for plane in deepstack or ())]
        stays = torch.ones(sum(sizes), dtype=torch.bool)
        return Features(output, row, where, sizes, stays, planes, deepstack is not None)

    @property
    def sizes_left(self) -> list[int]:
        """Rows that stay of each item."""
        return [int(part.sum()) for part in self.stays.split(self.sizes)]

    def write(self, merges: Sequence[Merged]) -> None:
        """Put merged features into their rows, in every plane; differentiable."""
        for alike in _alike(merges, sum(plane.shape[-1] for plane in self.planes)):
            inputs, outputs = (torch.cat([getattr(one, name) for one in alike]) for name in ("inputs", "outputs"))
            flow = _flow([one.selection for one in alike])
            where, to = to_device(self.planes[0].device, inputs, outputs)
            given = [plane[where.to(plane.device)].to(where.device) for plane in self.planes]  # (sum of N, D) each
            with full_precision(where.device):
                merged = flow(given[0] if len(given) == 1 else torch.cat(given, -1))  # (sum of K, planes * D)
            parts = merged.split([plane.shape[-1] for plane in self.planes], -1)
            for i, (plane, part) in enumerate(zip(self.planes, parts, strict=True)):
                self.planes[i] = plane.index_copy(0, to.to(plane.device), part.to(plane))


@dataclass(frozen=True)
class Merged:
    """A stream whose tokens flow together."""

    selection: Selection
    inputs: Tensor
    """(N,) encoder rows of its candidates; on the host, like the next."""
    outputs: Tensor
    """(K,) encoder rows of those that stay."""


_AT_ONCE = 2**26
"""Numbers of features that are merged together: 256 MiB in float32."""


def _alike(merges: Sequence[Merged], width: int) -> Iterator[list[Merged]]:
    """Streams that merge in one go, as many as fit into memory. width: of a row of features."""
    kinds: dict[object, list[Merged]] = {}
    for i, one in enumerate(merges):
        kind: object = i
        if (weights := one.selection.weights) is not None:
            rows = weights.rows
            apart = rows is not None and (rows.is_sparse or rows.device.type == "cpu")  # what is saved is launches
            kind = i if apart else None if rows is None else rows.shape
        kinds.setdefault(kind, []).append(one)
    for same in kinds.values():
        part: list[Merged] = []
        for one in same:
            if part and (sum(len(other.inputs) for other in part) + len(one.inputs)) * width > _AT_ONCE:
                yield part
                part = []
            part.append(one)
        yield part


def _flow(selections: Sequence[Selection]) -> Callable[[Tensor], Tensor]:
    """What turns features of streams of one kind, (sum of N, D), into those of the tokens that stay, (sum of K, D)."""
    if len(selections) == 1:
        return selections[0].apply
    merges = [(chosen.weights, len(chosen)) for chosen in selections if chosen.weights is not None]
    rows = [merge.rows for merge, _ in merges if merge.rows is not None]
    if not rows:
        return partial(Merge.side_by_side(merges).apply, k=sum(k for _, k in merges))
    stacked = torch.stack(rows)  # (B, K, N)

    def flow(x: Tensor) -> Tensor:
        values = (x if x.dtype == torch.float64 else x.float()).unflatten(0, (len(rows), -1))  # (B, N, D)
        return (stacked.to(values) @ values).flatten(0, 1)

    return flow


@dataclass
class Plan:
    """A decided prefill."""

    columns: Columns
    keep: Tensor
    """(B, L) bool, the prompt columns that stay; on the host."""
    visual: Tensor
    """(B, L) bool, the prompt columns that features fill; on the host."""
    features: dict[str, Features]
    """By modality."""
    positions: Tensor
    """(B, L), or (3 or 4, B, L): position ids of the kept columns, still at their prompt columns."""
    moves: Tensor
    """(B, L + 1) by which positions moved (`PruneState.moves`); on the host."""
    start: int
    """Logical length of the cache."""
    policy: str
    """Of positions: "keep" or "compact"."""
    untouched: bool
    """Nothing is dropped or merged."""
    streams: list[StreamRecord]
    earlier: PruneState | None = None
    """The record of earlier turns; on the host."""

    def slots(self, width: int) -> tuple[list[int], Tensor]:
        """Filler in front of each row of `width` slots, and (B, L) the slot of each kept column; on the host."""
        filler = width - self.keep.sum(1)
        return filler.tolist(), self.keep.cumsum(1) - 1 + filler[:, None]

    def answer(self, prompt_length: int | None) -> int:
        """Columns behind the prompt's, which generate() wrote."""
        return 0 if prompt_length is None else max(self.keep.shape[1] - prompt_length, 0)


def tokens_of(call: Mapping[str, Tensor]) -> Tensor:
    """Token ids (B, L), or embeddings (B, L, D), of a call."""
    return call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]


def make_plan(
    adapter: Adapter,
    call: ModelCall,
    encoded: Mapping[str, EncoderOutput],
    columns: Columns,
    streams: Sequence[StreamRecord],
    policy: str,
    always: bool = False,
) -> Plan:
    """Turn the streams' selections into a plan for the columns of this call.

    always: also where nothing is dropped or merged, and no positions would be needed.
    """
    masks = columns.placeholders
    features = {m: Features.of(encoded[m], mask) for m, mask in masks.items() if encoded.get(m) is not None}
    visual = torch.stack([f.row >= 0 for f in features.values()]).any(0)  # (B, L)
    keep = columns.present.clone()  # (B, L)
    untouched, records = True, []
    merges: dict[str, list[Merged]] = {modality: [] for modality in features}
    for stream in streams:
        size = int(masks[stream.modality][stream.row].sum())
        changed, copies = _place(adapter, stream, features[stream.modality], size, keep, merges[stream.modality])
        untouched &= not changed
        records += copies
    for modality, of_modality in merges.items():
        features[modality].write(of_modality)
    x = tokens_of(call)
    state = get_state(cache_in(call))
    earlier = None if state is None else state.on_host()
    shift = torch.zeros(x.shape[0], 1, dtype=torch.long) if earlier is None else earlier.shift  # (B, 1)
    start = logical_length(cache_in(call))
    if untouched and state is None and not always:  # the call will be made as it is
        if policy == "auto":
            policy = "keep" if hasattr(adapter.base, "compute_3d_position_ids") else "compact"
        return Plan(columns, keep, visual, features, shift, shift, start, policy, True, records)
    positions = adapter.positions(call, x)
    if policy == "auto":
        policy = "keep" if positions.ndim == 3 else "compact"
    positions, moves = translate(positions, policy, keep, columns, visual, shift, adapter.rotary_axes)
    dropped = columns.present & ~keep  # (B, L)
    if adapter.hybrid and state is not None and len(set(dropped.sum(1).tolist())) > 1:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} has recurrent layers: a later turn whose prompts lose different numbers "
            "of tokens would need filler in the middle of the sequence. Run these prompts one by one, or without the "
            "kept cache."
        )
    untouched &= not always
    return Plan(columns, keep, visual, features, positions, moves, start, policy, untouched, records, earlier)


def _place(
    adapter: Adapter, stream: StreamRecord, features: Features, size: int, keep: Tensor, merges: list[Merged]
) -> tuple[bool, list[StreamRecord]]:
    """Take a stream's dropped columns out of `keep` and add what it merges to `merges`, in every copy of its prompt.

    size: rows of its modality in one copy of the prompt. Returns whether anything is dropped or merged, and a finished
    record for each copy.
    """
    selection, total = stream.selection, stream.geometry.total
    slots, stay, stream.separators_kept = kept_rows(stream)
    flows = selection.weights is not None or selection.features is not None
    if selection.features is not None and features.deepstack:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} has DeepStack planes, which explicit replacement features cannot reach; "
            "the method must return merge weights (Selection.weights) for this model."
        )
    dropped = ~stay  # (total,)
    records = []
    for copy in range(stream.copies):
        start = stream.offset + copy * size
        span = features.where[start : start + total]  # (total, 2): prompt, column
        features.stays[start : start + total] = stay
        keep[span[dropped, 0], span[dropped, 1]] = False
        if flows:
            merges.append(Merged(selection, start + stream.geometry.rows, start + slots))
        records.append(stream.finished(copy, span[:, 1]))
    return flows or not bool(stay.all()), records
