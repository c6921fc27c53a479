"""What reduces a vision tower, from a config: its methods, and whose the ratio is."""

from __future__ import annotations

import math

from torch import nn

from tokprune.adapters.local_processor import local_processor
from tokprune.adapters.types import Processor
from tokprune.config import PruneConfig
from tokprune.methods.base import ConnectorMethod
from tokprune.runtime.encoder.pixels import PixelDrop, WorstPredicted
from tokprune.runtime.encoder.stage import EncoderStage
from tokprune.runtime.stages import Stages


def in_tower(
    model: nn.Module, config: PruneConfig, expand: bool | None = None, processor: Processor = None
) -> tuple[EncoderStage, ConnectorMethod | None]:
    """The stage inside the tower of `model`, and what chooses behind it where the ratio is that of the pixels.

    The budget is one: the connector's when there is one, else the decoder's, else the encoder's, else that of the
    pixels. What stands before follows its own schedule or threshold; an encoder method that has none reduces by the
    same factor as the stage behind it.
    """
    stages, own = Stages.of(config), None
    encoder = stages.encoder
    later = stages.chooser is not None or stages.decoder is not None
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
            own = WorstPredicted(stages.pixels.over_time)
    return EncoderStage(model, encoder, *amount, expand=expand, processor=processor, pixels=drop), own
