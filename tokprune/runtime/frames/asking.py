"""Asks the VLM itself about each frame of a video, one short prompt per frame: how likely is "yes" the answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.query import tokenizer_of
from tokprune.adapters.types import EncoderOutput, ModelCall, Processor
from tokprune.errors import MissingSignalError
from tokprune.runtime.masks import causal_mask

if TYPE_CHECKING:
    from tokprune.runtime.records import StreamRecord

SIDE = 6  # a frame is shown with at most SIDE x SIDE tokens
TOKENS_AT_ONCE = 8192  # of one pass through the language model
YES, NO = "A", "B"  # the letters that a frames method's prompts offer
AMONG = {"pair": "yes and no", "vocab": "the whole vocabulary"}  # what the probability is of, by `normalize`


BEYOND = ("final_logit_softcapping", "use_bidirectional_attention", "hidden_size_per_layer_input")
"""Options of a language model that say that the model around it does more than to hand it embeddings."""


class PictureChat(NamedTuple):
    """A chat about one picture, without the picture."""

    before: Tensor
    """(A,) token ids in front of it."""
    after: Tensor
    """(C,) those behind."""
    inside: Tensor
    """(A + C,) bool, which of them count as parts of the picture."""


class Asking:
    """Scores by the language model of a VLM, from frame features that are there already; the vision tower does not run
    again.

    Each frame gets a chat with one picture, in the words of the model's own template; its tokens are averaged to at
    most SIDE x SIDE. The language model runs alone: without the multimodal model around it, without a cache, with no
    gradient.
    """

    def __init__(self, adapter: Adapter, processor: Processor, name: str, normalize: str = "pair") -> None:
        if processor is None:
            raise MissingSignalError(
                f"{name!r} asks the model itself about each frame and needs its processor for the prompt: apply(..., "
                "processor=processor)."
            )
        self.adapter, self.processor, self.name, self.normalize = adapter, processor, name, normalize

    @property
    def source(self) -> str:
        """How the scores were made, for the report."""
        name = type(self.adapter.model).__name__
        return f"P(yes) by {name} itself, among {AMONG[self.normalize]}, at most {SIDE}x{SIDE} tokens a frame"

    @torch.no_grad()
    def scores(self, stream: StreamRecord, prompt: str, encoded: Mapping[str, EncoderOutput]) -> Tensor:
        """P(yes) for each frame of a video, (T,) in float32. A frame of which the model itself left no token gets its
        predecessor's.
        """
        config = self.adapter.config.get_text_config()
        if beyond := [name for name in BEYOND if getattr(config, name, None)]:
            raise MissingSignalError(
                f"{self.name!r} asks the language model of {type(self.adapter.model).__name__} alone about frames, "
                f"whose answers would not be those of the whole model ({', '.join(beyond)}). Have the method score in "
                f"another way (tokprune methods {self.name})."
            )
        chat = self.prompt(prompt)
        shown = self.pooled(stream, stream.tokens.features)  # (T, S, D)
        present, place, grid = self.places(stream)
        planes = [self.pooled(stream, plane) for plane in self.planes(stream, encoded)]
        known = present.any(1)
        rows = known.nonzero()[:, 0].tolist()
        head = self.adapter.model.get_output_embeddings()
        length = len(chat.inside) + shown.shape[1]
        step = max(1, TOKENS_AT_ONCE // length)
        out = shown.new_zeros(shown.shape[0], dtype=torch.float32)
        for start in range(0, len(rows), step):
            part = torch.tensor(rows[start : start + step], device=shown.device)
            parts = [plane[part] for plane in planes]
            hidden = self.read(chat, shown[part], present[part], place, grid, parts)
            out[part] = self.yes(head.forward(hidden).float()).to(out.device)
        # A frame without tokens looks like the one before it: that is why they were left out.
        at = torch.where(known, torch.arange(len(out), device=known.device), -1).cummax(0).values.clamp(min=0)
        return out[at.to(out.device)]

    def yes(self, logits: Tensor) -> Tensor:
        """P(yes) by the logits of an answer, (T, V) -> (T,)."""
        yes, no = self.letters(YES), self.letters(NO)
        if self.normalize == "vocab":
            return logits.softmax(-1)[:, yes].sum(-1)
        pair = torch.stack([logits[:, yes].logsumexp(-1), logits[:, no].logsumexp(-1)], -1)
        return pair.softmax(-1)[:, 0]

    # -- the frames

    def cells(self, stream: StreamRecord) -> tuple[Tensor, int, int]:
        """(N,) the cell of its frame that each token falls into, and how many cells there are down and across."""
        layout = stream.tokens.layout
        down, across = min(SIDE, max(h for h, _ in layout.grids)), min(SIDE, max(w for _, w in layout.grids))
        grids = torch.tensor(layout.grids, device=layout.group.device)[layout.group]  # (N, 2)
        return (layout.row * down // grids[:, 0]) * across + layout.col * across // grids[:, 1], down, across

    def pooled(self, stream: StreamRecord, values: Tensor) -> Tensor:
        """Token values (N, D) as cell means (T, S, D); cells without a token are 0."""
        cell, down, across = self.cells(stream)
        layout = stream.tokens.layout
        index = layout.group * (down * across) + cell
        total = values.new_zeros(layout.num_groups * down * across, values.shape[1], dtype=torch.float32)
        total.index_add_(0, index, values.float())
        count = torch.bincount(index, minlength=total.shape[0]).clamp(min=1)
        return (total / count[:, None]).to(values.dtype).unflatten(0, (layout.num_groups, -1))

    def places(self, stream: StreamRecord) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(T, S) which cells hold a token, (S, 2) their row and column, and the cells down and across."""
        cell, down, across = self.cells(stream)
        layout = stream.tokens.layout
        present = torch.zeros(layout.num_groups, down * across, dtype=torch.bool, device=cell.device)
        present[layout.group, cell] = True
        number = torch.arange(down * across, device=cell.device)
        return present, torch.stack([number // across, number % across], -1), (down, across)

    def planes(self, stream: StreamRecord, encoded: Mapping[str, EncoderOutput]) -> list[Tensor]:
        """DeepStack planes of the stream's tokens, (N, D) each."""
        planes = getattr(encoded[stream.modality], "deepstack_features", None) or ()
        rows = stream.offset + stream.geometry.rows
        return [torch.cat(flatten(plane))[rows.to(stream.tokens.features.device)] for plane in planes]

    # -- the prompt

    def prompt(self, words: str) -> PictureChat:
        """A chat that shows a picture and asks `words`."""
        import numpy as np
        from PIL import Image

        from tokprune.adapters.prompting import inputs_of
        from tokprune.errors import TokpruneError

        blank: list[tuple[str, object]] = [
            ("image", Image.new("RGB", (64, 64))),
            ("video", np.zeros((1, 64, 64, 3), np.uint8)),  # for templates that know clips only
        ]
        splits = getattr(getattr(self.processor, "image_processor", None), "do_image_splitting", False)
        if splits and self.adapter.family.frames_by_words:
            blank.reverse()  # SmolVLM: a frame is not cut into tiles, as a picture would be
        failure: Exception | None = None
        for kind, picture in blank:
            content = [{"type": kind, kind: picture}, {"type": "text", "text": words}]
            try:
                inputs = inputs_of(self.adapter.model, self.processor, [[{"role": "user", "content": content}]])
            except TokpruneError as error:
                failure = failure or error
                continue
            placeholders = self.adapter.placeholders(dict(inputs), {"image": True, "video": True})
            at = torch.stack([columns[0] for columns in placeholders.values()]).any(0).nonzero()[:, 0]
            if len(at):
                ids, start, stop = inputs["input_ids"][0], int(at[0]), int(at[-1]) + 1
                types = inputs["mm_token_type_ids"][0] if "mm_token_type_ids" in inputs else torch.zeros_like(ids)
                return PictureChat(ids[:start], ids[stop:], torch.cat([types[:start], types[stop:]]) == 1)
        raise MissingSignalError(
            f"{self.name!r} cannot write a prompt about one frame for {type(self.adapter.model).__name__}: "
            f"{failure or 'its processor shows no picture'}. Have the method score in another way (tokprune methods "
            f"{self.name})."
        )

    def letters(self, letter: str) -> list[int]:
        """Ids of the tokens that are this letter, with and without a blank before it."""
        tokenizer = tokenizer_of(self.processor)
        letter_ids = set()
        for text in (letter, f" {letter}", f"\n{letter}"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
                letter_ids.add(int(ids[0]))
        if not letter_ids:
            raise MissingSignalError(
                f"{self.name!r} reads the answer {letter!r}, which the tokenizer of "
                f"{type(self.adapter.model).__name__} does not know as one token; have the method score in another way "
                f"(tokprune methods {self.name})."
            )
        return sorted(letter_ids)

    # -- one pass

    def read(
        self,
        chat: PictureChat,
        shown: Tensor,
        present: Tensor,
        place: Tensor,
        grid: tuple[int, int],
        planes: Sequence[Tensor],
    ) -> Tensor:
        """The last hidden state of each frame's prompt, (T, D). Cells without a token become filler on the left."""
        adapter, (frames, cells) = self.adapter, shown.shape[:2]
        table = adapter.base.get_input_embeddings()
        head, tail = len(chat.before), len(chat.after)
        if adapter.family.adds_to_placeholder:
            shown = shown + table(torch.tensor(adapter.config.image_patch_id, device=chat.before.device)).to(shown)
        words = table(torch.cat([chat.before, chat.after]))
        around = words[:head].expand(frames, -1, -1), words[head:].expand(frames, -1, -1)
        embeds = torch.cat([around[0], shown.to(words), around[1]], 1)
        real = torch.nn.functional.pad(present.to(embeds.device), (head, tail), value=True)  # (T, L)
        positions = self.positions(head, tail, place.to(embeds.device), grid, real)
        order = torch.argsort(real.int(), dim=1, stable=True)  # filler first
        visible = real.gather(1, order)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds)).masked_fill(~visible[..., None], 0)
        mask = visible.long()
        if adapter.family.both_ways:
            inside = chat.inside.to(real.device).expand(frames, -1)
            inside = torch.cat([inside[:, :head], present.to(real.device), inside[:, head:]], 1).gather(1, order)
            mask = causal_mask(mask - 1, mask.shape[1], embeds.dtype)  # (T, 1, L, L)
            mask = mask.masked_fill((inside[:, :, None] & inside[:, None])[:, None], 0)
        call: ModelCall = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions.gather(-1, order.expand(*positions.shape[:-1], -1)),
            "use_cache": False,
        }
        if planes:
            visual = torch.zeros_like(real)
            visual[:, head : head + cells] = present.to(real.device)
            call["visual_pos_masks"] = visual.gather(1, order)
            call["deepstack_visual_embeds"] = [p[present.to(p.device)].to(embeds) for p in planes]
        # Not through __call__: whoever times the model by its hooks must not take this pass for the prefill.
        hidden: Tensor = adapter.text_model.forward(**call).last_hidden_state
        return hidden[:, -1]

    def positions(self, head: int, tail: int, place: Tensor, grid: tuple[int, int], real: Tensor) -> Tensor:
        """Position ids (T, L), or (3, T, L) for M-RoPE: a picture is a grid there, and the words go on behind its
        longer side.
        """
        first = self.adapter.family.first_position
        if not hasattr(self.adapter.base, "compute_3d_position_ids"):
            return ((real.cumsum(1) - 1).clamp(min=0) + first) * real
        numbers = torch.arange(max(head, tail), device=place.device)
        picture = torch.stack([torch.zeros_like(place[:, 0]), place[:, 0], place[:, 1]]) + head  # (3, S)
        behind = numbers[:tail].expand(3, -1) + head + max(grid)
        whole = torch.cat([numbers[:head].expand(3, -1), picture, behind], 1)
        return whole[:, None].expand(-1, real.shape[0], -1)
