"""The numbers behind heat maps, and the pictures of what was kept, on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokprune
from tokprune.errors import OptionError
from tokprune.testing import TinyVLM, build, picture
from tokprune.viz.kept import kept_on_clip, kept_on_image
from tokprune.viz.signal_map import values_of


@pytest.fixture(scope="module")
def llava() -> TinyVLM:
    return build("llava")


def prompt(tiny: TinyVLM) -> object:
    return tiny.inputs([["What is ", ("image", picture(60, 40)), "?"]])


def test_a_signal_lines_up_with_the_tokens(llava: TinyVLM) -> None:
    values, layout, source = values_of(llava.model, prompt(llava), signal="cls_attention")
    assert values.shape == (64,) == tuple(layout.group.shape)
    assert (values >= 0).all()
    assert 0 < float(values.sum()) <= 1.001  # a row of attention, [CLS] itself left out
    assert source
    assert not hasattr(llava.model, "_tokprune")  # given back unpruned


def test_vectors_become_their_length(llava: TinyVLM) -> None:
    values, _, _ = values_of(llava.model, prompt(llava), signal="keys:-1")
    assert values.shape == (64,)
    assert (values > 0).all()


def test_scores_are_those_the_method_chose_by(llava: TinyVLM) -> None:
    values, _, source = values_of(llava.model, prompt(llava), method="fastervlm", ratio=0.25)
    with tokprune.apply(llava.model, "fastervlm", ratio=0.25) as pruning, torch.no_grad():
        llava.model.generate(**prompt(llava), max_new_tokens=1, do_sample=False)  # type: ignore[arg-type]
        kept = pruning.last.streams[0].selection.indices  # type: ignore[union-attr]
    assert source == "scores of fastervlm"
    assert set(values.topk(16).indices.tolist()) == set(kept.tolist())


def test_what_has_no_score_says_so(llava: TinyVLM) -> None:
    with pytest.raises(OptionError, match="gives no score per token"):
        values_of(llava.model, prompt(llava), method="divprune")
    with pytest.raises(OptionError, match="give one of them"):
        values_of(llava.model, prompt(llava))


def test_pictures_of_what_was_kept(llava: TinyVLM) -> None:
    records = {}
    for name in ("random", "uniform"):
        with tokprune.apply(llava.model, name, ratio=0.25) as pruning, torch.no_grad():
            llava.model.generate(**prompt(llava), max_new_tokens=1, do_sample=False)  # type: ignore[arg-type]
            records[name] = pruning.last.streams[0]  # type: ignore[union-attr]
    image = picture(60, 40)
    both = kept_on_image(image, records, llava.processor, title="kept")
    one = kept_on_image(image, {"random": records["random"]}, llava.processor)
    assert both.width * both.height > one.width * one.height
    assert np.asarray(both).std() > 10
    frames = np.stack([np.asarray(image)] * 2)
    strips = kept_on_clip(frames, {"random": [records["random"], records["uniform"]]}, llava.processor)
    assert [name for name, _ in strips] == ["random"]
    with pytest.raises(OptionError, match="no record"):
        kept_on_image(image, {}, llava.processor)
