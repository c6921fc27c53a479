"""Step 5 of the prefill: the shortened call that the model's own forward then runs.

Rows that keep different numbers are padded on the left with masked filler, so that the last slot of every row is its
last token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.adapters.base import RAW, TYPE_IDS, Adapter, like
from tokprune.adapters.dialect import cache_in
from tokprune.adapters.types import EncoderOutput, KVCache, Mask, ModelCall, RotaryTable
from tokprune.errors import OptionError
from tokprune.runtime.cache_record import PruneState, get_state, physical_length
from tokprune.runtime.masks import causal_mask, gather_mask, is_full
from tokprune.runtime.outputs import WidePath
from tokprune.runtime.plan import Features, Plan
from tokprune.runtime.tripwires import next_positions


@dataclass
class PrunedForward:
    """One forward of the base model in flight."""

    past: KVCache
    state: PruneState
    """For the cache that it fills."""
    expand: Tensor
    """(B, L) slot that answers for each prompt column."""
    index: Tensor
    """(B, P) prompt column of each slot, -1 for filler."""
    for_generate: bool = False
    as_tuple: bool = False
    path: WidePath | None = None
    """Where gradients of hidden states may be asked for."""


@dataclass
class Slots:
    """Where the kept columns of a plan go."""

    index: Tensor
    """(B, P) prompt column of each slot; filler has one, too."""
    used: Tensor
    """(B, P) bool, false for filler."""
    filler: Tensor
    """(B, 1) filler on the left of each row."""
    held: int
    """Keys before these."""
    columns: Tensor
    """(B, held + P) prompt column of every key, -1 for filler."""

    @staticmethod
    def of(plan: Plan, past: KVCache) -> Slots:
        """The slots of a plan behind the keys of a cache."""
        keep = plan.keep
        batch, length = keep.shape
        counts = keep.sum(1)
        width = max(int(counts.max()), 1)  # a prompt may be all padding: one filler column stays
        order = torch.argsort(keep.int(), dim=1, stable=True)  # (B, L) dropped columns first
        index = order[:, length - width :]  # (B, P)
        filler = (width - counts)[:, None]  # (B, 1)
        used = torch.arange(width, device=keep.device) >= filler  # (B, P)
        held, state = physical_length(past), get_state(past)
        check_room(past, held + width)
        before = torch.arange(held, device=keep.device).expand(batch, -1) if state is None else state.columns(held)
        columns = torch.cat([before.to(keep.device), torch.where(used, index + plan.start, -1)], 1)  # (B, held + P)
        return Slots(index, used, filler, held, columns)

    @property
    def width(self) -> int:
        """Slots of a row."""
        return self.index.shape[1]

    @property
    def numbers(self) -> Tensor:
        """(P,) 0, 1, ..."""
        return torch.arange(self.width, device=self.index.device)

    @property
    def known(self) -> Tensor:
        """(B, P) prompt column of each slot, -1 for filler."""
        return torch.where(self.used, self.index, -1)

    def take(self, values: Tensor, filler: int = 0) -> Tensor:
        """(B, L) per prompt column -> (B, P) per slot."""
        return values.gather(1, self.index).masked_fill(~self.used, filler)


def execute(
    adapter: Adapter, plan: Plan, call: ModelCall, hide_positions: bool
) -> tuple[ModelCall, PrunedForward, RotaryTable | None]:
    """The physical call for the columns of `call`, and the table of positions for rotation where attention gets others.

    hide_positions: give attention contiguous positions and only the rotary embedding the kept ones; flash attention
    reads gaps in them as packing.
    """
    past = cache_in(call)
    slots = Slots.of(plan, past)
    new = dict(call)
    if call.get("input_ids") is not None:
        new["input_ids"] = slots.take(call["input_ids"], adapter.pad_id)  # (B, P)
    if call.get("inputs_embeds") is not None:
        embeds = call["inputs_embeds"]  # (B, L, D)
        gathered = embeds.gather(1, slots.index[..., None].expand(-1, -1, embeds.shape[-1]))
        new["inputs_embeds"] = gathered.masked_fill(~slots.used[..., None], 0)  # (B, P, D)
    new["attention_mask"] = _mask(adapter, plan, call, slots)
    _cut_type_ids(new, plan.keep.shape[1], slots)
    at = slots.index.expand(*plan.positions.shape[:-2], -1, -1)
    kept_positions = plan.positions.gather(-1, at).masked_fill(~slots.used.expand_as(at), 0)  # (..., B, P)
    new["position_ids"], table = _positions(plan, slots, kept_positions, hide_positions)
    if plan.columns.packed:
        _cut_lengths(new, plan.keep)
    new["mm_encoder_outputs"] = _encoder_outputs(plan, call, slots)
    clear_raw(new)
    expected = next_positions(kept_positions, plan.keep[:, -1] & ~plan.visual[:, -1])  # (B,)
    state = _record(plan, slots, past, new["attention_mask"], expected)
    return new, PrunedForward(past, state, _expand(slots, plan.keep.shape[1]), slots.known), table


def _mask(adapter: Adapter, plan: Plan, call: ModelCall, slots: Slots) -> Mask:
    """The physical mask, always explicit: transformers would take gaps in kept positions for packed sequences
    otherwise.

    But for rows that are packed, whose samples it must tell apart by their positions.
    """
    mask: Mask = call.get("attention_mask")
    if is_full(mask):
        causal = causal_mask(slots.columns, slots.width, adapter.model.dtype)
        return gather_mask(mask, slots.columns, slots.known, causal)
    if plan.columns.packed:
        return None  # filler is a sample of its own
    if mask is None or isinstance(mask, Mapping):
        return (slots.columns >= 0).long()  # (B, held + P)
    return gather_mask(mask, slots.columns)


def _cut_type_ids(call: ModelCall, length: int, slots: Slots) -> None:
    """Token types of the kept columns. length: of the prompt's new columns."""
    for name in TYPE_IDS:
        types = call.get(name)
        if types is None:
            continue
        if types.shape[1] < length:  # assisted decoding does not extend them over drafted tokens
            types = torch.nn.functional.pad(types, (0, length - types.shape[1]))
        if types.shape[1] == length:
            call[name] = slots.take(types)  # (B, P)
        else:  # Gemma-3 passes them from the start of the sequence
            call[name] = types.gather(1, slots.columns.clamp(min=0)).masked_fill(slots.columns < 0, 0)  # (B, held + P)


def _positions(plan: Plan, slots: Slots, kept: Tensor, hide: bool) -> tuple[Tensor, RotaryTable | None]:
    """Position ids that attention gets, and those for rotation where they differ. kept: (..., B, P)."""
    numbers = slots.numbers
    if plan.columns.packed and plan.columns.segments is not None:
        sample = torch.where(slots.used, plan.columns.segments.gather(1, slots.index), -1)  # (B, P)
        first = sample.diff(dim=1, prepend=sample[:, :1] - 1) != 0  # (B, P) where a sample begins
        in_sample = numbers - torch.where(first, numbers, 0).cummax(1).values  # (B, P)
        if kept.ndim == 3:
            return torch.cat([in_sample[None], kept[1:]]), None
        return in_sample, (kept, 0)
    if hide and plan.policy == "keep" and kept.ndim == 2 and slots.width > 1:
        contiguous = numbers.expand(slots.used.shape[0], -1) - slots.filler  # (B, P)
        return torch.where(slots.used, contiguous, 0), (kept, slots.filler)
    return kept, None


def _cut_lengths(call: ModelCall, keep: Tensor) -> None:
    """Where the samples of a packed row end, as flash attention may be told beside the positions. keep: (B, L)."""
    before = torch.nn.functional.pad(keep.flatten().cumsum(0), (1, 0))
    for side in "qk":
        ends = call.get(f"cu_seq_lens_{side}")
        if ends is None:
            continue
        new = before[ends.long()].to(ends.dtype)
        call[f"cu_seq_lens_{side}"] = new
        if call.get(f"max_length_{side}") is not None:
            call[f"max_length_{side}"] = int(new.diff().max())


def _encoder_outputs(plan: Plan, call: ModelCall, slots: Slots) -> dict[str, EncoderOutput] | None:
    """The encoder outputs with the rows of the kept placeholders, item by item; objects of their own."""
    outputs = {k: v for k, v in (call.get("mm_encoder_outputs") or {}).items() if k not in plan.features}
    for modality, features in plan.features.items():
        rows = torch.where(slots.used, features.row.gather(1, slots.index), -1)  # (B, P)
        rows = rows[rows >= 0]
        if rows.numel():
            outputs[modality] = _encoder_output(features, rows)
    return outputs or None


def _encoder_output(features: Features, rows: Tensor) -> EncoderOutput:
    """An encoder output with some rows of its features and DeepStack planes. rows: (K,)."""
    output, sizes = copy.copy(features.output), features.sizes_left
    kept = [plane[rows.to(plane.device)] for plane in features.planes]  # (K, D) each
    output.pooler_output = like(features.output.pooler_output, kept[0], sizes)
    if features.deepstack:
        templates = features.output.deepstack_features  # type: ignore[attr-defined]
        planes = [like(template, plane, sizes) for template, plane in zip(templates, kept[1:], strict=True)]
        output.deepstack_features = planes  # type: ignore[attr-defined]
    return output


def _expand(slots: Slots, length: int) -> Tensor:
    """(B, L) slot that answers for each prompt column: of a dropped one, the nearest kept one before it."""
    slot = torch.full((slots.index.shape[0], length), -1, dtype=torch.long, device=slots.index.device)  # (B, L)
    slot.scatter_(1, slots.index, torch.where(slots.used, slots.numbers, -1))
    return slot.cummax(1).values.clamp(min=0)


def _record(plan: Plan, slots: Slots, past: KVCache, mask: Mask, expected: Tensor) -> PruneState:
    """What the cache must know after this forward. mask: the physical one. expected: (B,) position of the next
    token."""
    state, device = get_state(past), plan.keep.device
    batch, length = plan.keep.shape
    hidden = slots.columns < 0  # (B, held + P)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        hidden = mask == 0
    candidate = torch.zeros_like(plan.keep)  # (B, L)
    for stream in plan.streams:
        candidate[stream.row, stream.candidates.to(device)] = True
    visual = candidate.gather(1, slots.index) & slots.used  # (B, P)
    seen = state.visual if state is not None and state.visual is not None else visual[:, :0]
    seen = torch.nn.functional.pad(seen.to(device), (0, slots.held - seen.shape[1]))  # (B, held)
    moves = plan.moves.to(device)  # (B, L + 1)
    earlier = moves[:, :0]
    if plan.start:
        earlier = moves.new_zeros(batch, plan.start) if state is None else state.moves_until(plan.start).to(device)
    return PruneState(
        slots.columns,
        torch.cat([earlier, moves], 1),
        plan.start + length,
        bool(hidden.any()),
        visual=torch.cat([seen, visual], 1),
        next_position=expected,
    )


def check_room(cache: KVCache, keys: int) -> None:
    """Refuse a cache of fixed length that the pruned prompt does not fit in."""
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    room = min((size for layer in layers if (size := getattr(layer, "max_cache_len", None)) is not None), default=keys)
    if room < keys:
        raise OptionError(
            f"this {type(cache).__name__} holds {room} keys and the pruned prompt has {keys}: its text, the tokens "
            "kept of each picture "
            "and the newline tokens beside them. Give max_cache_len=pruning.last.length plus the tokens to generate."
        )


def clear_raw(call: ModelCall) -> None:
    """Blank the raw pixels of a call whose features are there."""
    for keys in RAW.values():
        for key in keys:
            if key in call:
                call[key] = None
