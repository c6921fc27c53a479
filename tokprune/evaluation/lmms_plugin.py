"""What lmms-eval finds under the entry point `lmms_eval.models` and imports with every run: it stays light."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "tokprune"


def manifests() -> list[ModelManifest]:
    """The model `tokprune`: a chat class for generation, and its simple twin for tasks that compare likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "tokprune.evaluation.lmms_model"
    return [
        ModelManifest(
            model_id=MODEL_ID,
            chat_class_path=f"{module}.TokpruneChat",
            simple_class_path=f"{module}.TokpruneSimple",
        )
    ]
