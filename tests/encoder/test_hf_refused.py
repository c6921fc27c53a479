"""Towers, heads and calls of transformers that the encoder stage cannot follow: refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.encoder.all_towers import hooks, pixels
from tests.encoder.hf_vits import VITS, hf_vit, torchvision_vit
from tokprune.errors import UnsupportedModelError


@torch.no_grad()
def test_what_one_call_cannot_have_is_refused_in_it() -> None:
    beit, x = VITS["beit"][0](), pixels()
    with tokprune.apply(beit, "tome", r=7), pytest.raises(UnsupportedModelError, match="interpolate_pos_encoding"):
        beit(x, interpolate_pos_encoding=True)
    assert not any("_tokprune" in vars(m) for m in beit.modules())
    vit = VITS["vit"][0]()
    hidden = torch.ones(2, 65, dtype=torch.bool)
    hidden[0, 60:] = False
    with tokprune.apply(vit, "tome", r=7), pytest.raises(UnsupportedModelError, match="equal size"):
        vit(x, attention_mask=hidden)
    radio = VITS["radio"][0]()
    patches = torch.rand(20, 48)
    with tokprune.apply(radio, "tome", r=2), pytest.raises(UnsupportedModelError, match="several sizes"):
        radio(patches, image_grid_hw=torch.tensor([[2, 4], [3, 4]]))


STAGES = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4}
HIERA = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32], "masked_unit_size": [4, 4]}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
SEGFORMER |= {"num_attention_heads": [1, 2], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
SAM = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 4}
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "swin": ("SwinModel", "windows of the grid", STAGES),
    "swinv2": ("Swinv2Model", "windows of the grid", STAGES),
    "hiera": ("HieraModel", "windows of the grid", {**HIERA, "num_query_pool": 1, "query_stride": [2, 2]}),
    "sam_vision_model": ("SamVisionModel", "windows of the grid", {**SAM, "output_channels": 8, "window_size": 2}),
    "segformer": ("SegformerModel", "convolution over the whole grid", SEGFORMER),
    "convnext": ("ConvNextModel", "convolutional", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}),
    "resnet": ("ResNetModel", "convolutional", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}),
    "yolos": ("YolosModel", "YolosLayer", {**SMALL, "image_size": [32, 32], "patch_size": 4}),
    "videomae": ("VideoMAEModel", "VideoMAELayer", {**SMALL, "patch_size": 8, "num_frames": 4}),
    "timesformer": ("TimesformerModel", "TimesformerLayer", {**SMALL, "patch_size": 8, "num_frames": 4}),
    "blip_vision_model": ("BlipVisionModel", "BlipEncoderLayer", {**SMALL, "patch_size": 4}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_towers_are_refused_with_the_reason(kind: str) -> None:
    hf = pytest.importorskip("transformers")
    name, reason, options = REFUSED[kind]
    cls = getattr(hf, name)
    model = cls(cls.config_class(**options))
    with pytest.raises(UnsupportedModelError, match=reason):
        tokprune.apply(model, "tome", r=4)
    assert hooks(model) == hooks(cls(cls.config_class(**options)))


def test_classifiers_that_average_patches_refuse_counts_that_differ() -> None:
    for config, name in (
        ("Dinov2Config", "Dinov2ForImageClassification"),
        ("CLIPConfig", "CLIPForImageClassification"),
    ):
        hf = pytest.importorskip("transformers")
        small = {**SMALL, "patch_size": 4}
        made = hf.CLIPConfig(vision_config=small) if "CLIP" in config else hf.Dinov2Config(**small)
        with pytest.raises(UnsupportedModelError, match="pools over all patches"):
            tokprune.apply(getattr(hf, name)(made), "ats", ratio=0.5)
    tokprune.apply(hf_vit("ViTConfig", "ViTForImageClassification"), "ats", ratio=0.5)
    tokprune.apply(torchvision_vit(), "ats", ratio=0.5)


def test_a_model_that_calls_its_tower_in_its_own_way_names_it() -> None:
    hf = pytest.importorskip("transformers")
    vision = hf.ViTConfig(**SMALL, patch_size=4)
    text = hf.BertConfig(**{k: v for k, v in SMALL.items() if k != "image_size"}, vocab_size=40, is_decoder=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    with pytest.raises(UnsupportedModelError, match=r"get_submodule\('encoder'\)"):
        tokprune.apply(hf.VisionEncoderDecoderModel(config), "tome", r=4)


@pytest.mark.parametrize("method", ["tome", "evit", "zerotprune", "ipcv", "toc3d"])
@torch.no_grad()
def test_hidden_tokens_are_refused_before_the_first_cut(method: str) -> None:
    """Whatever a method does with the sequence later: padding may not be chosen, nor merge."""
    vit, hidden = VITS["vit"][0](), torch.ones(2, 65, dtype=torch.bool)
    hidden[0, 60:] = False
    with tokprune.apply(vit, method, **({"r": 3} if method == "tome" else {})):
        with pytest.raises(UnsupportedModelError, match="equal size"):
            vit(pixels(), attention_mask=hidden)
        vit(pixels(), attention_mask=torch.ones_like(hidden))
