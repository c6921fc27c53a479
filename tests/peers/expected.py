"""Tests of other projects whose assertions cannot hold once tokens are dropped, each with its reason."""

from __future__ import annotations

CANNOT_HOLD: dict[str, str] = {}
"""Pattern of test names -> why a pruned model (ratio below 1, or r above 0) rightly fails it."""
