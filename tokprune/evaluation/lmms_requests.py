"""From a request of lmms-eval to a chat with decoded media and the question it asks. Every failure names its row."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.errors import OptionError, nearest
from tokprune.evaluation.errors import EvaluationError, at_row
from tokprune.files import rgb
from tokprune.types import Fields, JsonObject
from tokprune.video.result import Video

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION_FIELDS = ("question", "Question", "query", "problem")
_OPTION_LINE = re.compile(r"^\s*(?:options?\s*:?\s*$|\(?[A-Z][.):]\s)", re.IGNORECASE)
_FIRST_OPTION = re.compile(r"^\s*\(?A[.):]\s")

Messages = Callable[[Fields], Sequence[Fields]]
"""A task's function: a document of its data set -> the messages of a chat."""


@dataclass(frozen=True)
class TaskRow:
    """Which row of a task a request belongs to. padding: it only evens out the processes; nobody reads its answer."""

    task: str
    split: str
    doc_id: int
    padding: bool = False


@dataclass
class Prompt:
    """One request, ready for a model. chat: messages with decoded media. query: the question alone, for query-aware
    methods.

    kind: "video", "image" or "text", by its media. generation: the task's generation_kwargs. target: what is scored in
    a likelihood request, None in a generation request.
    """

    row: TaskRow
    chat: list[JsonObject]
    query: str
    kind: str
    generation: Fields = field(default_factory=dict)
    target: str | None = None


@dataclass(frozen=True)
class MediaRules:
    """How videos are read; see ModelArgs."""

    frames: int | str | None
    fps: float | None = None
    rule: str = "linspace_unique"
    backend: str = "auto"


@dataclass
class RequestReader:
    """Turns requests of one run into prompts."""

    docs: Callable[[str, str, int], Fields]
    """(task, split, doc_id) -> the row of the data set."""
    count: Callable[[str, str], int]
    """(task, split) -> how many rows."""
    rules: Callable[[str], MediaRules]
    system_prompt: str = ""
    control: str = ""
    bare: bool = False
    """Ask the question alone."""
    _videos: dict[tuple[object, ...], Video] = field(default_factory=dict, init=False)
    """The last two: neighbouring rows often share one."""

    def read(self, row: TaskRow, messages_of: Messages, generation: Fields, target: object = None) -> Prompt:
        """The prompt of one row. messages_of: the task's doc -> messages. target: a text, or a function of the doc."""
        doc = self.docs(row.task, row.split, row.doc_id)
        messages = self._messages(row, doc, messages_of)
        if self.control:
            messages = self._controlled(row, messages, messages_of)
        try:
            chat, kind = self._decoded(messages)
        except Exception as error:
            raise at_row(row.task, row.doc_id, "cannot read its media", error) from error
        query = question_of(doc, _last_text(chat))
        if self.bare:
            _ask_only(chat, query)
        if self.system_prompt:
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            chat = [system, *(m for m in chat if m["role"] != "system")]
        if target is not None and not isinstance(target, str):
            target = str(target(doc) if callable(target) else target)
        return Prompt(row, chat, query, kind, generation, target)

    def _messages(self, row: TaskRow, doc: Fields, messages_of: Messages) -> list[JsonObject]:
        try:
            return [{"role": str(m["role"]), "content": _parts(m["content"])} for m in messages_of(doc)]
        except (Exception, SystemExit) as error:  # some tasks end the program when a file is missing
            empty = [k for k, v in doc.items() if v is None]
            hint = f" (empty fields of this row: {', '.join(empty)})" if empty else ""
            raise at_row(row.task, row.doc_id, f"the task cannot make a prompt of this row{hint}", error) from error

    def _controlled(self, row: TaskRow, messages: list[JsonObject], messages_of: Messages) -> list[JsonObject]:
        """The same messages without media, or with those of another row."""
        if self.control == "no_image":
            for m in messages:
                m["content"] = [p for p in m["content"] if p["type"] == "text"]
            return messages
        media = _media(messages)
        if not media:
            return messages
        total = self.count(row.task, row.split)
        seen = [_fingerprint(p["url"]) for p in media]
        for step in range(total - 1):
            other_id = (row.doc_id + max(1, total // 2) + step) % total
            if other_id == row.doc_id:
                continue
            other = TaskRow(row.task, row.split, other_id)
            others = _media(self._messages(other, self.docs(row.task, row.split, other_id), messages_of))
            if others and not set(seen) & {_fingerprint(p["url"]) for p in others}:
                for i, part in enumerate(media):  # as many as the row's own, in case the other has fewer
                    part.update(others[i % len(others)])
                return messages
        raise EvaluationError(
            f"task {row.task!r}: control=shuffled needs rows with other pictures; all {total} show the same.",
            row.task,
            row.doc_id,
        )

    def _decoded(self, messages: Sequence[Fields]) -> tuple[list[JsonObject], str]:
        kinds = {p["type"] for m in messages for p in m["content"]}
        kind = "video" if "video" in kinds else "image" if "image" in kinds else "text"
        chat = []
        for m in messages:
            content: list[JsonObject] = []
            for part in m["content"]:
                if part["type"] == "text":
                    content.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image":
                    content.append({"type": "image", "image": open_image(part["url"])})
                else:
                    video = self._video(part["url"], part.get("start_time"), part.get("end_time"), self.rules(kind))
                    content.append({"type": "video", "video": video})
            chat.append({"role": m["role"], "content": content})
        return chat, kind

    def _video(self, source: object, start: float | None, end: float | None, rules: MediaRules) -> Video:
        from tokprune.video import read_video

        if not isinstance(source, str | os.PathLike):
            raise OptionError(f"a video is the path of a file or a folder of pictures, not {type(source).__name__}.")
        key = (os.fspath(source), start, end, rules)
        if key not in self._videos:
            video = read_video(source, rules.frames, rules.fps, start, end, rules.backend, rule=rules.rule)
            self._videos = {**dict(list(self._videos.items())[-1:]), key: video}
        return self._videos[key]


def question_of(doc: Fields, text: str) -> str:
    """The question of a row, without its options and the task's instructions.

    The row's own field when the prompt contains it, else the prompt up to the first option.
    """
    for name in QUESTION_FIELDS:
        value = doc.get(name)
        if isinstance(value, str) and value.strip() and _plain(value) in _plain(text):
            return _without_options(value)
    return _without_options(text)


def _without_options(text: str) -> str:
    lines = text.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if _FIRST_OPTION.match(line)), None)
    if first is not None:
        while first > 0 and _OPTION_LINE.match(lines[first - 1]):  # such as a heading "Options:"
            first -= 1
        kept = "\n".join(lines[:first]).strip()
        if kept:
            return kept
    return text.strip()


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _last_text(chat: Sequence[Fields]) -> str:
    user = next((m for m in reversed(chat) if m["role"] == "user"), None)
    return "\n".join(p["text"] for p in user["content"] if p["type"] == "text") if user else ""


def _ask_only(chat: Sequence[JsonObject], question: str) -> None:
    """Let the last user turn hold its media and the bare question."""
    for m in reversed(chat):
        if m["role"] == "user":
            m["content"] = [p for p in m["content"] if p["type"] != "text"] + [{"type": "text", "text": question}]
            return


def _parts(content: str | Iterable[Fields]) -> list[JsonObject]:
    """The parts of a message, each with its type; media under "url", as lmms-eval writes them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = [dict(part) for part in content]
    for part in parts:
        kind = part["type"]
        if kind not in ("text", "image", "video"):
            raise OptionError(f"{kind} input is not supported; tokprune runs images and videos.")
        if kind == "text" and not isinstance(part["text"], str):
            raise OptionError(f"a text part holds {type(part['text']).__name__}, not a string.")
        if kind != "text" and part.get("url") is None:
            raise OptionError(f"the row has no {kind}: the task gives None.")
    return parts


def _media(messages: Sequence[Fields]) -> list[JsonObject]:
    return [p for m in messages for p in m["content"] if p["type"] in ("image", "video")]


def _fingerprint(url: object) -> str:
    """Equal for equal media: the path, or the pixels."""
    if isinstance(url, str | os.PathLike):
        return str(url)
    data = url.tobytes() if hasattr(url, "tobytes") else repr(url).encode()
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def open_image(source: object) -> Image:
    """A picture as PIL.Image in RGB, from one or from a path."""
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else rgb(source, on_white=False)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if not path.is_file():
            siblings = [p.name for p in path.parent.iterdir()][:10_000] if path.parent.is_dir() else []
            raise OptionError(f"there is no picture {str(source)!r}.{nearest(path.name, siblings)}")
        with Image.open(path) as image:
            return rgb(ImageOps.exif_transpose(image), on_white=False)
    raise OptionError(f"a picture is a PIL image or a path, not {type(source).__name__}; the row has no usable image.")
