"""What every connector method promises, tried on any one: `check_method(method)` gives a list of checks with reasons.

A check is a function of the method that raises Broken with what was seen. Our own tests run the same ones on every
registered method.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokprune.config import PruneConfig
from tokprune.errors import BudgetError, MissingQueryError, MissingSignalError, OptionError
from tokprune.methods.base import ConnectorMethod, Method
from tokprune.testing.self_test import Check
from tokprune.testing.streams import LAYOUTS, changed, stream
from tokprune.tokens import Selection, VisualTokens

CLOSE = 1e-5


class Broken(AssertionError):
    """A promise that a method does not keep; the message says what was seen and what is right."""


def require(holds: bool | Tensor, sentence: str) -> None:
    """Raise Broken with `sentence` unless `holds`."""
    if not bool(holds):
        raise Broken(sentence)


def keeps(n: int) -> list[int]:
    """Keep counts to try on a stream of n tokens."""
    if n <= 7:
        return list(range(1, n + 1))
    return [1, 58, n - 1] if n > 100 else sorted({1, 2, 5, n // 3 | 1, n - 1, n})


def expected(method: ConnectorMethod, tokens: VisualTokens, keep: int) -> int:
    """How many tokens stay: `none` keeps all of them, by its description."""
    return len(tokens) if method.info.name == "none" else keep


def well_formed(method: ConnectorMethod, chosen: Selection, tokens: VisualTokens, keep: int) -> None:
    """Exactly `keep` unique ascending indices, and merge weights that fit them."""
    n, k, indices = len(tokens), expected(method, tokens, keep), chosen.indices
    require(indices.shape == (k,), f"selects {tuple(indices.shape)} of N={n} tokens where keep={keep}")
    require(indices.dtype == torch.long and not indices.requires_grad, f"indices are {indices.dtype}; torch.long it is")
    require((indices[1:] > indices[:-1]).all(), f"indices are not ascending and unique: {indices.tolist()[:12]} …")
    require(int(indices[0]) >= 0 and int(indices[-1]) < n, f"an index lies outside 0 … {n - 1}")
    if chosen.weights is not None:
        dense = chosen.weights.dense(k, n).cpu()
        require(dense.shape == (k, n), f"merge weights have the shape {tuple(dense.shape)}, not {(k, n)}")
        require(torch.isfinite(dense).all(), "merge weights hold NaN or infinity")
        require((dense != 0).any(1).all(), "nothing flows into some output of the merge")
    out = chosen.apply(tokens.features)
    require(out.shape == (k, tokens.features.shape[1]), f"applied, it gives {tuple(out.shape)}")
    require(out.dtype == tokens.features.dtype, f"applied, it turns {tokens.features.dtype} into {out.dtype}")
    require(torch.isfinite(out).all(), "applied, it gives NaN or infinity")


def alike(a: Selection, b: Selection, tokens: VisualTokens, sentence: str) -> None:
    """Two selections are one."""
    require(torch.equal(a.indices, b.indices), sentence)
    require(
        torch.allclose(a.apply(tokens.features), b.apply(tokens.features), CLOSE, CLOSE),
        f"{sentence} (merged features)",
    )


# -- the promises ------------------------------------------------------------------------------------------------------


def keeps_exactly_what_is_asked(method: ConnectorMethod) -> None:
    """On every kind of layout and many counts."""
    for where, layout in LAYOUTS.items():
        tokens = stream(layout, method.needs, seed=1)
        for keep in keeps(len(tokens)):
            try:
                well_formed(method, method.select(tokens, keep), tokens, keep)
            except Broken as error:
                raise Broken(f"layout {where!r}: {error}") from None


def depends_on_no_neighbour_and_no_chance(method: ConnectorMethod) -> None:
    """A stream alone, in a batch, in a batch the other way round, and once more: the same choice."""
    kinds = ("image", "video", "image", "unpadded", "image")
    batch = [stream(LAYOUTS[w], method.needs, seed) for seed, w in enumerate(kinds)]
    counts = [9, 13, 9, 21, 20]
    together = method.select_batch(batch, counts)
    backwards = method.select_batch(batch[::-1], counts[::-1])[::-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for tokens, keep, a, b in zip(batch, counts, together, backwards, strict=True):
            alone, again = method.select(tokens, keep), method.select(tokens, keep)
            alike(again, alone, tokens, "the same call twice chooses otherwise; a random method needs a seed field")
            alike(a, alone, tokens, "a stream in a batch is chosen from otherwise than alone")
            alike(b, alone, tokens, "the order of a batch changes what is chosen")


def _repeat_rows(x: Tensor) -> Tensor:
    return x[torch.arange(len(x)) % min(5, len(x))]


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "duplicates": _repeat_rows,
    "all equal": lambda x: x[:1].expand_as(x).clone(),
    "all ones": torch.ones_like,
    "some zero": lambda x: x * (torch.arange(len(x)) % 3 > 0).reshape(-1, *[1] * (x.dim() - 1)),
    "all zero": torch.zeros_like,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-6,
}


def takes_degenerate_inputs(method: ConnectorMethod, kinds: Sequence[str] = tuple(DEGENERATE)) -> None:
    """Duplicates, constants, zeros, huge and tiny numbers still give exact counts."""
    for kind in kinds:
        for where in ("image", "unpadded", "video"):
            tokens = changed(stream(LAYOUTS[where], method.needs, seed=2), DEGENERATE[kind])
            for keep in (1, 16, 33):
                try:
                    well_formed(method, method.select(tokens, keep), tokens, keep)
                except Broken as error:
                    raise Broken(f"inputs {kind!r}: {error}") from None


def takes_equal_attention(method: ConnectorMethod) -> None:
    """Signals per token that are all alike."""
    tokens = stream(LAYOUTS["tiles"], method.needs, seed=3)
    flat = {k: torch.full_like(v, 1 / 49) if v.dim() == 1 else v for k, v in tokens.signals.items()}
    tokens = dataclasses.replace(tokens, signals=flat)
    for keep in (1, 15, 47):
        well_formed(method, method.select(tokens, keep), tokens, keep)


def refuses_nan_or_does_not_read_it(method: ConnectorMethod) -> None:
    """NaN in the features or a signal ends in an OptionError that says so, or changes nothing."""
    clean = stream(LAYOUTS["image"], method.needs, seed=4)
    right = method.select(clean, 9).indices
    for broken in (None, *clean.signals):
        value = (clean.features if broken is None else clean.signals[broken]).clone()
        value[min(int(right[0]), len(value) - 1)] = torch.nan  # of a token that stays
        with_nan = {"features": value} if broken is None else {"signals": {**clean.signals, broken: value}}
        where = broken or "the features"
        try:
            chosen = method.select(dataclasses.replace(clean, **with_nan), 9).indices
        except OptionError as error:
            require("NaN" in str(error), f"NaN in {where} is refused without saying so: {error}")
        else:
            require(torch.equal(chosen, right), f"NaN in {where} changes the choice; check_finite(...) refuses it")


def changes_nothing_when_all_stay(method: ConnectorMethod) -> None:
    """keep = N."""
    for where in ("seven", "unpadded", "video"):
        tokens = stream(LAYOUTS[where], method.needs, seed=5)
        chosen = method.select(tokens, len(tokens))
        require(torch.equal(chosen.indices, torch.arange(len(tokens))), "keep=N does not keep all tokens")
        if not method.info.merges:
            require(torch.equal(chosen.apply(tokens.features), tokens.features), "keep=N changes features")


DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def takes_other_dtypes(method: ConnectorMethod, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """bfloat16, float16 and float64."""
    for dtype in dtypes:
        tokens = changed(stream(LAYOUTS["unpadded"], method.needs, seed=6), lambda x, to=dtype: x.to(to))  # type: ignore[misc]
        for keep in (1, 17):
            well_formed(method, method.select(tokens, keep), tokens, keep)


def leaves_its_inputs_alone(method: ConnectorMethod) -> None:
    """Features, signals and layout are the same before and after."""
    for where in ("tiles", "video"):
        tokens = stream(LAYOUTS[where], method.needs, seed=7)
        parts = [tokens.features, *tokens.signals.values(), tokens.layout.group, tokens.layout.row, tokens.layout.col]
        before = [part.clone() for part in parts]
        method.select(tokens, 11)
        require(all(map(torch.equal, before, parts)), "it writes into its inputs")


def lets_gradients_through(method: ConnectorMethod) -> None:
    """The same choice with gradients, without, and in inference mode; every kept token gets a gradient."""
    tokens = stream(LAYOUTS["unpadded"], method.needs, seed=8)
    with torch.no_grad():
        plain = method.select(tokens, 14)
    with torch.inference_mode():
        inside = method.select(stream(LAYOUTS["unpadded"], method.needs, seed=8), 14)
        alike(inside, plain, tokens, "inference mode changes the choice")
    tracked = changed(tokens, lambda x: x.clone().requires_grad_())
    chosen = method.select(tracked, 14)
    well_formed(method, chosen, tracked, 14)
    alike(chosen, plain, tokens, "gradients change the choice")
    chosen.apply(tracked.features).sum().backward()
    grad = tracked.features.grad
    require(grad is not None and torch.isfinite(grad).all(), "gradients are NaN, infinite or missing")
    require(grad is not None and (grad[chosen.indices] != 0).any(1).all(), "a kept token gets no gradient")


def asks_for_the_question_only_when_it_reads_it(method: ConnectorMethod) -> None:
    """Without one, a query-aware method raises MissingQueryError, and another works."""
    tokens = stream(LAYOUTS["image"], method.needs, seed=9, query=False)
    if not method.query_aware:
        well_formed(method, method.select(tokens, 9), tokens, 9)
        return
    try:
        method.select(tokens, 9)
    except MissingQueryError:
        return
    raise Broken("query_aware=True, yet it chooses without a question: read it by tokens.question()")


def names_missing_signals(method: ConnectorMethod) -> None:
    """A signal that is not there ends in MissingSignalError with its name."""
    for missing in (need for need in method.needs if need != "clip_text"):
        tokens = stream(LAYOUTS["tiles"], method.needs, seed=10)
        signals = {k: v for k, v in tokens.signals.items() if k != missing}
        try:
            method.select(dataclasses.replace(tokens, signals=signals), 9)
        except MissingSignalError as error:
            require(missing in str(error), f"the error does not name {missing!r}: {error}")
        else:
            raise Broken(f"needs {missing!r} and does not miss it: read it by tokens.signal(...), or do not name it")


def refuses_impossible_counts(method: ConnectorMethod, counts: Sequence[int] = (0, -1, 65)) -> None:
    """Below 1 and above N."""
    if method.info.name == "none":
        return
    tokens = stream(LAYOUTS["image"], method.needs, seed=11)
    for keep in counts:
        try:
            method.select(tokens, keep)
        except BudgetError:
            continue
        raise Broken(f"keep={keep} of 64 tokens is not refused: call check_keep(keep, len(tokens))")


def shares_a_prompt_out_exactly(method: ConnectorMethod) -> None:
    """budgets(): the sum stays, each stream keeps at least one token and no more than it has."""
    kinds = ("image", "image", "unpadded", "seven")
    batch = [stream(LAYOUTS[w], method.needs, seed) for seed, w in enumerate(kinds)]
    given = [10, 10, 30, 1]
    shared = method.budgets(batch, given)
    require(sum(shared) == sum(given), f"budgets of {given} add up to {sum(shared)}: {shared}")
    require(all(1 <= k <= len(t) for k, t in zip(shared, batch, strict=True)), f"budgets {shared} leave 1 … N")


def is_a_described_frozen_dataclass(method: Method) -> None:
    """A docstring, a paper, a complexity, and fields that cannot be changed."""
    cls = type(method)
    text = (cls.__doc__ or "").strip()
    require(bool(text) and not text.startswith(f"{cls.__name__}("), "the class has no docstring")
    require(bool(method.info.paper and method.info.complexity), "@register_method lacks paper= or complexity=")
    for field in dataclasses.fields(method):
        try:
            setattr(method, field.name, None)
        except dataclasses.FrozenInstanceError:
            continue
        raise Broken(f"the field {field.name!r} can be changed: write @dataclass(frozen=True)")


def goes_through_a_config(method: Method) -> None:
    """Written as JSON and read again it is the same method."""
    config = PruneConfig.build(method, ratio=0.1)
    again = PruneConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    require(again == config and hash(again.methods[0]) == hash(method), "a config on disk gives another method back")


ANY: tuple[Callable[[Method], None], ...] = (is_a_described_frozen_dataclass, goes_through_a_config)
CONNECTOR: tuple[Callable[[ConnectorMethod], None], ...] = (
    keeps_exactly_what_is_asked,
    depends_on_no_neighbour_and_no_chance,
    takes_degenerate_inputs,
    takes_equal_attention,
    refuses_nan_or_does_not_read_it,
    changes_nothing_when_all_stay,
    takes_other_dtypes,
    leaves_its_inputs_alone,
    lets_gradients_through,
    asks_for_the_question_only_when_it_reads_it,
    names_missing_signals,
    refuses_impossible_counts,
    shares_a_prompt_out_exactly,
)
"""The promises of every method, and those of a connector method."""


def check_method(method: Method) -> list[Check]:
    """Try every promise on a method; an error inside a check is that check's failure."""
    promises: list[Callable[..., None]] = [*ANY, *(CONNECTOR if isinstance(method, ConnectorMethod) else ())]
    checks = []
    for promise in promises:
        name = promise.__name__.replace("_", " ")
        try:
            promise(method)
        except Exception as error:  # a method is somebody else's program and raises what it likes
            known = isinstance(error, Broken)
            checks.append(Check(name, False, str(error) if known else f"{type(error).__name__}: {error}"))
        else:
            checks.append(Check(name, True))
    return checks
