"""Prompts of whole videos, pictures and text for any VLM with a processor, and the answer to them.

    inputs = build_inputs(model, processor, "what happens ?", videos=[read_video("clip.mp4", frames=16)])
    answer(model, processor, inputs, max_new_tokens=32)

Frames are always decoded and chosen before (tokprune.video): processors get arrays with `do_sample_frames=False`, so no
path and no decoding library ever reaches transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tokprune.adapters.base import unwrap
from tokprune.adapters.families import family_named
from tokprune.adapters.media import Clip, as_clip, as_picture, check_lengths, stamp
from tokprune.adapters.query import tokenizer_of
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.types import VLM, Fields, Inputs, JsonObject, Processor

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature

SPLITTING = ("do_image_splitting", "crop_to_patches")
"""Options of image processors that cut a picture into tiles; off for frames that are given as pictures."""


def takes_videos(processor: Processor) -> bool:
    """Whether a processor has a video processor and a mark for videos, so that a clip stays one clip."""
    return getattr(processor, "video_processor", None) is not None and _mark(processor, "video") is not None


def build_inputs(
    model: VLM,
    processor: Processor,
    question: str | Sequence[str],
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    history: Sequence[tuple[str, str]] | None = None,
) -> BatchFeature:
    """What `model.generate(**inputs)` takes for a question about videos and images, on the model's device and dtype.

    images: PIL pictures or (H, W, 3) uint8 arrays. videos: `tokprune.video.Video`s, (T, H, W, 3) uint8 arrays, or pairs
    (frames, seconds); arrays without times count as 2 frames a second. Videos stand first, then images, then the words;
    with `history`, the (question, answer) turns so far, they stand in its first turn. Several questions are a batch:
    `images` and `videos` are then one list per question (or None), and history is not possible.

    Models that know no videos get the frames as so many pictures, none of them cut into tiles, when their prompt takes
    several. Raises OptionError for media that cannot be used, UnsupportedModelError for a model that takes fewer of
    them.
    """
    if isinstance(question, str):
        turns = [*(history or ()), (question, None)]
        content = [{"type": "video", "video": v} for v in _several(videos, "videos")]
        content += [{"type": "image", "image": i} for i in _several(images, "images")]
        messages = []
        for i, (asked, answered) in enumerate(turns):
            words = [{"type": "text", "text": asked}]
            messages.append({"role": "user", "content": content + words if i == 0 else words})
            if answered is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        return inputs_of(model, processor, [messages])
    if history:
        raise OptionError(
            "history goes with one question, not with a batch of them; use inputs_of for a batch of chats."
        )
    rows: list[list[JsonObject]] = []
    for i, text in enumerate(question):
        content = []
        for kind, media in (("video", videos), ("image", images)):
            if media is not None and len(media) != len(question):
                raise OptionError(
                    f"{len(media)} lists of {kind}s for {len(question)} questions; give one list per question."
                )
            content += [{"type": kind, kind: item} for item in (media[i] if media is not None else None) or ()]
        rows.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    return inputs_of(model, processor, rows)


def inputs_of(model: VLM, processor: Processor, chats: Sequence[Sequence[Fields]]) -> BatchFeature:
    """The same for whole chats in the message format of Transformers, one per row of the batch.

    A message is {"role": ..., "content": text or parts}; parts are {"type": "text", "text": ...}, {"type": "image",
    "image": ...} and {"type": "video", "video": ...} in any order.
    """
    inner = unwrap(model)
    family = family_named(str(getattr(inner.config, "model_type", "")))
    rows = [_Row(chat) for chat in chats]
    clips, pictures = [c for row in rows for c in row.clips], [p for row in rows for p in row.pictures]
    native = takes_videos(processor)
    if clips and pictures and not family.mixes_modalities:
        warnings.warn(
            f"{type(inner).__name__} takes pictures or videos in one prompt, not both: the frames are given as "
            "pictures.",
            stacklevel=3,
        )
        native = False
    more: JsonObject = {}
    if clips and not native:
        for row in rows:
            row.spread_clips(timed=family.times_frames)
        pictures = [p for row in rows for p in row.pictures]
        images = getattr(processor, "image_processor", None)
        more |= {name: False for name in SPLITTING if getattr(images, name, None)}
        clips = []
    texts = [row.text(processor) for row in rows]
    if pictures:
        more["images"] = [row.pictures for row in rows]
    if clips:
        if family.clips_in_one_tensor:
            check_lengths(clips, type(inner).__name__)
        more["videos"] = [c.frames for c in clips]
        more["video_metadata"] = [c.metadata() for c in clips]
        more["do_sample_frames"] = False
    try:
        features = processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **more)
    except ValueError as error:
        raise OptionError(f"{type(processor).__name__} refuses this prompt: {error}") from error
    features.pop("labels", None)  # PaliGemma's processor adds training labels to plain prompts
    return _to(features, inner)


def _to(features: BatchFeature, model: VLM) -> BatchFeature:
    """Everything on the model's device, pixels in its dtype; seconds and grids keep their precision."""
    features = features.to(device=model.device)
    for name, value in list(features.items()):
        pixels = "pixel" in name or name == "image_patches"
        if pixels and isinstance(value, torch.Tensor) and value.is_floating_point():
            features[name] = value.to(model.dtype)
    return features


@torch.no_grad()
def answer(model: VLM, processor: Processor, inputs: Inputs, max_new_tokens: int = 64, **options: object) -> list[str]:
    """The model's greedy answer to each prompt of `inputs`, without the prompt and without special tokens.

    options: of model.generate, such as num_beams=3.
    """
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens}; ask for at least 1.")
    greedy: JsonObject = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.get("do_sample"):
        greedy = {}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **{**greedy, **options})
    new = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _several(media: Sequence[object] | None, what: str) -> list[object]:
    if media is None:
        return []
    if not isinstance(media, list | tuple):
        raise OptionError(f"{what} is a list, also of one: {what}=[...]; given {type(media).__name__}.")
    return list(media)


def _mark(processor: Processor, kind: str) -> str | None:
    """What stands for a picture or a clip in a prompt of this processor."""
    mark = getattr(processor, f"{kind}_token", None)
    return None if mark is None else str(mark)


class _Row:
    """One chat: its messages with media replaced by bare marks, and the media in order."""

    def __init__(self, chat: Sequence[Fields]) -> None:
        self.messages: list[JsonObject] = []
        self.media: list[Clip | Image] = []
        for message in chat:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            content = []
            for part in parts:
                kind = part.get("type")
                if kind == "text":
                    content.append({"type": "text", "text": part["text"]})
                elif kind == "video":
                    self.media.append(as_clip(part["video"]))
                    content.append({"type": "video"})
                elif kind == "image":
                    self.media.append(as_picture(part["image"]))
                    content.append({"type": "image"})
                else:
                    raise OptionError(f'a part of a message has the type "text", "image" or "video", not {kind!r}.')
            self.messages.append({"role": message["role"], "content": content})

    @property
    def clips(self) -> list[Clip]:
        """The clips that are still clips."""
        return [item for item in self.media if isinstance(item, Clip)]

    @property
    def pictures(self) -> list[Image]:
        """The pictures, in order."""
        return [item for item in self.media if not isinstance(item, Clip)]

    def spread_clips(self, timed: bool) -> None:
        """Exchange every clip for its frames as pictures; timed: each with the words that SmolVLM writes before a
        frame.
        """
        queue = iter(self.media)
        media: list[Clip | Image] = []
        for message in self.messages:
            content: list[JsonObject] = []
            for part in message["content"]:
                if part["type"] == "text":
                    content.append(part)
                    continue
                item = next(queue)
                if not isinstance(item, Clip):
                    content.append(part)
                    media.append(item)
                    continue
                for frame, second in zip(item.frames, item.seconds, strict=True):
                    if timed:
                        content.append({"type": "text", "text": f"\nFrame from {stamp(second)}:"})
                    content.append({"type": "image"})
                    media.append(as_picture(frame))
                if timed:
                    content.append({"type": "text", "text": "\n\n"})
            message["content"] = content
        self.media = media

    def text(self, processor: Processor) -> str:
        """The prompt as text, ready for the answer; refused when it does not show every picture and clip."""
        written = self._templated(processor)
        parts = [part for m in self.messages for part in (*m["content"], {"type": "text", "text": "\n"})]
        plain = _flat(processor, parts[:-1])  # for processors without a template, such as PaliGemma's
        text = next((t for t in written if not self.missing(processor, t)), written[-1] if written else plain)
        if missing := self.missing(processor, text):
            kind, shown, wanted = missing
            raise UnsupportedModelError(
                f"the prompt of {type(processor).__name__} shows {shown} of {wanted} {kind}s: it takes no more. Give "
                f"fewer {'frames or pictures' if kind == 'image' else 'clips'}, or take a model that reads more of "
                f"them."
            )
        return text

    def missing(self, processor: Processor, text: str) -> tuple[str, int, int] | None:
        """The kind of media that a prompt does not show in full, how often it does and how often it should; None: all
        there.
        """
        for kind in ("image", "video"):
            mark, wanted = _mark(processor, kind), len(self.clips if kind == "video" else self.pictures)
            shown = 0 if mark is None else text.count(mark)
            if wanted != shown and wanted:
                return kind, shown, wanted
        return None

    def _templated(self, processor: Processor) -> list[str]:
        """What the chat templates at hand make of the messages: with parts, then with strings; none without a
        template."""
        strings = [{"role": m["role"], "content": _flat(processor, m["content"])} for m in self.messages]
        out, refusal, tokenizer = [], None, tokenizer_of(processor)
        for source, messages in ((processor, self.messages), (processor, strings), (tokenizer, strings)):
            if getattr(source, "chat_template", None) is None:
                continue
            try:
                out.append(str(source.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)))
            except Exception as error:  # a template is a program of its own and raises what it likes
                refusal = refusal or error
        if refusal is not None and not out:
            raise OptionError(
                f"the chat template of {type(processor).__name__} refuses this chat: {refusal}"
            ) from refusal
        return out


def _flat(processor: Processor, content: Sequence[Fields]) -> str:
    """The parts of a message as one string with marks."""
    return "".join(part["text"] if part["type"] == "text" else _mark(processor, part["type"]) or "" for part in content)
