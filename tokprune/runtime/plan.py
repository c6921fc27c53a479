"""Which prompt columns stay, with which features and positions, and the shortened call that the model then runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import RAW, TYPE_IDS, Adapter, flatten, like
from tokprune.adapters.dialect import cache_in, logical_length
from tokprune.errors import OptionError, TokpruneError, UnsupportedModelError
from tokprune.runtime.cache_record import PruneState, get_state, physical_length
from tokprune.runtime.masks import causal_mask, check_mask, gather_mask, is_full
from tokprune.runtime.positions import restarts, translate
from tokprune.runtime.streams import Stream, kept_rows
from tokprune.runtime.tripwires import next_positions
from tokprune.tokens import Layout, Selection


@dataclass
class StreamRecord:
    """What happened to one image or video in the last prefill.

    row: prompt of the batch. total, kept: candidate tokens. separators, separators_kept: newline tokens beside them.
    columns: (total + separators,) prompt columns of the stream's rows, in encoder order. candidates: (total,) the column of
    each token as `layout` and `selection` number them.
    """

    row: int
    modality: str
    total: int
    kept: int
    separators: int
    separators_kept: int
    layout: Layout
    selection: Selection
    columns: Tensor
    candidates: Tensor
    question: str | None = None
    question_source: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def frame_tokens(self) -> tuple[int, ...] | None:
        """Tokens kept of each frame of a video; None for an image. Asks the device."""
        if self.layout.kind != "video":
            return None
        group = self.layout.group[self.selection.indices.to(self.layout.group.device)]
        return tuple(torch.bincount(group, minlength=self.layout.num_groups).tolist())


@dataclass(frozen=True)
class Columns:
    """What is known of the columns of a call before anything is chosen; all (B, L).

    visible: the mask shows the token (to somebody, where it says so for each query). present: it is no padding: a token in
    the middle that the mask hides, or a hidden picture, keeps its place. placeholders: per modality, columns that features
    fill, hidden ones too. segments: number of the sample in a packed row, or None. packed: transformers would keep these
    samples apart by their positions.
    """

    visible: Tensor
    present: Tensor
    placeholders: dict[str, Tensor]
    segments: Tensor | None = None
    packed: bool = False

    @staticmethod
    def of(adapter: Adapter, call: Mapping[str, Any], encoded: Mapping[str, Any]) -> Columns:
        """Of the columns of `call`, whose mask covers those before them as well."""
        x, mask, past = columns_of(call), call.get("attention_mask"), cache_in(call)
        check_mask(mask)
        placeholders = adapter.placeholders(call, encoded)
        visible = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            visible = mask[:, -x.shape[1] :].bool().to(x.device)
        after = visible.flip(1).cumsum(1).flip(1) > 0
        present = (visible.cumsum(1) > 0) & after
        for columns in placeholders.values():
            present = present | columns
        segments, packed = None, False
        if mask is None and past is None and call.get("position_ids") is not None:
            segments = restarts(adapter.positions(call, x))
            packed = segments is not None and not adapter.caches(call)
        return Columns(visible, present, placeholders, segments, packed)


@dataclass
class Plan:
    """A decided prefill. keep: (B, L). row: per modality (B, L) flattened feature row, -1 elsewhere. sizes: rows left of each
    item of the encoder output. moves: (B, L + 1) by which positions moved (PruneState). start: logical length of the cache."""

    columns: Columns
    keep: Tensor
    row: dict[str, Tensor]
    sizes: dict[str, list[int]]
    pooled: dict[str, Tensor]
    deepstack: dict[str, list[Tensor]]
    template: dict[str, Any]
    positions: Tensor
    moves: Tensor
    start: int
    policy: str
    untouched: bool
    streams: list[StreamRecord]


@dataclass
class Frame:
    """One forward of the base model in flight. expand: (B, L) physical slot that answers for each logical column. index: (B, P)
    logical column of each slot, -1 for filler."""

    past: Any
    state: PruneState
    expand: Tensor
    index: Tensor
    for_generate: bool = False
    as_tuple: bool = False
    path: Any = None  # WidePath, where gradients of hidden states may be asked


def columns_of(call: Mapping[str, Any]) -> Tensor:
    """Token ids (B, L), or embeddings (B, L, D), of a call."""
    return call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]


def _write(stream: Stream, slots: Tensor, flat: Tensor, plane: Tensor) -> Tensor:
    """`flat` with the merged features of one stream copy written over its kept slots; differentiable.

    slots: (K,) rows in `flat`. plane: (N, D) candidate features of the stream in `flat`'s plane.
    """
    selection = stream.selection
    if selection is None:
        return flat
    return flat.index_copy(0, slots.to(flat.device), selection.apply(plane).to(flat.dtype))


def make_plan(
    adapter: Adapter,
    call: dict[str, Any],
    encoded: dict[str, Any],
    columns: Columns,
    streams: Sequence[Stream],
    policy: str,
) -> Plan:
    """Turn the streams' selections into a plan for the columns of this call."""
    x = columns_of(call)
    batch = x.shape[0]
    device = x.device
    keep = columns.present.clone()
    row: dict[str, Tensor] = {}
    where: dict[str, Tensor] = {}
    items: dict[str, list[int]] = {}
    stays: dict[str, Tensor] = {}
    pooled: dict[str, Tensor] = {}
    deepstack: dict[str, list[Tensor]] = {}
    masks = columns.placeholders
    for modality, mask in masks.items():
        if encoded.get(modality) is None:
            continue
        features = flatten(encoded[modality].pooler_output)
        where[modality] = mask.nonzero()
        row[modality] = torch.full(mask.shape, -1, dtype=torch.long, device=device)
        row[modality][mask] = torch.arange(where[modality].shape[0], device=device)
        items[modality] = [f.shape[0] for f in features]
        stays[modality] = torch.ones(sum(items[modality]), dtype=torch.bool)
        pooled[modality] = torch.cat(features)
        planes = getattr(encoded[modality], "deepstack_features", None)
        if planes is not None:
            deepstack[modality] = [torch.cat(flatten(plane)) for plane in planes]
    untouched, records = True, []
    for stream in streams:
        modality, selection = stream.modality, stream.selection
        if selection is None:
            raise TokpruneError("no selection was made for a stream.")
        slots, stay, separators = kept_rows(stream)
        changed = selection.weights is not None or selection.features is not None
        if selection.features is not None and modality in deepstack:
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} has DeepStack planes, which explicit replacement features cannot reach; "
                "the method must return merge weights (Selection.weights) for this model."
            )
        untouched &= not changed and bool(stay.all())
        size = int(masks[modality][stream.row].sum())
        for i in range(stream.copies):
            start = stream.offset + i * size
            span = where[modality][start : start + stream.geometry.total]  # (total, 2): batch row, column
            stays[modality][start : start + stream.geometry.total] = stay.cpu()
            out = ~stay.to(device)
            keep[span[out, 0], span[out, 1]] = False
            if changed:
                inputs = (start + stream.geometry.rows).to(pooled[modality].device)
                outputs = start + slots
                pooled[modality] = _write(stream, outputs, pooled[modality], pooled[modality][inputs])
                if modality in deepstack:
                    deepstack[modality] = [
                        _write(stream, outputs, p, p[inputs.to(p.device)]) for p in deepstack[modality]
                    ]
            query = stream.tokens.query
            records.append(
                StreamRecord(
                    row=stream.row + i,
                    modality=modality,
                    total=len(stream.tokens),
                    kept=len(selection),
                    separators=stream.geometry.separators.shape[0],
                    separators_kept=separators,
                    layout=stream.geometry.layout,
                    selection=selection,
                    columns=span[:, 1],
                    candidates=span[stream.geometry.rows.to(device), 1],
                    question=None if query is None else query.text,
                    question_source=None if query is None else query.source,
                    sources=stream.sources,
                    note="; ".join(n for n in (stream.geometry.note, stream.note) if n),
                )
            )
    past = cache_in(call)
    state = get_state(past)
    shift = state.shift.to(device) if state is not None else torch.zeros(batch, 1, dtype=torch.long, device=device)
    positions = adapter.positions(call, x)
    if policy == "auto":
        policy = "keep" if positions.ndim == 3 else "compact"
    visual = torch.stack([r >= 0 for r in row.values()]).any(0)
    dropped = columns.present & ~keep
    positions, moves = translate(positions, policy, keep, dropped, columns.visible, visual, shift, columns.segments)
    if adapter.hybrid and state is not None and len(set(dropped.sum(1).tolist())) > 1:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} has recurrent layers: a later turn whose prompts lose different numbers of tokens "
            "would need filler in the middle of the sequence. Run these prompts one by one, or without the kept cache."
        )
    template = {m: encoded[m] for m in row}
    sizes = {m: [int(part.sum()) for part in stays[m].split(items[m])] for m in row}
    start = logical_length(past)
    return Plan(
        columns, keep, row, sizes, pooled, deepstack, template, positions, moves, start, policy, untouched, records
    )


def execute(
    adapter: Adapter, plan: Plan, call: dict[str, Any], hide_positions: bool
) -> tuple[dict[str, Any], Frame, Any]:
    """The physical call for the columns of `call`.

    Rows that keep different numbers are padded on the left with masked filler, so that the last slot of every row is its
    last token. The mask is always explicit: transformers would take gaps in kept positions for packed sequences otherwise;
    but for rows that are packed, whose samples it must tell apart by their positions. hide_positions: give attention
    contiguous positions and only the rotary embedding the kept ones (flash attention reads gaps as packing, too); then the
    third value is its table, else None.
    """
    x = columns_of(call)
    batch, length = x.shape[:2]
    device = x.device
    past = cache_in(call)
    state = get_state(past)
    keep = plan.keep
    counts = keep.sum(1)
    width = max(int(counts.max()), 1)  # a prompt may be all padding: one filler column stays
    order = torch.argsort(keep.int(), dim=1, stable=True)
    index = order[:, length - width :]  # (B, P) logical column of each physical one
    slots = torch.arange(width, device=device)
    used = slots >= (width - counts)[:, None]

    new = dict(call)
    if call.get("input_ids") is not None:
        new["input_ids"] = call["input_ids"].gather(1, index).masked_fill(~used, adapter.pad_id)
    if call.get("inputs_embeds") is not None:
        embeds = call["inputs_embeds"]
        gathered = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        new["inputs_embeds"] = gathered.masked_fill(~used[..., None], 0)

    held = physical_length(past)
    check_room(past, held + width)
    columns = torch.where(used, index + plan.start, -1)
    before = state.columns(held) if state is not None else torch.arange(held, device=device).expand(batch, -1)
    columns = torch.cat([before.to(device), columns], 1)  # (B, held + P)
    new["attention_mask"] = _mask(adapter, plan, call, columns, torch.where(used, index, -1))
    for name in TYPE_IDS:
        types = call.get(name)
        if types is None:
            continue
        if types.shape[1] < length:  # assisted decoding does not extend them over drafted tokens
            types = torch.nn.functional.pad(types, (0, length - types.shape[1]))
        if types.shape[1] == length:
            new[name] = types.gather(1, index).masked_fill(~used, 0)
        else:  # Gemma-3 passes them from the start of the sequence
            new[name] = types.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)

    at = index.expand(*plan.positions.shape[:-2], -1, -1)
    positions = plan.positions.gather(-1, at).masked_fill(~used.expand_as(at), 0)
    visual = torch.stack([row >= 0 for row in plan.row.values()]).any(0)
    expected = next_positions(positions, keep[:, -1] & ~visual[:, -1])
    table: tuple[Tensor, Any] | None = None
    if plan.columns.packed and plan.columns.segments is not None:
        sample = torch.where(used, plan.columns.segments.gather(1, index), -1)
        first = sample.diff(dim=1, prepend=sample[:, :1] - 1) != 0
        inside = slots - torch.where(first, slots, 0).cummax(1).values
        if positions.ndim == 3:
            positions = torch.cat([inside[None], positions[1:]])
        else:
            table = (positions, 0)
            positions = inside
        _cut_lengths(new, keep)
    elif hide_positions and plan.policy == "keep" and positions.ndim == 2 and width > 1:
        pad = (width - counts)[:, None]
        table = (positions, pad)
        positions = torch.where(used, slots.expand(batch, -1) - pad, 0)
    new["position_ids"] = positions
    new["mm_encoder_outputs"] = _encoder_outputs(plan, call, index, used)
    clear_raw(new)

    slot = torch.full((batch, length), -1, dtype=torch.long, device=device)
    slot.scatter_(1, index, torch.where(used, slots.expand(batch, -1), -1))
    expand = slot.cummax(1).values.clamp(min=0)  # a dropped column answers with the nearest kept one before it
    mask = new["attention_mask"]
    filled = columns < 0 if not isinstance(mask, Tensor) or mask.ndim != 2 else mask == 0
    candidate = torch.zeros_like(keep)
    for record in plan.streams:
        candidate[record.row, record.candidates.to(device)] = True
    visual = candidate.gather(1, index) & used
    seen = state.visual if state is not None and state.visual is not None else visual[:, :0]
    seen = torch.nn.functional.pad(seen.to(device), (0, held - seen.shape[1]))
    moves = plan.moves.to(device)
    earlier = moves[:, :0]
    if plan.start:
        earlier = state.moves_until(plan.start).to(device) if state is not None else moves.new_zeros(batch, plan.start)
    after = PruneState(
        columns,
        torch.cat([earlier, moves], 1),
        plan.start + length,
        bool(filled.any()),
        visual=torch.cat([seen, visual], 1),
        next_position=expected,
    )
    return new, Frame(past, after, expand, torch.where(used, index, -1)), table


def check_room(cache: Any, keys: int) -> None:
    """Refuse a cache of fixed length that the pruned prompt does not fit in."""
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    room = min((size for layer in layers if (size := getattr(layer, "max_cache_len", None)) is not None), default=keys)
    if room < keys:
        raise OptionError(
            f"this {type(cache).__name__} holds {room} keys and the pruned prompt has {keys}: its text, the tokens kept of each picture "
            "and the newline tokens beside them. Give max_cache_len=pruning.last.length plus the tokens to generate."
        )


def _mask(adapter: Adapter, plan: Plan, call: Mapping[str, Any], columns: Tensor, index: Tensor) -> Any:
    """The physical mask. columns: (B, keys) logical column of every key. index: (B, P) column of each query; -1 is filler."""
    mask = call.get("attention_mask")
    if is_full(mask):
        causal = causal_mask(columns, index.shape[1], adapter.model.dtype)
        return gather_mask(mask, columns, index, causal)
    if plan.columns.packed:
        return None  # filler is a sample of its own
    if mask is None or isinstance(mask, Mapping):
        return (columns >= 0).long()
    return gather_mask(mask, columns)


def _cut_lengths(call: dict[str, Any], keep: Tensor) -> None:
    """Where the samples of a packed row end, as flash attention may be told beside the positions."""
    before = torch.nn.functional.pad(keep.flatten().cumsum(0), (1, 0))
    for side in "qk":
        ends = call.get(f"cu_seq_lens_{side}")
        if ends is None:
            continue
        new = before[ends.long()].to(ends.dtype)
        call[f"cu_seq_lens_{side}"] = new
        if call.get(f"max_length_{side}") is not None:
            call[f"max_length_{side}"] = int(new.diff().max())


def _encoder_outputs(plan: Plan, call: Mapping[str, Any], index: Tensor, used: Tensor) -> dict[str, Any] | None:
    """The encoder outputs with the rows of the kept placeholders, item by item; objects of their own."""
    outputs = {k: v for k, v in (call.get("mm_encoder_outputs") or {}).items() if k not in plan.row}
    for modality, row in plan.row.items():
        rows = torch.where(used, row.gather(1, index), -1)
        rows = rows[rows >= 0]
        if rows.numel() == 0:
            continue
        template, sizes = plan.template[modality], plan.sizes[modality]
        output = copy.copy(template)
        pooled = plan.pooled[modality]
        output.pooler_output = like(template.pooler_output, pooled[rows.to(pooled.device)], sizes)
        if modality in plan.deepstack:
            output.deepstack_features = [
                like(plane, features[rows.to(features.device)], sizes)
                for plane, features in zip(template.deepstack_features, plan.deepstack[modality], strict=True)
            ]
        outputs[modality] = output
    return outputs or None


def clear_raw(call: dict[str, Any]) -> None:
    """Blank the raw pixels of a call whose features are there."""
    for keys in RAW.values():
        for key in keys:
            if key in call:
                call[key] = None
