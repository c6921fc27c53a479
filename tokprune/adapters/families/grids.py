"""Families that need nothing beyond a plain grid per picture."""

from __future__ import annotations

from tokprune.adapters.families.base import register_family
from tokprune.adapters.families.units import Units


@register_family("got_ocr2", "deepseek_vl")
class PlainGrid(Units):
    """One grid of tokens per picture."""
