"""Which decoder stage a config asks for: what drops tokens inside the LLM, what frees memory of its cache, or both."""

from __future__ import annotations

from tokprune.adapters.base import Adapter
from tokprune.config import PruneConfig
from tokprune.errors import OptionError
from tokprune.methods.cache_base import CacheMethod
from tokprune.runtime.decoder.compact import Compaction
from tokprune.runtime.decoder.stage import DecoderStage
from tokprune.runtime.stages import Stages


def stage_of(adapter: Adapter, config: PruneConfig, stages: Stages) -> DecoderStage:
    """The stage inside the LLM: a decoder method, a cache method that frees memory, or both."""
    method, compact = stages.decoder, stages.cache
    if isinstance(compact, CacheMethod):
        raise OptionError(
            f"{compact.info.name!r} lets all layers read the same visual keys, and a method of the decoder stage "
            "leaves them different ones; it cannot run beside one. Methods of the cache stage that free memory can: "
            "mustdrop_cache, fastkv, kvmerger."
        )
    if compact is not None and compact.follows and method is None:
        raise OptionError(
            f"{compact.info.name!r} keeps what a method of the decoder stage kept last, and none is there. Write "
            f"method=['mustdrop', {compact.info.name!r}]."
        )
    alone = stages.chooser is None and (config.ratio is not None or config.budget is not None)
    count, share = (config.count, config.ratio) if alone else (None, None)
    if method is not None or compact is None:
        compaction = None if compact is None else Compaction(compact)
        return DecoderStage(adapter, method, count, share, config.positions, compaction)
    propagation = compact.propagation(len(adapter.layers))
    return DecoderStage(adapter, propagation, None, None, config.positions, Compaction(compact, count))
