"""The encoder stage on one model: its vision tower runs on fewer tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Hook
from tokprune.adapters.local_processor import local_processor
from tokprune.adapters.tower_parts import normalisation
from tokprune.adapters.towers import find_tower
from tokprune.adapters.types import Processor
from tokprune.budget import check_budget, check_ratio
from tokprune.config import PruneConfig
from tokprune.errors import BudgetError, OptionError, UnsupportedModelError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.runtime.encoder.batched import BatchedSplice
from tokprune.runtime.encoder.engine import Splice
from tokprune.runtime.encoder.handoff import AmongSurvivors
from tokprune.runtime.encoder.packed import PackedSplice
from tokprune.runtime.encoder.pixels import NoReduction, PixelDrop, WorstPredicted, std_of
from tokprune.runtime.encoder.report import EncoderReport
from tokprune.runtime.encoder.run import EncoderTrace, Run
from tokprune.runtime.probe import AttentionProbe
from tokprune.runtime.stages import Stages


def refuse_two_reductions(root: nn.Module, owner: object, reduces: bool) -> None:
    """Raise where a pruning of a model and a pruning of its bare tower would meet in one call.

    root: the tower. owner: the model to be pruned. reduces: inside the tower; else its blocks are only looked at.
    """
    for hook in root._forward_hooks.values():
        other = hook.owner() if isinstance(hook, Hook) else None
        if isinstance(other, Splice) and other.anchor() is root is not owner:
            raise UnsupportedModelError(
                f"the vision tower of {type(owner).__name__} is already reduced by a pruning of the tower itself; "
                "take that off first, tokprune.remove(tower), and give its method with this one: "
                f"method=[{other.label!r}, ...]."
            )
        looks = isinstance(other, Splice) and other.anchor() is not root
        looks |= isinstance(other, AttentionProbe) and other.own_calls
        if looks and reduces and owner is root:
            raise UnsupportedModelError(
                f"this {type(root).__name__} is the vision tower of a model that is pruned and looks into it; apply "
                "the encoder method to that model, or take its pruning off first."
            )


class EncoderStage:
    """A vision tower that runs on fewer tokens, by an encoder method, a pixels method or both; `remove` leaves it as it
    was.

    pixels: the pixels method, and how much it is to keep; ratio and budget are the encoder method's.
    expand: whether the tower gives its output at full length, each merged token repeated at the places of its members.
    """

    def __init__(
        self,
        model: nn.Module,
        method: EncoderMethod | None,
        ratio: float | None = None,
        budget: int | None = None,
        expand: bool | None = None,
        processor: object = None,
        pixels: PixelDrop | None = None,
    ) -> None:
        self.tower = find_tower(model)
        method = NoReduction() if method is None else method
        self.method, self.name = method, type(self.tower.owner).__name__
        if expand is None:
            expand = self.tower.vlm or method.info.merges or method.restores or pixels is not None
        if method.restores and not expand:
            raise OptionError(
                f"{method.info.name!r} restores the full sequence at the tower's end; expand=False has no meaning."
            )
        if self.tower.dense and not self.tower.vlm and not expand:
            raise UnsupportedModelError(
                f"{self.name} puts the tower's output back on the grid, and {method.info.name!r} leaves "
                "fewer tokens; take a method that merges or restores (tome, pitome, ipcv), or "
                "apply_encoder(..., expand=True), which leaves zeros in the gaps."
            )
        full_length = method.restores or (expand and (method.info.merges or pixels is not None))
        if (method.info.adaptive or pixels is not None) and self.tower.pools and not self.tower.vlm and not full_length:
            raise UnsupportedModelError(
                f"{(pixels or self).method.info.name!r} keeps another count in each image, and {self.tower.family} "
                "pools over all patches, padding included; it needs a tower that reads its output from [CLS]."
            )
        self.expand = expand
        self.ratio = None if ratio is None else check_ratio(ratio)
        self.budget = None if budget is None else check_budget(budget)
        if ratio is not None and budget is not None:
            raise BudgetError(f"both ratio={ratio!r} and budget={budget!r} given; choose one.")
        splice = PackedSplice if self.tower.packed else BatchedSplice
        self._splice: PackedSplice | BatchedSplice = splice(self.tower, method, self.ratio, self.budget, expand)
        normal = self._splice.normalisation = normalisation(processor) or self.tower.normal
        if pixels is not None:
            self._splice.pixels = replace(pixels, std=std_of(pixels.method, normal))
        self._splice.check()
        refuse_two_reductions(self.tower.root, self.tower.owner, reduces=True)

    @property
    def model(self) -> Any:
        """The model that was given; None when it is gone."""
        return self.tower.owner

    @property
    def pixels(self) -> PixelDrop | None:
        """What is dropped in front of the first block, from the pixels alone."""
        return self._splice.pixels

    @property
    def label(self) -> str:
        """Names of the methods."""
        return self._splice.label

    @property
    def trace(self) -> EncoderTrace | None:
        """Groups and places of this thread's last run, or of the last run of any thread; None before."""
        run: Run | None = self._splice.threads.now.last
        return self._splice.trace if run is None or run.trace is None else run.trace

    def install(self) -> None:
        """Put the hooks on the tower."""
        self._splice.install()

    def remove(self) -> None:
        """Take them off. Calling it twice is harmless."""
        self._splice.remove()

    def release(self) -> None:
        """Let go of the tower's modules: the model is gone."""
        self.tower = replace(self.tower, blocks=(), taps=(), patch=None, embed=None)
        self._splice.tower = self.tower

    def widen(self, block: int, x: Tensor) -> Tensor:
        """Rows that entered block `block` in this thread's last run, at full length.

        For whoever looks at a reduced block from outside (its queries and keys, say) and wants one row per original
        token: members of a group get the group's row, dropped tokens zeros. x: (B, K, C), packed towers (K, C).
        """
        return self._splice.entering(block, x)

    def output(self, block: int, x: Tensor) -> Tensor:
        """What block `block` gave in this thread's last run, at full length, rebuilt where the method does that."""
        return self._splice.full_length(block, x)

    def places(self, block: int) -> Tensor | None:
        """Packed towers: (K,) original token of each row that entered `block`; None when it was not reduced."""
        return self._splice.places(block)

    @property
    def channels(self) -> int:
        """Channels that ride on the queries and keys of reduced blocks and carry sizes (packed towers)."""
        return self._splice.channels

    def report(self) -> EncoderReport:
        """What the last run left, block by block; prints as text."""
        ratio, budget, own = self.ratio, self.budget, "its own schedule"
        if self.pixels is not None and isinstance(self.method, NoReduction):
            ratio, budget, own = self.pixels.ratio, self.pixels.budget, f"threshold {self.pixels.method.threshold:g}"
        amount = f"ratio {ratio:g}" if ratio is not None else own if budget is None else f"budget {budget}"
        return EncoderReport.build(self.name, self.tower, self.method, amount, self.expand, self.trace, self.label)


def in_tower(
    model: nn.Module,
    config: PruneConfig,
    connector: ConnectorMethod | None = None,
    expand: bool | None = None,
    processor: Processor = None,
) -> tuple[EncoderStage, ConnectorMethod | None, ConnectorMethod]:
    """The stage inside the tower of `model`, what chooses behind it by a ratio, and the same among what it left.

    connector: what the config chooses with, if anything.

    The budget is one: the connector's when there is one, else the decoder's, else the encoder's, else that of the
    pixels. What stands before follows its own schedule or threshold; an encoder method that has none reduces by the
    same factor as the stage behind it.
    """
    stages = Stages.of(config)
    encoder, later = stages.encoder, stages.chooser is not None or stages.decoder is not None
    free = (None, None) if later else (config.ratio, config.budget)
    amount = (None, None) if encoder is None else free
    if later and config.ratio is not None and encoder is not None and not encoder.scheduled:
        amount = (math.sqrt(config.ratio), None)
    drop = None
    if stages.pixels is not None:
        drop = PixelDrop(stages.pixels, *(free if encoder is None else (None, None)))
        measures = drop.exact or stages.pixels.threshold > 0
        if processor is None and measures and stages.pixels.std is None and hasattr(model, "config"):
            processor = local_processor(model)
        if drop.exact:
            connector = WorstPredicted(stages.pixels.over_time)
    stage = EncoderStage(model, encoder, *amount, expand=expand, processor=processor, pixels=drop)
    return stage, connector, AmongSurvivors() if connector is None else AmongSurvivors(connector)
