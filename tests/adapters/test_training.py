"""Losses and gradients of pruned models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import (
    QUICK,
    Prompt,
    prompt_of,
    samples,
    slow_unless,
)
from tests.adapters.shortened import RATIO, TOLERANCE, encoder_rows, shorten, type_names
from tokprune.errors import MissingSignalError
from tokprune.testing import build, picture

# -- training ----------------------------------------------------------------------------------------------------------


def labels_of(case: Prompt) -> Tensor:
    """Every text token is a target; pictures and padding are not, nor a first token, which only padding could
    foretell."""
    first = torch.nn.functional.pad(case.real, (1, 0))[:, :-1] < case.real
    return case.inputs["input_ids"].masked_fill(case.visual | ~case.real | first, -100)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize(
    "family", [slow_unless(f in QUICK, f) for f in (*QUICK, "llava_onevision", "qwen2_vl", "gemma3")]
)
def test_loss_and_gradients_equal_those_of_the_short_sequence(family: str, positions: str) -> None:
    tiny = build(family)
    case = prompt_of(tiny, samples("image"))
    model = tiny.model.train()
    labels = labels_of(case)
    with tokprune.apply(model, "random", ratio=RATIO, positions=positions) as pruning:
        out = model(**case.inputs, labels=labels)
        got = gradients(model, out.loss)
        keep = pruning.last.keep
        model.gradient_checkpointing_enable()
        again = model(**case.inputs, labels=labels)
        checkpointed = gradients(model, again.loss)
        model.gradient_checkpointing_disable()
    short = shorten(case, keep, positions, case.forward)
    cut_labels = torch.full(short["input_ids"].shape, -100)
    for row in range(len(keep)):
        cut_labels[row, -int(keep[row].sum()) :] = labels[row, keep[row]]
    logits = model(
        input_ids=short["input_ids"],
        attention_mask=short["attention_mask"],
        position_ids=short["position_ids"],
        mm_encoder_outputs=encoder_rows(case, keep, by_row=False),
        **dict.fromkeys(type_names(case.inputs), short["types"]),
    ).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), cut_labels[:, 1:].flatten())
    wanted = gradients(model, loss)
    assert abs(float(out.loss) - float(loss)) < 1e-5
    assert abs(float(again.loss) - float(loss)) < 1e-5
    assert got.keys() == wanted.keys() == checkpointed.keys()
    assert sum(float(g.abs().sum()) for name, g in got.items() if "vis" in name) > 0, "the tower learns"
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=TOLERANCE)
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_training_with_signals_and_checkpointing(family: str) -> None:
    """Checkpointing runs blocks again in the backward pass; probes in the tower must not trip over it."""
    tiny = build(family)
    case = prompt_of(tiny, samples("image"))
    model = tiny.model.train()
    with tokprune.apply(model, "hired", ratio=RATIO):
        plain = gradients(model, model(**case.inputs, labels=labels_of(case)).loss)
        model.gradient_checkpointing_enable()
        for _ in range(2):
            got = gradients(model, model(**case.inputs, labels=labels_of(case)).loss)
            for name, value in plain.items():
                torch.testing.assert_close(got[name], value, rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "prumerge", "flashvid", "globalcom2", "visionzip", "fastvid"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_autocast_changes_neither_choice_nor_merges(family: str, name: str) -> None:
    """What a method computes stays in float32 where the model's own products are made in 16 bits."""
    tiny = build(family)
    model: Any = tiny.model
    inputs = tiny.inputs([["a ", ("image", picture(60, 40, 1)), " b"], ["x ", ("image", picture(40, 60, 2)), " and c"]])
    names = inspect.signature(model.base_model.get_image_features).parameters
    seen: list[torch.Tensor] = []
    model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        pruning = tokprune.apply(model, name, ratio=0.4, query="which?", processor=tiny.processor)
    except MissingSignalError:
        pytest.skip("a signal that this tower does not have")
    encoded = model.base_model.get_image_features(**{k: v for k, v in inputs.items() if k in names})
    words = {k: v for k, v in inputs.items() if k != "pixel_values"}
    model(**words, mm_encoder_outputs={"image": encoded})
    keep = pruning.last.keep
    with torch.autocast("cpu", torch.bfloat16):
        model(**words, mm_encoder_outputs={"image": encoded})
        assert torch.equal(pruning.last.keep, keep)
        model(**inputs).logits.float().sum().backward()
    torch.testing.assert_close(seen[1], seen[0])
