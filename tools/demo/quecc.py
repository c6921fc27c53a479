"""Trains QueCC's query-aware convolution as the demo VLM's projector, and says how right its few tokens are.

python -m tools.demo.quecc --json benchmarks/results/quecc_demo.json     a few minutes of one CPU thread

Tower and LLM stay as they are; QueCC and a copy of the projector behind it learn from questions about scenes that are
in no other set. The paper trains the LLM, too, by LLaVA's recipe.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokprune
import tokprune.demo
from tokprune.demo.asking import BATCH, Asker
from tokprune.demo.scenes import Example, make_scene, questions
from tokprune.environment import environment
from tokprune.files import write_json
from tokprune.methods.connector.quecc import QueCC

FIRST_SCENE = 10_500_000  # none of the demo's training, nor of what it is measured on
LEVELS = (2, 3, 4, 5)  # of six hidden states of the tower; the paper: 12, 16, 22 and 23 of 25
RIVALS = ("random", "pool", "divprune", "visionzip", "cdpruner")


@dataclass
class Asked:
    """A question about the picture of number `scene`."""

    scene: int
    question: Tensor
    """(T,) ids from behind the picture to the last token before the answer."""
    answer: int


class FewTokens(nn.Module):
    """The demo VLM whose picture is a few tokens that the question shaped."""

    def __init__(self, model: Any, words: Any, kernel: int) -> None:
        super().__init__()
        llm, vision = model.config.text_config.hidden_size, model.config.vision_config.hidden_size
        self.quecc = QueCC(vision, vision * len(LEVELS), llm, kernel, heads=4)
        self.projector = type(model.model.multi_modal_projector)(model.config)
        self.projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        self.llama = [model.model.language_model]  # in a list: not trained, not saved
        self.prefix = words("<s> user:", return_tensors="pt", add_special_tokens=False)["input_ids"][0]

    def text(self, question: Tensor) -> Tensor:
        """(B, 1, D) the LLM's last state of the question alone. question: (B, T) ids."""
        ids = torch.cat([self.prefix.expand(len(question), -1), question], 1)
        with torch.no_grad():
            state: Tensor = self.llama[0](input_ids=ids, use_cache=False).last_hidden_state[:, -1:]
        return state

    def tokens(self, levels: Tensor, question: Tensor) -> Tensor:
        """(B, S, C) what goes into the projector. levels: (B, N, C * levels)."""
        x = levels.unflatten(-1, (len(LEVELS), -1))[:, :, LEVELS.index(4)]  # the layer that LLaVA selects
        out: Tensor = self.quecc(x, levels, self.text(question))
        return out

    def forward(self, levels: Tensor, question: Tensor) -> Tensor:
        """(B, V) logits of the answer."""
        llama = self.llama[0]
        visual = self.projector(self.tokens(levels, question))
        before = llama.embed_tokens(self.prefix).expand(len(visual), -1, -1)
        embeds = torch.cat([before, visual, llama.embed_tokens(question)], 1)
        state = llama(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
        return state @ llama.embed_tokens.weight.T


def asked_of(processor: Any, number: int, text: str, answer: str) -> Asked:
    """One question as ids."""
    words = processor.tokenizer
    ids = words(f"{text} assistant:", return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return Asked(number, ids, words(answer, add_special_tokens=False)["input_ids"][0])


@torch.no_grad()
def features(model: Any, processor: Any, pictures: Sequence[Any]) -> Tensor:
    """(S, N, C * levels) patches of the tower's layers, in half precision."""
    out = []
    for at in range(0, len(pictures), BATCH):
        pixels = processor.image_processor(pictures[at : at + BATCH], return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        out.append(torch.cat([states[i][:, 1:] for i in LEVELS], -1).half())
    return torch.cat(out)


def batches(asked: Sequence[Asked], size: int, rng: random.Random | None = None) -> Iterator[list[Asked]]:
    """Questions of equal length, once in order, or for ever at random."""
    groups: dict[int, list[Asked]] = defaultdict(list)
    for one in asked:
        groups[len(one.question)].append(one)
    if rng is None:
        for group in groups.values():
            yield from (group[at : at + size] for at in range(0, len(group), size))
    while rng is not None:
        length = len(rng.choice(asked).question)
        yield rng.sample(groups[length], min(size, len(groups[length])))


def told(net: FewTokens, levels: Tensor, some: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """Logits (B, V) and answers (B,) of a batch."""
    logits = net(levels[[a.scene for a in some]].float(), torch.stack([a.question for a in some]))
    return logits, torch.tensor([a.answer for a in some])


@torch.no_grad()
def accuracy(net: FewTokens, levels: Tensor, asked: Sequence[Asked]) -> float:
    """Share of right answers."""
    right = 0
    for some in batches(asked, 50):
        logits, answers = told(net, levels, some)
        right += int((logits.argmax(-1) == answers).sum())
    return right / len(asked)


@torch.no_grad()
def start_as_means(net: FewTokens, levels: Tensor) -> None:
    """Begin where the output is nearly the mean of each block, whatever the question: values pass the selected layer
    on, attention is even, and the last matrix is fitted.
    """
    quecc: Any = net.quecc
    k = quecc.kernel
    x = levels[:64].float()
    chosen = x.unflatten(-1, (len(LEVELS), -1))[:, :, LEVELS.index(4)]  # (S, N, C)
    width, first = chosen.shape[-1], LEVELS.index(4) * chosen.shape[-1]
    scale = 5 * chosen.flatten(0, 1).std(0)  # small enough for GELU to be nearly linear
    quecc.v_proj[0].weight.zero_()
    quecc.v_proj[0].weight[:, first : first + width] = torch.diag(1 / scale)
    quecc.v_proj[0].bias.copy_(-chosen.mean((0, 1)) / scale)
    quecc.v_proj[2].weight.copy_(2 * torch.eye(width))
    quecc.v_proj[2].bias.zero_()
    attention = quecc.clip_attn
    attention.in_proj_weight[: 2 * width] *= 0.1
    attention.in_proj_weight[2 * width :] = torch.eye(width)

    def means(grid: Tensor) -> Tensor:
        side = round(grid.shape[1] ** 0.5)
        pooled = torch.nn.functional.avg_pool2d(grid.transpose(1, 2).unflatten(2, (side, side)), k)
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)

    seen, wanted = means(quecc.v_proj(x)), means(chosen)
    seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
    found = torch.linalg.lstsq(seen, wanted).solution  # (C + 1, C)
    attention.out_proj.weight.copy_(found[:-1].T)
    attention.out_proj.bias.copy_(found[-1])


def train(net: FewTokens, levels: Tensor, asked: Sequence[Asked], options: Any) -> list[float]:
    """Toward right answers. Returns the mean loss of every 50 steps."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps)
    stream, log, start = batches(asked, options.batch, random.Random(0)), [], time.perf_counter()
    recent: list[float] = []
    for step in range(options.steps):
        loss = torch.nn.functional.cross_entropy(*told(net, levels, next(stream)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if step % 50 == 49:
            log.append(round(sum(recent) / len(recent), 4))
            recent.clear()
            print(f"step {step + 1}: loss {log[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
    return log


def rival(asker: Asker, scorer: Any, examples: list[Example], method: str, ratio: float) -> float:
    """Share of right answers under a connector method that leaves as many tokens."""
    right = 0
    with tokprune.apply(asker.model, method, ratio=ratio, processor=asker.processor, scorer=scorer):
        for at in range(0, len(examples), BATCH):
            some = examples[at : at + BATCH]
            right += sum(w == e.answer for w, e in zip(asker.answers(asker.inputs(some)), some, strict=True))
    return right / len(examples)


def main() -> None:
    """Train one kernel after the other, and measure beside methods that leave as many tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=140)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any
    model, processor = tokprune.demo.load()
    model.requires_grad_(False)
    scenes = [make_scene(FIRST_SCENE + n) for n in range(options.scenes)]
    levels = features(model, processor, [s.image for s in scenes])
    asked = [asked_of(processor, n, q.text, q.answer) for n, s in enumerate(scenes) for q in questions(s)]
    held_out = tokprune.demo.held_out(options.questions)
    shown = features(model, processor, [e.image for e in held_out])
    tests = [asked_of(processor, n, e.question, e.answer) for n, e in enumerate(held_out)]
    asker, scorer, rows = Asker(model, processor), tokprune.demo.load_scorer(), []
    for kernel in options.kernels:
        net = FewTokens(model, processor.tokenizer, kernel)
        start_as_means(net, levels)
        before, start = accuracy(net, shown, tests), time.perf_counter()
        print(f"before: {before:.3f}", flush=True)
        log = train(net, levels, asked, options)
        row: dict[str, Any] = {"kernel": kernel, "tokens": 256 // kernel**2, "before": before}
        row["quecc"] = accuracy(net, shown, tests)
        row |= {"questions_of_training": len(asked), "seconds": round(time.perf_counter() - start), "loss": log}
        row |= {"parameters": sum(p.numel() for p in net.parameters())}
        row |= {name: rival(asker, scorer, held_out, name, kernel**-2) for name in RIVALS}
        rows.append(row)
        print(row, flush=True)
    if options.json is not None:
        command = shlex.join(["python", "-m", "tools.demo.quecc", *sys.argv[1:]])
        data = {"type": "tokprune.quecc_demo", "command": command, "environment": environment(), "rows": rows}
        write_json(options.json, {**data, "questions": options.questions})


if __name__ == "__main__":
    main()
