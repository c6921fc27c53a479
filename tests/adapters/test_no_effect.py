"""A forward with pictures from which nothing is dropped is never passed over in silence."""

from __future__ import annotations

import warnings

import pytest
import torch

import tokprune
from tests.adapters.reference import shared
from tokprune.errors import UnsupportedModelError
from tokprune.testing import clip, picture


@pytest.mark.parametrize("family", ["llava", "fast_vlm"])
def test_a_share_that_rounds_to_everything_is_told_once_and_reported(family: str) -> None:
    tiny = shared(family)
    inputs = tiny.inputs([["a ", ("image", picture(40, 40, 1)), " b"]])
    with tokprune.apply(tiny.model, "random", ratio=0.995) as pruning, torch.no_grad():
        with pytest.warns(UserWarning, match="nothing was dropped at ratio 0.995"):
            tiny.model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.model(**inputs)
        assert "nothing was dropped" in str(pruning.report())
    with tokprune.apply(tiny.model, "random", ratio=0.5) as pruning, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.model(**inputs)
        assert "nothing was dropped" not in str(pruning.report())


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_features_without_columns_are_an_error(ratio: float) -> None:
    """A clip whose placeholders are not marked as one would be left whole; at ratio 1 that is what was asked for."""
    tiny = shared("glm4v")
    inputs = dict(tiny.inputs([["v ", ("video", clip(4, seed=1)), " what?"]]))
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].clamp(max=1)
    encoded = tiny.model.base_model.get_video_features(inputs.pop("pixel_values_videos"), inputs["video_grid_thw"])
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    call = {**inputs, "mm_encoder_outputs": {"video": encoded}, "position_ids": positions}
    with tokprune.apply(tiny.model, "random", ratio=ratio), torch.no_grad():
        if ratio == 1:
            tiny.model(**call)
            return
        with pytest.raises(UnsupportedModelError, match="no column of the prompt is known to be their placeholder"):
            tiny.model(**call)
    assert not tiny.model.base_model._forward_pre_hooks, "an exception leaves the model clean"
