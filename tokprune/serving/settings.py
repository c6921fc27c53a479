"""What a server prunes and by how much: read from the model's config on both sides of the engine, and checked there."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tokprune.config import PruneConfig, method_from_dict, method_to_dict
from tokprune.errors import OptionError, unknown
from tokprune.methods.base import ConnectorMethod, Method, shares_budgets

KEY = "tokprune"  # of hf_overrides
FIELDS = ("method", "options", "ratio", "budget")
ELSEWHERE = {
    "pixels": "chooses patches of the picture before the vision tower, which vLLM runs on whole grids by its own code",
    "frames": "chooses frames before the engine sees them; sample the clip with tokprune.video and send those frames",
    "encoder": "works between blocks of the vision tower, which vLLM runs by its own code",
    "decoder": "drops tokens between layers of the LLM, whose paged KV cache has one length for all layers",
    "cache": "hides keys of the KV cache, which vLLM's attention kernels do not know",
}
"""Why methods of the other stages do not run in vLLM."""


@dataclass(frozen=True)
class ServingSettings:
    """One method and how much it keeps."""

    config: PruneConfig
    """Holds the method and the rule for keep counts."""
    salt: str
    """Joins the cache keys of pictures: an engine with other settings must not take its outputs or KV blocks."""

    @property
    def method(self) -> ConnectorMethod:
        """The method; `of` lets no other stage in."""
        method = self.config.methods[0]
        assert isinstance(method, ConnectorMethod)
        return method

    @staticmethod
    def of(hf_config: Any, signals: Collection[str] = ()) -> ServingSettings:
        """The settings in a model's config, or the reason why they cannot be served.

        signals: kinds of signals that the family's vision tower gives.
        """
        raw = getattr(hf_config, KEY, None)
        if not isinstance(raw, dict) or "method" not in raw:
            raise OptionError(
                f"a Tokprune architecture needs to know what to keep, and {KEY}={raw!r} does not say it. Write "
                '--hf-overrides \'{"architectures": ["Tokprune..."], '
                '"tokprune": {"method": "divprune", "ratio": 0.25}}\'.'
            )
        for key in raw:
            if key not in FIELDS:
                raise unknown(f"field of {KEY} in hf-overrides", key, FIELDS)
        method = method_from_dict({"name": raw["method"], "options": raw.get("options", {})})
        why = why_not(method, signals)
        if why:
            raise OptionError(f"the method {method.info.name!r} does not run inside vLLM: it {why}.")
        config = PruneConfig((method,), raw.get("ratio"), raw.get("budget"))
        salt = json.dumps([method_to_dict(method), config.ratio, config.budget], sort_keys=True, default=str)
        return ServingSettings(config, f"{KEY}:{salt}")


def why_not(method: Method, signals: Collection[str]) -> str:
    """Why a method cannot run inside vLLM, or an empty string."""
    if not isinstance(method, ConnectorMethod):
        return ELSEWHERE.get(method.stage, f"works at a stage ({method.stage}) that vLLM runs by its own code")
    if method.query_aware:
        return (
            "reads the question, and vLLM's caches know a picture by its pixels alone: a second question about it "
            "would get the tokens of the first"
        )
    missing = [name for name in method.needs if name.partition(":")[0] not in signals]
    if any(name.startswith("llm_") for name in missing):
        return f"needs {', '.join(missing)} of a pass through the LLM, for which vLLM has no place before the prefill"
    if missing:
        return f"needs {', '.join(missing)} of the vision tower, which this family does not give in vLLM"
    if shares_budgets(method):
        return "shares its tokens out over the pictures of a prompt, and vLLM encodes each picture alone"
    if not method.exact or method.drops_at_full_budget:
        return "keeps a number of tokens that depends on the picture, and vLLM counts placeholders before it is encoded"
    return ""
