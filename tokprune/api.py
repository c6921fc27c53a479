"""What a user holds: apply, remove, and the handle between them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tokprune.adapters.base import get_adapter, unwrap
from tokprune.adapters.families import tiny_families
from tokprune.adapters.seam import LastRun, Options, Seam
from tokprune.budget import kept
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, TokpruneError
from tokprune.methods.base import ConnectorMethod, Method
from tokprune.methods.cache_base import CacheMethod
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.methods.frames_base import FramesMethod, PerFrame
from tokprune.registry import get_method
from tokprune.report import Report

HANDLE = "_tokprune"  # attribute of the model that holds its Pruning


class Pruning:
    """A model that is being pruned: the handle that `apply` returns, also a context manager.

    last: what happened in the last prefill (kept columns, one record per image or video), None before the first.
    """

    def __init__(self, model: Any, config: PruneConfig, processor: Any = None, scorer: Any = None) -> None:
        self.config = config
        self.processor = processor
        self.adapter = get_adapter(model)
        self.model = self.adapter.model
        stages = _stages(config)
        self.encoder: Any = None
        connector, encoder = stages.seam, stages.encoder
        method: Any = connector
        if encoder is not None:
            from tokprune.adapters.splice import EncoderPruning
            from tokprune.adapters.splice.handoff import AmongSurvivors

            # The budget is one: the connector's when there is one. The encoder then follows its own schedule; one that has
            # none reduces by the same factor as the connector behind it.
            amount = (None, None) if connector is not None else (config.ratio, config.budget)
            if connector is not None and config.ratio is not None and not encoder.scheduled:
                amount = (math.sqrt(config.ratio), None)
            self.encoder = EncoderPruning(model, encoder, *amount, processor=processor)
            encoder.check(self.encoder.tower.depth, amount != (None, None))
            method = AmongSurvivors() if connector is None else AmongSurvivors(connector)
        keep_of = self.config.count if connector is not None else lambda n: n
        frames = connector if isinstance(connector, PerFrame) else None
        self.cache: Any = None
        if stages.cache is not None:
            from tokprune.adapters.cache_stage import CacheStage

            self.cache = CacheStage(self.adapter, stages.cache, self._keep_keys(stages.cache, alone=method is None))
            method = get_method("uniform") if method is None else method  # asked to keep all
        options = Options(method, keep_of, config.positions, config.query, processor, scorer, self.encoder, frames)
        options.cached = self.cache is not None
        self._seam = Seam(self.adapter, options)

    def _install(self) -> None:
        if self.encoder is not None:
            self.encoder.install()
        try:
            self._seam.install()
            if self.cache is not None:
                self.cache.install()
        except BaseException:
            self.remove()
            raise
        self.model.__dict__[HANDLE] = self

    def _keep_keys(self, method: CacheMethod, alone: bool) -> Callable[[int], int]:
        """Visual keys that a decode step uses of n: the ratio or budget is for the cache stage only where it stands alone."""
        if alone and (self.config.ratio is not None or self.config.budget is not None):
            return self.config.count
        return functools.partial(kept, ratio=method.share)

    @property
    def last(self) -> LastRun | None:
        """What happened in the last prefill."""
        return self._seam.last

    @property
    def active(self) -> bool:
        """Whether the model is pruned through this handle now."""
        return self.model.__dict__.get(HANDLE) is self

    def remove(self) -> None:
        """Give the model back untouched. Calling it twice is harmless."""
        self._seam.remove()
        for stage in (self.encoder, self.cache):
            if stage is not None:
                stage.remove()
        if self.active:
            del self.model.__dict__[HANDLE]

    def __enter__(self) -> Pruning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @contextlib.contextmanager
    def query(self, text: str | Sequence[str]) -> Iterator[Pruning]:
        """Use `text` as the question (one, or one per prompt) inside the with block."""
        options = self._seam.options
        before, options.query = options.query, text if isinstance(text, str) else tuple(text)
        try:
            yield self
        finally:
            options.query = before

    def report(self) -> Report:
        """What the last prefill kept, how, and what it cost; prints as a table."""
        kind = getattr(self.model.config, "model_type", "?")
        notes = (
            []
            if kind in tiny_families()
            else [f"{kind} runs through the generic adapter; it is not in the verified list"]
        )
        if self.encoder is not None and self.last is not None:
            notes += str(self.encoder.report()).splitlines()
        if self.cache is not None and self.last is not None:
            notes += self.cache.notes()
        return Report.build(self.config, type(self.model).__name__, self.last, notes)

    def __repr__(self) -> str:
        methods = " + ".join(m.info.name for m in self.config.methods)
        amount = "" if self.config.budget is None else f", budget={self.config.budget}"
        amount = amount if self.config.ratio is None else f", ratio={self.config.ratio:g}"
        return f"<Pruning {type(self.model).__name__} by {methods}{amount}{'' if self.active else ', removed'}>"


@dataclass(frozen=True)
class Stages:
    """The methods of a config, one per stage at most."""

    frames: FramesMethod | None = None
    encoder: EncoderMethod | None = None
    connector: ConnectorMethod | None = None
    cache: CacheMethod | None = None

    @property
    def seam(self) -> ConnectorMethod | None:
        """What chooses between encoder and LLM: the connector method, inside each frame when there is a frames method."""
        return self.connector if self.frames is None else PerFrame(self.frames, self.connector)


BASES: dict[str, type[Method]] = {
    "frames": FramesMethod,
    "encoder": EncoderMethod,
    "connector": ConnectorMethod,
    "cache": CacheMethod,
}
"""The stages that run in a model, and what their methods derive from."""


def _stages(config: PruneConfig) -> Stages:
    """The methods of a config by their stage; other stages are refused."""
    found: dict[str, Any] = {}
    for method in config.methods:
        base = BASES.get(method.stage)
        if base is None:
            raise OptionError(
                f"method {method.info.name!r} belongs to the stage {method.stage!r}, which this version cannot run in a model yet; the "
                f"stages {', '.join(BASES)} can."
            )
        if not isinstance(method, base):
            raise OptionError(
                f"{type(method).__name__} is of the stage {method.stage!r}, so it must derive from {base.__module__}.{base.__name__}."
            )
        found[method.stage] = method
    return Stages(**found)


def apply(
    model: Any,
    method: str | Method | Sequence[str | Method] | PruneConfig = "divprune",
    *,
    ratio: float | None = None,
    budget: int | None = None,
    positions: str = "auto",
    query: str | Sequence[str] | None = None,
    processor: Any = None,
    scorer: Any = None,
    **options: Any,
) -> Pruning:
    """Let `model` run on fewer visual tokens, in place; generate() and the processor stay as they are.

    method: a name (see list_methods), a method object, or a PruneConfig. ratio: share of visual tokens kept, or budget:
    tokens kept per image or video. positions: "keep" leaves the kept tokens' position ids, "compact" re-numbers, "auto"
    re-numbers for one-dimensional RoPE and keeps for M-RoPE, as the published implementations do. query: the question,
    for query-aware methods (one, or one per prompt); with `processor` it is cut out of the prompt. scorer: an object with
    embed_text and embed_image (embed_picture, for frames), or "open_clip:<model>/<weights>", for methods that compare text with
    pictures. options: the
    method's own fields.

    A method of the frames stage shares a video's budget out over its frames: method="quota", or ["quota", "divprune"] to choose
    by the second inside each frame; images of the same prompt go to the second alone, or stay whole.

    A method of the encoder stage reduces the vision tower itself, and a VLM's LLM then gets one token per group. Stages compose:
    method=[get_method("tome", r=1), "divprune"]; the ratio is the connector's then. `model` may also be a timm or open_clip
    ViT: ratio is optional for methods with a schedule of their own (`apply(vit, "tome", r=8)`), the handle an EncoderPruning.

    A method of the cache stage lets each new token read a part of the visual keys: method=["dycoke", "dycoke_cache"]. Its share
    is its own there; alone, the ratio is.

    Applying again replaces. Raises UnsupportedModelError for models that cannot be pruned, OptionError and BudgetError for
    arguments that cannot be used; the model is then as it was.
    """
    if isinstance(method, PruneConfig):
        if ratio is not None or budget is not None or options or query is not None or positions != "auto":
            raise OptionError(
                "a PruneConfig already says how much and how to prune; give nothing beside it, or change the config."
            )
        config = method
    else:
        config = PruneConfig.build(method, ratio=ratio, budget=budget, positions=positions, query=query, **options)
    if isinstance(scorer, str):
        from tokprune.adapters.scorers import load_scorer

        scorer = load_scorer(scorer, processor)
    if all(m.stage == "encoder" for m in config.methods) and not _is_vlm(model):
        from tokprune.adapters.splice import apply_encoder

        remove(model)
        return apply_encoder(  # type: ignore[return-value]
            model, config.methods[0], ratio=config.ratio, budget=config.budget, processor=processor
        )
    pruning = Pruning(model, config, processor, scorer)
    remove(pruning.model)
    pruning._install()
    return pruning


def _is_vlm(model: Any) -> bool:
    """Whether a model has an LLM behind its vision tower, so that its tokens can be pruned there, too."""
    inner = unwrap(model) if hasattr(model, "modules") else model
    return hasattr(getattr(inner, "base_model", None), "get_image_features") and hasattr(inner.config, "text_config")


def remove(model: Any) -> None:
    """Take the pruning off `model`, whoever applied it; a model that is not pruned stays as it is."""
    from tokprune.adapters.splice import remove_encoder

    inner = unwrap(model) if hasattr(model, "modules") else model
    remove_encoder(model)
    pruning = getattr(inner, "__dict__", {}).get(HANDLE)
    if pruning is None:
        return
    if not isinstance(pruning, Pruning):
        raise TokpruneError(f"{type(inner).__name__}.{HANDLE} is not a Pruning; something else wrote it.")
    pruning.remove()
