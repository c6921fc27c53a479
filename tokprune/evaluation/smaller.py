"""The baseline `resize` in a sweep: chats whose pictures are made smaller before the processor runs."""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.errors import OptionError
from tokprune.scaling import resize, token_counter
from tokprune.types import Fields, JsonObject, Processor


class Smaller:
    """Scales the pictures of chats to a share of the visual tokens that the processor makes of them."""

    def __init__(self, processor: Processor, ratio: float) -> None:
        self.processor, self.ratio, self.count = processor, ratio, token_counter(processor)

    def __call__(self, chat: Sequence[Fields]) -> tuple[list[JsonObject], int]:
        """The chat with smaller pictures, and how many visual tokens the ones it came with would give."""
        total, out = 0, []
        for message in chat:
            content = message["content"]
            if not isinstance(content, str):
                content = [dict(part) for part in content]
                for part in content:
                    if part.get("type") == "video":
                        raise OptionError("resize scales pictures; for clips take fewer frames: uniform_frames.")
                    if part.get("type") == "image":
                        total += self.count(part["image"])
                        part["image"] = resize(part["image"], self.processor, self.ratio, self.count)
            out.append({**message, "content": content})
        return out, total
