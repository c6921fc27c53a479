"""What a pruned forward gives back: one rule for widths, gradients that flow, native containers and tuples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.conversations import encode
from tests.adapters.reference import QUICK, prompt
from tokprune.testing import FAMILIES, build


def families(*quick: str) -> list[Any]:
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in FAMILIES]


@pytest.mark.parametrize("family", families(*QUICK, "gemma3", "qwen3_5"))
def test_hidden_states_have_the_prompts_width_everywhere(family: str) -> None:
    """forward() and generate() alike; attentions have that of the kept tokens."""
    case = prompt(family, "image")
    model, length = case.tiny.model, case.real.shape[1]
    more = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    try:
        with tokprune.apply(model, "random", ratio=0.3) as pruning, torch.no_grad():
            out = model(**case.inputs, **more)
            generated = model.generate(**case.inputs, max_new_tokens=2, return_dict_in_generate=True, **more)
            kept = int(pruning.last.keep.sum(1).max())
            assert pruning.last.length == kept
    finally:
        model.set_attn_implementation("sdpa")
    for states in (out.hidden_states, generated.hidden_states[0]):
        assert {h.shape[1] for h in states} == {length}
    for one in (out.attentions, generated.attentions[0]):
        assert all(a.shape[-2:] == (kept, kept) for a in one if a is not None)
    assert len(out.hidden_states) == len(generated.hidden_states[0])


@pytest.mark.parametrize("family", families(*QUICK, "gemma3"))
def test_gradients_reach_returned_states(family: str) -> None:
    """retain_grad() on hidden states and attentions works as on an unpruned model, and so does autograd.grad."""
    tiny = build(family, attn="eager")
    inputs = prompt(family, "image").inputs
    with tokprune.apply(tiny.model, "random", ratio=0.3) as pruning:
        out = tiny.model(**inputs, output_hidden_states=True, output_attentions=True)
        keep = pruning.last.keep
    (middle,) = torch.autograd.grad(out.logits[:, -1].sum(), out.hidden_states[1], retain_graph=True)
    for state in (*out.hidden_states, out.attentions[0]):
        state.retain_grad()
    out.logits[:, -1].sum().backward()
    for state in (*out.hidden_states, out.attentions[0]):
        assert state.grad is not None
    assert torch.allclose(middle, out.hidden_states[1].grad, atol=1e-6)
    assert float(middle[keep].abs().sum()) > 0
    assert float(middle[~keep].abs().sum()) == 0, "a dropped token leads nowhere"


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("family", families(*QUICK, "idefics3"))
@torch.no_grad()
def test_tuples(family: str, ratio: float) -> None:
    """return_dict=False on the whole model and on its base, as an argument and in the config."""
    tiny = build(family)
    inputs = prompt(family, "image").inputs
    plain = tiny.model.base_model(**inputs, return_dict=False)
    with tokprune.apply(tiny.model, "random", ratio=ratio):
        wanted = tiny.model(**inputs)
        base = tiny.model.base_model(**inputs)
        answers = [tiny.model.base_model(**inputs, return_dict=False)]
        whole = [tiny.model(**inputs, return_dict=False)]
        for config in {id(c): c for c in (tiny.model.config, tiny.model.base_model.config)}.values():
            config.return_dict = False
        try:
            answers.append(tiny.model.base_model(**inputs))
        finally:
            tiny.model.config.return_dict = True
    for answer in answers:
        assert isinstance(answer, tuple)
        assert len(answer) == len(plain)
        assert torch.equal(answer[0], base.last_hidden_state)
    for answer in whole:
        assert isinstance(answer, tuple)
        assert torch.equal(answer[0], wanted.logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_config_return_dict_false(family: str) -> None:
    """What the plain model does with config.return_dict=False, the pruned one does."""
    tiny = build(family)
    inputs = prompt(family, "image").inputs
    tiny.model.config.return_dict = False

    def outcome() -> Any:
        try:
            with torch.no_grad():
                out = tiny.model(**inputs)
            return type(out), len(out), out[0].shape
        except Exception as error:
            return type(error)

    plain = outcome()
    for ratio in (0.3, 1.0):
        with tokprune.apply(tiny.model, "random", ratio=ratio):
            assert outcome() == plain


def _sizes(features: Any) -> Any:
    if isinstance(features, Tensor):
        return features.ndim
    return type(features), len(features)


@pytest.mark.parametrize("family", families(*QUICK, "gemma3", "idefics3"))
@torch.no_grad()
def test_picture_features_keep_their_container(family: str) -> None:
    """One entry per picture, as natively, in what a forward returns of them."""
    case = prompt(family, "image")
    seen: list[Any] = []
    plain = case.tiny.model.base_model(**case.inputs)
    with tokprune.apply(case.tiny.model, "random", ratio=0.3) as pruning:
        hook = case.tiny.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["mm_encoder_outputs"]["image"].pooler_output),
            with_kwargs=True,
        )
        got = case.tiny.model.base_model(**case.inputs)
        hook.remove()
        kept = [r.kept + r.separators_kept for r in pruning.last.streams]
    for name in ("image_hidden_states", "image_outputs"):
        native, mine = plain.get(name), got.get(name)
        if native is not None:
            native = getattr(native, "pooler_output", native)
            mine = getattr(mine, "pooler_output", mine)
            assert _sizes(mine) == _sizes(native)
    if not isinstance(seen[0], Tensor):
        assert len(seen[0]) == len(encode(case.tiny, case.inputs).pooler_output)
        assert sum(len(f) for f in seen[0]) == sum(kept)
        if len(seen[0]) == len(kept):
            assert [len(f) for f in seen[0]] == kept


@pytest.mark.parametrize("method", ["random", "pyramiddrop", "none"])
@torch.no_grad()
def test_the_last_run_says_which_columns_every_layer_worked_on(method: str) -> None:
    """What enters a layer is the returned hidden state at these columns; attentions are as wide as they are."""
    tiny = build("llava", attn="eager", layers=4)
    inputs = prompt("llava", "image").inputs
    options = {"schedule": ((1, 0.6), (3, 0.2))} if method == "pyramiddrop" else {"ratio": 0.4}
    entering: dict[int, Tensor] = {}

    def note(layer: int, args: Any) -> None:
        entering[layer] = args[0]

    more = {"output_hidden_states": True, "output_attentions": True}
    with tokprune.apply(tiny.model, method, **options) as pruning:
        generated = tiny.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, **more)
        for i, layer in enumerate(tiny.model.base_model.language_model.layers):
            layer.input_layernorm.register_forward_pre_hook(lambda m, a, i=i: note(i, a))
        out = tiny.model(**inputs, **more)
        columns = [pruning.last.columns(i) for i in range(4)]
    for i, seen in entering.items():
        width = columns[i].shape[1]
        assert out.attentions[i].shape[-2:] == generated.attentions[0][i].shape[-2:] == (width, width)
        real = columns[i] >= 0
        states = out.hidden_states[i].gather(1, columns[i].clamp(min=0)[..., None].expand_as(seen))
        torch.testing.assert_close(states[real], seen[real])
    assert len({c.shape[1] for c in columns}) == {"random": 1, "pyramiddrop": 3, "none": 1}[method]
