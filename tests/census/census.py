"""The whole proof for one model type, and what it found: the census' row."""

from __future__ import annotations

from typing import Any

from tests.census import proof
from tests.census.models import tiny_model
from tests.census.reach import reach
from tokprune.errors import TokpruneError


def kinds_of(model: Any) -> list[str]:
    """What a model sees."""
    return [kind for kind in ("image", "video") if hasattr(model.base_model, f"get_{kind}_features")]


def prove(model_type: str) -> dict[str, Any]:
    """Prove a model type or fail. Returns by kind of picture: largest difference, what is allowed, positions that are
    refused; and the stages and signals within reach."""
    model = tiny_model(model_type)
    write = proof.writer(model)
    row: dict[str, Any] = {"kinds": {}}
    for kind in kinds_of(model):
        rows = proof.rows_of(kind)
        plain = proof.check_unharmed(model, write(rows))
        allowed = proof.check_reference(model, write, rows, plain)
        found: dict[str, Any] = {"allowed": allowed, "apart": 0.0, "refused": {}}
        for positions in ("keep", "compact"):
            try:
                apart = proof.check_exact(model, write, rows, positions, allowed, plain)
            except TokpruneError as error:
                found["refused"][positions] = str(error)
            else:
                found["apart"] = max(found["apart"], apart)
        assert len(found["refused"]) < 2, found["refused"]
        row["kinds"][kind] = found
    proof.check_words_beside_pictures(model, write, allowed)
    row["reach"] = reach(model, write(proof.rows_of("image")))
    return row
