"""Tiny random-weight models and real processors of every supported family, offline: for our tests and for plug-in
authors.

tiny = tokprune.testing.build("qwen2_5_vl")
inputs = tiny.inputs([["What is on ", ("image", picture(60, 40)), "?"]])
tiny.model.generate(**inputs, max_new_tokens=4)

And a proof that pruning is exact on any model: `self_test(model, prompts(model, processor))`, a list of checks.
What tokprune sees of a vision tower and can do inside it: `reach(model, inputs)`.
"""

from __future__ import annotations

from tokprune.runtime.reach import Reach, ReachAnswer, reach
from tokprune.testing.device import StandInDevice
from tokprune.testing.doctor import Diagnosis, diagnose
from tokprune.testing.media import clip, picture
from tokprune.testing.self_test import Check, prompts, self_test
from tokprune.testing.tiny import FAMILIES, Part, Spec, TinyVLM, build

__all__ = [
    "FAMILIES",
    "Check",
    "Diagnosis",
    "Part",
    "Reach",
    "ReachAnswer",
    "Spec",
    "StandInDevice",
    "TinyVLM",
    "build",
    "clip",
    "diagnose",
    "picture",
    "prompts",
    "reach",
    "self_test",
]
