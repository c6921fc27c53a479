"""Names for what comes from other libraries and for plain data, so that a signature says what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from tokprune.methods.base import Method

    class VLM(PreTrainedModel, GenerationMixin):
        """A vision-language model of transformers, with its `generate`."""

    Processor: TypeAlias = ProcessorMixin
    """Tokenizer, image processor and chat template of a VLM in one object."""

    ModelConfig: TypeAlias = PreTrainedConfig
    """A transformers config, with one for the text model and one for the vision tower inside."""

    ImageLike: TypeAlias = Image.Image | NDArray[np.uint8] | Tensor
    """A picture as a user gives it: PIL, or (H, W, 3) uint8."""

    MethodLike: TypeAlias = str | Method | Sequence[str | Method]
    """A method as a user gives it: by name, as an object, or several of different stages."""
else:  # transformers is not imported for the sake of a name
    VLM = Processor = ModelConfig = ImageLike = MethodLike = object

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as `json.load` gives it: who reads a field checks what it is."""

Fields: TypeAlias = Mapping[str, Any]
"""What is read by field names: a JSON object, a benchmark's document, a message of a chat."""

Inputs: TypeAlias = Mapping[str, Any]
"""What `model(**inputs)` and `model.generate(**inputs)` take: tensors, grids and sizes by their names."""

Options: TypeAlias = Mapping[str, Any]
"""Keyword arguments that are handed on by name: options of a method, of `apply`, of `generate`."""
