"""generate() in all its ways on pruned models, against the unpruned model on a prompt that was shortened by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import (
    HYBRID,
    QUICK,
    VIDEO,
    placeholder_ids,
    prompt,
    prompt_of,
    reference,
    run,
    samples,
    slow_unless,
)
from tests.adapters.shortened import BLOCKWISE, RATIO, TOLERANCE, generate, oracle
from tokprune.testing import FAMILIES

SCENARIOS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beam, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.4},
    "static cache": {"cache_implementation": "static"},
    "static cache, beam": {"cache_implementation": "static", "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 16},
    "chunked prefill, static cache": {"prefill_chunk_size": 16, "cache_implementation": "static"},
    "chunked prefill, beam": {"prefill_chunk_size": 16, "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def works_natively(family: str, scenario: str, kind: str = "image") -> bool:
    """Whether transformers itself can do it; what it cannot, pruning cannot either."""
    if "chunked" in scenario and family in ("ovis2", "fast_vlm", "perception_lm"):
        return False  # raises: raw pixels cannot be split, or the placeholders are other ids than the features'
    if "chunked" in scenario and kind != "image" and family in ("glm4v", "video_llama_3"):
        return False  # wrong tokens: its clips stand under the images' id; raises: its compression mask is not split
    if scenario == "prompt lookup" and family in HYBRID:
        return False  # raises: a recurrent state cannot be rolled back
    # glm4v repeats the images of a two-image prompt as A, A, B, B: wrong for beams, even with top_k=1
    return not (family == "glm4v" and ("beam" in scenario or scenario == "return sequences"))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_generation_equals_that_of_a_shortened_prompt(family: str, scenario: str) -> None:
    if not works_natively(family, scenario):
        pytest.skip("fails natively")
    case, options = prompt(family), SCENARIOS[scenario]
    if scenario == "prompt lookup":  # transformers drafts for one prompt at a time
        case = prompt_of(case.tiny, samples("image")[:1])
    elif family in BLOCKWISE and {"num_beams", "num_return_sequences"} & options.keys():
        case = prompt_of(case.tiny, samples("image")[1:])  # encoder rows of unequal prompts cannot be repeated natively
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, "random", ratio=RATIO, positions=positions) as pruning:
            tokens, scores = generate(case, case.inputs, options)
        keep = pruning.last.keep
        if len(keep) != len(case.real):  # beams repeat prompts
            repeats = len(keep) // len(case.real)
            assert torch.equal(keep, keep[::repeats].repeat_interleave(repeats, 0))
            keep = keep[::repeats]
        if scenario == "no cache":  # planned anew in each step; the last plan has the new tokens, too
            keep = keep[:, : case.real.shape[1]]
        wanted, wanted_scores = oracle(case, keep, positions, options)
        assert torch.equal(tokens, wanted)
        if scores is not None:
            torch.testing.assert_close(scores, wanted_scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["ovis2", "fast_vlm", "perception_lm"])
def test_chunked_prefill_that_fails_natively_fails_pruned(family: str) -> None:
    case = prompt(family)
    with pytest.raises((TypeError, ValueError)) as native:
        case.tiny.model.generate(**case.inputs, max_new_tokens=2, prefill_chunk_size=16)
    with (
        tokprune.apply(case.tiny.model, "random", ratio=RATIO),
        pytest.raises(type(native.value)),
    ):
        case.tiny.model.generate(**case.inputs, max_new_tokens=2, prefill_chunk_size=16)
    assert torch.equal(run(case.tiny, case.inputs).logits, case.unpruned.logits)


@pytest.mark.parametrize("scenario", ["greedy", "beam", "static cache", "chunked prefill"])
@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f == "internvl" and k == "video", f, k) for f in VIDEO for k in ("video", "mixed")]
)
def test_generation_over_clips(family: str, kind: str, scenario: str) -> None:
    """Steps after the prefill against the brute-force reference; the tokens of cacheless and cached decoding agree."""
    tiny = prompt(family).tiny
    if kind == "mixed" and not tiny.spec.mixes:
        pytest.skip("takes images or clips, not both")
    if not works_natively(family, scenario, kind):
        pytest.skip("fails natively")
    case = prompt(family, kind)
    greedy = SCENARIOS[scenario] if scenario != "beam" else {"num_beams": 2, "num_return_sequences": 2}
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "random", ratio=RATIO, positions=positions) as pruning:
            tokens, scores = generate(case, case.inputs, greedy)
        keep = pruning.last.keep[:: len(pruning.last.keep) // len(case.real)]
        if scenario == "beam":
            for i in range(2):  # each beam's score is the mean log-probability of its tokens
                answer = reference(tiny, case.generate, keep, positions, tokens[i::2, :-1])
                steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)
                told = steps.log_softmax(-1).gather(-1, tokens[i::2, :, None])[..., 0]
                torch.testing.assert_close(scores[i::2], told.mean(-1), rtol=0, atol=10 * TOLERANCE)
            continue
        answer = reference(tiny, case.generate, keep, positions, tokens[:, :-1])
        steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)[..., :256]
        assert torch.equal(steps.argmax(-1), tokens)


def test_streamer_and_stopping_see_the_prompt_as_written() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            pass

    tiny = prompt("llava").tiny
    inputs = tiny.inputs(samples("image")[:1])
    length = inputs["input_ids"].shape[1]
    lengths: list[int] = []

    def watch(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(lengths) == 4)

    streamer = Collect()
    with tokprune.apply(tiny.model, "random", ratio=RATIO):
        out = tiny.model.generate(**inputs, max_length=length + 9, streamer=streamer, stopping_criteria=[watch])
        assert tiny.model.generate(**inputs, max_length=length + 3).shape[1] == length + 3
    assert lengths == [length + 1, length + 2, length + 3, length + 4]
    assert torch.equal(torch.cat(streamer.pieces), out[0])


def test_placeholders_are_never_generated() -> None:
    """What keeps the turns above honest: a random model that wrote a placeholder would break its next turn, natively
    too."""
    for family in QUICK:
        model = prompt(family).tiny.model
        assert placeholder_ids(model.config) <= set(model.generation_config.suppress_tokens)
