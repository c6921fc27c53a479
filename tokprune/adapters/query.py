"""The question about the picture: given by the user, or cut out of the prompt with the processor's chat template."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from tokprune.errors import MissingQueryError
from tokprune.tokens import Query

# Words that no prompt contains, to find where a chat template puts the user's text.
FIRST, ANSWER, SECOND = "qzquestionqz", "qzanswerqz", "qzfollowupqz"


# Words and marks that open the model's turn in prompts that follow no chat template at hand, and the user's.
SPOKEN = (
    r"(?:(?<!\w)(?:assistant|answer|gpt|bot|model|ai|(?-i:Response|Output)|antwort|réponse|respuesta)\s*:|回答\s*[::]"
    r"|\[/inst\]|<\|?assistant\|?>|<\|im_start\|>\s*assistant|<start_of_turn>\s*model|<\|start_header_id\|>\s*assistant"
    r"|<end_of_turn>|<end_of_utterance>|<\|im_end\|>|<\|eot_id\|>|<\|end\|>)"
)
SPOKEN_TO_Q = SPOKEN[:-1] + r"|(?<!\w)a\s*:)"  # behind "Q:", unless A, B, ... are the options to choose from
ASKED = (
    r"(?:(?<!\w)(?:user|human|question|q|(?-i:Instruct|Instruction)|frage|pregunta)\s*:|(?:问题|問題)\s*[::]"
    r"|\[inst\]|<\|?user\|?>|<\|im_start\|>\s*user|<start_of_turn>\s*user|<\|start_header_id\|>\s*user<\|end_header_id\|>)"
)

WHOLE = "the whole prompt: nothing in it tells where an answer would begin; give query= if it holds one"


def plain_question(text: str) -> tuple[str, bool]:
    """The question in a prompt that follows no known template, and whether its end is sure.

    It ends where the model's turn opens ("ASSISTANT:", "[/INST]", ...) and begins after the last word that opens the
    user's; with neither, it ends at the first question mark, so that words of an answer behind it do not count,
    whatever they ask in turn.
    """
    begins = [m.end() for m in re.finditer(ASKED, text, re.IGNORECASE)]
    question = text[begins[-1] :] if begins else text
    to_q = re.search(r"(?<!\w)q\s*:", text, re.IGNORECASE) and not re.search(r"(?<!\w)b\s*:", question, re.IGNORECASE)
    end = re.search(SPOKEN_TO_Q if to_q else SPOKEN, question, re.IGNORECASE)
    if end is not None:
        return question[: end.start()], True
    mark = question.find("?")
    return (question[: mark + 1], True) if mark >= 0 else (question, False)


# Questions of the with blocks that a thread (or asyncio task) is in, by id of the set-up that they are for.
_ASKED: ContextVar[Mapping[int, str | tuple[str, ...]]] = ContextVar("tokprune_asked", default={})  # noqa: B039 - never written to


@contextlib.contextmanager
def asking(setup: Any, question: str | tuple[str, ...]) -> Iterator[None]:
    """`question` is what `current_question(setup)` answers inside the block, in this thread."""
    before = _ASKED.get()
    _ASKED.set({**before, id(setup): question})
    try:
        yield
    finally:
        _ASKED.set(before)


def current_question(setup: Any) -> str | tuple[str, ...] | None:
    """The question of the innermost `asking` block around the caller, or None."""
    return _ASKED.get().get(id(setup))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the processor itself when it is one."""
    return getattr(processor, "tokenizer", processor)


def _template_parts(processor: Any) -> tuple[str, str] | None:
    """What a chat template writes right before and right after the last user text, or None without a template."""

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    for plain in (False, True):
        turns = [turn("user", FIRST), turn("assistant", ANSWER), turn("user", SECOND)]
        if plain:
            turns = [{"role": t["role"], "content": t["content"][0]["text"]} for t in turns]
        try:
            text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception:  # a template is a program of its own and raises what it likes
            continue
        if all(word in text for word in (FIRST, ANSWER, SECOND)):
            opening, middle = text.split(FIRST)[0], text.split(ANSWER)[1].split(SECOND)[0]
            # Both end in what opens a user's turn.
            ends = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(opening), reversed(middle), strict=False))
            header = "".join(letter for letter, _ in ends)[::-1]
            return _one_line(header), _one_line(text.split(SECOND)[1])
    return None


LABEL = r"(?:Frame ?-?\d+|Frame from [\d:]+|Time \d+(?:\.\d+)?s):|<\d+(?:\.\d+)? seconds>"
"""What processors write before a frame of a video: InternVL, SmolVLM, VideoLLaMA 3, Qwen3-VL."""
CLOCK = r"\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?"
"""The same in words that a question may hold, too (Gemma 4, Kimi): labels only where all frames have one."""
BEHIND = r"\d+(?:\.\d+)?(?: seconds)?"
"""What stands behind a frame, between marks (GLM-4V)."""
INTRODUCTION = r"You are provided the following series of [^.]*? frames from a [^.]*? video\."


def _without_labels(tokenizer: Any, ids: Tensor, visual: Tensor) -> str:
    """The text of a prompt without placeholders and without the words that tell frames of a video apart.

    ids: (L,). visual: (L,) bool placeholders. Labels end a stretch of text before placeholders, or begin the one behind
    them; special tokens may stand between.
    """
    mark = "|".join(map(re.escape, _marks(tokenizer))) or "(?!)"
    edges = [0, *((visual[1:] != visual[:-1]).nonzero().flatten() + 1).tolist(), len(ids)]
    parts = [ids[a:b].tolist() for a, b in pairwise(edges) if b > a and not visual[a]]
    texts = [tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    between = texts[1:-1] if len(ids) and not visual[-1] else texts[1:]
    clocks = bool(between) and all(re.fullmatch(rf"(?:{mark}|\s)*{CLOCK}\s*(?:{mark}|\s)*", t) for t in between)
    label = f"{LABEL}|{CLOCK}" if clocks else LABEL
    for i, text in enumerate(texts):
        if i + 1 < len(texts) or bool(visual[-1]):
            comma = r"(?:,\s*)?" if i else ""  # VideoLLaMA 3 writes one between frames
            text = re.sub(rf"{comma}(?:{label})((?:{mark}|\s)*)$", r"\1", text)
            text = re.sub(rf"({mark})\d+((?:{mark})(?:{mark}|\s)*)$", r"\1\2", text)  # a picture's number
        if i or bool(visual[0]):
            text = re.sub(rf"^((?:{mark}|\s)+){BEHIND}(?=\s*(?:{mark}))", r"\1", text)
        texts[i] = text
    return re.sub(INTRODUCTION, " ", " ".join(texts))


def find_question(processor: Any, ids: Tensor, visual_ids: Sequence[int]) -> tuple[str, str]:
    """The words of the last user turn of a prompt, without template, system prompt and visual placeholders, and how
    they were found. Words of an answer that follows the question do not count as the question.

    ids: (L,) token ids of one prompt, padding removed. visual_ids: ids of placeholder tokens.
    """
    tokenizer = tokenizer_of(processor)
    skip = torch.isin(ids, torch.tensor(list(visual_ids), device=ids.device))
    text = _one_line(_without_labels(tokenizer, ids, skip) if len(ids) else "")
    parts, cut_out = _template_parts(processor), False
    if parts is not None:
        low = text.lower()
        header, closing = parts[0].lower(), parts[1].lower()
        end = low.rfind(closing) if closing else len(text)
        end = len(text) if end < 0 else end
        start = low.rfind(header, 0, end) if header else -1
        cut_out = start >= 0
        if cut_out:
            text, source = text[start + len(header) : end], "cut out of the prompt by the chat template"
    if not cut_out:
        text, sure = plain_question(text)
        source = "found in a prompt that follows no known chat template" if sure else WHOLE
    return _without_special(tokenizer, text), source


def words_between(processor: Any, ids: Tensor) -> str:
    """The words of a stretch of a prompt, ids (L,), without what the chat template writes around turns."""
    tokenizer = tokenizer_of(processor)
    text = _one_line(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    for mark in reversed(_template_parts(processor) or ()):
        if mark:
            text = re.sub(re.escape(mark), " ", text, flags=re.IGNORECASE)
    return _without_special(tokenizer, text)


def _marks(tokenizer: Any) -> list[str]:
    """The special tokens, the longest first."""
    names = {*getattr(tokenizer, "all_special_tokens", ()), *getattr(tokenizer, "added_tokens_encoder", ())}
    return sorted(map(str, names), key=len, reverse=True)


def _without_special(tokenizer: Any, text: str) -> str:
    for mark in _marks(tokenizer):
        text = text.replace(mark, " ")
    return _one_line(text)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], tuple[str, ...] | None]:
    """Token ids of a text, and the word that each belongs to (None when the tokenizer cannot tell)."""
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer(text, add_special_tokens=False)["input_ids"], None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words = [(m.start(), m.end(), m.group()) for m in re.finditer(r"\w+|[^\w\s]", text)]

    def word_at(start: int, end: int) -> str:  # offsets may include the blank before a word
        return max(words, key=lambda w: min(end, w[1]) - max(start, w[0]), default=(0, 0, ""))[2]

    return encoded["input_ids"], tuple(word_at(*span) for span in encoded["offset_mapping"])


def build_queries(
    processor: Any,
    table: Any,
    rows: Sequence[Tensor | None],
    questions: str | Sequence[str] | None,
    visual_ids: Sequence[int],
    scorer: Any,
    device: torch.device | None = None,
) -> list[Query | None]:
    """One Query per prompt.

    table: the LLM's embedding module, asked on `device`. rows: (L,) ids per prompt without padding, None when only
    embeddings are known. questions: one for all prompts or one per prompt. scorer: object with embed_text, or None.
    """
    if questions is not None and not isinstance(questions, str) and len(questions) != len(rows):
        raise MissingQueryError(
            f"{len(questions)} questions were given for {len(rows)} prompts; give one per prompt, or a single string."
        )
    out: list[Query | None] = []
    for i, ids in enumerate(rows):
        if questions is not None:
            text, source = (questions if isinstance(questions, str) else questions[i]), "given"
        elif processor is not None and ids is not None:
            text, source = find_question(processor, ids, visual_ids)
        else:
            out.append(None)
            continue
        out.append(read(processor, table, text, source, scorer, device))
    return out


def read(
    processor: Any, table: Any, text: str, source: str, scorer: Any = None, device: torch.device | None = None
) -> Query:
    """A text as a Query: with its rows of the LLM's embedding module `table`, where a processor can tell its tokens."""
    embeddings, pieces = None, None
    if processor is not None:
        words, pieces = _tokens(tokenizer_of(processor), text)
        if device is None:
            device = next((p.device for p in table.parameters() if p.device.type != "meta"), torch.device("cpu"))
        with torch.no_grad():
            embeddings = table(torch.tensor(words, dtype=torch.long, device=device))
    clip = scorer.embed_text([text]) if hasattr(scorer, "embed_text") else None
    return Query(text, embeddings, clip, source, pieces)
