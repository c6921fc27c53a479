"""The contract of a method: a frozen dataclass of hyper-parameters and one decision."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tokprune.errors import BudgetError, OptionError
from tokprune.methods.options import check_options
from tokprune.ops.blocks import together
from tokprune.ops.merge import join
from tokprune.ops.topk import top
from tokprune.registry import MethodInfo
from tokprune.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses set `stage`; `@register_method` sets `info`.

    The fields are the method's options, declared as `tokprune.methods.options` says and checked here. A subclass that
    looks at several of them together overrides `__post_init__` and calls this one first.

    needs: names of the signals that the method reads, class data like `stage`. Where they depend on an option or on
    another method, it is a property of that name.
    """

    stage: ClassVar[str]
    info: ClassVar[MethodInfo]
    if TYPE_CHECKING:

        @property
        def needs(self) -> tuple[str, ...]:
            """Names of the signals that the method reads."""
    else:
        needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def query_aware(self) -> bool:
        """Whether the method reads the question (a wrapper answers for what it wraps)."""
        return self.info.query_aware

    @property
    def exact(self) -> bool:
        """Whether it leaves exactly what it is asked to; published code that under-fills its budget may not."""
        return getattr(self, "compat", "corrected") == "corrected" and not self.info.adaptive

    @property
    def label(self) -> str:
        """The method's name with those of the methods that it runs inside: "merge(divprune)"."""
        values = [getattr(self, f.name) for f in fields(self)]
        inner = ", ".join(value.label for value in values if isinstance(value, Method))
        return f"{self.info.name}({inner})" if inner else self.info.name


@dataclass(frozen=True)
class ConnectorMethod(Method):
    """Base of methods that pick or merge the tokens the LLM will receive.

    Subclasses implement `select`, or `select_batch` when the maths gains from images of equal size in one call.
    """

    stage: ClassVar[str] = "connector"

    @property
    def reads_examples(self) -> bool:
        """Whether each picture of a prompt comes with the words written behind it, instead of the prompt's question."""
        return False

    @property
    def drops_at_full_budget(self) -> bool:
        """Whether `select` may drop tokens, and so must be asked, even where the budget covers all of them."""
        return False

    @property
    def narrows(self) -> bool:
        """Deprecated name of `drops_at_full_budget`."""
        warnings.warn("narrows is now called drops_at_full_budget", DeprecationWarning, stacklevel=2)
        return self.drops_at_full_budget

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """Share the tokens of one prompt's images out anew, before `select_batch`; as given unless a method has a rule.

        batch: the streams of one prompt. keeps: what each would keep by the common rule. The sum stays what it was, and
        each stream keeps between 1 and all of its tokens.
        """
        return list(keeps)

    def bounds(self, tokens: VisualTokens) -> tuple[int, int]:
        """How few and how many tokens of a stream may stay, where a budget of the whole prompt is shared out."""
        return 1, len(tokens)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose exactly `keep` (1 <= keep <= N) of the stream's tokens."""
        if type(self).select_batch is not ConnectorMethod.select_batch:
            return self.select_batch([tokens], [keep])[0]
        raise OptionError(f"{type(self).__name__} does not implement select(tokens, keep).")

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams; the result of a stream never depends on its neighbours."""
        return [self.select(tokens, keep) for tokens, keep in zip(batch, keeps, strict=True)]


@dataclass(frozen=True)
class ScoreMethod(ConnectorMethod):
    """Base of methods that rank tokens by one number each: subclasses implement `scores`, and `choose` where top-k is
    not all.

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


class Wrapper(ConnectorMethod):
    """Base of everything that wraps a connector method: whatever it does not override is answered by the wrapped
    `method`.

    A subclass is a frozen dataclass with a field or property `method`, and overrides what it changes, `select_batch` as
    a rule. A new hook of ConnectorMethod gets a line here, so that no wrapper loses it.
    """

    if TYPE_CHECKING:

        @property
        def method(self) -> ConnectorMethod:
            """What is wrapped."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What the wrapped method needs."""
        return self.method.needs

    @property
    def query_aware(self) -> bool:
        """Whether the wrapped method reads the question."""
        return self.method.query_aware

    @property
    def reads_examples(self) -> bool:
        """Whether the wrapped method reads the words behind each picture."""
        return self.method.reads_examples

    @property
    def exact(self) -> bool:
        """Whether both keep exactly what they are asked to."""
        return super().exact and self.method.exact

    @property
    def drops_at_full_budget(self) -> bool:
        """Whether the wrapped method must be asked even where the budget covers all tokens."""
        return self.method.drops_at_full_budget

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """The wrapped method's rule for sharing one prompt's budget out over its images."""
        return self.method.budgets(batch, keeps)

    def bounds(self, tokens: VisualTokens) -> tuple[int, int]:
        """As the wrapped method says."""
        return self.method.bounds(tokens)

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """As the wrapped method chooses, or stream by stream where a subclass has a `select` of its own."""
        if type(self).select is ConnectorMethod.select:
            return self.method.select_batch(batch, keeps)
        return super().select_batch(batch, keeps)


def shares_budgets(method: ConnectorMethod) -> bool:
    """Whether a method, or one that it wraps, has a rule of its own for the budgets of a prompt's pictures."""
    while type(method).budgets is Wrapper.budgets:
        method = method.method  # type: ignore[attr-defined]
    return type(method).budgets is not ConnectorMethod.budgets


def solve_alike(problems: Sequence[tuple[Sequence[Tensor], int]], solve: Callable[..., Tensor]) -> list[Tensor]:
    """Solve selection problems, those of equal shapes and keep count in one call, as many as fit into memory with all
    their pairs. Returns one (keep,) per problem, in order.

    problems: the tensors of one problem, without a batch dimension, and its keep count. solve: the algorithm, from
    tensors with a batch dimension and the keep count to (B, keep) indices.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (tensors, keep) in enumerate(problems):
        alike.setdefault((keep, *((x.shape, x.dtype, x.device) for x in tensors)), []).append(i)
    out: dict[int, Tensor] = {}
    for members in (part for same in alike.values() for part in together(same, len(problems[same[0]][0][0]))):
        stacked = [torch.stack(same) for same in zip(*(problems[i][0] for i in members), strict=True)]
        out.update(zip(members, solve(*stacked, problems[members[0]][1]), strict=True))
    return [out[i] for i in range(len(problems))]


def picked(picks: Sequence[Tensor], places: Sequence[tuple[int, int]], streams: int) -> list[Tensor]:
    """What was picked from parts of `streams` streams, as ascending indices of each. places: a part's stream
    and start.
    """
    found: list[list[Tensor]] = [[] for _ in range(streams)]
    for chosen, (stream, start) in zip(picks, places, strict=True):
        found[stream].append(chosen + start)
    return [torch.cat(parts).sort().values for parts in found]


def select_in_parts(
    method: ConnectorMethod,
    batch: Sequence[VisualTokens],
    parts: Sequence[Sequence[tuple[slice, int]]],
    ask_full: bool = True,
) -> list[Selection]:
    """Let `method` choose within each part of each stream, all parts of all streams in one call.

    parts: for each stream, where its parts lie, ascending, and the keep count of each; a part that keeps 0 drops out.
    ask_full: ask also about parts that keep all their tokens, which otherwise stay as they are. Returns one selection
    per stream, in the stream's own positions.
    """
    asked: list[VisualTokens] = []
    keeps: list[int] = []
    pieces: list[list[tuple[slice, int]]] = []  # per stream: a part and its number in `asked`, -1: it stays as it is
    for tokens, own in zip(batch, parts, strict=True):
        pieces.append([])
        for where, keep in own:
            size = where.stop - where.start
            if keep == 0:
                continue
            stays = keep == size and not ask_full
            pieces[-1].append((where, -1 if stays else len(asked)))
            if not stays:
                asked.append(tokens if size == len(tokens) else tokens.part(where))
                keeps.append(keep)
    chosen = method.select_batch(asked, keeps) if asked else []
    return [_joined(tokens, own, chosen) for tokens, own in zip(batch, pieces, strict=True)]


def _joined(tokens: VisualTokens, pieces: Sequence[tuple[slice, int]], chosen: Sequence[Selection]) -> Selection:
    """The answers about one stream's parts as one selection of the stream."""
    device = tokens.features.device
    found = []
    for where, number in pieces:
        place = torch.arange(where.start, where.stop, device=device)
        found.append((place, chosen[number] if number >= 0 else Selection(place - where.start)))
    single = len(found) == 1 and len(found[0][0]) == len(tokens)
    return found[0][1] if single else join(found, tokens.features)


def check_keep(keep: int, n: int) -> None:
    """Refuse a count that a stream of `n` tokens cannot meet."""
    if not 1 <= keep <= n:
        raise BudgetError(f"keep={keep} is not between 1 and the {n} tokens of this stream.")


class Checks:
    """What a method found to be finite or not, to be read by the host together with what it chose."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, str]] = []

    def add(self, finite: Tensor, what: str) -> None:
        """Note one answer of the device, (1,) bool."""
        self._seen.append((finite, what))

    def flags(self) -> list[Tensor]:
        """The answers, (1,) each."""
        return [finite for finite, _ in self._seen]

    def raise_unless(self, flags: Sequence[Tensor]) -> None:
        """Refuse what is not finite, by the answers as the host knows them."""
        for finite, (_, what) in zip(flags, self._seen, strict=True):
            if not finite:
                raise OptionError(
                    f"{what} hold NaN or infinity; the model's forward is broken before pruning (overflow in half "
                    "precision?)."
                )


_CHECKS: ContextVar[Checks | None] = ContextVar("tokprune_checks", default=None)


@contextlib.contextmanager
def deferred_checks() -> Iterator[Checks]:
    """While a method runs inside, `check_finite` does not wait for an accelerator: who opened this reads the flags."""
    checks = Checks()
    token = _CHECKS.set(checks)
    try:
        yield checks
    finally:
        _CHECKS.reset(token)


def check_finite(values: Tensor, what: str) -> Tensor:
    """Return `values`, or refuse NaN and infinity, which would make any choice meaningless.

    On an accelerator the refusal may come when the choice is read (`deferred_checks`).
    """
    if not values.numel():
        return values
    finite, checks = values.abs().amax()[None] < torch.inf, _CHECKS.get()  # NaN is not below anything
    if checks is None or values.device.type == "cpu":
        checks = Checks()
        checks.add(finite, what)
        checks.raise_unless([finite])
    else:
        checks.add(finite, what)
    return values
