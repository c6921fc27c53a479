"""What reduces a vision tower, from a config: its methods, and whose the ratio is."""

from __future__ import annotations

import math

from torch import nn

from tokprune.adapters.local_processor import local_processor
from tokprune.adapters.types import Processor
from tokprune.config import PruneConfig
from tokprune.methods.base import ConnectorMethod
from tokprune.runtime.encoder.handoff import AmongSurvivors
from tokprune.runtime.encoder.pixels import PixelDrop, WorstPredicted
from tokprune.runtime.encoder.stage import EncoderStage
from tokprune.runtime.stages import Stages


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
