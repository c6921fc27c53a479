"""Which prompt columns stay, with which features and positions, and the shortened call that the model then runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import RAW, TYPE_IDS, Adapter, flatten, like, mask_2d
from tokprune.adapters.dialect import cache_in
from tokprune.adapters.positions import translate
from tokprune.adapters.state import PruneState, get_state, logical_length, physical_length
from tokprune.adapters.streams import Stream, kept_rows
from tokprune.errors import TokpruneError, UnsupportedModelError
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


@dataclass
class Plan:
    """A decided prefill. keep: (B, L). row: per modality (B, L) flattened feature row, -1 elsewhere."""

    keep: Tensor
    row: dict[str, Tensor]
    pooled: dict[str, Tensor]
    deepstack: dict[str, list[Tensor]]
    template: dict[str, Any]
    positions: Tensor
    shift: Tensor
    start: int
    policy: str
    untouched: bool
    streams: list[StreamRecord]


@dataclass
class Frame:
    """One forward of the base model in flight. expand: (B, L) physical slot that answers for each logical column."""

    past: Any
    state: PruneState
    expand: Tensor
    for_generate: bool = False


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
    masks: dict[str, Tensor],
    real: Tensor,
    streams: Sequence[Stream],
    policy: str,
) -> Plan:
    """Turn the streams' selections into a plan for the columns of this call. masks: (B, L) placeholder columns."""
    x = columns_of(call)
    batch = x.shape[0]
    device = x.device
    keep = real.clone()
    row: dict[str, Tensor] = {}
    where: dict[str, Tensor] = {}
    pooled: dict[str, Tensor] = {}
    deepstack: dict[str, list[Tensor]] = {}
    for modality, mask in masks.items():
        if encoded.get(modality) is None:
            continue
        where[modality] = mask.nonzero()
        row[modality] = torch.full(mask.shape, -1, dtype=torch.long, device=device)
        row[modality][mask] = torch.arange(where[modality].shape[0], device=device)
        pooled[modality] = torch.cat(flatten(encoded[modality].pooler_output))
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
    positions, shift = translate(positions, policy, keep, real, visual, shift)
    if adapter.hybrid and state is not None and len(set((real & ~keep).sum(1).tolist())) > 1:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} has recurrent layers: a later turn whose prompts lose different numbers of tokens "
            "would need filler in the middle of the sequence. Run these prompts one by one, or without the kept cache."
        )
    template = {m: encoded[m] for m in row}
    return Plan(
        keep, row, pooled, deepstack, template, positions, shift, logical_length(past), policy, untouched, records
    )


def execute(
    adapter: Adapter, plan: Plan, call: dict[str, Any], hide_positions: bool
) -> tuple[dict[str, Any], Frame, Any]:
    """The physical call for the columns of `call`, which `plan` covers from its start.

    Rows that keep different numbers are padded with masked filler on the side the batch is padded already (left unless
    only the right is). The 2-D mask is always explicit: transformers would take gaps in kept positions for packed
    sequences otherwise. hide_positions: give attention contiguous positions and only the rotary embedding the kept ones
    (flash attention reads gaps as packing, too); then the third value is its table, else None.
    """
    x = columns_of(call)
    batch, length = x.shape[:2]
    device = x.device
    past = cache_in(call)
    state = get_state(past)
    offset = logical_length(past) - plan.start
    keep = plan.keep[:, offset : offset + length]
    counts = keep.sum(1)
    width = max(int(counts.max()), 1)  # a chunk may lose all its tokens: one filler column stays
    mask = mask_2d(call.get("attention_mask"), plan.start + offset + length)
    right = mask is not None and bool((mask[:, -1] == 0).any()) and bool((mask[:, 0] != 0).all())
    order = torch.argsort(keep.int(), dim=1, stable=True, descending=right)
    index = order[:, :width] if right else order[:, length - width :]  # (B, P) logical column of each physical one
    slots = torch.arange(width, device=device)
    used = slots < counts[:, None] if right else slots >= (width - counts)[:, None]

    new = dict(call)
    if call.get("input_ids") is not None:
        new["input_ids"] = call["input_ids"].gather(1, index).masked_fill(~used, adapter.pad_id)
    if call.get("inputs_embeds") is not None:
        embeds = call["inputs_embeds"]
        gathered = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        new["inputs_embeds"] = gathered.masked_fill(~used[..., None], 0)

    held = physical_length(past)
    columns = torch.where(used, index + plan.start + offset, -1)
    before = state.columns(held) if state is not None else torch.arange(held, device=device).expand(batch, -1)
    columns = torch.cat([before.to(device), columns], 1)  # (B, held + P)
    if mask is None:
        key_mask = (columns >= 0).long()
    else:
        key_mask = mask.to(device).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0).long()
    new["attention_mask"] = key_mask
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

    positions = plan.positions[..., offset : offset + length]
    at = index.expand(*positions.shape[:-2], -1, -1)
    positions = positions.gather(-1, at).masked_fill(~used.expand_as(at), 0)
    table = None
    if hide_positions and plan.policy == "keep" and positions.ndim == 2 and width > 1:
        pad = (width - counts)[:, None] * (0 if right else 1)
        table = (positions, pad)
        positions = torch.where(used, slots.expand(batch, -1) - pad, 0)
    new["position_ids"] = positions

    outputs = {k: v for k, v in (call.get("mm_encoder_outputs") or {}).items() if k not in plan.row}
    for modality, row in plan.row.items():
        rows = torch.where(used, row[:, offset : offset + length].gather(1, index), -1)
        rows = rows[rows >= 0]
        if rows.numel() == 0:
            continue
        output = copy.copy(plan.template[modality])
        pooled = plan.pooled[modality]
        output.pooler_output = like(plan.template[modality].pooler_output, pooled[rows.to(pooled.device)])
        if modality in plan.deepstack:
            output.deepstack_features = [
                like(template, plane[rows.to(plane.device)])
                for template, plane in zip(
                    plan.template[modality].deepstack_features, plan.deepstack[modality], strict=True
                )
            ]
        outputs[modality] = output
    clear_raw(new)
    new["mm_encoder_outputs"] = outputs or None

    slot = torch.full((batch, length), -1, dtype=torch.long, device=device)
    slot.scatter_(1, index, torch.where(used, slots.expand(batch, -1), -1))
    expand = slot.cummax(1).values.clamp(min=0)  # a dropped column answers with the nearest kept one before it
    has_fill = bool((key_mask == 0).any())
    candidate = torch.zeros_like(plan.keep)
    for record in plan.streams:
        candidate[record.row, record.candidates.to(device)] = True
    visual = candidate[:, offset : offset + length].gather(1, index) & used
    seen = state.visual if state is not None and state.visual is not None else visual[:, :0]
    seen = torch.nn.functional.pad(seen.to(device), (0, held - seen.shape[1]))
    visual = torch.cat([seen, visual], 1)
    after = PruneState(columns, plan.shift.to(device), plan.start + offset + length, has_fill, visual=visual)
    return new, Frame(past, after, expand), table


def clear_raw(call: dict[str, Any]) -> None:
    """Blank the raw pixels of a call whose features are there."""
    for keys in RAW.values():
        for key in keys:
            if key in call:
                call[key] = None
