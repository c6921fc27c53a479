"""Trains ATP-LLaVA's threshold heads on the demo VLM, whose own weights stay as they are, and says what came out.

python -m tools.demo.atp_heads --json benchmarks/results/atp_demo.json     a few minutes of one CPU thread

In training nothing is dropped: later layers see each visual token through the logarithm of its soft mask, added to the
attention logits, and the gradient of the answer's loss reaches the thresholds through it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokprune
import tokprune.demo
from tokprune.demo.asking import BATCH, Asker
from tokprune.demo.scenes import make_scene, questions
from tokprune.environment import environment
from tokprune.files import write_json
from tokprune.methods.decoder.atp import (
    LAYERS,
    ThresholdHeads,
    atp_loss,
    calibrate,
    redundancy,
    save_heads,
    soft_mask,
    spatial_scores,
)
from tokprune.methods.decoder.watch import Watch
from tokprune.methods.decoder_base import LayerTokens, at_layers

BATCH_SIZE, RATE, SHARPNESS = 8, 0.05, 20.0
FLOOR = -30.0  # of the logarithm of a mask


class SoftPruning:
    """The demo VLM in training: masks of each stage, and hooks that let later layers see through them."""

    def __init__(self, asker: Asker, heads: list[ThresholdHeads]) -> None:
        self.asker, self.heads = asker, heads
        text = asker.model.model.language_model
        self.layers = at_layers(None, LAYERS, len(text.layers))
        self.masks: dict[int, list[Tensor]] = {}
        self.bias = self.visual = torch.empty(0)
        self.pruning = tokprune.apply(asker.model, Watch(look=self.look))
        for at in range(self.layers[0], len(text.layers)):  # the attention runs behind the look in front of its layer
            attention = text.layers[at].self_attn
            attention.register_forward_pre_hook(lambda m, a, k, at=at: self.see(at, a, k), with_kwargs=True)

    def look(self, tokens: LayerTokens) -> None:
        """The soft mask of one prompt, where its layer is one of the stages."""
        if tokens.layer not in self.layers:
            return
        scores, spatial = redundancy(tokens), spatial_scores(tokens.row, tokens.col)
        with torch.enable_grad():
            thresholds = self.heads[self.layers.index(tokens.layer)](scores)
            self.masks.setdefault(tokens.layer, []).append(soft_mask(scores, spatial, thresholds, SHARPNESS))

    def see(self, at: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """Attention logits of a layer with the logarithm of the masks so far."""
        so_far = torch.stack([torch.stack(self.masks[layer]) for layer in self.layers if layer <= at]).prod(0)  # (B, V)
        mask = self.bias.clone()
        rows, columns = self.visual.nonzero(as_tuple=True)
        mask[rows, 0, :, columns] = mask[rows, 0, :, columns] + so_far.flatten().log().clamp_min(FLOOR)[:, None]
        return args, {**kwargs, "attention_mask": mask}

    def loss(self, seeds: list[int], target: float) -> tuple[Tensor, float, float]:
        """Loss of a batch of scenes, its part of the answers, and the mean share of tokens behind the last stage."""
        rng = random.Random(seeds[0])
        scenes = [make_scene(seed) for seed in seeds]
        asked = [rng.choice(questions(scene)) for scene in scenes]
        inputs = self.asker.prepare([q.text for q in asked], [scene.image for scene in scenes])
        real = inputs["attention_mask"].bool()
        n = real.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, :] | torch.eye(n, dtype=torch.bool)
        self.bias = torch.zeros(len(real), 1, n, n).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
        self.visual = inputs["input_ids"] == self.asker.model.config.image_token_id
        self.masks.clear()
        logits = self.asker.model(**inputs, logits_to_keep=1).logits[:, -1]
        words = self.asker.processor.tokenizer([q.answer for q in asked], add_special_tokens=False).input_ids
        answers = torch.nn.functional.cross_entropy(logits, torch.tensor([w[0] for w in words]))
        stages = [torch.stack(self.masks[layer]) for layer in self.layers]
        left = [torch.stack(stages[: i + 1]).prod(0) for i in range(len(stages))]
        return answers + atp_loss(left, target), float(answers.detach()), float(left[-1].detach().mean())


def accuracy(asker: Asker, examples: list[Any], **options: Any) -> dict[str, Any]:
    """Share of right answers, and mean tokens of a picture behind each stage."""
    hits, kept = 0, []
    with tokprune.apply(asker.model, "atp_llava", **options) as pruning:
        for at in range(0, len(examples), BATCH):
            batch = examples[at : at + BATCH]
            words = asker.answers(asker.inputs(batch))
            hits += sum(w == e.answer for w, e in zip(words, batch, strict=True))
            kept.append(torch.tensor([drop.kept for drop in pruning.last.drops], dtype=torch.float32))  # (stages, B)
    stages = torch.cat(kept, 1)
    return {
        "accuracy": hits / len(examples),
        "kept": [round(float(k), 1) for k in stages.mean(1)],
        "spread": round(float(stages[-1].std()), 1),
    }


def main() -> None:
    """Train, then compare with calibrated thresholds and with an exact ratio at the same mean count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", type=float, default=64, help="tokens, mean over the stages")
    parser.add_argument("--questions", type=int, default=210)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, processor = tokprune.demo.load()
    asker = Asker(model.requires_grad_(False), processor)
    heads = [ThresholdHeads() for _ in LAYERS]
    soft = SoftPruning(asker, heads)
    optimizer = torch.optim.Adam([p for h in heads for p in h.parameters()], RATE)
    log = []
    for step in range(options.steps):
        loss, answers, left = soft.loss(list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)), options.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append({"step": step, "loss": float(loss.detach()), "answers": answers, "left": left})
        if step % 10 == 9:
            print(log[-1], flush=True)
    soft.pruning.remove()
    model, processor = tokprune.demo.load()  # without the hooks of training
    asker, examples = Asker(model, processor), tokprune.demo.held_out(options.questions)
    with tempfile.TemporaryDirectory() as folder:
        save_heads(heads, Path(folder) / "heads.safetensors")
        learned = accuracy(asker, examples, weights=str(Path(folder) / "heads.safetensors"))
    watch = Watch(look=lambda t: (redundancy(t).mean(0), spatial_scores(t.row, t.col)))
    with torch.no_grad(), tokprune.apply(model, watch):
        model(**asker.inputs(tokprune.demo.held_out(32, seed=7)))
    thresholds = []
    for layer, count in zip(soft.layers, learned["kept"], strict=True):
        pairs = [sample[layer - 1] for sample in watch.samples()]
        thresholds.append(calibrate([s for s, _ in pairs], [c for _, c in pairs], count / 256))
    found = {
        "learned": learned,
        "calibrated": accuracy(asker, examples, thresholds=tuple(thresholds)),
        "exact": accuracy(
            asker, examples, schedule=tuple((at, k / 256) for at, k in zip(soft.layers, learned["kept"], strict=True))
        ),
    }
    print(found)
    if options.json is not None:
        write_json(
            options.json,
            {
                "type": "tokprune.atp_demo",
                "version": 1,
                "command": " ".join(["python -m tools.demo.atp_heads", *sys.argv[1:]]),
                "environment": environment(),
                "target": options.target,
                "log": log,
                "found": found,
            },
        )


if __name__ == "__main__":
    main()
