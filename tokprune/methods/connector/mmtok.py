"""MMTok: keep the tokens that together cover the question and the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.methods.question import word_embeddings
from tokprune.ops.coverage import greedy_coverage
from tokprune.ops.distance import cosine_similarity
from tokprune.registry import register_method
from tokprune.tokens import Query, Selection, VisualTokens

# Words that name nothing in a picture.
_WORDS = (
    "a an the this that these those there here it its is are was were be been am do does did has have had can could will "
    "would shall should may might must i you he she we they me him her us them my your his our their of in on at by to "
    "from for with as into and or but not no if so than then what which who whom whose when where why how please any some"
)
STOP_WORDS = frozenset(_WORDS.split())


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

    projected: (N, D) and text: (M, D) in the LLM's space; vision: (N, C) before the projector. Rows of cosines, divided by a
    temperature and softmaxed over the visual tokens; words weigh 1/M each, visual tokens alpha/N. Returns (M + N, N).
    """
    words = (cosine_similarity(text, projected) / text_temperature).softmax(-1) / text.shape[0]
    patches = (cosine_similarity(vision) / vision_temperature).softmax(-1) / vision.shape[0]
    return torch.cat([words, alpha * patches])


def mmtok(
    projected: Tensor,
    vision: Tensor,
    text: Tensor,
    keep: int,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    exclude: Tensor | None = None,
) -> Tensor:
    """Greedy maximum coverage of words and visual tokens. Shapes as in `coverage_rows` -> (keep,) in the order of choice.

    exclude: indices of tokens (padding) that are picked only when no other is left.
    """
    rows = coverage_rows(projected, vision, text, alpha, text_temperature, vision_temperature)
    barred = None
    if exclude is not None:
        barred = torch.zeros(1, rows.shape[-1], dtype=torch.bool, device=rows.device)
        barred[:, exclude.to(rows.device)] = True
    return greedy_coverage(rows[None], keep, barred=barred)[0]


def content_rows(query: Query, count: int) -> list[int]:
    """Which of the question's `count` embedding rows belong to words that name something.

    `query.pieces` names the word of each row. Without it, rows can be told apart only when the words of the text are as
    many as the rows (one row per word, with or without rows for punctuation). Otherwise, and when nothing but stop words
    remains, all rows count.
    """
    if query.pieces is not None and len(query.pieces) == count:
        found = [i for i, w in enumerate(query.pieces) if w.lower() not in STOP_WORDS and re.search(r"\w", w)]
        return found or list(range(count))
    text = (query.text or "").lower()
    for words in (re.findall(r"\w+|[^\w\s]", text), text.split()):
        if len(words) == count:
            found = [i for i, w in enumerate(words) if w.strip(".,;:!?\"'") not in STOP_WORDS and re.search(r"\w", w)]
            return found or list(range(count))
    return list(range(count))


@register_method(
    "mmtok",
    paper="MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
    year=2026,
    url="https://arxiv.org/abs/2508.18264",
    complexity="O(N²(C + K))",
    query_aware=True,
)
@dataclass(frozen=True)
class MMTok(ConnectorMethod):
    """MMTok (ICLR 2026): greedy maximum coverage of the question's words and of the picture itself.

    It compares projected features with LLM embeddings of the question's words and the tower's own features with each other, so
    it needs no CLIP text tower. alpha = 0.5 and the temperatures 0.02 and 0.2 are the published settings. stop_words:
    leave out words such as "what is the" (the publication does, with a list of its own), see `content_rows`. All tiles or
    frames of a stream are covered together.

    Published code and paper agree; the code's list-of-images path feeds text padding as words, which cannot happen here.
    """

    alpha: float = option(0.5, low=0, hint="0 is the question alone.")
    text_temperature: float = option(0.02, above=0)
    vision_temperature: float = option(0.2, above=0)
    stop_words: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The tower's features before the projector."""
        return ("encoder_features",)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        return self.select_batch([tokens], [keep])[0]

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams; those of equal size, budget and number of words share one greedy loop."""
        jobs: dict[tuple[torch.Size, int, torch.device], list[tuple[int, Tensor]]] = {}
        for i, (tokens, keep) in enumerate(zip(batch, keeps, strict=True)):
            check_keep(keep, len(tokens))
            text = word_embeddings(tokens)
            if self.stop_words:
                text = text[content_rows(tokens.question(), len(text))]
            features = check_finite(tokens.features, "the visual features")
            vision = check_finite(tokens.signal("encoder_features"), "the tower's features")
            rows = coverage_rows(features, vision, text, self.alpha, self.text_temperature, self.vision_temperature)
            jobs.setdefault((rows.shape, keep, rows.device), []).append((i, rows))
        out: dict[int, Selection] = {}
        for (_, keep, _), members in jobs.items():
            orders = greedy_coverage(torch.stack([rows for _, rows in members]), keep)
            for (i, _), order in zip(members, orders, strict=True):
                out[i] = Selection(order.sort().values)
        return [out[i] for i in range(len(batch))]
