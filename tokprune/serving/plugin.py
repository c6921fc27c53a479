"""What vLLM finds under its entry point: names of models that prune. They are loaded when a server asks for one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

from tokprune.errors import OptionError, UnsupportedModelError, install_line, unknown
from tokprune.types import JsonObject

PREFIX = "Tokprune"
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "tokprune.serving.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokprune.serving.anyres:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "tokprune.serving.anyres:PrunedOneVision",
    "Qwen2_5_VLForConditionalGeneration": "tokprune.serving.qwen:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "tokprune.serving.qwen:PrunedQwen3VL",
    "InternVLForConditionalGeneration": "tokprune.serving.internvl:PrunedInternVL",
}
"""Architecture of a checkpoint's config.json -> the class that serves it pruned, under the name with PREFIX."""

TESTED = (0, 32), (0, 33)
"""Minor versions of vLLM: `make serve-test` runs the first; the second has the same files, as far as we use them."""

SPELLING = (
    'Write --hf-overrides \'{"architectures": ["TokpruneLlavaForConditionalGeneration"], "tokprune": {"method": '
    f'"divprune", "ratio": 0.25}}}}\', with {PREFIX} before the architecture of config.json; there '
    f"are {', '.join(PREFIX + name for name in ARCHITECTURES)}."
)


def register() -> None:
    """Name the pruned models to vLLM; it calls this in each of its processes, in some of them twice."""
    from vllm import ModelRegistry

    check_command(sys.argv[1:])
    for name, path in ARCHITECTURES.items():
        if PREFIX + name not in ModelRegistry.models:
            ModelRegistry.register_model(PREFIX + name, path)


def check_command(words: Sequence[str]) -> None:
    """Refuse a server that was given settings of tokprune and would serve unpruned: vLLM ignores what it does not know.

    words: the command line behind the program's name. vLLM shows a plug-in no config before it chose a model, so what
    stands in a file of `--config`, or in `LLM(...)`, is not seen here.
    """
    given: dict[str, set[str]] = {"hf_overrides": set(), "additional_config": set()}
    pruned = False
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        option, *path = flag.removeprefix("--").removesuffix("+").split(".")  # --hf-overrides.tokprune.ratio 0.5
        option = option.replace("-", "_")
        if not flag.startswith("--") or option not in given:
            continue
        value = value if equals else "".join(words[i + 1 : i + 2])
        try:
            told = json.loads(value)
        except ValueError:
            told = value
        given[option] |= {path[0]} if path else set(told) if isinstance(told, dict) else set()
        names = (
            told.get("architectures", ()) if isinstance(told, dict) else told if path[:1] == ["architectures"] else ""
        )
        pruned |= option == "hf_overrides" and PREFIX in str(names)
    if "tokprune" in given["additional_config"]:
        raise OptionError(f"tokprune stands in --additional-config, where nothing reads it. {SPELLING}")
    if "tokprune" in given["hf_overrides"] and not pruned:
        raise OptionError(
            "--hf-overrides has settings of tokprune and names no architecture of it, so vLLM would take its own model "
            f"and prune nothing. {SPELLING}"
        )


def overrides(architecture: str, method: str = "divprune", **settings: object) -> JsonObject:
    """The `hf_overrides` with which vLLM serves a checkpoint pruned: LLM(..., hf_overrides=overrides(...)).

    architecture: as config.json of the checkpoint names it. settings: ratio or budget, and the method's options as a
    dictionary `options`; checked when the server reads them.
    """
    if architecture not in ARCHITECTURES:
        raise unknown("architecture to serve pruned", architecture, ARCHITECTURES)
    return {"architectures": [PREFIX + architecture], "tokprune": {"method": method, **settings}}


def check_version(installed: str | None = None) -> None:
    """Refuse a vLLM whose models and processors may have other methods than those that we override."""
    if installed is None:
        import vllm

        installed = str(vllm.__version__)
    found = re.match(r"(\d+)\.(\d+)", installed)
    minor = tuple(int(part) for part in found.groups()) if found else None
    if minor is None or not TESTED[0] <= minor <= TESTED[-1]:
        span = " to ".join(".".join(map(str, version)) for version in (TESTED[0], TESTED[-1]))
        raise UnsupportedModelError(
            f"vLLM {installed} is installed; tokprune's models for vLLM are written for {span}, and each minor version "
            f"so far has moved something. Run: {install_line('vllm')}"
        )
