"""The contract of a method: a frozen dataclass of hyper-parameters and one decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.errors import BudgetError, OptionError
from tokprune.methods.options import check_options
from tokprune.registry import MethodInfo
from tokprune.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses set `stage`; `@register_method` sets `info`.

    The fields are the method's options, declared as `tokprune.methods.options` says and checked here. A subclass that looks
    at several of them together overrides `__post_init__` and calls this one first.
    """

    stage: ClassVar[str]
    info: ClassVar[MethodInfo]

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ConnectorMethod(Method):
    """Base of methods that pick or merge the tokens the LLM will receive.

    Subclasses implement `select`, and `select_batch` when the maths gains from images of equal size in one call.
    """

    stage: ClassVar[str] = "connector"

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that `select` reads."""
        return ()

    @property
    def query_aware(self) -> bool:
        """Whether `select` reads the question (a wrapper answers for what it wraps)."""
        return self.info.query_aware

    @property
    def exact(self) -> bool:
        """Whether `select` keeps exactly what it is asked to; published code that under-fills its budget may not."""
        inner = [v for v in vars(self).values() if isinstance(v, ConnectorMethod)]
        return (
            getattr(self, "compat", "corrected") == "corrected"
            and not self.info.adaptive
            and all(m.exact for m in inner)
        )

    @property
    def narrows(self) -> bool:
        """Whether `select` must be asked even when all tokens may stay."""
        return False

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """Share the tokens of one prompt's images out anew, before `select_batch`; as given unless a method has a rule.

        batch: the streams of one prompt. keeps: what each would keep by the common rule. The sum stays what it was, and each
        stream keeps between 1 and all of its tokens.
        """
        return list(keeps)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose exactly `keep` (1 <= keep <= N) of the stream's tokens."""
        raise OptionError(f"{type(self).__name__} does not implement select(tokens, keep).")

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams; the result of a stream never depends on its neighbours."""
        return [self.select(tokens, keep) for tokens, keep in zip(batch, keeps, strict=True)]


@dataclass(frozen=True)
class ScoreMethod(ConnectorMethod):
    """Base of methods that rank tokens by one number each: subclasses implement `scores`, and `choose` where top-k is not all.

    Wrappers such as Relevance mix something into the scores and leave the choice to the method.
    """

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Worth of each token, higher = keep. Returns (N,) in float32."""
        raise OptionError(f"{type(self).__name__} does not implement scores(tokens).")

    def choose(self, tokens: VisualTokens, scores: Tensor, keep: int) -> Tensor:
        """Exactly `keep` ascending indices by these scores: the best of the whole stream."""
        return top(scores, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        scores = check_finite(self.scores(tokens), f"the scores of {self.info.name}")
        return Selection(self.choose(tokens, scores, keep), info={"scores": scores})


def check_keep(keep: int, n: int) -> None:
    """Refuse a count that a stream of `n` tokens cannot meet."""
    if not 1 <= keep <= n:
        raise BudgetError(f"keep={keep} is not between 1 and the {n} tokens of this stream.")


def check_finite(values: Tensor, what: str) -> Tensor:
    """Return `values`, or refuse NaN and infinity, which would make any choice meaningless."""
    if not torch.isfinite(values).all():
        raise OptionError(
            f"{what} hold NaN or infinity; the model's forward is broken before pruning (overflow in half precision?)."
        )
    return values


def top(scores: Tensor, keep: int) -> Tensor:
    """The `keep` best of (..., N) scores as ascending indices; equal scores: lower index first."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(-1).values
