"""Two turns of a conversation, each with a picture, and the same conversation as one prompt of the unpruned model."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.adapters.reference import Native, observe, placeholder_ids
from tests.spelling import cache_in, with_cache
from tokprune.testing import TinyVLM, picture

TYPES = ("token_type_ids", "mm_token_type_ids")
TEXTS = ("input_ids", "attention_mask", *TYPES)


@torch.no_grad()
def encode(tiny: TinyVLM, inputs: Any) -> Any:
    """The encoder output of a prompt's pictures."""
    base = tiny.model.base_model
    names = inspect.signature(base.get_image_features).parameters
    return base.get_image_features(**{k: v for k, v in inputs.items() if k in names}, return_dict=True)


def flat(features: Any) -> Tensor:
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in features])


def joined(tiny: TinyVLM, turns: list[Any]) -> Any:
    """The encoder outputs of all turns as the one of the whole conversation: row by row, turn by turn."""
    outputs = [encode(tiny, turn) for turn in turns]
    marks = torch.tensor(sorted(placeholder_ids(tiny.model.config)))
    counts = [torch.isin(turn["input_ids"], marks).sum(1).tolist() for turn in turns]

    def join(parts: list[Any]) -> Any:
        pieces = [flat(part).split(count) for part, count in zip(parts, counts, strict=True)]
        rows = torch.cat([turn[b] for b in range(len(counts[0])) for turn in pieces])
        return (
            rows[None]
            if isinstance(parts[0], Tensor) and parts[0].ndim > 2
            else rows
            if isinstance(parts[0], Tensor)
            else [rows]
        )

    out = copy.copy(outputs[0])
    out.pooler_output = join([o.pooler_output for o in outputs])
    if getattr(out, "deepstack_features", None) is not None:
        out.deepstack_features = [
            join(list(planes)) for planes in zip(*(o.deepstack_features for o in outputs), strict=True)
        ]
    return {"image": out}


@dataclass
class Conversation:
    """first, second: inputs of each turn, the second with its own tokens only. whole: both in one go."""

    tiny: TinyVLM
    first: Any
    second: Any
    whole: dict[str, Any]
    native: Native

    @property
    def start(self) -> int:
        return int(self.first["input_ids"].shape[1])

    def forward_second(self, cache: Any) -> Any:
        """The second turn as a forward on the cache of the first."""
        length = self.second["input_ids"].shape[1]
        positions = self.native.positions[..., -length:]
        call = {k: v for k, v in self.second.items() if k not in ("attention_mask",)}
        call |= {"attention_mask": self.whole["attention_mask"], "position_ids": positions, **with_cache(cache)}
        if self.tiny.family == "gemma3":  # it reads them from the start of the sequence
            call["token_type_ids"] = self.whole["token_type_ids"]
        return self.tiny.model(**call, use_cache=True)

    def forward_first(self) -> Any:
        return cache_in(self.tiny.model(**self.first, use_cache=True))


def conversation(tiny: TinyVLM, rows: int = 1, small: bool = False) -> Conversation:
    """A picture and a question in each turn; `small`: the second picture is the smaller one."""
    firsts = [
        ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
        ["And ", ("image", picture(40, 60, 2)), " here, what?"],
    ]
    seconds = [[" Now ", ("image", picture(30 if small else 40, 30, 7 + i)), " compare."] for i in range(2)]
    first, second = tiny.inputs(firsts[:rows]), tiny.inputs(seconds[:rows])
    bos = int(second["input_ids"][0, 0] == tiny.processor.tokenizer.bos_token_id)
    later = dict(second)
    for name in TEXTS:
        if name in later:
            later[name] = later[name][:, bos:]
    turns = [first, later]
    whole = {name: torch.cat([turn[name] for turn in turns], 1) for name in TEXTS if name in first}
    if "image_grid_thw" in first:
        grids = [turn["image_grid_thw"] for turn in turns]
        whole["image_grid_thw"] = torch.cat([g[b : b + 1] for b in range(rows) for g in grids])
    whole["mm_encoder_outputs"] = joined(tiny, turns)
    return Conversation(tiny, first, later, whole, observe(tiny, whole, "forward"))
