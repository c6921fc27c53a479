"""The explainability compressor: its network on grids of every kind, what it refuses, and the weights that ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tokprune
import tokprune.demo
from tests.methods.streams import HEADS, WIDTH, untrained
from tokprune.demo.asking import Asker
from tokprune.demo.sweep import is_right
from tokprune.errors import OptionError
from tokprune.methods.connector.explain import Explain, predicted_relevance
from tokprune.testing import build, picture
from tokprune.tokens import Layout, VisualTokens


@pytest.fixture
def file() -> Path:
    return Path(untrained())


def tokens_of(layout: Layout, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    n = len(layout.group)
    attention = torch.rand(n, HEADS, generator=generator) / n
    return VisualTokens(torch.randn(n, WIDTH, generator=generator), layout, {"llm_question:0": attention})


def test_a_picture_is_convolved_on_its_grid(file: Path) -> None:
    method, tokens = Explain(str(file)), tokens_of(Layout.grid(6, 9))
    grid = tokens.signal("llm_question:0").T.unflatten(1, (6, 9))[None]
    expected = method.net(grid).flatten()
    assert torch.equal(method.select(tokens, 7).indices, expected.topk(7).indices.sort().values)


def test_layers_are_five_and_see_a_neighbourhood(file: Path) -> None:
    net = Explain(str(file)).net
    assert len(net.convolutions) == 5
    x = torch.rand(1, HEADS, 15, 15)
    changed = x.clone()
    # Far away: only the mean over the picture carries it, so the mean is kept.
    changed[0, :, 0, 0], changed[0, :, 0, 1] = x[0, :, 0, 1], x[0, :, 0, 0]
    difference = (net(changed) - net(x)).abs()[0]
    assert float(difference[:6, :7].max()) > 0
    assert float(difference[7:].max()) < 1e-5


def test_frames_are_pictures_and_share_out_what_each_gets(file: Path) -> None:
    net = Explain(str(file)).net
    layout = Layout.grid(3, 4, 3, "video")
    tokens = tokens_of(layout)
    attention = tokens.signal("llm_question:0")
    scores = predicted_relevance(net, attention, layout)
    got = scores.exp().unflatten(0, (3, 12)).sum(1)
    torch.testing.assert_close(got, attention.unflatten(0, (3, 12)).sum((1, 2)))
    alone = predicted_relevance(net, attention[12:24], Layout.grid(3, 4))
    torch.testing.assert_close(scores[12:24], alone)


def test_cut_grids_are_filled_with_the_mean(file: Path) -> None:
    net = Explain(str(file)).net
    full = tokens_of(Layout.grid(4, 4))
    part = full.part(torch.tensor([0, 1, 2, 5, 6, 9, 10, 15]))
    attention = part.signal("llm_question:0")
    grid = attention.mean(0).repeat(16, 1)
    grid[[0, 1, 2, 5, 6, 9, 10, 15]] = attention
    expected = net(grid.T.unflatten(1, (4, 4))[None]).flatten()[[0, 1, 2, 5, 6, 9, 10, 15]]
    scores = predicted_relevance(net, attention, part.layout)
    torch.testing.assert_close(scores - scores[0], expected - expected[0])


def test_other_models_and_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"4 heads and width 128; this one has 2 and 16.*tools/explain\.py"):
        Explain().select(tokens_of(Layout.grid(4, 4)), 3)
    with pytest.raises(OptionError, match="is no file; write weights='demo'"):
        Explain(str(tmp_path / "nothing.safetensors"))
    wrong = tmp_path / "wrong.safetensors"
    save_file({"a": torch.zeros(1)}, wrong)
    with pytest.raises(OptionError, match="holds no network"):
        Explain(str(wrong)).select(tokens_of(Layout.grid(4, 4)), 3)
    wrong.write_text("no weights")
    with pytest.raises(OptionError, match="holds no network"):
        Explain(str(wrong)).select(tokens_of(Layout.grid(4, 4)), 3)


def test_the_weights_that_ship_are_small_and_of_the_demo_model() -> None:
    method = Explain()
    assert method.net.made_for == (4, 128)
    assert method.file.stat().st_size < 64_000


@torch.no_grad()
def test_in_a_model_it_reads_layer_0_and_beats_chance_on_the_demo_questions() -> None:
    model, processor = tokprune.demo.load()
    asker, examples = Asker(model, processor), tokprune.demo.held_out(42, seed=2)
    inputs = asker.inputs(examples)
    right = {}
    for method in ("explain", "random"):
        with tokprune.apply(model, method, ratio=0.1) as pruning:
            right[method] = sum(is_right(a, e.answer) for a, e in zip(asker.answers(inputs), examples, strict=True))
            assert {s.kept for s in pruning.last.streams} == {26}
            if method == "explain":
                assert "layer 0 of the LLM, head by head" in str(pruning.report())
    assert right["explain"] > right["random"] + 5


def test_another_model_is_refused_when_it_runs_and_left_clean() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["What is ", ("image", picture(40, 40)), "?"]])
    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "explain", ratio=0.5), pytest.raises(OptionError, match="were trained for an LLM"):
        tiny.model(**inputs)
    assert torch.equal(tiny.model(**inputs).logits, plain)
