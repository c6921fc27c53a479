"""Tiny random-weight models and real processors of every supported family, offline: for our tests and for plug-in authors.

tiny = tokprune.testing.build("qwen2_5_vl")
inputs = tiny.inputs([["What is on ", ("image", picture(60, 40)), "?"]])
tiny.model.generate(**inputs, max_new_tokens=4)
"""

from __future__ import annotations

from tokprune.testing.media import clip, picture
from tokprune.testing.tiny import FAMILIES, Part, Spec, TinyVLM, build

__all__ = ["FAMILIES", "Part", "Spec", "TinyVLM", "build", "clip", "picture"]
