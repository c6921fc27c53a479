"""A model split over two devices, as accelerate's dispatch_model does it, prunes as on one: every stage, forward and
generate(), on two stand-in devices that refuse each other's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tokprune.errors import TokpruneError
from tokprune.testing import FAMILIES, StandInDevice, build, device, picture
from tokprune.testing.device import NAME

pytestmark = pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")
hooks = pytest.importorskip("accelerate.hooks")

OPTIONS: dict[str, dict[str, Any]] = {
    "gemfilter": {"layer": 1}, "mustdrop": {"layers": (1,)}, "sparsevlm": {"layers": (1,)},
    "dycoke_cache": {"layer": 1}, "fastkv": {"layer": 1},
}  # fmt: skip
"""Layers that the tiny model has."""
CLOSE = 1e-3
"""Recurrent layers round otherwise in a split model by up to 2e-4, unpruned as well."""
METHODS = (
    *("divprune", "hired", "visionzip", "gemfilter", "mustdrop", "sparsevlm", "fitprune", "tome"),
    *("dycoke_cache", "fastkv", "kvmerger"),
)


class Placed(hooks.AlignDevicesHook):
    """accelerate's own hook on a module whose tensors are in place already."""

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        return module


def split(model: Any, stand_in: StandInDevice) -> None:
    """The tower and the first layer on one device; the later layers and the head on another. What comes out goes back
    to where the inputs are."""
    text = next(getattr(model.model, n) for n in ("language_model", "text_model") if hasattr(model.model, n))
    second = [*text.layers[1:], text.norm, text.rotary_emb, model.lm_head]
    first = [m for m in (*model.model.children(), text.embed_tokens, text.layers[0]) if m is not text]
    for number, modules in ((1, second), (0, first)):
        for module in modules:
            stand_in.move(module, number)
            hooks.add_hook_to_module(module, Placed(execution_device=torch.device(NAME, number)))
    stand_in.move(model)
    hooks.add_hook_to_module(model, Placed(execution_device=torch.device(NAME, 0), io_same_device=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "llava")]
)
def test_a_split_model_prunes_as_a_whole_one(family: str, method: str) -> None:
    tiny = build(family)
    first, second = ("image", picture(56, 56)), ("image", picture(40, 56))
    inputs = dict(tiny.inputs([["a", first, "what is it?"], ["Colour?", second]]))
    chosen = tokprune.get_method(method, **OPTIONS.get(method, {}))
    with torch.no_grad():
        try:
            with tokprune.apply(tiny.model, chosen, ratio=0.5, processor=tiny.processor):
                logits, words = tiny.model(**inputs).logits, tiny.model.generate(**inputs, max_new_tokens=3)
        except TokpruneError as refusal:  # in words, on one device as well
            pytest.skip(str(refusal))
        with StandInDevice() as stand_in:
            split(tiny.model, stand_in)
            placed = stand_in.put(inputs)
            with tokprune.apply(tiny.model, chosen, ratio=0.5, processor=tiny.processor):
                assert torch.allclose(tiny.model(**placed).logits.cpu(), logits, atol=CLOSE)
                assert torch.equal(tiny.model.generate(**placed, max_new_tokens=3).cpu(), words)


def test_devices_refuse_each_other() -> None:
    with StandInDevice() as stand_in:
        a, b = stand_in.put(torch.ones(2)), stand_in.put(torch.ones(2), 1)
        with pytest.raises(RuntimeError, match="same device"):
            a + b
        with stand_in.count() as counted:
            moved = b.to(a.device) + a
        assert (moved.device.index, counted.syncs) == (0, 0)
        assert (a + a).device.index == 0
        assert (b + b).device.index == 1
