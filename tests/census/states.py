"""What has been decided about each model type: the census fails for a type that stands nowhere."""

from __future__ import annotations

from tests.census.models import model_types
from tokprune.adapters.known import NOT_VISUAL, REFUSED, VERIFIED
from tokprune.testing import FAMILIES


def state(model_type: str) -> str:
    """ "works", "refused", "not a VLM", or "untested"."""
    if model_type in NOT_VISUAL:
        return "not a VLM"
    if model_type in REFUSED:
        return "refused"
    return "works" if model_type in VERIFIED or model_type in FAMILIES else "untested"


STATES = {name: state(name) for name in model_types()}
