"""A deleted model is freed at once, with all its weights; a failing apply changes nothing; remove finds the model it is
meant for."""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tokprune
from tests.encoder.all_towers import TOWERS, hooks, pixels
from tokprune.errors import MissingSignalError, OptionError, TokpruneError, UnsupportedModelError
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, clip, picture


def cache() -> Any:
    return tokprune.get_method("dycoke_cache", layer=1)


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "connector": lambda: {"method": "divprune", "ratio": 0.3},
    "signals": lambda: {"method": "hired", "ratio": 0.3},
    "merging": lambda: {"method": "tome_merge", "ratio": 0.3},
    "encoder": lambda: {"method": "tome", "ratio": 0.3},
    "pixels": lambda: {"method": "pixelprune", "ratio": 0.3},
    "encoder that restores": lambda: {"method": "ipcv"},
    "encoder and connector": lambda: {"method": [tokprune.get_method("tome", r=2), "visionzip"], "ratio": 0.3},
    "cache": lambda: {"method": ["dycoke", cache()], "ratio": 0.5},
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    warm_up()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@functools.cache
def warm_up() -> None:
    """What transformers sets up once, when the first model answers, is no matter of ours."""
    tiny = build("llava")
    tiny.model.generate(**tiny.inputs([["a ", ("image", picture(60, 40)), " b"]]), max_new_tokens=2)


def watch(model: nn.Module) -> dict[str, weakref.ref[Any]]:
    """Weak references to every module and parameter."""
    found: dict[str, weakref.ref[Any]] = {name or "model": weakref.ref(m) for name, m in model.named_modules()}
    return found | {name: weakref.ref(p) for name, p in model.named_parameters()}


def alive(watched: dict[str, weakref.ref[Any]]) -> list[str]:
    return [name for name, ref in watched.items() if ref() is not None]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("end", ["pruned", "removed", "removed, handle kept", "replaced, handle kept", "failed"])
def test_a_deleted_model_is_freed_at_once(family: str, stage: str, end: str) -> None:
    if (end not in ("pruned", "removed") and family != "llava") or (stage == "cache" and family == "internvl"):
        pytest.skip("shown by the other families")
    handles: list[Any] = []
    tiny = build(family)
    model = tiny.model
    kind = "video" if family in ("llava_onevision", "qwen2_5_vl") else "image"
    kind = "image" if stage == "pixels" and family == "llava_onevision" else kind  # its clips are pooled: refused
    rows = [["a ", (kind, clip(4, 40, 40) if kind == "video" else picture(60, 40)), " b"]]
    inputs = tiny.inputs(rows)
    del tiny
    watched = watch(model)
    with torch.no_grad():
        pruning = tokprune.apply(model, **STAGES[stage]())
        model(**inputs)
        model.generate(**inputs, max_new_tokens=3)
        if end.startswith("removed"):
            pruning.remove()
            model(**inputs)
        if end.startswith("replaced"):
            tokprune.apply(model, "divprune", ratio=0.5)
            model(**inputs)
        if end == "failed":
            with pytest.raises(TokpruneError):
                tokprune.apply(model, "tome", ratio=7.0)
    if end.endswith("kept"):
        handles.append(pruning)
    del pruning, model
    assert alive(watched) == []
    assert all(not h.active and h.model is None for h in handles)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", ["timm", "timm registers", "clip", "internvl", "open_clip"])
@pytest.mark.parametrize("method", ["tome", "evit", "apt"])
@pytest.mark.parametrize("end", ["pruned", "removed"])
def test_a_deleted_tower_is_freed_at_once(name: str, method: str, end: str) -> None:
    model = TOWERS[name]()
    watched = watch(model)
    options = {"r": 4} if method == "tome" else {"mean": (0.5,) * 3, "std": (0.5,) * 3} if method == "apt" else {}
    if method == "apt" and name in ("internvl", "timm registers"):
        pytest.skip("APT needs absolute positions")
    pruning = tokprune.apply(model, method, **options)
    model(pixels())
    model.train()(pixels())
    if end == "removed":
        pruning.remove()
    del model, pruning
    assert alive(watched) == []


@pytest.mark.usefixtures("no_collector")
def test_the_handle_keeps_its_model_until_it_is_removed() -> None:
    pruning = tokprune.apply(build("llava").model, "divprune", ratio=0.5)
    watched = watch(pruning.model)
    assert len(alive(watched)) == len(watched)
    pruning.remove()
    assert alive(watched) == []
    assert "removed" in repr(pruning)
    assert "no picture" in str(pruning.report())


@torch.no_grad()
def test_copies_of_a_model_and_of_its_parts() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    plain = tiny.model(**inputs).logits
    pruning = tokprune.apply(tiny.model, [tokprune.get_method("tome", r=2), "hired"], ratio=0.3)
    expected = tiny.model(**inputs).logits
    other = copy.deepcopy(tiny.model)
    part = copy.deepcopy(tiny.model.base_model.vision_tower)
    pruning.remove()
    assert torch.equal(other(**inputs).logits, expected)
    assert torch.equal(tiny.model(**inputs).logits, plain)
    assert torch.equal(part(inputs["pixel_values"])[0], tiny.model.base_model.vision_tower(inputs["pixel_values"])[0])
    tokprune.remove(other)
    assert torch.equal(other(**inputs).logits, plain)


@torch.no_grad()
def test_a_pruned_model_can_be_saved_whole(tmp_path: Any) -> None:
    """Before it has run: hooks of transformers' own, made in the first run, cannot be pickled. It decodes, too."""
    tiny = build("llava", layers=4)
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    stages = [tokprune.get_method("tome", r=2), "hired", tokprune.get_method("fastv", layer=2), "mustdrop_cache"]
    tokprune.apply(tiny.model, stages, ratio=0.3)
    torch.save(tiny.model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(**inputs).logits, tiny.model(**inputs).logits)
    wanted = tiny.model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(other.generate(**inputs, max_new_tokens=4), wanted)
    tokprune.remove(other)
    tokprune.remove(tiny.model)
    assert torch.equal(other(**inputs).logits, tiny.model(**inputs).logits)


FAILING: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception]]] = {
    "unknown method": (lambda: {"method": "no such"}, OptionError),
    "missing signal": (lambda: {"method": "prumerge", "ratio": 0.5}, MissingSignalError),
    "bad block": (lambda: {"method": tokprune.get_method("evit", blocks=(99,))}, OptionError),
    "no schedule": (lambda: {"method": "tome"}, OptionError),
    "bad layer": (
        lambda: {"method": ["divprune", tokprune.get_method("dycoke_cache", layer=99)], "ratio": 0.5},
        OptionError,
    ),
}


@pytest.mark.parametrize("first", ["connector", "signals", "encoder", "encoder and connector", "cache"])
@pytest.mark.parametrize("failing", FAILING)
@torch.no_grad()
def test_a_failing_apply_leaves_the_pruning_before_it(
    first: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    pruning = tokprune.apply(tiny.model, **STAGES[first]())
    expected, count = tiny.model.generate(**inputs, max_new_tokens=4), hooks(tiny.model)
    logits = tiny.model(**inputs).logits
    if failing == "missing signal":
        monkeypatch.setattr("tokprune.runtime.signal_blocks.tower_blocks", _no_blocks)
    arguments, error = FAILING[failing]
    with pytest.raises(error):
        tokprune.apply(tiny.model, **arguments())
    monkeypatch.undo()
    assert pruning.active
    assert hooks(tiny.model) == count
    assert torch.equal(tiny.model(**inputs).logits, logits)
    assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=4), expected)


def _no_blocks(tower: Any) -> Any:
    raise MissingSignalError("a convolutional tower")


@pytest.mark.parametrize("first", ["connector", "encoder and connector", "cache"])
@pytest.mark.parametrize("where", ["EncoderStage", "ConnectorStage", "Recorder", "CacheStage"])
@torch.no_grad()
def test_an_install_that_fails_half_way_is_undone(first: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokprune.runtime.cache import CacheStage
    from tokprune.runtime.encode import Recorder
    from tokprune.runtime.encoder.stage import EncoderStage
    from tokprune.runtime.generate import ConnectorStage

    kinds = {
        "EncoderStage": EncoderStage,
        "ConnectorStage": ConnectorStage,
        "Recorder": Recorder,
        "CacheStage": CacheStage,
    }
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    pruning = tokprune.apply(tiny.model, **STAGES[first]())
    logits, count, calls = tiny.model(**inputs).logits, hooks(tiny.model), []
    install = kinds[where].install

    def broken(self: Any) -> None:
        install(self)
        if not calls:
            calls.append(1)
            raise RuntimeError("half way")

    monkeypatch.setattr(kinds[where], "install", broken)
    with pytest.raises(RuntimeError, match="half way"):
        tokprune.apply(tiny.model, [tokprune.get_method("tome", r=1), "hired", cache()], ratio=0.4)
    assert pruning.active
    assert hooks(tiny.model) == count
    assert torch.equal(tiny.model(**inputs).logits, logits)


@torch.no_grad()
def test_a_failing_second_method_leaves_a_bare_tower_reduced() -> None:
    model = TOWERS["timm"]()
    pruning = tokprune.apply(model, "tome", r=4)
    expected = model(pixels())
    for arguments in ({"method": "tome"}, {"method": "evit", "blocks": (99,)}, {"method": "divprune", "ratio": 0.5}):
        with pytest.raises(TokpruneError):
            tokprune.apply(model, **arguments)
        assert pruning.active
        assert torch.equal(model(pixels()), expected)


class Holder(nn.Module):
    def __init__(self, vlm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"vlm": vlm})


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda m: nn.ModuleList([m]), Holder])
@torch.no_grad()
def test_containers(wrap: Any) -> None:
    """remove finds the VLM inside; apply says where it is."""
    tiny = build("llava")
    before = hooks(tiny.model)
    box = wrap(tiny.model)
    with pytest.raises(UnsupportedModelError, match=r"holds a LlavaForConditionalGeneration at .*get_submodule"):
        tokprune.apply(box, "divprune", ratio=0.5)
    with pytest.raises(UnsupportedModelError, match=r"holds a LlavaForConditionalGeneration at .*get_submodule"):
        tokprune.apply(box, "tome", ratio=0.5)
    for method in ("hired", "tome"):
        pruning = tokprune.apply(tiny.model, method, ratio=0.5)
        tokprune.remove(box)
        assert not pruning.active
        assert hooks(tiny.model) == before
    tokprune.remove(box)  # nothing is pruned: nothing to do


def test_parts_of_a_pruned_model_and_things_that_are_no_model_are_refused() -> None:
    tiny = build("llava")
    pruning = tokprune.apply(tiny.model, "tome", ratio=0.5)
    for part in (tiny.model.base_model, tiny.model.base_model.vision_tower):
        with pytest.raises(UnsupportedModelError, match="part of a pruned LlavaForConditionalGeneration"):
            tokprune.remove(part)
    for thing in (None, "llava", 3, pruning):
        with pytest.raises(UnsupportedModelError, match="remove takes the model"):
            tokprune.remove(thing)
    assert pruning.active


def test_a_tower_is_not_reduced_twice_in_one_call() -> None:
    tiny = build("llava")
    tower = tiny.model.base_model.vision_tower
    with tokprune.apply(tower, "tome", r=2):
        for method in ("tome", "hired"):
            with pytest.raises(UnsupportedModelError, match="already reduced"):
                tokprune.apply(tiny.model, method, ratio=0.5)
        tokprune.apply(tiny.model, "divprune", ratio=0.5).remove()  # looks at features alone
    for method in ("tome", "hired"):
        with tokprune.apply(tiny.model, method, ratio=0.5):
            with pytest.raises(UnsupportedModelError, match="is the vision tower of a model"):
                tokprune.apply(tower, "tome", r=2)
            tokprune.apply(tiny.model, method, ratio=0.4)  # replacing is no meeting


@torch.no_grad()
def test_one_handle_for_all_models() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    vit = TOWERS["timm"]()
    handles = [
        (tokprune.apply(tiny.model, "divprune", ratio=0.5), lambda: tiny.model(**inputs)),
        (tokprune.apply(vit, "tome", r=4), lambda: vit(pixels())),
    ]
    for pruning, run in handles:
        assert type(pruning) is tokprune.Pruning
        assert pruning.last is None
        assert pruning.active
        run()
        report = pruning.report()
        assert 0 < report.kept < report.total
        assert report.to_dict()["kept"] == report.kept
        assert pruning.last is not None
        assert pruning.config.methods
        pruning.remove()
        assert not pruning.active
    towers = apply_encoder(build("llava").model, "tome", ratio=0.5)
    assert type(towers) is tokprune.Pruning
    assert towers.config.ratio == 0.5


def test_a_users_own_stand_in_comes_back() -> None:
    """A method that somebody put on the model before is theirs again in the end, also when they wrap ours meanwhile."""
    tiny = build("llava")
    model, base = tiny.model, tiny.model.base_model

    def mine(*args: Any, **kwargs: Any) -> Any:
        return type(base).get_image_features(base, *args, **kwargs)

    base.get_image_features = mine
    tokprune.apply(model, [tokprune.get_method("tome", r=2), "hired"], ratio=0.5).remove()
    assert vars(base)["get_image_features"] is mine
    pruning = tokprune.apply(model, "hired", ratio=0.5)
    ours = base.get_image_features
    base.get_image_features = lambda *args, **kwargs: ours(*args, **kwargs)
    pruning.remove()
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(("method", "end"), [("tome", "pruning.remove()"), ("hired", "pass")])
def test_a_script_ends_quietly(method: str, end: str) -> None:
    """The model and the handle are still there when Python takes its modules apart."""
    script = (
        f"import tokprune; from tokprune.testing import build; tiny = build('llava')\n"
        f"pruning = tokprune.apply(tiny.model, {method!r}, ratio=0.5); {end}"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert "Exception" not in done.stderr
