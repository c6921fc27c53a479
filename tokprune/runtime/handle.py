"""What a user holds of a pruned model, and what the model itself holds."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tokprune.adapters.base import Adapter, get_adapter, unwrap
from tokprune.adapters.families import tiny_families
from tokprune.adapters.foreign import HANDLE
from tokprune.adapters.hooks import Hook, Ref
from tokprune.adapters.known import VERIFIED
from tokprune.adapters.local_processor import local_processor
from tokprune.adapters.query import asking
from tokprune.adapters.types import Model, Processor, Scorer
from tokprune.budget import kept
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, TokpruneError, UnsupportedModelError
from tokprune.methods.base import ConnectorMethod, Method
from tokprune.methods.cache_base import CacheMethod, CompactMethod
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.methods.frames_base import PerFrame
from tokprune.methods.pixels_base import PixelMethod
from tokprune.methods.prompt_rule import PROPORTIONAL, Shared
from tokprune.registry import get_method
from tokprune.report import Report
from tokprune.runtime.encoder.report import EncoderReport
from tokprune.runtime.encoder.run import EncoderTrace
from tokprune.runtime.generate import ConnectorStage
from tokprune.runtime.options import Options
from tokprune.runtime.stages import Stages

if TYPE_CHECKING:
    from tokprune.runtime.cache import CacheStage
    from tokprune.runtime.decoder.stage import DecoderStage
    from tokprune.runtime.encoder.stage import EncoderStage

OF_THE_STAGE = ("tower", "method", "expand", "ratio", "budget", "widen", "output", "places", "channels")


class Installed:
    """The parts of one pruning, put on their model together or not at all.

    The model owns this object, which looks at the model through a weak reference: no cycle keeps a deleted model's
    weights.
    """

    def __init__(self, model: Model, config: PruneConfig, processor: Processor = None) -> None:
        self.config, self.processor = config, processor
        self.name = type(model).__name__
        self.kind = getattr(getattr(model, "config", None), "model_type", "?")
        self.encoder: EncoderStage | None = None
        self.connector: ConnectorStage | None = None
        self.decoder: DecoderStage | None = None
        self.cache: CacheStage | None = None
        self._model = Ref(model)
        self.handle = Ref()
        self._gone: weakref.ref[nn.Module] | None = None  # tells when the model is

    @property
    def model(self) -> Model:
        """The pruned model; None when it is gone."""
        return self._model()

    @property
    def parts(self) -> list[EncoderStage | ConnectorStage | DecoderStage | CacheStage]:
        """What has hooks, in the order of putting them on."""
        parts = (self.encoder, self.connector, self.decoder, self.cache)
        return [part for part in parts if part is not None]

    @property
    def active(self) -> bool:
        """Whether the model is pruned by this now."""
        model = self.model
        return model is not None and vars(model).get(HANDLE) is self

    def install(self) -> None:
        """Take the place of what is on the model; where that fails, it is there again as it was."""
        model = self.model
        before = vars(model).get(HANDLE)
        if before is not None and not isinstance(before, Installed):
            raise TokpruneError(f"{self.name}.{HANDLE} is not a pruning; something else wrote it.")
        if before is not None:
            before.remove()
        try:
            for part in self.parts:
                part.install()
            model.__dict__[HANDLE] = self
        except BaseException:
            self.remove()
            if before is not None:
                before.install()
            raise
        if self.handle() is not None:
            self.handle()._kept = model

    def remove(self) -> None:
        """Take everything off, the last first. Calling it twice is harmless."""
        for part in reversed(self.parts):
            part.remove()
        if self.active:
            del self.model.__dict__[HANDLE]
        if self.handle() is not None:  # it may outlive the model, whose parts must not stay alive for that
            release = functools.partial(_release, weakref.ref(self))
            self._gone = None if self.model is None else weakref.ref(self.model, release)
            self.handle()._kept = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_gone": None}


def installed_on(model: Model) -> Installed | None:
    """What is on a model now; None where it is not pruned."""
    found = vars(unwrap(model)).get(HANDLE)
    return found if isinstance(found, Installed) else None


def _release(removed: weakref.ref[Installed], _: object, ending: Callable[[], bool] = sys.is_finalizing) -> None:
    """A removed pruning whose model is gone lets go of the model's parts, unless Python ends and modules are gone,
    too."""
    installed = None if ending() else removed()
    for part in [] if installed is None else installed.parts:
        part.release()


class Pruning:
    """A model that is being pruned: the handle that `apply` returns for every kind of model, also a context manager.

    It keeps the model alive until the pruning is removed or replaced.
    """

    def __init__(self, installed: Installed) -> None:
        self._installed = installed
        self._kept: Model = None  # the model while it is pruned, so that it stays alive
        installed.handle = Ref(self)

    @property
    def config(self) -> PruneConfig:
        """What was asked for."""
        return self._installed.config

    @property
    def processor(self) -> Processor:
        """The processor that was given."""
        return self._installed.processor

    @property
    def model(self) -> Model:
        """The model; None when the pruning was removed and the model is gone."""
        return self._installed.model

    @property
    def encoder(self) -> EncoderStage | None:
        """The stage inside the vision tower (an EncoderStage), or None."""
        return self._installed.encoder

    @property
    def cache(self) -> CacheStage | None:
        """The stage that reads a part of the visual keys while decoding (a CacheStage), or None."""
        return self._installed.cache

    @property
    def decoder(self) -> DecoderStage | None:
        """The stage inside the layers of the LLM (a DecoderStage), or None."""
        return self._installed.decoder

    @property
    def trace(self) -> EncoderTrace | None:
        """What the vision tower did in its last run, None without an encoder method or before the first run."""
        return None if self.encoder is None else self.encoder.trace

    @property
    def last(self) -> Any:
        """What happened in the last run: a LastRun of a VLM, an EncoderTrace of a bare tower."""
        return self.trace if self._installed.connector is None else self._installed.connector.last

    @property
    def active(self) -> bool:
        """Whether the model is pruned through this handle now."""
        return self._installed.active

    def remove(self) -> None:
        """Give the model back untouched. Calling it twice is harmless."""
        self._installed.remove()

    def __enter__(self) -> Pruning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @contextlib.contextmanager
    def query(self, text: str | Sequence[str]) -> Iterator[Pruning]:
        """Use `text` as the question (one, or one per prompt) inside the with block.

        It holds for this thread (and asyncio task) alone: a generate() that runs in a thread of its own, as streamers
        do it, needs the block inside that thread.
        """
        connector = self._installed.connector
        if connector is None:
            raise OptionError(
                f"{self._installed.name} is pruned inside its vision tower alone, which takes no question."
            )
        with asking(connector.options, text if isinstance(text, str) else tuple(text)):
            yield self

    def report(self) -> Report | EncoderReport:
        """What the last run kept, how, and what it cost; prints as a table."""
        installed = self._installed
        if installed.connector is None and installed.encoder is not None:
            return installed.encoder.report()
        known = installed.kind in tiny_families() or installed.kind in VERIFIED
        notes = [] if known else [f"{installed.kind} runs through the generic adapter; it is not in the verified list"]
        if self.encoder is not None and self.last is not None:
            notes += str(self.encoder.report()).splitlines()
        if self.decoder is not None and self.last is not None:
            notes += self.decoder.notes()
        if self.cache is not None and self.last is not None:
            notes += self.cache.notes()
        decoder = self.decoder
        depth, below = (0, 0) if decoder is None else (decoder.depth, decoder.method.counted_below)
        return Report.build(self.config, installed.name, self.last, notes, depth, below)

    def __repr__(self) -> str:
        methods = " + ".join(m.label for m in self.config.methods)
        amount = "" if self.config.budget is None else f", budget={self.config.budget}"
        amount = amount if self.config.ratio is None else f", ratio={self.config.ratio:g}"
        amount += "" if self.config.prompt_budget is None else f", prompt_budget={self.config.prompt_budget}"
        return f"<Pruning {self._installed.name} by {methods}{amount}{'' if self.active else ', removed'}>"

    def __getattr__(self, name: str) -> Any:
        """Members that handles of bare towers used to have: those of the encoder stage."""
        if name in OF_THE_STAGE and self.encoder is not None:
            warnings.warn(f"write pruning.encoder.{name} instead of pruning.{name}.", DeprecationWarning, stacklevel=2)
            return getattr(self.encoder, name)
        raise AttributeError(f"Pruning has no attribute {name!r}")


def vlm_pruning(model: Model, config: PruneConfig, processor: Processor = None, scorer: Scorer = None) -> Pruning:
    """The pruning of a VLM, made but not put on yet: whatever cannot work is refused here."""
    adapter: Adapter = get_adapter(model)
    if config.positions == "compact" and adapter.rotary_axes > 3:
        raise OptionError(
            f"{type(adapter.model).__name__} has {adapter.rotary_axes} rotary axes, one of which counts tokens inside "
            'pictures, too; re-numbering is not defined for it. Give positions="keep" or leave positions out.'
        )
    if processor is None and any(getattr(m, "query_aware", m.info.query_aware) for m in config.methods):
        processor = local_processor(adapter.model)  # the question must be tokenised
    installed = Installed(adapter.model, config, processor)
    stages = Stages.of(config)
    connector = frames = stages.chooser
    if connector is not None and config.prompt_rule is not None:
        rule = None if config.prompt_rule == PROPORTIONAL else config.prompt_rule
        connector = Shared(connector, rule)  # type: ignore[arg-type]
    method: ConnectorMethod | None = connector
    if stages.encoder is not None or stages.pixels is not None:
        from tokprune.runtime.encoder.stage import in_tower

        installed.encoder, connector, method = in_tower(adapter.model, config, connector, processor=processor)
    if stages.decoder is not None or isinstance(stages.cache, CompactMethod):
        from tokprune.runtime.decoder.stage import stage_of

        installed.decoder = stage_of(adapter, config, stages)
    if isinstance(stages.cache, CacheMethod):
        from tokprune.runtime.cache import CacheStage

        # The ratio or budget is for the cache stage only where it stands alone.
        alone = method is None and (config.ratio is not None or config.budget is not None)
        keys = config.count if alone else functools.partial(kept, ratio=stages.cache.share)
        installed.cache = CacheStage(adapter, stages.cache, keys)
    if method is None:
        method = cast(ConnectorMethod, get_method("uniform"))  # it is told to keep all
    options = Options(
        method,
        int if connector is None else config.count,  # n of n, where nothing is asked of it
        config.positions,
        config.query,
        processor,
        scorer,
        encoder=installed.encoder,
        frames=frames if isinstance(frames, PerFrame) else None,
        ratio=None if connector is None else config.ratio,
        prompt_budget=config.prompt_budget,
        packing=_packing(adapter, config),
        cached=installed.cache is not None or installed.decoder is not None,
        decoder=installed.decoder,
    )
    installed.connector = ConnectorStage(adapter, options)
    for stage in (installed.decoder, installed.cache):
        if stage is not None:
            stage.reader = installed.connector.reader
    return Pruning(installed)


def _packing(adapter: Adapter, config: PruneConfig) -> str:
    """How rows of different length are read; "grouped" is refused where no forward of this set-up could be."""
    later = [m.info.name for m in config.methods if m.stage in ("decoder", "cache")]
    why = ""
    if adapter.hybrid:
        why = f"{type(adapter.model).__name__} has layers that are no attention"
    elif later:
        why = f"{later[0]} works on all rows of a batch at once"
    elif adapter.kernel not in ("eager", "sdpa"):
        why = f"it is made for sdpa and eager attention, not for {adapter.kernel}"
    if why and config.packing == "grouped":
        raise OptionError(f'packing="grouped": {why}. Leave packing out, or write packing="auto".')
    return "padded" if why else config.packing


def apply_encoder(
    model: Model,
    method: str | Method = "tome",
    *,
    ratio: float | None = None,
    budget: int | None = None,
    expand: bool | None = None,
    processor: Processor = None,
    **options: object,
) -> Pruning:
    """Let the vision tower of `model` run on fewer tokens, in place; of a VLM, nothing but the tower.

    model: a ViT of timm, open_clip, torchvision or transformers, with a head or without, or a VLM with one. method: a
    name (see list_methods("encoder")) with its fields as `options`, or a method object. ratio, budget: patches left at
    the tower's end, per image or frame, for methods that have no schedule of their own. expand: whether the tower's
    output keeps its full length, each merged token repeated at the places of its members (then pooling over patches is
    the weighted mean, and everything behind the tower still fits); by default for VLMs always, and for bare towers with
    methods that merge. Dropped tokens are zeros. processor: says how pixels were normalised, to methods that see them.

    The pruning belongs to `model`: a tower inside it is reduced in calls of `model` alone, and runs plain for other
    models that hold the same tower, and when it is called directly; give the tower itself to reduce it for everybody.

    Applying again replaces. Raises UnsupportedModelError for towers that cannot be spliced, OptionError and BudgetError
    for arguments that cannot be used; the model is then as it was.
    """
    if isinstance(method, str):
        method = get_method(method, **options)
    elif options:
        raise OptionError(f"options {sorted(options)} need the method by name.")
    if not isinstance(method, EncoderMethod | PixelMethod):
        raise OptionError(
            f"method {method.info.name!r} belongs to the stage {method.stage!r}, not to the encoder stage or pixels."
        )
    return install(tower_alone(model, PruneConfig.build(method, ratio=ratio, budget=budget), expand, processor))


def tower_alone(model: Model, config: PruneConfig, expand: bool | None = None, processor: Processor = None) -> Pruning:
    """The pruning of a vision tower alone, by a config's pixels and encoder methods, made but not put on yet."""
    from tokprune.runtime.encoder.stage import in_tower

    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"apply_encoder takes a model (a torch.nn.Module), not {type(model).__name__}.")
    installed = Installed(unwrap(model), config, processor)
    installed.encoder = in_tower(installed.model, config, None, expand, processor)[0]
    return Pruning(installed)


def install(pruning: Pruning) -> Pruning:
    """Put a pruning that was made on its model, in the place of the one that is there."""
    pruning._installed.install()
    return pruning


def remove(model: Model) -> None:
    """Take the pruning off `model`, whoever applied it, and off all models inside it; a model without one stays as it
    is.

    Raises UnsupportedModelError for what is no model, and for a mere part of a pruned model.
    """
    inner = unwrap(model) if hasattr(model, "modules") else model
    if not isinstance(inner, nn.Module):
        hint = ".model: tokprune.remove(it.model)" if isinstance(getattr(model, "model", None), nn.Module) else " model"
        raise UnsupportedModelError(
            f"remove takes the model (a torch.nn.Module) or handle.remove(), not {type(model).__name__}; give "
            f"its{hint}."
        )
    pruned = [m for m in inner.modules() if isinstance(vars(m).get(HANDLE), Installed)]
    for module in pruned:
        vars(module)[HANDLE].remove()
    if pruned:
        return
    for hook in [*inner._forward_pre_hooks.values(), *inner._forward_hooks.values()]:
        owner = hook.owner() if isinstance(hook, Hook) else None
        if owner is not None and owner.anchor() is not inner and HANDLE in vars(owner.anchor()):
            raise UnsupportedModelError(
                f"this {type(inner).__name__} is a part of a pruned {type(owner.anchor()).__name__}; give remove that "
                "whole model, or call remove() of its handle."
            )


remove_encoder = remove
