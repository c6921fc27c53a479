"""The contract of a frames method, and PerFrame: a frames and a connector method as one, where the connector method
would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, Method, Wrapper, check_keep, select_in_parts
from tokprune.methods.connector.uniform import Uniform
from tokprune.methods.options import option
from tokprune.registry import MethodInfo
from tokprune.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class ScoreOptions:
    """What whoever fills the signal `frame_scores` has to do: which model looks at the frames, and what it is asked.

    source: "clip" (a scorer with an image and a text tower) or "self" (the VLM that answers). The signal is (T,), raw:
    for "clip" the scorer's logit, scale * cosine + bias, the best over `entities` or that of the question; for "self"
    the probability of "yes", 0 … 1. The method calibrates it. normalize: "pair" is P(yes) / (P(yes) + P(no)), "vocab"
    is P(yes) among all tokens of the vocabulary (as published). entities: things to look for; None takes the question.
    decouple: have the VLM name them first, from the question, where `entities` is None. entity_prompt and query_prompt:
    what "self" asks about a frame; they hold {entities} or {question}, offer yes as A and no as B, and ask for the
    letter.
    """

    source: Literal["clip", "self"]
    normalize: Literal["pair", "vocab"] = "pair"
    decouple: bool = False
    entities: tuple[str, ...] | None = None
    entity_prompt: str = ""
    query_prompt: str = ""


@dataclass(frozen=True)
class FramesMethod(Method):
    """Base of methods that say which frames of a video the LLM sees, and how many tokens of each.

    Subclasses implement `allocate`; those that score frames derive from ScoredFrames.
    """

    stage: ClassVar[str] = "frames"

    @property
    def exact(self) -> bool:
        """Whether the shares add up to what was asked; published code that under-fills its budget may not."""
        return getattr(self, "compat", "corrected") == "corrected"

    @property
    def score_options(self) -> ScoreOptions | None:
        """How the signal `frame_scores` is to be made; None when the method does not read it."""
        return None

    @property
    def inside(self) -> ConnectorMethod:
        """What brings a frame down to its share when no connector method is given: a regular grid of its tokens."""
        return Uniform()

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each frame of a video may keep.

        keep: 1 … N. Returns T whole numbers, none above its frame's tokens (`layout.group_sizes`), whose sum is `keep`.
        """
        raise OptionError(f"{type(self).__name__} does not implement allocate(tokens, keep).")

    def fit(self, shares: list[int], tokens: VisualTokens) -> list[int]:
        """The shares as the method's own `inside` likes them best, with the same sum; asked when no other is given."""
        return shares


@dataclass(frozen=True)
class ScoredFrames(FramesMethod):
    """Base of methods that share the budget out by a number per frame: `frame_worth`, then `allocate_by`."""

    def frame_worth(self, tokens: VisualTokens) -> Tensor:
        """Worth of each frame, higher = more tokens. Returns (T,) in float32 (float64 stays), finite."""
        raise OptionError(f"{type(self).__name__} does not implement frame_worth(tokens).")

    def allocate_by(self, worth: Tensor, tokens: VisualTokens, keep: int) -> list[int]:
        """`allocate` for a worth that is known, (T,)."""
        raise OptionError(f"{type(self).__name__} does not implement allocate_by(worth, tokens, keep).")

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each frame of a video may keep."""
        return self.allocate_by(self.frame_worth(tokens), tokens, keep)


@dataclass(frozen=True)
class PerFrame(Wrapper):
    """A frames method shares the budget out, a connector method picks or merges inside each frame.

    Not registered: apply makes it of the two.

    frames: whose shares. inner: any connector method, wrappers included; each frame is a video of one frame to it. None
    is the frames method's own (`FramesMethod.inside`). A frame whose share is 0 vanishes, one that may keep all its
    tokens stays as it is.

    Images and tiles have no frames: there `inner` works with the plain budget, and without an `inner` they stay whole
    (`budgets` says so, and `note` why). Selections carry `frame_tokens` (T,), each frame's share, and `frame_worth`
    (T,) where frames are scored.
    """

    frames: FramesMethod = option(hint="Such as UniformFrames().")
    inner: ConnectorMethod | None = option(
        None, example="divprune", hint="A connector method works inside the frames, such as DivPrune()."
    )

    @property
    def method(self) -> ConnectorMethod:
        """What works inside the frames."""
        return self.frames.inside if self.inner is None else self.inner

    @property
    def info(self) -> MethodInfo:  # type: ignore[override]
        """The facts of both; named after the methods."""
        own, inside = self.frames.info, self.method.info
        return replace(
            inside,
            name=own.name if self.inner is None else f"{own.name} + {inside.name}",
            paper=own.paper,
            year=own.year,
            url=own.url,
            query_aware=self.query_aware,
            deterministic=own.deterministic and inside.deterministic,
            adaptive=own.adaptive or inside.adaptive,
            video=True,
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """What both need."""
        return tuple(dict.fromkeys([*self.frames.needs, *self.method.needs]))

    @property
    def query_aware(self) -> bool:
        """Whether one of them reads the question."""
        return self.frames.query_aware or self.method.query_aware

    @property
    def exact(self) -> bool:
        """Whether both keep exactly what they are asked to."""
        return self.frames.exact and self.method.exact

    def note(self, tokens: VisualTokens) -> str:
        """What the report has to say about this stream; empty for a video."""
        if tokens.layout.kind == "video":
            return ""
        if self.inner is None:
            return (
                f"not a video: the frames method {self.frames.info.name!r} has nothing to share out here, and no "
                f"connector method "
                f"was given, so all tokens stay (give one: method=[{self.frames.info.name!r}, 'divprune'])"
            )
        return f"not a video: {self.inner.info.name!r} alone"

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """The inner method's rule; without one, what is not a video keeps all its tokens."""
        if self.inner is not None:
            return super().budgets(batch, keeps)
        return [keep if t.layout.kind == "video" else len(t) for t, keep in zip(batch, keeps, strict=True)]

    def bounds(self, tokens: VisualTokens) -> tuple[int, int]:
        """Those of the inner method; without one, what is not a video keeps all its tokens."""
        if self.inner is None and tokens.layout.kind != "video":
            return len(tokens), len(tokens)
        return super().bounds(tokens)

    def shares(self, tokens: VisualTokens, keep: int) -> tuple[list[int], dict[str, Tensor]]:
        """The frames method's shares of one video, checked, and what to record of them."""
        frames = self.frames
        worth = {"frame_worth": frames.frame_worth(tokens)} if isinstance(frames, ScoredFrames) else {}
        if isinstance(frames, ScoredFrames):
            counts = frames.allocate_by(worth["frame_worth"], tokens, keep)
        else:
            counts = frames.allocate(tokens, keep)
        if self.inner is None:
            counts = frames.fit(counts, tokens)
        sizes = tokens.layout.group_sizes
        fits = len(counts) == len(sizes) and all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))
        if not fits or sum(counts) < 1 or (frames.exact and sum(counts) != keep):
            raise OptionError(
                f"the frames method {frames.info.name!r} shared {keep} tokens out as {counts} over frames of "
                f"{list(sizes)}: the shares must fit the frames and add up to the budget."
            )
        return counts, {"frame_tokens": torch.tensor(counts, device=tokens.features.device), **worth}

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams: all frames of all of them go to the inner method in one call."""
        parts: list[list[tuple[slice, int]]] = []
        records: list[dict[str, Tensor]] = []
        for tokens, keep in zip(batch, keeps, strict=True):
            check_keep(keep, len(tokens))
            if tokens.layout.kind == "video":
                counts, record = self.shares(tokens, keep)
                parts.append(list(zip(tokens.layout.group_slices(), counts, strict=True)))
            else:
                record = {}
                parts.append([(slice(0, len(tokens)), keep if self.inner is not None else len(tokens))])
            records.append(record)
        chosen = select_in_parts(self.method, batch, parts, ask_full=self.drops_at_full_budget)
        return [replace(found, info={**found.info, **record}) for found, record in zip(chosen, records, strict=True)]
