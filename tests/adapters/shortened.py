"""A prompt shortened by hand, for the unpruned model: embeddings (or encoder rows) cut, positions counted by hand.

Rows of different length are padded again.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from tests.adapters.reference import (
    Native,
    Prompt,
    recount,
)

TOLERANCE = 1e-4


RATIO = 0.2


NEW = 6


TYPES = ("token_type_ids", "mm_token_type_ids")


# -- a prompt shortened by hand ----------------------------------------------------------------------------------------


def shorten(case: Prompt, keep: Tensor, positions: str, native: Native | None = None) -> dict[str, Tensor]:
    """ids, embeds, mask, types and position ids of the kept columns, padded on the left to one length."""
    native = native or case.generate
    width = int(keep.sum(1).max())
    batch, dim = len(keep), native.embeds.shape[-1]
    ids = torch.full((batch, width), 256)
    embeds = torch.zeros(batch, width, dim, dtype=native.embeds.dtype)
    mask = torch.zeros(batch, width, dtype=torch.long)
    types = torch.zeros(batch, width, dtype=torch.long)
    axes = 4 if native.mrope else 1
    where = torch.zeros(axes, batch, width, dtype=torch.long)
    for row in range(batch):
        count = int(keep[row].sum())
        here = slice(width - count, width)
        ids[row, here] = native.ids[row, keep[row]]
        embeds[row, here] = native.embeds[row, keep[row]]
        mask[row, here] = 1
        types[row, here] = native.types[row, keep[row]].long()
        if positions == "compact":
            numbers = recount(native, keep, row)[0]
        else:
            numbers = native.positions[..., row, keep[row]].reshape(-1, count)
        where[axes - len(numbers) :, row, here] = numbers
        if native.mrope:
            where[0, row, here] = torch.arange(count)
    return {
        "input_ids": ids,
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "types": types,
        "position_ids": where if native.mrope else where[0],
    }


def type_names(inputs: Any) -> list[str]:
    return [name for name in TYPES if name in inputs]


def encoder_rows(case: Prompt, keep: Tensor, by_row: bool) -> dict[str, Any]:
    """The encoder outputs of the unpruned model with the rows of dropped placeholders cut by hand (images only)."""
    model, inputs = case.tiny.model, case.inputs
    base = model.base_model
    names = inspect.signature(base.get_image_features).parameters
    output = copy.copy(base.get_image_features(**{k: v for k, v in inputs.items() if k in names}, return_dict=True))

    def cut(features: Any) -> Any:
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
        pieces, start = [], 0
        for row in range(len(keep)):
            stay = keep[row][case.visual[row]]
            pieces.append(rows[start : start + len(stay)][stay])
            start += len(stay)
        assert start == len(rows)
        if by_row:
            return pieces
        whole = torch.cat(pieces)
        return whole[None] if isinstance(features, Tensor) else [whole]

    output.pooler_output = cut(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [cut(plane) for plane in output.deepstack_features]
    return {"image": output}


BLOCKWISE = (
    "gemma3",
    "paligemma",
    "molmo2",
)  # image tokens see each other both ways: chunks cut those blocks, natively too


NO_EMBEDS = ("gemma3", "paligemma")  # their generate() does not take inputs_embeds


def oracle(case: Prompt, keep: Tensor, positions: str, options: dict[str, Any]) -> Any:
    """Native generate() on the shortened prompt. Its embeddings go in directly, or as encoder rows where planes
    follow."""
    options = dict(options)
    short = shorten(case, keep, positions)
    call = {
        "input_ids": short["input_ids"],
        "attention_mask": short["attention_mask"],
        "position_ids": short["position_ids"],
        **dict.fromkeys(type_names(case.inputs), short["types"]),
    }
    options.pop("use_cache", None)
    options.pop("prompt_lookup_num_tokens", None)
    if case.tiny.family == "qwen3_vl":
        call["mm_encoder_outputs"] = encoder_rows(case, keep, by_row=True)
    elif case.tiny.family in NO_EMBEDS or (case.tiny.family in BLOCKWISE and "prefill_chunk_size" in options):
        call["mm_encoder_outputs"] = encoder_rows(case, keep, by_row=False)
    else:
        call["inputs_embeds"] = short["inputs_embeds"]
        options.pop("prefill_chunk_size", None)  # transformers chunks ids, not embeddings; the result is the same
    return generate(case, call, options)


def generate(case: Prompt, inputs: Any, options: dict[str, Any]) -> Any:
    """New tokens (and beam scores) of a seeded generate()."""
    torch.manual_seed(7)
    more = {"return_dict_in_generate": True, "output_scores": True}
    out = case.tiny.model.generate(**inputs, max_new_tokens=NEW, **more, **options)
    length = inputs["input_ids"].shape[1]
    repeats = len(out.sequences) // len(inputs["input_ids"])
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"].repeat_interleave(repeats, 0)), (
        "the prompt changed"
    )
    return out.sequences[:, length:], getattr(out, "sequences_scores", None)


# -- later turns -------------------------------------------------------------------------------------------------------


def with_text(inputs: Any, sequences: Tensor, new: Tensor, types: Tensor | None = None) -> dict[str, Tensor]:
    """The call of a later turn: everything so far, then `new`; masks and type ids grown to match."""
    ids = torch.cat([sequences, new], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    call = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)}
    for name in type_names(inputs):
        grown = ids.shape[1] - inputs[name].shape[1] - (0 if types is None else types.shape[1])
        tail = [] if types is None else [types]
        call[name] = torch.cat([torch.nn.functional.pad(inputs[name], (0, grown)), *tail], 1)
    return call
