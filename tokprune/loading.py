"""Opens what a command names: a device, a dtype, any Hugging Face VLM or the embedded demo, and its text-image
scorer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokprune.errors import OptionError, missing_extra, unknown
from tokprune.types import VLM, Fields, JsonObject, Processor

if TYPE_CHECKING:
    import torch
    from transformers import AutoModelForImageTextToText

    from tokprune.methods.base import Method

DEMO, DEMO_CLIPS = "demo", "demo-clips"
"""Names of the embedded VLMs, for pictures and for clips."""

DTYPES = {
    **{name: name for name in ("float32", "bfloat16", "float16")},
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
DEVICES = ("cpu", "cuda", "cuda:0", "mps", "xpu")
HUB_SECONDS = 5.0
"""How long the hub may take to say whether a name exists, before a load that retries for minutes is tried."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its processor. embedded: a demo VLM, which knows some eighty words and answers in
    one."""

    model: VLM
    processor: Processor
    embedded: bool = False


@dataclass(frozen=True)
class LoadOptions:
    """How a model is opened. dtype: None or "auto" as stored. attn: sdpa, eager, flash_attention_2 ...; None as the
    model says. device_map: places the parts of a large model, in place of `device`. processor: arguments of the
    processor.
    random_weights: build the model from its config; its weights are not read.
    """

    device: str | torch.device = "cpu"
    dtype: str | None = None
    attn: str | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    processor: Fields = field(default_factory=dict)
    random_weights: bool = False


def check_device(name: str) -> torch.device:
    """The device called `name`, or the error that says which there are."""
    import torch

    try:
        place = torch.device(name)
    except RuntimeError:
        if name.lower().startswith(("gpu", "nvidia")):
            raise OptionError(f"unknown device {name!r}. Did you mean 'cuda'? Allowed: {', '.join(DEVICES)}.") from None
        raise unknown("device", name, DEVICES) from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {name!r}: this torch sees no GPU; use cpu (--device cpu, device=cpu).")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs here, counted from cuda:0.")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"device {name!r}: this torch sees no Apple GPU; use cpu (--device cpu, device=cpu).")
    if place.type not in ("cpu", "cuda", "mps", "xpu"):
        raise unknown("device", name, DEVICES)
    return place


def check_dtype(name: str | None) -> torch.dtype | None:
    """The dtype called `name`; None for None and "auto": as stored."""
    import torch

    if name is None or name == "auto":
        return None
    if name.lower() not in DTYPES:
        raise unknown("dtype", name, ("auto", *DTYPES))
    dtype: torch.dtype = getattr(torch, DTYPES[name.lower()])
    return dtype


def split_methods(text: str) -> list[str]:
    """The names in "quota+divprune", or with commas between; raises OptionError for one that is not registered."""
    from tokprune.registry import method_class

    text = re.sub(r"(?<=\w)\+\s*(?=$|,|\+)", "_plus", text)  # the "+" of PruMerge+ joins nothing
    names = [part.strip() for part in text.replace(",", "+").split("+") if part.strip()]
    if not names:
        raise OptionError("no method is named; write for example divprune, or quota+divprune for two stages.")
    return [method_class(name).info.name for name in names]


def load(name: str, options: LoadOptions | None = None, video: bool = False) -> Loaded:
    """The model called `name`: a hub id, a folder, "demo" or "demo-clips". video: for questions about clips.

    Raises OptionError, within seconds, for a name that neither this machine nor the hub has, and for a model that takes
    no pictures; MissingExtraError for a processor whose package is not installed.
    """
    options = options or LoadOptions()
    dtype = check_dtype(options.dtype)
    if name in (DEMO, DEMO_CLIPS):
        return _load_demo(options, dtype, video or name == DEMO_CLIPS)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tokprune.adapters.checkpoint import check_vlm, refusal_of
    from tokprune.profiling.runs import is_out_of_memory

    name = os.path.expanduser(name)
    common: JsonObject = {"trust_remote_code": options.trust_remote_code, **check_reachable(name, options.revision)}
    if options.revision is not None:
        common["revision"] = options.revision
    more = {"attn_implementation": options.attn, "device_map": options.device_map}
    auto = AutoModelForImageTextToText
    check_vlm(name, **common)
    try:
        processor: Processor = AutoProcessor.from_pretrained(name, **common, **options.processor)
        arguments = {key: value for key, value in more.items() if value is not None}
        if options.random_weights:
            model = _random(auto, name, dtype, common)
        else:
            model = auto.from_pretrained(name, dtype=dtype or "auto", **common, **arguments)
        model = model if options.device_map is not None else model.to(options.device)
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise missing_extra("torchvision", "vision", f"the processor of {name}") from error
        raise OptionError(f"cannot load the model {name}: {error}") from error
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot load the model {name}: {refusal_of(error) or error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OptionError(
            f"{name} does not fit; load it as bfloat16 (--dtype bfloat16), or take a smaller one."
        ) from error
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    return Loaded(model.eval(), processor)


def _random(auto: type[AutoModelForImageTextToText], name: str, dtype: torch.dtype | None, common: Fields) -> Any:
    """A model with random weights, the same at every call, in float32 unless a dtype is asked for."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config, dtype=dtype or torch.float32)


def _load_demo(options: LoadOptions, dtype: torch.dtype | None, video: bool) -> Loaded:
    import tokprune.demo

    if options.processor:
        raise OptionError(f"the demo VLM takes no processor options, such as {next(iter(options.processor))!r}.")
    made, processor = (tokprune.demo.load_clips if video else tokprune.demo.load)(options.device, dtype)
    model = cast("VLM", made)
    if options.attn is not None:
        try:
            model.set_attn_implementation(options.attn)
        except (ValueError, ImportError) as error:
            raise OptionError(f"attention {options.attn!r}: {error}") from error
    return Loaded(model, processor, embedded=True)


def check_reachable(name: str, revision: str | None = None, kind: str = "model") -> JsonObject:
    """Say in seconds what a load would find out after minutes of retries: that nobody has the model or data set `name`.

    Returns {"local_files_only": True} where the hub does not answer but this machine has a copy. kind: "model" or
    "dataset".
    """
    from huggingface_hub import HfApi, constants, errors

    if Path(name).exists():
        return {}
    cached = (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir()
    if kind == "dataset":
        prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
        cached = cached or (prepared / name.replace("/", "___")).is_dir()
    if kind == "model" and not cached and (name.count("/") != 1 or name[0] in "./~"):
        if "/" in name or name[0] in ".~":
            raise OptionError(
                f"there is no folder {name!r}; give a folder that exists, or a {kind} of the hub: owner/name."
            )
        raise OptionError(
            f"there is no folder {name!r}, and no {kind} of the hub is called that; write its owner, too: "
            f"llava-hf/{name}, for example."
        )
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        ask(name, revision=revision, timeout=HUB_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        if not cached:
            raise OptionError(
                f"the hub has no {kind} {name!r}{'' if revision is None else f' at {revision!r}'}, or it is private; "
                f"check the spelling, or log in: hf auth login."
            ) from error
    except Exception as error:  # a proxy, a firewall, no network: of many libraries
        if not cached:
            words = str(error).strip().partition("\n")[0] or type(error).__name__
            raise OptionError(
                f"the {kind} {name!r} is not on this machine and the hub cannot be reached ({words}); connect, or "
                f"download it elsewhere (hf download {name}{'' if kind == 'model' else ' --repo-type dataset'}) and "
                f"give its folder."
            ) from error
        return {"local_files_only": True}
    return {}


def needs_scorer(methods: Sequence[Method | str]) -> bool:
    """Whether one of the methods compares the question with what is seen. methods: names may be joined by "+"."""
    from tokprune.registry import method_class

    parts = [part for m in methods for part in (m.split("+") if isinstance(m, str) else (m,))]
    return any((method_class(m) if isinstance(m, str) else m).info.query_aware for m in parts)


def demo_scorer(loaded: Loaded, methods: Sequence[Method | str]) -> object:
    """The demo's own text-image scorer, for the demo and methods that need one; else None."""
    if not loaded.embedded or not needs_scorer(methods):
        return None
    import tokprune.demo

    return tokprune.demo.load_scorer(device=loaded.model.device)


@contextmanager
def no_bars(wanted: bool = True) -> Iterator[None]:
    """Without the loading bars of transformers, which -q must not show; they are as before afterwards."""
    if not wanted:
        yield
        return
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
