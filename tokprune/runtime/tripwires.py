"""Tripwires: what reaches the language model after a pruned prefill fits the keys that its cache holds, or an error
says so.

Outside the base model lengths are logical (as prompted), inside they are physical (as kept). Should some step between
the two be left out, by a transformers that calls things in another way or by code in between, the model would answer
from wrong keys or positions without a word. Here both sides are compared wherever they are known on the host: shapes of
tensors, lengths of caches, and which call was translated. Only the positions of the first step after a prefill are read
from the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from tokprune.adapters.dialect import cache_in, cache_of, tested_versions
from tokprune.adapters.foreign import GENERATE_STEP, UNFINISHED
from tokprune.adapters.types import KVCache, Mask, ModelCall, ModelOutput, Positional
from tokprune.errors import TranslationError
from tokprune.runtime.cache_record import PrunedCacheMixin, PruneState, Reader, class_before, get_state, physical_length
from tokprune.runtime.decoder.columns import LayerKeys


def fail(what: str) -> TranslationError:
    """The error for a call that would be answered wrongly."""
    return TranslationError(
        f"{what} Answering would be wrong, so it is refused. Either this transformers calls the model in a way that "
        f"tokprune does not know (tested: {tested_versions()}), or code around the model changed the call; please "
        f"report it. The model answers without pruning after tokprune.remove(model), with a new cache."
    )


class Passage:
    """One thread's calls on their way to the language model.

    prefill: inside generate()'s prefill. chunked: which runs in chunks of one shortened prompt. width: columns that the
    language model must be given in the forward that runs now, None where there was nothing to translate. step: it is a
    decode step of generate(). table_due: contiguous positions must still be exchanged for the kept ones.
    """

    def __init__(self) -> None:
        self.prefill = self.chunked = False
        self._prepared: weakref.ref[KVCache] | None = None
        self.begin(None)

    def begin(self, width: int | None, step: bool = False, table_due: bool = False) -> None:
        """Note the forward that begins now."""
        self.width, self.step, self.table_due = width, step, table_due

    def prepare(self, cache: KVCache) -> None:
        """Note that prepare_inputs_for_generation has seen a call with `cache`, which is due to arrive with its
        keyword.
        """
        self._prepared = None if cache is None else weakref.ref(cache)

    def arrive(self, cache: KVCache, translated: bool) -> None:
        """A forward of the base model begins. translated: with the keyword, or there is nothing to translate in it.

        Raises where generate() took another way than through prepare_inputs_for_generation, or lost what that returned.
        """
        prepared, self._prepared = self._prepared, None
        if translated:
            return
        if self.prefill:
            raise fail("generate() began a prompt without prepare_inputs_for_generation.")
        if cache is not None and prepared is not None and prepared() is cache:
            raise fail("prepare_inputs_for_generation saw a call, but what it returned did not come along whole.")


def width_of(args: Positional, call: ModelCall) -> int | None:
    """Columns of a call: of its embeddings, else of its token ids."""
    x = call.get("inputs_embeds")
    x = call.get("input_ids", args[0] if args else None) if x is None else x
    return None if x is None else int(x.shape[1])


def check_record(cache: KVCache, state: PruneState, rows: int | None = None) -> int | None:
    """Raise unless cache and record agree. rows: batch size of the call. Returns the keys held, None if only the device
    knows.
    """
    if not isinstance(cache, PrunedCacheMixin):
        raise fail("a cache has a record of a pruned prompt, but answers with its own lengths.")
    if rows is not None and state.kept.shape[0] != rows:
        raise fail(f"a cache has a record of {state.kept.shape[0]} prompts, but the call has {rows}.")
    length = class_before(cache).get_seq_length(cache)  # by its own class
    if isinstance(length, Tensor) and length.device.type != "cpu":
        return None
    held, recorded = int(length) + state.removed_in(0), state.kept.shape[1]
    if held < recorded:
        raise fail(f"a cache holds {held} keys, but its record is about {recorded}: it was cut without its record.")
    logical = held + state.removed
    if int(cache.get_query_offset()) != held or int(cache.get_seq_length()) != logical:
        raise fail(
            f"a cache of {held} keys that stand for {logical} tokens says that it has {int(cache.get_query_offset())} "
            f"and {int(cache.get_seq_length())}."
        )
    return held


def check_attached(cache: KVCache, state: PruneState) -> None:
    """Raise unless `cache` carries `state` after a pruned prefill; the prefill is finished then."""
    if cache is None or get_state(cache) is not state:
        raise fail("a pruned prompt filled a cache, but the cache has no record of it.")
    held, kept = check_record(cache, state), state.kept.shape[1]
    if held is not None and held != kept:
        raise fail(f"a pruned prompt of {kept} tokens left {held} keys in its cache.")
    check_layer_lengths(cache, state.layers, kept)
    cache.__dict__.pop(UNFINISHED, None)


def check_mask(mask: Mask, keys: int | None, width: int, cache: KVCache, has_fill: bool = False) -> None:
    """Raise unless `mask` is over `keys` keys, the last `width` of which are new; keys None: not known on the host.

    mask: None, 2-D, 4-D, or a dict of these. has_fill: some keys must stay hidden.
    """
    if mask is None:
        if has_fill:
            raise fail("some keys of a cache are filler, but no attention mask hides them.")
        return
    if isinstance(mask, Mapping):
        for kind, one in mask.items():
            if "linear" not in kind and "conv" not in kind:  # those are about the new tokens only
                check_mask(one, keys, width, cache)
        return
    shape = tuple(mask.shape)
    if len(shape) == 2:
        if keys is not None and shape[1] != keys:
            raise fail(f"an attention mask is about {shape[1]} keys, but there will be {keys}.")
        return
    sizes = {keys}  # layers with a window, and caches of a fixed length, have other numbers of keys
    if cache is not None:
        layers = [i for i, linear in enumerate(cache.is_linear) if not linear] or [0]
        sizes = {int(cache.get_mask_sizes(width, i)[0]) for i in layers}
    if shape[-2] != width or shape[-1] not in sizes:
        raise fail(
            f"an attention mask is about {shape[-2]} x {shape[-1]} tokens, but there are {width} new ones and "
            f"{' or '.join(map(str, sizes))} keys."
        )


def check_layer_lengths(cache: KVCache, layers: Mapping[int, LayerKeys], slots: int) -> None:
    """Raise unless every layer that lost tokens holds what its record says, `slots` keys being in layer 0."""
    for i, keys in layers.items():
        held = int(cache.layers[i].get_seq_length())
        if held + keys.removed != slots:
            raise fail(
                f"layer {i} of a cache holds {held} keys where {slots - keys.removed} are recorded: it was left out, "
                "or ran without the pruning."
            )


def check_callers_mask(mask: Mask, keys: int, cache: KVCache) -> None:
    """Raise unless a mask with a row per query, which a caller gave, is over the `keys` tokens of the conversation as
    prompted.
    """
    for one in mask.values() if isinstance(mask, Mapping) else (mask,):
        if one is None or one.ndim == 2:
            continue
        if one.shape[-1] != keys or getattr(cache, "is_compileable", False):
            raise fail(
                f"an attention mask of {one.shape[-1]} columns, made outside the pruned model, came with a cache that "
                f"stands for {keys} tokens."
            )


def check_entry(passage: Passage, reader: Reader, args: Positional, call: ModelCall) -> None:
    """Raise unless a call of the language model is the one that the prefill made.

    reader: of the pruning that watches; what other prunings translate is theirs to check.
    """
    if GENERATE_STEP in call:
        raise fail("the language model was called without the multimodal model around it.")
    cache, width = cache_in(call), width_of(args, call)
    state = get_state(cache)
    planned, passage.width = passage.width, None
    if state is None and getattr(cache, UNFINISHED, False) and not passage.chunked:
        if int(cache.get_seq_length()):
            raise fail("the pruned prompt that filled this cache was not finished.")
        delattr(cache, UNFINISHED)  # emptied since
    if width is None or (planned is None and (state is None or state.reader is not reader)):
        return
    if planned is None:
        raise fail("a call with a cache of a pruned prompt reached the language model untranslated.")
    if width != planned:
        raise fail(f"the language model was given {width} tokens where {planned} were kept.")
    if state is None or passage.chunked:  # in chunks, the record is of the turns before this prompt
        held = None
        check_mask(call.get("attention_mask"), physical_length(cache) + width, width, cache)
    else:
        held = check_record(cache, state)
        keys = None if held is None else held + width
        check_mask(call.get("attention_mask"), keys, width, cache, state.has_fill)
    positions = call.get("position_ids")
    if positions is not None and positions.shape[-1] != width:
        raise fail(f"there are positions of {positions.shape[-1]} tokens for {width}.")
    if positions is not None and passage.step and state is not None and held == state.kept.shape[1]:
        check_first_step(state, positions)


def check_first_step(state: PruneState, positions: Tensor) -> None:
    """Raise unless the first decode step after a prefill stands right behind the prompt. Asks the device, once per
    prefill.
    """
    expected, state.next_position = state.next_position, None
    if expected is None:
        return
    first = positions[..., 0].to(expected.device)  # (B or 1,), or (axes, B or 1)
    first = first[-3:] if first.ndim == 2 else first[None]
    if bool(((first != expected) & (expected >= 0)).any()):
        raise fail(
            f"the first token after a pruned prompt stands at position {first[-1].tolist()}, but the prompt ends "
            f"before {expected.tolist()}."
        )


def check_table(passage: Passage) -> None:
    """Raise where attention was given contiguous positions, but nothing exchanged them for the kept ones."""
    if passage.table_due:
        raise fail("no rotary embedding of the language model asked for the positions of the kept tokens.")


def mark_unfinished(call: ModelCall, output: ModelOutput) -> None:
    """Mark the cache that a pruned prefill fills, until its record is attached."""
    cache = cache_of(output)
    cache = cache_in(call) if cache is None else cache
    if cache is not None and get_state(cache) is None:
        setattr(cache, UNFINISHED, True)


def next_positions(positions: Tensor, known: Tensor) -> Tensor:
    """(B,) position that the token after each prompt must have; -1 where it is not known.

    positions: (B, P) or (3 or 4, B, P) of the kept tokens, the last one of each prompt in the last slot. known: (B,)
    bool, where a prompt ends with text: neither with padding nor with a picture.
    """
    last = (positions[None] if positions.ndim == 2 else positions[-3:])[..., -1]  # (axes, B)
    return torch.where(known, last.amax(0) + 1, -1)
