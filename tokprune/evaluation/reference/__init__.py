"""What others published: accuracy and speed per method, model, budget and benchmark, with the sources.

    from tokprune.evaluation.reference import select
    for model in select("llava-1.5-7b", methods=["divprune"], tasks=["gqa"]): ...

The numbers stand in the JSON files of this folder, one per model; names.json says which method and which lmms-eval task
a published name means.
"""

from __future__ import annotations

from tokprune.evaluation.reference.render import terminal, to_text
from tokprune.evaluation.reference.tables import Model, PublishedTable, known_model, model_of, models, select

__all__ = ["Model", "PublishedTable", "known_model", "model_of", "models", "select", "terminal", "to_text"]
