"""One loaded model with its pruning: answers batches of prompts, scores continuations, measures both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tokprune
from tokprune.adapters.prompting import inputs_of
from tokprune.adapters.query import tokenizer_of
from tokprune.config import PruneConfig
from tokprune.evaluation.lmms_meter import SampleRecord, clock_times, stages_of, token_counts
from tokprune.evaluation.lmms_requests import Prompt
from tokprune.evaluation.smaller import Smaller
from tokprune.loading import Loaded
from tokprune.profiling.flops import stage_flops
from tokprune.profiling.timing import StageClock
from tokprune.runtime.handle import Pruning
from tokprune.runtime.prefill import LastRun
from tokprune.types import Fields, Inputs, JsonObject

NEW_TOKENS = 128  # where neither the task nor the user sets a number
HARNESS_DEFAULT_STOP = ["\n\n"]  # lmms-eval adds it to tasks that name no stop


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

    @contextmanager
    def _asking(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Tell query-aware methods what is asked."""
        queries = [p.query for p in prompts]
        with self.pruning.query(queries) if self.pruning is not None else nullcontext():
            yield

    @property
    def _last(self) -> LastRun | None:
        return None if self.pruning is None else self.pruning.last

    def _kept(self, before: LastRun | None) -> Tensor | None:
        """Columns that the last prefill kept; None when nothing was pruned since `before`, as with a prompt of text."""
        last = self._last
        return None if last is None or last is before else last.keep

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
        before = self._last
        clock = StageClock(self.model.device)
        with self._asking(prompts), clock.watch(self._stages) if self._stages is not None else nullcontext():
            ids = self.model.generate(**inputs, **options)
        new = ids[:: ids.shape[0] // len(prompts), inputs["input_ids"].shape[1] :]
        tokenizer = tokenizer_of(self.processor)
        pad = getattr(tokenizer, "pad_token_id", None)
        times = clock_times(clock, len(prompts)) if self._stages is not None else {}
        counts = token_counts(self.model, inputs, self._kept(before))
        answers = []
        for i, (prompt, row, (total, kept, width)) in enumerate(zip(prompts, new, counts, strict=True)):
            total = total if whole is None else whole[i]
            text = cut(tokenizer.decode(row, skip_special_tokens=True), stops)
            length = _length(row, pad)
            record = SampleRecord(prompt.row.task, prompt.row.doc_id, total, kept, width, length, **times)
            answers.append(Answer(text, record))
        return answers

    @torch.no_grad()
    def count_flops(self, prompt: Prompt, record: SampleRecord) -> SampleRecord:
        """The record with the FLOPs of its answer, by asking once more; unchanged where torch cannot count this
        model."""
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
        """Mean negative log-likelihood of the target after the prompt, whether greedy decoding would give it, the
        cost."""
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
        before = self._last
        clock = StageClock(self.model.device)
        with self._asking([prompt]), clock.watch(self._stages) if self._stages is not None else nullcontext():
            logits = self.model(**longer, use_cache=False).logits
        likely = logits[0, -len(tail) - 1 : -1].float().log_softmax(-1)  # from the end: pruned prompts may be shorter
        loss = -likely.gather(-1, tail[:, None]).mean()
        greedy = bool((likely.argmax(-1) == tail).all())
        times = clock_times(clock, 1) if self._stages is not None else {}
        total, kept, reached = token_counts(self.model, longer, self._kept(before))[0]
        total = total if whole is None else whole[0]
        record = SampleRecord(prompt.row.task, prompt.row.doc_id, total, kept, reached, 0, **times)
        return float(loss), greedy, record

    def _target_ids(self, prompt_ids: Tensor, target: str) -> Tensor:
        """The target as the tokenizer would write it right after the prompt, with a space where the prompt ends in a
        word."""
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
