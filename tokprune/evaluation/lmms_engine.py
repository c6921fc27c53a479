"""One loaded model with its pruning: answers batches of prompts, scores continuations, measures both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

import tokprune
from tokprune.adapters.prompting import inputs_of
from tokprune.adapters.query import tokenizer_of
from tokprune.config import PruneConfig
from tokprune.errors import OptionError
from tokprune.evaluation.lmms_meter import SampleRecord, stages_of, timed, token_counts
from tokprune.evaluation.lmms_options import ModelArgs
from tokprune.evaluation.lmms_requests import Prompt
from tokprune.loading import DEMO, DEMO_CLIPS, Loaded, LoadOptions, check_device, demo_scorer, load, needs_scorer
from tokprune.profiling.flops import stage_flops
from tokprune.runtime.handle import Pruning
from tokprune.runtime.prefill import LastRun
from tokprune.scaling import resize, token_counter
from tokprune.types import Fields, Inputs, JsonObject, Processor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tokprune.methods.base import Method

R = TypeVar("R")

NEW_TOKENS = 128  # where neither the task nor the user sets a number
HARNESS_DEFAULT_STOP = ["\n\n"]  # lmms-eval adds it to tasks that name no stop
FRAMES = 32  # of a video, where nothing else is said
DEMO_FRAMES = 8  # what the demo VLM for clips was trained on


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt, and what it cost."""

    text: str
    record: SampleRecord


def generation_options(generation_kwargs: Fields, longest: int | None) -> tuple[JsonObject, tuple[str, ...], list[str]]:
    """A task's generation_kwargs as arguments of model.generate, its stop strings, and the names that mean nothing
    there.

    Greedy unless the task sets a temperature above 0. Stop strings are those that the task names: the blank line that
    lmms-eval adds to tasks without any is not one, since it would cut answers that begin with reasoning. longest: in
    place of the task's max_new_tokens.
    """
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    options = {k: v for k, v in generation_kwargs.items() if k in known and v is not None}
    ignored = sorted(k for k in generation_kwargs if k not in known and k not in ("until", "max_agentic_steps"))
    if options.pop("do_sample", None) is not False and float(options.get("temperature") or 0) > 0:
        options["do_sample"] = True
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options["max_new_tokens"] = int(longest or options.get("max_new_tokens") or NEW_TOKENS)
    until = generation_kwargs.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    if stops == HARNESS_DEFAULT_STOP:
        stops = []
    return options, tuple(s for s in stops if s), ignored


def cut(text: str, stops: Sequence[str]) -> str:
    """The answer up to the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


class Smaller:
    """Scales the pictures of chats to a share of the visual tokens that the processor makes of them."""

    def __init__(self, processor: Processor, ratio: float) -> None:
        self.processor, self.ratio, self.count = processor, ratio, token_counter(processor)

    def __call__(self, chat: Sequence[Fields]) -> tuple[list[JsonObject], int]:
        """The chat with smaller pictures, and how many visual tokens the ones it came with would give."""
        total, out = 0, []
        for message in chat:
            content = message["content"]
            if not isinstance(content, str):
                content = [dict(part) for part in content]
                for part in content:
                    if part.get("type") == "video":
                        raise OptionError("resize scales pictures; for clips take fewer frames: uniform_frames.")
                    if part.get("type") == "image":
                        total += self.count(part["image"])
                        part["image"] = resize(part["image"], self.processor, self.ratio, self.count)
            out.append({**message, "content": content})
        return out, total


class Engine:
    """A model, its processor, and the pruning that is on it now (none after construction)."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.model, self.processor = loaded, loaded.model, loaded.processor
        self.pruning: Pruning | None = None
        self.smaller: Smaller | None = None
        self.notes: list[str] = []
        self._stages = stages_of(self.model)
        self._countable = True

    def prune(self, config: PruneConfig | None, scorer: object = None, smaller: float | None = None) -> None:
        """Run on fewer tokens from now on; None gives the model back untouched. smaller: keep ratio of the baseline
        `resize`, which scales pictures instead.
        """
        tokprune.remove(self.model)
        self.pruning = None
        self.smaller = None if smaller is None else Smaller(self.processor, smaller)
        if config is not None:
            self.pruning = tokprune.apply(self.model, config, processor=self.processor, scorer=scorer)

    def _asking(self, prompts: Sequence[Prompt]) -> AbstractContextManager[object]:
        """Tell query-aware methods what is asked."""
        return nullcontext() if self.pruning is None else self.pruning.query([p.query for p in prompts])

    @property
    def _last(self) -> LastRun | None:
        return None if self.pruning is None else self.pruning.last

    def _measured(
        self, prompts: Sequence[Prompt], inputs: Inputs, whole: list[int] | None, call: Callable[[], R]
    ) -> tuple[R, list[SampleRecord]]:
        """What a call with these inputs returns, and what it cost each prompt, new tokens not counted yet.

        whole: visual tokens of the pictures before they were made smaller.
        """
        before = self._last
        with self._asking(prompts), timed(self.model.device, self._stages, len(prompts)) as times:
            out = call()
        last = self._last  # as before where nothing was pruned, as with prompts of text
        counts = token_counts(self.model, inputs, None if last is None or last is before else last.keep)
        totals = [total for total, _, _ in counts] if whole is None else whole
        records = [
            SampleRecord(prompt.row.task, prompt.row.doc_id, total, kept, width, 0, **times)
            for prompt, total, (_, kept, width) in zip(prompts, totals, counts, strict=True)
        ]
        return out, records

    def _inputs(self, prompts: Sequence[Prompt]) -> tuple[Inputs, list[int] | None]:
        """Model inputs of prompts; where their pictures are made smaller, also how many visual tokens they had."""
        chats: list[Sequence[Fields]] = [p.chat for p in prompts]
        if self.smaller is None:
            return inputs_of(self.model, self.processor, chats), None
        scaled = [self.smaller(chat) for chat in chats]
        return inputs_of(self.model, self.processor, [chat for chat, _ in scaled]), [total for _, total in scaled]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], longest: int | None, seed: int = 0) -> list[Answer]:
        """Answers to prompts with equal generation settings and media of one kind, as one batch.

        longest: answer length in place of the task's. Sampled answers are drawn with `seed` and the first row's number.
        """
        options, stops, ignored = generation_options(prompts[0].generation, longest)
        for name in ignored:
            self.note(f"generation_kwargs of {prompts[0].row.task}: {name!r} is no argument of generate and is ignored")
        inputs, whole = self._inputs(prompts)
        if options["do_sample"]:
            torch.manual_seed(seed * 1_000_003 + prompts[0].row.doc_id)
        ids, records = self._measured(prompts, inputs, whole, lambda: self.model.generate(**inputs, **options))
        new = ids[:: ids.shape[0] // len(prompts), inputs["input_ids"].shape[1] :]
        tokenizer = tokenizer_of(self.processor)
        pad = getattr(tokenizer, "pad_token_id", None)
        answers = []
        for row, record in zip(new, records, strict=True):
            text = cut(tokenizer.decode(row, skip_special_tokens=True), stops)
            answers.append(Answer(text, replace(record, new_tokens=_length(row, pad))))
        return answers

    @torch.no_grad()
    def count_flops(self, prompt: Prompt, record: SampleRecord) -> SampleRecord:
        """The record with the FLOPs of its answer, by asking once more; as it is where torch cannot count."""
        if self._stages is None or not self._countable:
            return record
        inputs, _ = self._inputs([prompt])
        try:
            with self._asking([prompt]):
                flops = stage_flops(self.model, inputs, self._stages).total(max(record.new_tokens, 1))
        except Exception as error:  # an estimate beside the answers must not end the run: the reason is in the notes
            self._countable = False
            self.note(f"FLOPs are not counted: {type(error).__name__}: {error}")
            return record
        return replace(record, flops=flops)

    @torch.no_grad()
    def score(self, prompt: Prompt) -> tuple[float, bool, SampleRecord]:
        """Mean negative log-likelihood of the target after the prompt, whether it is the greedy answer, the cost."""
        inputs, whole = self._inputs([prompt])
        tail = self._target_ids(inputs["input_ids"][0], prompt.target or "")
        if not len(tail):
            raise ValueError(f"the continuation {prompt.target!r} has no tokens")
        width = inputs["input_ids"].shape[1]
        longer = dict(inputs)
        longer["input_ids"] = torch.cat([inputs["input_ids"], tail[None]], 1)
        for name, value in inputs.items():  # masks and token types run along the prompt, too
            if name != "input_ids" and isinstance(value, Tensor) and value.shape == (1, width):
                fill = torch.ones_like(tail) if name == "attention_mask" else torch.zeros_like(tail)
                longer[name] = torch.cat([value, fill[None].to(value.dtype)], 1)
        logits, (record,) = self._measured(
            [prompt], longer, whole, lambda: self.model(**longer, use_cache=False).logits
        )
        likely = logits[0, -len(tail) - 1 : -1].float().log_softmax(-1)  # from the end: pruned prompts may be shorter
        loss = -likely.gather(-1, tail[:, None]).mean()
        greedy = bool((likely.argmax(-1) == tail).all())
        return float(loss), greedy, record

    def _target_ids(self, prompt_ids: Tensor, target: str) -> Tensor:
        """The target as the tokenizer would write it right after the prompt, with a space behind a word."""
        tokenizer = tokenizer_of(self.processor)
        before = tokenizer.decode(prompt_ids[-8:])
        joined = target if not before or before[-1].isspace() or target[:1].isspace() else f" {target}"
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        both = tokenizer(before + joined, add_special_tokens=False)["input_ids"]
        clean = both[: len(start)] == start and len(both) > len(start)
        ids = both[len(start) :] if clean else tokenizer(joined, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long, device=prompt_ids.device)

    def note(self, text: str) -> None:
        """Keep something that a user should know, once."""
        if text not in self.notes:
            self.notes.append(text)


def _length(row: Tensor, pad: int | None) -> int:
    """How many tokens an answer has, the end mark included and the padding after it not."""
    if pad is None:
        return len(row)
    real = (row != pad).nonzero()
    return min(len(row), int(real[-1]) + 1) if len(real) else 0


def pick_device(name: str | None, accelerator: Accelerator) -> torch.device:
    """Where the model goes: as asked; each process of several has its own GPU, which the accelerator assigned."""
    if name is None or (accelerator.num_processes > 1 and name in ("cuda", "auto")):
        return torch.device(accelerator.device)
    return check_device(name)


def load_for(args: ModelArgs, kind: str, device: torch.device) -> Loaded:
    """The model for requests of a kind ("image", "video" or "text"). Raises OptionError when it cannot be opened."""
    a = args
    options = LoadOptions(
        device, a.dtype, a.attn_implementation, a.device_map, a.revision, a.trust_remote_code, a.processor
    )
    return load(args.pretrained, options, video=kind == "video")


def frames_for(args: ModelArgs, kind: str) -> int:
    """How many frames of a video the model gets unless told otherwise; the picture demo sees one."""
    if args.pretrained not in (DEMO, DEMO_CLIPS):
        return FRAMES
    return DEMO_FRAMES if args.pretrained == DEMO_CLIPS or kind == "video" else 1


def scorer_for(args: ModelArgs, loaded: Loaded, methods: tuple[Method, ...]) -> object:
    """The text-image scorer for these methods: the one asked for, the demo's own for the demo, else none."""
    if not needs_scorer(methods):
        return None
    if loaded.embedded and args.scorer in (None, "demo"):
        return demo_scorer(loaded, methods)
    return args.scorer
