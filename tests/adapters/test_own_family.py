"""Adding a family is one class: everything that the runtime, the report and the test matrix need comes from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tokprune
from tokprune.adapters import families
from tokprune.adapters.families import EncoderCall, StreamLayout
from tokprune.adapters.families.geometry import plain
from tokprune.adapters.families.tiny import TinyParts
from tokprune.errors import OptionError
from tokprune.testing import build, picture
from tokprune.tokens import Layout


@pytest.fixture
def toy() -> Iterator[str]:
    """A family whose pictures are read column by column, in a LLaVA under another name."""
    import transformers as hf

    class ToyConfig(hf.LlavaConfig):
        model_type = "toy_vlm"

    class ToyVLM(hf.LlavaForConditionalGeneration):
        config_class = ToyConfig

    @families.register_family("toy_vlm")
    class Toy(families.Family):
        tiny_types = ("toy_vlm",)

        def streams(self, call: EncoderCall) -> list[StreamLayout]:
            grid = Layout.grid(8, 8)
            return [plain(Layout(grid.group, grid.col, grid.row, grid.grids, "image")) for _ in call.lengths]

        def tiny(self, model_type: str) -> TinyParts:
            parts = families.FAMILIES["llava"].tiny("llava")
            config = ToyConfig(**{k: v for k, v in parts.model.config.to_dict().items() if k != "model_type"})
            return TinyParts(ToyVLM(config), parts.processor, parts.image)

    yield "toy_vlm"
    families._FAMILIES.pop("toy_vlm")


def test_a_toy_family_is_built_pruned_and_reported(toy: str) -> None:
    tiny = build(toy)
    inputs = tiny.inputs([["What is ", ("image", picture(40, 40, 1)), "?"]])
    with torch.no_grad():
        whole = tiny.model(**inputs).logits
    pruning = tokprune.apply(tiny.model, "uniform", ratio=0.25)
    with torch.no_grad():
        tiny.model.generate(**inputs, max_new_tokens=3)
    stream: Any = pruning.last and pruning.last.streams[0]
    assert (stream.kept, stream.total) == (16, 64)
    assert stream.layout.row[:3].tolist() == [0, 1, 2]  # as the toy reads it
    assert "generic adapter" not in str(pruning.report())
    pruning.remove()
    with torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, whole)


def test_a_model_type_belongs_to_one_family() -> None:
    with pytest.raises(OptionError, match="belongs to Llava already"):
        families.register_family("llava")(families.Family)
    assert type(families.FAMILIES["llava"]).__name__ == "Llava"
