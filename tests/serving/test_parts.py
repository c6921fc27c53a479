"""The parts of the plug-in that need no vLLM: settings and refusals, the choice, clips with words between frames."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokprune
from tokprune.adapters.families import FAMILIES, EncoderCall
from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import plain
from tokprune.errors import BudgetError, OptionError, UnsupportedModelError, install_line
from tokprune.registry import STAGES
from tokprune.serving import ARCHITECTURES, overrides
from tokprune.serving.choose import Kept, Stream, choose
from tokprune.serving.model import check_engine
from tokprune.serving.plugin import check_command, check_version
from tokprune.serving.settings import ELSEWHERE, ServingSettings
from tokprune.serving.tiles import clip, pack, tiles
from tokprune.serving.weave import staying, woven
from tokprune.testing import build, picture
from tokprune.tokens import Layout

CLIP = ("cls_attention", "received_attention", "keys", "encoder_features")
# Needs no signal, no question, keeps what it is asked to: served for every family.
EVERYWHERE = {"divprune", "dart", "gprune", "random", "uniform", "pool", "tome_merge", "textmonkey", "evs", "vidcom2"}


def settings(signals: tuple[str, ...] = (), **raw: Any) -> ServingSettings:
    return ServingSettings.of(SimpleNamespace(tokprune=raw), signals)


def refusal(name: str, signals: tuple[str, ...] = ()) -> str:
    """Why a method with its defaults is refused, or an empty string."""
    try:
        settings(signals, method=name, ratio=0.5)
    except OptionError as error:
        return str(error)
    return ""


def test_methods_that_fit_are_served_and_the_others_say_why() -> None:
    wrappers = {"merge", "per_tile", "protect", "adaptive_budget", "relevance"}  # have a field `method`
    names = {n: refusal(n) for n in tokprune.list_methods() if n not in wrappers}
    assert {n for n, why in names.items() if not why} >= EVERYWHERE
    assert set(STAGES) - {"connector"} <= ELSEWHERE.keys()  # a new stage says why it is not served
    for stage in set(STAGES) - {"connector"}:
        assert all(ELSEWHERE[stage] in names[n] for n in tokprune.list_methods(stage=stage))
    assert "reads the question" in names["cdpruner"]
    assert "pass through the LLM" in names["gemfilter"]
    assert "needs cls_attention" in names["hired"]
    assert refusal("hired", CLIP) == refusal("visionzip", CLIP) == ""
    assert "depends on the picture" in refusal("prumerge", (*CLIP, "cls_attention_1head"))


def test_wrapped_methods_are_judged_by_what_they_wrap() -> None:
    inner = {"name": "divprune", "options": {}}
    assert settings(method="per_tile", options={"method": inner}, ratio=0.5).method.info.name == "per_tile"
    with pytest.raises(OptionError, match="reads the question"):
        settings(method="per_tile", options={"method": {"name": "cdpruner"}}, ratio=0.5)
    with pytest.raises(OptionError, match="shares its tokens out"):
        settings(method="adaptive_budget", options={"method": inner}, ratio=0.5)


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        ({}, OptionError, "hf-overrides"),
        ({"method": "divprun", "ratio": 0.5}, OptionError, "Did you mean 'divprune'"),
        ({"method": "divprune", "ratoi": 0.5}, OptionError, "Did you mean 'ratio'"),
        ({"method": "divprune", "ratio": 25}, BudgetError, "not in"),
        ({"method": "divprune"}, BudgetError, "neither ratio nor budget"),
        ({"method": "divprune", "ratio": 0.5, "budget": 4}, BudgetError, "choose one"),
        ({"method": "divprune", "ratio": 0.5, "options": {"seed": 1}}, OptionError, "no option 'seed'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(raw: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        settings(**raw)


def test_cache_keys_tell_settings_apart() -> None:
    salts = [
        settings(method="random", ratio=0.5).salt,
        settings(method="random", ratio=0.25).salt,
        settings(method="random", budget=4).salt,
        settings(method="random", ratio=0.5, options={"seed": 1}).salt,
        settings(method="uniform", ratio=0.5).salt,
    ]
    assert len(set(salts)) == len(salts)
    assert settings(method="random", ratio=0.5).salt == salts[0]


def test_overrides_are_what_settings_reads() -> None:
    told = overrides("Qwen3VLForConditionalGeneration", "random", ratio=0.5, options={"seed": 3})
    assert told["architectures"] == ["TokpruneQwen3VLForConditionalGeneration"]
    assert settings(**told["tokprune"]).method == tokprune.get_method("random", seed=3)
    with pytest.raises(OptionError, match="Did you mean 'LlavaForConditionalGeneration'"):
        overrides("LlavaForConditionalGeneratoin")


def test_every_architecture_names_a_class() -> None:
    for path in ARCHITECTURES.values():
        module, name = path.split(":")
        tree = ast.parse(Path(tokprune.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("version", ["0.32.0+cpu", "0.33.1", "0.33"])
def test_tested_versions_of_vllm_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "dev"])
def test_other_versions_of_vllm_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"0\.32 to 0\.33.*" + re.escape(install_line("vllm"))):
        check_version(version)


def rows(n: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_the_choice_is_the_methods_and_neighbours_do_not_matter() -> None:
    streams = [Stream(rows(n, seed=n), plain(Layout.grid(n // 4, 4))) for n in (16, 16, 8, 4)]
    wanted = settings(method="divprune", budget=4)
    together = choose(wanted, streams, 6)
    assert together[3] is None  # all four tokens stay
    for stream, kept in zip(streams[:3], together[:3], strict=True):
        (alone,) = choose(wanted, [stream], 6)
        (picked,) = wanted.method.select_batch([tokprune.VisualTokens(stream.features, stream.geometry.layout)], [4])
        assert kept is not None
        assert alone is not None
        assert torch.equal(kept.rows, alone.rows)
        assert torch.equal(kept.rows, picked.indices)
        assert torch.equal(kept.features, stream.features[picked.indices])


def test_separators_stay_and_deepstack_columns_are_merged_along() -> None:
    """Two lines of four tokens, each closed by a newline; the last column belongs to a DeepStack plane."""
    features = rows(10)
    line = torch.arange(8) // 4
    candidates = torch.arange(8) + line
    layout = StreamLayout(candidates, 10, Layout.grid(2, 4), torch.tensor([4, 9]), torch.tensor([0, 1]), line)
    (kept,) = choose(settings(method="tome_merge", budget=2), [Stream(features, layout)], 5)
    assert kept is not None
    assert {4, 9} <= set(kept.rows.tolist())
    assert torch.equal(kept.features[(kept.rows == 4).nonzero().flatten()][0], features[4])
    tokens = tokprune.VisualTokens(features[candidates, :5], layout.layout)
    (selection,) = tokprune.get_method("tome_merge").select_batch([tokens], [2])
    merged = selection.apply(features[candidates])
    where = torch.isin(kept.rows, candidates[selection.indices])
    assert torch.equal(kept.features[where], merged)


def test_words_between_frames_stay_in_their_places() -> None:
    """Two frames of two tokens (id 9) between words 1, 2, 3; the second frame keeps nothing."""
    ids = [1, 9, 9, 2, 9, 9, 3]
    kept = Kept(torch.tensor([[5.0, 6.0]]), torch.tensor([1]))
    assert staying(ids, 9, kept).tolist() == [True, False, True, True, False, False, True]
    out = woven(ids, 9, kept, lambda tokens: -tokens[:, None].float())
    assert out.tolist() == [[-1, 0], [5, 6], [-2, 0], [-3, 0]]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(32, 32), (40, 64), (64, 40), (96, 96), (28, 20), (32, 96)])
def test_tiles_lie_where_the_model_of_transformers_puts_them(family: str, size: tuple[int, int]) -> None:
    """Also OneVision's canvases that are shrunk, and signals, which are packed like the features."""
    tiny = build(family)
    inputs = tiny.inputs([[("image", picture(size[1], size[0]))]])
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    config = tiny.model.config
    if family == "llava_onevision":
        config.vision_aspect_ratio = "anyres_max_2"
    call = EncoderCall(tiny.model.model, "image", images, None)
    (expected,) = FAMILIES[family].streams(call)
    found = tiles(config, inputs["image_sizes"][0].tolist())
    assert (found.total, found.layout.grids, found.layout.canvas) == (
        expected.total,
        expected.layout.grids,
        expected.layout.canvas,
    )
    for name in ("rows", "separators"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("group", "row", "col"):
        assert torch.equal(getattr(found.layout, name), getattr(expected.layout, name))
    values = torch.randn(len(images["pixel_values"][0]), 64, 3)
    packed = pack(config, inputs["image_sizes"][0].tolist(), values, 0.0)
    torch.testing.assert_close(packed, FAMILIES[family].arrange(call, values.flatten(0, 1)))


def test_clips_lie_where_the_model_of_transformers_puts_them() -> None:
    tiny = build("llava_onevision")
    call = EncoderCall(tiny.model.model, "video", {"pixel_values_videos": torch.zeros(1, 3, 3, 32, 32)}, None)
    (expected,) = FAMILIES["llava_onevision"].streams(call)
    found = clip(tiny.model.config, 3)
    assert (found.total, found.layout.grids) == (expected.total, expected.layout.grids)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.separators, expected.separators)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"additional_config": {"tokprune": {}}}, "hf-overrides"),
        ({"pruning": True}, "video-pruning-rate"),
        ({"speculative_config": object()}, "speculative"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "LoRA"),
    ],
)
def test_engines_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    pruning = change.pop("pruning", False)
    multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: pruning)
    told = {"additional_config": {}, "speculative_config": None, "lora_config": None, **change}
    with pytest.raises(OptionError, match=words):
        check_engine(SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal), **told))


PRUNED = '["TokpruneLlavaForConditionalGeneration"]'


@pytest.mark.parametrize(
    "words",
    [
        ["--hf-overrides", '{"tokprune": {"method": "divprune"}}'],
        ['--hf_overrides={"tokprune": {}, "architectures": ["LlavaForConditionalGeneration"]}'],
        ["serve", "model", "--hf-overrides.tokprune.method", "divprune"],
        ["--hf-overrides.tokprune.ratio=0.5", "--hf-overrides.architectures+", "LlavaForConditionalGeneration"],
        ["--additional-config", '{"tokprune": {}}'],
        ["--hf-overrides", f'{{"architectures": {PRUNED}}}', "--additional-config.tokprune.ratio", "0.5"],
    ],
)
def test_a_command_that_would_be_served_unpruned_is_refused(words: list[str]) -> None:
    with pytest.raises(
        OptionError, match=r"--hf-overrides '\{\"architectures\".*TokpruneLlavaForConditionalGeneration"
    ):
        check_command(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--hf-overrides", f'{{"tokprune": {{}}, "architectures": {PRUNED}}}'],
        ["--hf-overrides.tokprune.ratio", "0.5", "--hf-overrides.architectures+", PRUNED[2:-2]],
        ["--hf-overrides.architectures", PRUNED, "--hf-overrides.tokprune", '{"method": "divprune"}'],
        [
            "--model",
            "/models/tokprune",
            "--hf-overrides",
            '{"text_config": {"tokprune": 1}}',
            "--additional-config",
            "{}",
        ],
        ["--hf-overrides", "no JSON"],
        ["--hf-overrides"],
        [],
    ],
)
def test_commands_that_say_both_or_nothing_are_let_through(words: list[str]) -> None:
    check_command(words)
