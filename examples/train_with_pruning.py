"""LoRA on a VLM that is pruned while it trains, so that it learns to answer from few tokens.

python examples/train_with_pruning.py              a minute on a CPU: the demo VLM at a tenth of its tokens
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

import tokprune
import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.demo.scenes import Example
from tokprune.demo.sweep import is_right
from tokprune.types import Inputs

IGNORED = -100  # what transformers' loss leaves out


def training_batch(asker: Asker, examples: Sequence[Example]) -> tuple[Inputs, torch.Tensor]:
    """Inputs and labels (B, L): the answer counts, what is asked does not. Labels have the unpruned prompt's width."""
    prompts = asker.inputs(examples)
    answers = asker.processor.tokenizer([e.answer for e in examples], add_special_tokens=False)["input_ids"]
    longest = max(map(len, answers))
    tail = torch.tensor([a + [asker.processor.tokenizer.pad_token_id] * (longest - len(a)) for a in answers])
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers])  # (B, longest)
    inputs = dict(prompts)
    inputs["input_ids"] = torch.cat([prompts["input_ids"], tail], dim=1)
    inputs["attention_mask"] = torch.cat([prompts["attention_mask"], real], dim=1)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -longest:] = tail.masked_fill(real == 0, IGNORED)
    return inputs, labels


def accuracy(asker: Asker, examples: Sequence[Example]) -> float:
    """Share of right answers under whatever pruning is on."""
    answers = asker.answers(asker.inputs(examples))
    return sum(is_right(a, e.answer) for a, e in zip(answers, examples, strict=True)) / len(examples)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, inputs: Inputs, labels: torch.Tensor) -> float:
    """Loss on questions that training never sees."""
    loss: torch.Tensor = model(**inputs, labels=labels).loss
    return float(loss)


def main() -> None:
    """Train, print the loss, and compare held-out accuracy before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--method", default="random")
    args = parser.parse_args()
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit("this example needs PEFT: pip install 'peft>=0.18'") from None

    torch.manual_seed(0)
    model, processor = tokprune.demo.load()
    examples, held_out = tokprune.demo.held_out(args.batch * args.steps, seed=1), tokprune.demo.held_out(56, seed=2)
    random.Random(0).shuffle(examples)
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).eval()
    tuned.print_trainable_parameters()
    tokprune.apply(tuned, args.method, ratio=args.ratio)
    asker = Asker(tuned, processor)
    checked = training_batch(asker, held_out)
    before = held_out_loss(tuned, *checked), accuracy(asker, held_out)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    tuned.train()
    for step in range(args.steps):
        at = step * args.batch
        inputs, labels = training_batch(asker, examples[at : at + args.batch])
        loss = tuned(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")
    after = held_out_loss(tuned.eval(), *checked), accuracy(asker, held_out)
    print(f"held out, {args.ratio:.0%} of the tokens: loss {before[0]:.3f} -> {after[0]:.3f}")
    print(f"{before[1]:.1%} -> {after[1]:.1%} of {len(held_out)} questions right")


if __name__ == "__main__":
    main()
