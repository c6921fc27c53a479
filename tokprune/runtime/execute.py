"""Step 5 of the prefill: the shortened call that the model's own forward then runs.

Rows that keep different numbers are padded on the left with masked filler, so that the last slot of every row is its
last token.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from tokprune.adapters.base import RAW, TYPE_IDS, Adapter, like
from tokprune.adapters.dialect import cache_in
from tokprune.adapters.types import EncoderOutput, KVCache, Mask, ModelCall, RotaryTable
from tokprune.errors import OptionError
from tokprune.ops.topk import rows_at
from tokprune.runtime.cache_record import PruneState, physical_length
from tokprune.runtime.grouping import Grouped
from tokprune.runtime.host import to_device
from tokprune.runtime.masks import causal_mask, gather_mask, is_full
from tokprune.runtime.outputs import WidePath
from tokprune.runtime.plan import Features, Plan, tokens_of
from tokprune.runtime.positions import at_start
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
    lengths: list[int] = field(default_factory=list)
    """Columns that each row keeps."""
    grouped: Grouped | None = None
    """How the LLM reads the rows, where not padded to one length."""
    path: WidePath | None = None
    """Where gradients of hidden states may be asked for."""


@dataclass
class Slots:
    """Where the kept columns of a plan go; on the host, but for `at` and `filled`."""

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
    at: Tensor
    """`index` where the call is."""
    filled: Tensor | None
    """(B, P) bool, true for filler, where the call is; None without any."""

    @staticmethod
    def of(plan: Plan, past: KVCache, device: torch.device) -> Slots:
        """The slots of a plan behind the keys of a cache, for a call on `device`."""
        keep = plan.keep
        batch, length = keep.shape
        counts = keep.sum(1)
        width = max(int(counts.max()), 1)  # a prompt may be all padding: one filler column stays
        order = torch.argsort(keep.int(), dim=1, stable=True)  # (B, L) dropped columns first
        index = order[:, length - width :]  # (B, P)
        filler = (width - counts)[:, None]  # (B, 1)
        used = torch.arange(width) >= filler  # (B, P)
        held = physical_length(past)
        check_room(past, held + width)
        before = torch.arange(held).expand(batch, -1) if plan.earlier is None else plan.earlier.columns(held)
        columns = torch.cat([before, torch.where(used, index + plan.start, -1)], 1)  # (B, held + P)
        at, *filled = to_device(device, index, *([] if used.all() else [~used]))
        return Slots(index, used, filler, held, columns, at, filled[0] if filled else None)

    @property
    def width(self) -> int:
        """Slots of a row."""
        return self.index.shape[1]

    @property
    def numbers(self) -> Tensor:
        """(P,) 0, 1, ..."""
        return torch.arange(self.width)

    @property
    def known(self) -> Tensor:
        """(B, P) prompt column of each slot, -1 for filler."""
        return torch.where(self.used, self.index, -1)

    def take(self, values: Tensor, filler: int = 0) -> Tensor:
        """(..., B, L) per prompt column -> (..., B, P) per slot."""
        taken = values.gather(-1, self.at.to(values.device).expand(*values.shape[:-2], -1, -1))
        return taken if self.filled is None else taken.masked_fill(self.filled.to(values.device), filler)


def hides_positions(adapter: Adapter) -> bool:
    """Whether attention gets contiguous positions and only the rotary embedding the kept ones: flash attention reads
    gaps in them as packing.
    """
    return "flash" in adapter.kernel


def execute(adapter: Adapter, plan: Plan, call: ModelCall) -> tuple[ModelCall, PrunedForward, RotaryTable | None]:
    """The physical call for the columns of `call`, and the table of positions for rotation where attention gets
    others.
    """
    past, device = cache_in(call), tokens_of(call).device
    slots = Slots.of(plan, past, device)
    visible = _visible_keys(plan, slots)
    state = _record(plan, slots, visible)
    ends_in_text = plan.keep[:, -1] & ~plan.visual[:, -1]  # (B,)
    of_call = (visible.long(), _expand(slots, plan.keep.shape[1]), slots.known, ends_in_text)
    placed = to_device(device, state.kept, state.moves, cast(Tensor, state.visual), *of_call)
    (state.kept, state.moves, state.visual), (visible, expand, known, ends_in_text) = placed[:3], placed[3:]
    new = dict(call)
    if call.get("input_ids") is not None:
        new["input_ids"] = slots.take(call["input_ids"], adapter.pad_id)  # (B, P)
    if call.get("inputs_embeds") is not None:
        embeds = call["inputs_embeds"]  # (B, L, D)
        taken = rows_at(embeds, slots.at)  # (B, P, D)
        new["inputs_embeds"] = taken if slots.filled is None else taken.masked_fill(slots.filled[..., None], 0)
    new["attention_mask"] = _mask(adapter, plan, call, (visible, state.kept, known))
    _cut_type_ids(new, plan.keep.shape[1], slots, state.kept)
    kept_positions = slots.take(plan.positions)  # (..., B, P)
    new["position_ids"], table = _positions(plan, slots, kept_positions, hides_positions(adapter))
    if plan.columns.packed:
        _cut_lengths(new, plan.keep)
    new["mm_encoder_outputs"] = _encoder_outputs(adapter, plan, call, slots)
    clear_raw(new)
    state.next_position = next_positions(kept_positions, ends_in_text)
    lengths: list[int] = plan.keep.sum(1).tolist()
    return new, PrunedForward(past, state, expand, known, lengths=lengths), table


def _visible_keys(plan: Plan, slots: Slots) -> Tensor:
    """(B, held + P) bool, on the host: keys that a two-dimensional mask leaves visible."""
    there, mask = slots.columns >= 0, plan.columns.mask
    return there if mask is None else there & mask.gather(1, slots.columns.clamp(min=0))


def _mask(adapter: Adapter, plan: Plan, call: ModelCall, keys: tuple[Tensor, Tensor, Tensor]) -> Mask:
    """The physical mask, always explicit: transformers would take gaps in kept positions for packed sequences
    otherwise.

    But for rows that are packed, whose samples it must tell apart by their positions. keys: (B, held + P) which are
    visible (0 or 1) and their prompt columns, and (B, P) the columns of the new ones.
    """
    mask: Mask = call.get("attention_mask")
    visible, columns, known = keys
    if is_full(mask):
        return gather_mask(mask, columns, known, causal_mask(columns, known.shape[1], adapter.model.dtype))
    if plan.columns.packed:
        return None  # filler is a sample of its own
    return visible.bool() if isinstance(mask, Tensor) and mask.dtype == torch.bool else visible


def _cut_type_ids(call: ModelCall, length: int, slots: Slots, columns: Tensor) -> None:
    """Token types of the kept columns. length: of the prompt's new columns. columns: (B, held + P) of every key."""
    for name in TYPE_IDS:
        types = call.get(name)
        if types is None:
            continue
        if types.shape[1] < length:  # assisted decoding does not extend them over drafted tokens
            types = torch.nn.functional.pad(types, (0, length - types.shape[1]))
        if types.shape[1] == length:
            call[name] = slots.take(types)  # (B, P)
        else:  # Gemma-3 passes them from the start of the sequence
            call[name] = types.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)  # (B, held + P)


def _positions(plan: Plan, slots: Slots, kept: Tensor, hide: bool) -> tuple[Tensor, RotaryTable | None]:
    """Position ids that attention gets, and those for rotation where they differ. kept: (..., B, P)."""
    numbers = slots.numbers
    if plan.columns.packed and plan.columns.segments is not None:
        sample = torch.where(slots.used, plan.columns.segments.gather(1, slots.index), -1)  # (B, P)
        in_sample = (numbers - at_start(numbers, sample)).to(kept.device)  # (B, P)
        if kept.ndim == 3:
            return torch.cat([in_sample[None], kept[1:]]), None
        return in_sample, (kept, 0)
    if hide and plan.policy == "keep" and kept.ndim == 2 and slots.width > 1:
        contiguous = numbers.expand(slots.used.shape[0], -1) - slots.filler  # (B, P)
        contiguous, filler = to_device(kept.device, torch.where(slots.used, contiguous, 0), slots.filler)
        return contiguous, (kept, filler)
    return kept, None


def _cut_lengths(call: ModelCall, keep: Tensor) -> None:
    """Where the samples of a packed row end, as flash attention may be told beside the positions. keep: (B, L)."""
    before = torch.nn.functional.pad(keep.flatten().cumsum(0), (1, 0))
    for side in "qk":
        ends = call.get(f"cu_seq_lens_{side}")
        if ends is None:
            continue
        new = before[ends.cpu().long()].to(ends)
        call[f"cu_seq_lens_{side}"] = new
        if call.get(f"max_length_{side}") is not None:
            call[f"max_length_{side}"] = int(new.diff().max())


def _encoder_outputs(adapter: Adapter, plan: Plan, call: ModelCall, slots: Slots) -> dict[str, EncoderOutput] | None:
    """The encoder outputs with the rows of the kept placeholders, item by item; objects of their own."""
    outputs = {k: v for k, v in (call.get("mm_encoder_outputs") or {}).items() if k not in plan.features}
    for modality, features in plan.features.items():
        rows = torch.where(slots.used, features.row.gather(1, slots.index), -1)  # (B, P)
        rows = rows[rows >= 0]
        if rows.numel():
            outputs[modality] = _encoder_output(features, rows)
            adapter.family.restore(outputs[modality])
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
    slot = torch.full((slots.index.shape[0], length), -1, dtype=torch.long)  # (B, L)
    slot.scatter_(1, slots.index, torch.where(slots.used, slots.numbers, -1))
    return slot.cummax(1).values.clamp(min=0)


def _record(plan: Plan, slots: Slots, visible: Tensor) -> PruneState:
    """What the cache must know after this forward, still on the host. visible: (B, held + P), `_visible_keys`."""
    batch, length = plan.keep.shape
    candidate = torch.zeros_like(plan.keep)  # (B, L)
    for stream in plan.streams:
        candidate[stream.row, stream.candidates] = True
    visual = candidate.gather(1, slots.index) & slots.used  # (B, P)
    before = plan.earlier
    seen = before.visual if before is not None and before.visual is not None else visual[:, :0]
    seen = torch.nn.functional.pad(seen, (0, slots.held - seen.shape[1]))  # (B, held)
    none = plan.moves.new_zeros(batch, plan.start)
    earlier = none if before is None or not plan.start else before.moves_until(plan.start)
    return PruneState(
        slots.columns,
        torch.cat([earlier, plan.moves], 1),  # (B, start + L + 1)
        plan.start + length,
        bool((~visible).any()),
        visual=torch.cat([seen, visual], 1),
        moved=bool(plan.moves.any()),
    )


def check_room(cache: KVCache, keys: int) -> None:
    """Refuse a cache of fixed length that the pruned prompt does not fit in."""
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    room = min((size for layer in layers if (size := getattr(layer, "max_cache_len", None)) is not None), default=keys)
    if room < keys:
        raise OptionError(
            f"this {type(cache).__name__} holds {room} keys and the pruned prompt has {keys}: its text, the tokens "
            "kept of each picture and the newline tokens beside them. Give max_cache_len=pruning.last.length plus the "
            "tokens to generate."
        )


def clear_raw(call: ModelCall) -> None:
    """Blank the raw pixels of a call whose features are there."""
    for keys in RAW.values():
        for key in keys:
            if key in call:
                call[key] = None
