"""The model_args of the lmms-eval model `tokprune`: what they may be, and the pruning they describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokprune.config import PruneConfig
from tokprune.errors import OptionError, nearest, unknown
from tokprune.evaluation.cells import BASELINE, OPTION, check_counts
from tokprune.methods.base import Method
from tokprune.registry import get_method, method_class
from tokprune.types import Fields, JsonObject, Options
from tokprune.video.sampling import frames_by_length

CONTROLS = ("", "no_image", "shuffled")
ON_ERROR = ("raise", "continue")
PROCESSOR = "processor."
_FROM_HARNESS = ("batch_size", "max_batch_size", "device")


@dataclass(frozen=True)
class ModelArgs:
    """What a user may write after --model_args.

    pretrained: a Hugging Face name or folder, or "demo" (the embedded VLM; questions on clips go to its sibling), or
    "demo-clips". method: "none", a name, or names of several stages joined by "+". ratio, budget, prompt_budget,
    positions: as in tokprune.apply. scorer: "demo" or "open_clip:<model>/<weights>". seed: of methods that draw, and of
    sampled answers. option.<field>: a method's own field; with several methods option.<method>.<field>.
    processor.<field>: of the processor, such as processor.max_pixels. frames: at most so many frames of a video (None:
    32, or what the demo was made for), or "quota" (96, and 64 more per hour). fps: one frame per 1/fps seconds.
    frame_rule: how `frames` are spread. video_backend: who decodes. system_prompt: a text, or a file that holds it.
    max_new_tokens: longest answer, in place of the tasks' own. flops_samples: questions per task whose FLOPs are
    counted (each costs one more short answer). control: "no_image" leaves pictures out, "shuffled" shows another row's.
    on_error: "raise" ends the run at the first row that fails; "continue" goes on and lists it under `failures`.
    """

    pretrained: str = ""
    method: str = BASELINE
    ratio: float | None = None
    budget: int | None = None
    prompt_budget: int | None = None
    positions: str = "auto"
    scorer: str | None = None
    seed: int = 0
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    batch_size: int = 1
    frames: int | str | None = None
    fps: float | None = None
    frame_rule: str = "linspace_unique"
    video_backend: str = "auto"
    system_prompt: str = ""
    max_new_tokens: int | None = None
    flops_samples: int = 2
    control: str = ""
    on_error: str = "raise"
    options: Options = field(default_factory=dict)
    processor: Fields = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise OptionError("model_args lack pretrained; write pretrained=<name or folder>, or pretrained=demo.")
        if self.control not in CONTROLS:
            raise unknown("control", self.control, CONTROLS[1:])
        if self.on_error not in ON_ERROR:
            raise unknown("on_error", self.on_error, ON_ERROR)
        check_counts(self, "batch_size", "max_new_tokens")
        if isinstance(self.frames, str):
            frames_by_length(self.frames, 0.0)
        else:
            check_counts(self, "frames")
        if not isinstance(self.flops_samples, int) or isinstance(self.flops_samples, bool) or self.flops_samples < 0:
            raise OptionError(f"flops_samples={self.flops_samples!r} is not a count; 0 counts none.")
        if self.device_map is not None and self.device is not None:
            raise OptionError("device and device_map are both given; device_map places the model alone.")

    @staticmethod
    def parse(model_args: Fields) -> ModelArgs:
        """The arguments as lmms-eval hands them over: strings are converted already, but "None" is still a word."""
        names = [f.name for f in dataclasses.fields(ModelArgs) if f.name not in ("options", "processor")]
        values: JsonObject = {}
        options: JsonObject = dict(model_args.get("options") or {})
        processor: JsonObject = dict(model_args.get("processor") or {})
        for name, raw in model_args.items():
            value = None if isinstance(raw, str) and raw.lower() in ("none", "") and name != "method" else raw
            if name.startswith(OPTION):
                options[name.removeprefix(OPTION)] = value
            elif name.startswith(PROCESSOR):
                processor[name.removeprefix(PROCESSOR)] = value
            elif name in names:
                if value is not None:  # None is the same as not given
                    values[name] = value
            elif name not in (*_FROM_HARNESS, "options", "processor"):
                known = [*names, "option.<field>", "processor.<field>"]
                raise OptionError(
                    f"tokprune has no model_arg {name!r}.{nearest(name, names)} Allowed: {', '.join(sorted(known))}."
                )
        size = values.get("batch_size")
        if isinstance(size, str):
            if not size.isdigit():
                raise OptionError(
                    f"batch_size={size!r}: tokprune does not choose one by itself; write such as batch_size=8."
                )
            values["batch_size"] = int(size)
        return ModelArgs(**values, options=options, processor=processor)


def pruning_config(
    method: str | Method | Sequence[str | Method] | PruneConfig | None,
    ratio: float | None = None,
    budget: int | None = None,
    positions: str = "auto",
    options: Options | None = None,
    seed: int | None = None,
    prompt_budget: int | None = None,
) -> PruneConfig | None:
    """The PruneConfig that the arguments describe, or None for the unpruned baseline (method "none").

    method: names may be joined by "+". options: fields of the one method named, or "<method>.<field>" for several.
    seed: for methods that have a field of that name and were not given one.
    """
    if isinstance(method, PruneConfig):
        return method
    listed: list[str | Method] = []
    for part in [method] if isinstance(method, str | Method) or method is None else method:
        listed += part.split("+") if isinstance(part, str) else [] if part is None else [part]
    listed = [m.strip() if isinstance(m, str) else m for m in listed]
    listed = [m for m in listed if m != BASELINE and m != ""]
    if not listed:
        if options:
            raise OptionError(f"options {sorted(options)} belong to a method, and method=none has none.")
        return None
    left = dict(options or {})
    methods = []
    for m in listed:
        if not isinstance(m, str):
            methods.append(m)
            continue
        name = method_class(m).info.name
        fields = {k.removeprefix(f"{name}."): left.pop(k) for k in list(left) if k.startswith(f"{name}.")}
        if len(listed) == 1:
            fields |= left
            left = {}
        if seed is not None and any(f.name == "seed" and f.init for f in dataclasses.fields(method_class(m))):
            fields.setdefault("seed", seed)
        methods.append(get_method(m, **fields))
    if left:
        names = [m.info.name for m in methods]
        raise OptionError(
            f"options {sorted(left)} belong to none of the methods {', '.join(names)}; with several, write "
            f"option.{names[0]}.<field>=<value>."
        )
    return PruneConfig(tuple(methods), ratio, budget, positions, prompt_budget=prompt_budget)
