"""Trains the network of the method "explain" for a demo VLM.

    python -m tools.explain --out tokprune/demo/weights/explain.safetensors --json benchmarks/results/explain.json

Follows "Task-Related Token Compression in Multimodal Large Language Models from an Explainability Perspective" (arXiv
2506.01097): the target is the relevance of each visual token for the model's own answer, by gradient-weighted
attention roll-out; the input is what the tokens behind the picture pay to it in layer 0; a network of five convolutions
learns one from the other and never sees the model. Sizes, loss (cross-entropy of the shares of relevance) and optimiser
are ours.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.demo.scenes import Example, make_scene, questions
from tokprune.environment import environment
from tokprune.methods.connector.explain import RelevanceNet
from tokprune.ops.numeric import wide
from tokprune.types import VLM

FIRST_SCENE = 10_000_000
"""Scenes from here on: neither those of the demo's training nor those that it is measured on."""


def examples(count: int) -> list[Example]:
    """A question about each of `count` scenes, of all types alike."""
    out: list[Example] = []
    seed = FIRST_SCENE
    while len(out) < count:
        scene = make_scene(seed)
        seed += 1
        asked = questions(scene)
        if asked:
            q = random.Random(seed).choice(asked)
            out.append(Example(scene.image, q.text, q.answer, q.type, scene))
    return out


def attention_relevance(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Relevance of every token for every other, by gradient-weighted attention roll-out.

    Layer by layer, from the first: the positive part of attention times gradient, mean over heads, is what flows
    between tokens beside the residual path; these flows are multiplied through (Chefer et al., ICCV 2021, arXiv
    2103.15679, equations 5 and 6). maps: (B, H, N, N) attention of each layer, rows attend to columns. gradients:
    of one output's score with respect to them. Returns (B, N, N): row i says what mattered for token i.
    """
    batch, _, n, _ = maps[0].shape
    relevance = torch.eye(n, dtype=wide(maps[0]).dtype, device=maps[0].device).expand(batch, n, n)
    for attention, gradient in zip(maps, gradients, strict=True):
        flow = (wide(attention) * wide(gradient)).clamp(min=0).mean(1)  # (B, N, N)
        relevance = relevance + flow @ relevance
    return relevance


def explained(model: VLM, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the tokens behind the picture pay to it in layer 0, (B, H, V), and the relevance of its tokens, (B, V).

    model: with eager attention; prompts are padded on the left and have one picture each, of V tokens.
    """
    output = model(**inputs, output_attentions=True, use_cache=False)
    maps = output.attentions
    score = output.logits[:, -1].amax(-1).sum()  # of the word that each prompt is answered with
    gradients = torch.autograd.grad(score, maps)
    with torch.no_grad():
        relevance = attention_relevance(maps, gradients)[:, -1]  # (B, n)
        visual = inputs["input_ids"] == model.config.image_token_id
        rows = []
        for b, seen in enumerate(visual):
            columns = seen.nonzero()[:, 0]
            behind = maps[0][b, :, int(columns[-1]) + 1 :]  # (H, T, n)
            rows.append((behind[:, :, columns].mean(1), relevance[b, columns]))
    return torch.stack([a for a, _ in rows]), torch.stack([r for _, r in rows])


def data_set(asker: Asker, count: int, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (count, H, V) and targets (count, V) of so many questions."""
    asked = examples(count)
    parts = []
    for at in range(0, count, batch):
        parts.append(explained(asker.model, asker.inputs(asked[at : at + batch])))
        if at % (batch * 50) == 0:
            print(f"explained {at} of {count}", flush=True)
    return torch.cat([a for a, _ in parts]), torch.cat([r for _, r in parts])


def loss_of(net: RelevanceNet, attention: Tensor, relevance: Tensor, side: int) -> Tensor:
    """Cross-entropy between the shares of relevance and those that the network predicts."""
    predicted = net(attention.unflatten(-1, (side, side))).flatten(1).log_softmax(-1)
    shares = relevance / relevance.sum(-1, keepdim=True).clamp_min(1e-12)
    return -(shares * predicted).sum(-1).mean()


def overlap(a: Tensor, b: Tensor, keep: int) -> float:
    """Share of the `keep` largest of `a` that are among the `keep` largest of `b`. (B, V)"""
    top = [torch.zeros_like(x).scatter_(1, x.topk(keep, 1).indices, 1.0) for x in (a, b)]
    return float((top[0] * top[1]).sum(1).mean() / keep)


def train(attention: Tensor, relevance: Tensor, width: int, steps: int, seed: int = 0) -> tuple[RelevanceNet, dict]:
    """A network fitted to all samples but the last tenth, on which it is measured."""
    torch.manual_seed(seed)
    side = round(attention.shape[-1] ** 0.5)
    cut = len(attention) * 9 // 10
    net = RelevanceNet(attention.shape[1], width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        at = torch.randint(cut, (64,), generator=draw)
        loss = loss_of(net, attention[at], relevance[at], side)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    net.eval()
    with torch.no_grad():
        left, target = attention[cut:], relevance[cut:]
        predicted = net(left.unflatten(-1, (side, side))).flatten(1)
        keep = attention.shape[-1] // 10
        found = {
            "samples": cut,
            "steps": steps,
            "held_out": len(left),
            "loss": float(loss_of(net, left, target, side)),
            "loss_of_uniform": float(torch.tensor(attention.shape[-1]).log()),
            "top_tenth_overlap": overlap(predicted, target, keep),
            "top_tenth_overlap_of_the_attention_itself": overlap(left.mean(1), target, keep),
        }
    return net, found


def main() -> None:
    """Make the data, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--questions", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--samples", type=Path, help="Keep what was explained in this file, and take it from there.")
    options = parser.parse_args()
    started = time.perf_counter()
    model, processor = tokprune.demo.load()
    model.set_attn_implementation("eager")
    if options.samples is not None and options.samples.exists():
        attention, relevance = torch.load(options.samples, weights_only=True)
    else:
        attention, relevance = data_set(Asker(model, processor), options.questions)
        if options.samples is not None:
            torch.save((attention, relevance), options.samples)
    net, found = train(attention, relevance, model.config.get_text_config().hidden_size, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, options.out)
    found |= {"seconds": time.perf_counter() - started}
    print(json.dumps(found, indent=2))
    if options.json is not None:
        command = shlex.join(["python", "-m", "tools.explain", *sys.argv[1:]])
        head = {"type": "tokprune.explain", "version": 1, "command": command}
        options.json.write_text(json.dumps({**head, "environment": environment(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
