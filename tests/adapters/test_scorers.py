"""Scorers: an open_clip tower embeds the patches of another model's pictures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tokprune
from tokprune.errors import MissingQueryError, OptionError
from tokprune.runtime.scorers import OpenClipScorer, load_scorer
from tokprune.testing import build, picture

open_clip = pytest.importorskip("open_clip", reason="tokprune[vision]")


@pytest.fixture(scope="module")
def scorer():
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    ).eval()
    return OpenClipScorer(model, open_clip.get_tokenizer("ViT-B-32"))


def test_embeddings_are_normalised_and_in_raster_order(scorer):
    text = scorer.embed_text(["a red car", "a dog"])
    assert text.shape == (2, 16)
    pixels = torch.zeros(1, 3, 32, 32)
    base = scorer.embed_image(pixels)
    assert base.shape == (1, 16, 16)
    assert torch.allclose(base.norm(dim=-1), torch.ones(1, 16), atol=1e-5)
    # Attention off: only the patch that changed may change, so the order of patches shows.
    for block in scorer.model.visual.transformer.resblocks:
        torch.nn.init.zeros_(block.attn.out_proj.weight)
        torch.nn.init.zeros_(block.attn.out_proj.bias)
    base = scorer.embed_image(pixels)
    pixels[:, :, 8:16, 16:24] = 1.0  # row 1, column 2 of a 4 x 4 grid
    moved = (scorer.embed_image(pixels) - base).norm(dim=-1)[0]
    assert moved.argmax() == 1 * 4 + 2
    assert (moved > 1e-4).sum() == 1


def test_normalisation_of_the_other_tower_is_undone(scorer):
    picture_01 = torch.rand(1, 3, 32, 32)
    half = OpenClipScorer(scorer.model, scorer.tokenizer, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    clip = scorer.embed_image((picture_01 - scorer.mean) / scorer.std)
    assert torch.allclose(half.embed_image((picture_01 - 0.5) / 0.5), clip, atol=1e-5)


@torch.no_grad()
def test_cdpruner_runs_on_its_signals(scorer):
    tiny = build("llava")
    inputs = tiny.inputs([["what is ", ("image", picture(40, 40, 1)), " this?"]])
    options = {"ratio": 0.25, "processor": tiny.processor, "scorer": scorer}
    with tokprune.apply(
        tiny.model, tokprune.get_method("cdpruner", relevance="clip"), query="a red car", **options
    ) as pruning:
        tiny.model(**inputs)
        first = pruning.last.keep.clone()
        report = pruning.report()
        assert report.kept == 16
        assert "OpenClipScorer" in str(report)
        with pruning.query("a dog on a boat"):
            tiny.model(**inputs)
        assert not torch.equal(first, pruning.last.keep)
    with tokprune.apply(tiny.model, "cdpruner", ratio=0.25), pytest.raises(MissingQueryError, match="query="):
        tiny.model(**inputs)


def test_a_named_scorer_is_told_how_the_processor_made_pixels(scorer, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: scorer.model)
    image = SimpleNamespace(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.2, 0.2])
    found = load_scorer("open_clip:ViT-B-32/x", SimpleNamespace(image_processor=image))
    assert torch.allclose(found.mean.flatten(), torch.tensor(image.image_mean))
    image.do_normalize = False  # pixels are 0 to 1, whatever the means beside them say
    found = load_scorer("open_clip:ViT-B-32/x", SimpleNamespace(image_processor=image))
    assert (found.mean.unique().tolist(), found.std.unique().tolist()) == ([0.0], [1.0])
    assert torch.equal(load_scorer("open_clip:ViT-B-32/x").mean, scorer.mean)


def test_names_are_checked():
    with pytest.raises(OptionError, match="open_clip:"):
        load_scorer("clip")
    with pytest.raises(OptionError, match="ViT-B-32"):
        load_scorer("open_clip:ViT-B-31/laion2b_s34b_b79k")
