"""MMTok: keep the tokens that together cover the question and the picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep, picked, solve_alike
from tokprune.methods.options import option
from tokprune.methods.question import word_embeddings
from tokprune.ops.blocks import row_blocks, whole
from tokprune.ops.select import greedy_coverage, lazy_coverage
from tokprune.ops.similarity import cosine_similarity, unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import Query, Selection, VisualTokens

# The published settings: words that say nothing about a picture, and what evaluation prompts add to a question.
_EMPTY = """
    a an the is are was were be been being have has had do does did it they he she we you i what where when why how
    who which and or but so if then question answer to for with by from at into onto upon
"""
STOP_WORDS = frozenset(_EMPTY.split())
ADDED = (
    "answer the question using a single word or phrase",
    "answer with the option s letter from the given choices directly",
)


@torch.no_grad()
def coverage_rows(
    projected: Tensor,
    vision: Tensor,
    text: Tensor,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
) -> Tensor:
    """How well each visual token stands for each word and for each visual token.

    projected: (N, D) and text: (M, D) in the LLM's space; vision: (N, C) before the projector. Rows of cosines, divided
    by a temperature and softmaxed over the visual tokens; words weigh 1/M each, visual tokens alpha/N. Returns (M + N,
    N).
    """
    words = (cosine_similarity(text, projected) / text_temperature).softmax(-1) / text.shape[0]
    patches = (cosine_similarity(vision) / vision_temperature).softmax(-1) / vision.shape[0]
    return torch.cat([words, alpha * patches])


@torch.no_grad()
def coverage_columns(
    projected: Tensor,
    vision: Tensor,
    text: Tensor,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
) -> Callable[[Tensor], Tensor]:
    """Columns of `coverage_rows` by number, (m,) -> (m, M + N), where there are too many rows to hold."""
    rows, n = unit(vision), len(vision)
    words = (cosine_similarity(text, projected) / text_temperature).softmax(-1) / text.shape[0]  # (M, N)
    mass = [(rows[part] @ rows.T).div_(vision_temperature).logsumexp(-1) for part in row_blocks(n)]
    total = torch.cat(mass)  # (N,) what the softmax of each row is divided by

    def columns(which: Tensor) -> Tensor:
        patches = ((rows[which] @ rows.T) / vision_temperature - total).exp() / n
        return torch.cat([words[:, which].T, alpha * patches], -1)

    return columns


def content_rows(query: Query, count: int) -> list[int]:
    """Which of the question's `count` embedding rows belong to words that say something about the picture.

    Stop words and the sentences that evaluation prompts add are left out. `query.pieces` names the word of each row.
    Without it, rows can be told apart only when the words of the text are as many as the rows (one row per word, with
    or without rows for punctuation). Otherwise, and when nothing but stop words remains, all rows count.
    """
    words = list(query.pieces) if query.pieces is not None and len(query.pieces) == count else None
    text = query.text or ""
    for split in (re.findall(r"\w+|[^\w\s]", text), text.split()):
        if words is None and len(split) == count:
            words = split
    if words is None:
        return list(range(count))
    plain = [" ".join(re.findall(r"\w+", w.lower())) for w in words]
    asked = [i for i in _question(plain) if plain[i]]
    found = [i for i in asked if plain[i] not in STOP_WORDS]
    return found or asked or list(range(count))


def _question(words: list[str]) -> list[int]:
    """Rows of the words that do not belong to a sentence of ADDED. A word of several rows stands there
    several times.
    """
    rows = [i for i, w in enumerate(words) if w]
    firsts = [i for n, i in enumerate(rows) if n == 0 or words[i] != words[rows[n - 1]]]
    spoken = " ".join(words[i] for i in firsts).split()
    owner = [i for i in firsts for _ in words[i].split()]
    gone: set[str | int] = set()
    for sentence in ADDED:
        wanted = sentence.split()
        for start in range(len(spoken) - len(wanted) + 1):
            if spoken[start : start + len(wanted)] == wanted:
                last = owner[start + len(wanted) - 1]
                end = next((i for i in firsts if i > last), len(words))
                gone |= set(range(owner[start], end))
    return [i for i in range(len(words)) if i not in gone]


@register_method(
    "mmtok",
    paper="MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
    year=2026,
    url="https://arxiv.org/abs/2508.18264",
    complexity="O(N²(C + K))",
    memory="O(ND)",
    query_aware=True,
    checked=Checked(
        "Ironieser/MMTok",
        agrees="the order of choice on one picture and on each tile, excluded padding, the words that are left out",
        differs="the list-of-images path; the word Question: before Qwen2.5-VL's questions; words of several "
        "sub-words, which "
        "the code splits anew from plain text",
    ),
    presets={"qwen2_5_vl": {"text_temperature": 0.01, "stop_words": False}},
)
@dataclass(frozen=True)
class MMTok(ConnectorMethod):
    """MMTok (ICLR 2026): greedy maximum coverage of the question's words and of the picture itself.

    It compares projected features with LLM embeddings of the question's words and the tower's own features with each
    other, so it needs no CLIP text tower. alpha = 0.5 and the temperatures 0.02 and 0.2 are the published settings for
    LLaVA; preset="qwen2_5_vl" takes those for Qwen2.5-VL, which reads the whole question. stop_words: leave out words
    such as "what is the" and the sentences that evaluation prompts add, by the published list, see `content_rows`. As
    published, each tile of a picture is covered on its own, with equal budgets. The frames of a video are covered
    together.

    Published code and paper agree; the code's list-of-images path feeds text padding as words, which cannot happen
    here. For Qwen2.5-VL it puts the word "Question:" before the question; here the question stands alone.
    """

    needs: ClassVar[tuple[str, ...]] = ("encoder_features",)
    alpha: float = option(0.5, low=0, hint="0 is the question alone.")
    text_temperature: float = option(0.02, above=0)
    vision_temperature: float = option(0.2, above=0)
    stop_words: bool = True

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams; those of equal size, budget and number of words share one greedy loop."""
        problems, places, large, where = [], [], [], []
        for i, (tokens, keep) in enumerate(zip(batch, keeps, strict=True)):
            check_keep(keep, len(tokens))
            text = word_embeddings(tokens)
            if self.stop_words:
                text = text[content_rows(tokens.question(), len(text))]
            features = check_finite(tokens.features, "the visual features")
            vision = check_finite(tokens.signal("encoder_features"), "the tower's features")
            tiled = tokens.layout.kind == "tiles"
            sizes = tokens.layout.group_sizes if tiled else (len(tokens),)
            for start, size, count in zip(accumulate(sizes, initial=0), sizes, equal(keep, sizes), strict=False):
                if count > 0:
                    x, v = features[start : start + size], vision[start : start + size]
                    given = (x, v, text, self.alpha, self.text_temperature, self.vision_temperature)
                    if whole(size, size):
                        problems.append(([coverage_rows(*given)], count))
                        places.append((i, start))
                    else:
                        numbers = torch.arange(size, device=v.device)
                        large.append(lazy_coverage(coverage_columns(*given), numbers, count)[0])
                        where.append((i, start))
        chosen = picked([*solve_alike(problems, greedy_coverage), *large], [*places, *where], len(batch))
        return [Selection(indices) for indices in chosen]
