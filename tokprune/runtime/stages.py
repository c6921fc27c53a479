"""Which method of a config works at which stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokprune.config import PruneConfig
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, Method
from tokprune.methods.cache_base import CacheMethod, CompactMethod
from tokprune.methods.decoder_base import DecoderMethod
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.methods.frames_base import FramesMethod, PerFrame
from tokprune.methods.pixels_base import PixelMethod


@dataclass(frozen=True)
class Stages:
    """The methods of a config, one per stage at most."""

    pixels: PixelMethod | None = None
    frames: FramesMethod | None = None
    encoder: EncoderMethod | None = None
    connector: ConnectorMethod | None = None
    decoder: DecoderMethod | None = None
    cache: CacheMethod | CompactMethod | None = None

    @property
    def chooser(self) -> ConnectorMethod | None:
        """What chooses between encoder and LLM: the connector method, inside each frame when there is a frames
        method."""
        return self.connector if self.frames is None else PerFrame(self.frames, self.connector)

    @staticmethod
    def of(config: PruneConfig) -> Stages:
        """The methods of a config by their stage; other stages are refused."""
        by_stage: dict[str, Any] = {}
        for method in config.methods:
            bases = BASES.get(method.stage)
            if bases is None:
                raise OptionError(
                    f"method {method.info.name!r} belongs to the stage {method.stage!r}, which this version cannot run "
                    f"in a model yet; the stages {', '.join(BASES)} can."
                )
            if not isinstance(method, bases):
                raise OptionError(
                    f"{type(method).__name__} is of the stage {method.stage!r}, so it must derive from "
                    f"{' or '.join(f'{base.__module__}.{base.__name__}' for base in bases)}."
                )
            by_stage[method.stage] = method
        return Stages(**by_stage)


BASES: dict[str, tuple[type[Method], ...]] = {
    "pixels": (PixelMethod,),
    "frames": (FramesMethod,),
    "encoder": (EncoderMethod,),
    "connector": (ConnectorMethod,),
    "decoder": (DecoderMethod,),
    "cache": (CacheMethod, CompactMethod),
}
"""The stages that run in a model, and what their methods derive from."""
