"""Fuyu: no vision tower; every patch of a picture is one linear map away from the LLM."""

from __future__ import annotations

from tokprune.adapters.families.base import register_family
from tokprune.adapters.families.units import Fallback


@register_family("fuyu")
class Fuyu(Fallback):
    """Patches of pictures as rows; the processor writes a newline token of its own behind each line."""

    features_field = "last_hidden_state"
