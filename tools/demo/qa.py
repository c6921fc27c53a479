"""Stage "qa": projector and Llama learn to answer from the frozen tower's features; all visual tokens, always."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from tokprune.demo.scenes import QUESTION_TYPES, SceneObject, SceneQuestion, ask
from tools.demo.vocabulary import ASSISTANT, BOS, EOS, PAD, USER, WORD_IDS, encode

from .data import open_split
from .features import read_features, take
from .loop import Metrics, batch_indices, load, mean_metrics, run_stage
from .networks import new_llava
from .optimizer import MixedOptimizer
from .recipe import Recipe
from .workers import Worker

_LENGTH = 10  # of the longest question with "assistant:" and its answer
_EOS_WEIGHT = 0.1
# The tower's features are long and share a large mean: at full speed the projector's output grew to a hundred times the
# words' length, nearly the same for every patch, and the LLM stayed at two thirds of the answers (one run).
_PROJECTOR_SPEED = 0.05
_MASKED = -1e4  # finite: padded places have rows in which nothing else is visible


def sample_questions(objects: Sequence[SceneObject], count: int, rng: random.Random) -> list[SceneQuestion]:
    """`count` questions about one scene, types in turn and in random order, skipping what has no unique answer."""
    asked: list[SceneQuestion] = []
    while len(asked) < count:
        for kind in rng.sample(QUESTION_TYPES, len(QUESTION_TYPES)):
            question = ask(objects, kind, rng)
            if question is not None and len(asked) < count:
                asked.append(question)
    return asked


class Asked(Protocol):
    """What a question must tell: about pictures or about clips."""

    @property
    def type(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str: ...


class PackedAnswerer(nn.Module):
    """Answers several questions about one picture in one pass: each sees the picture and itself, not the others."""

    def __init__(self, llava: PreTrainedModel, words: Mapping[str, int] = WORD_IDS, length: int = _LENGTH) -> None:
        """words: the model's vocabulary. length: of the longest question with "assistant:" and its answer."""
        super().__init__()
        self.projector = llava.model.multi_modal_projector
        self.llama = llava.model.language_model
        self.words, self.length = words, length
        self.prefix = (words[BOS], words[USER])
        self._layouts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def forward(self, features: Tensor, questions: Sequence[Sequence[Asked]]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) features, K questions each, to logits of the answer and of what follows it (B, K, V), and
        answers."""
        embed, device = self.llama.embed_tokens, features.device
        ids, places, answers = (tensor.to(device) for tensor in _pack(questions, self.words, self.length))
        visual = self.projector(features)
        prefix = embed(torch.tensor(self.prefix, device=device)).expand(len(ids), -1, -1)
        embeddings = torch.cat([prefix, visual, embed(ids.flatten(1))], 1)
        shared = prefix.shape[1] + visual.shape[1]
        mask, positions = self._layout(shared, ids.shape[1], device)
        hidden = self.llama(
            inputs_embeds=embeddings,
            attention_mask=mask.to(embeddings.dtype).expand(len(ids), -1, -1, -1),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, shared:]
        hidden = hidden.view(*ids.shape, -1)  # (B, K, L, D)

        def read(place: Tensor) -> Tensor:
            index = place[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
            return F.linear(hidden.gather(2, index).squeeze(2), embed.weight).float()  # tied embeddings

        return read(places), read(places + 1), answers

    def _layout(self, shared: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Additive block mask (1, 1, T, T) and position ids (1, T): every question follows the picture directly."""
        if (shared, count) not in self._layouts:
            block = torch.cat([torch.full((shared,), -1), torch.arange(count).repeat_interleave(self.length)])
            place = torch.arange(len(block))
            visible = (place[:, None] >= place) & ((block == -1) | (block[:, None] == block))
            mask = torch.zeros(visible.shape).masked_fill(~visible, _MASKED)[None, None]
            positions = torch.cat([torch.arange(shared), shared + torch.arange(self.length).repeat(count)])[None]
            self._layouts[shared, count] = (mask.to(device), positions.to(device))
        return self._layouts[shared, count]


def _pack(questions: Sequence[Sequence[Asked]], words: Mapping[str, int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, K, length), where each answer is predicted (B, K), answers (B, K)."""
    batch, count = len(questions), len(questions[0])
    ids = torch.full((batch, count, length), words[PAD])
    places, answers = torch.zeros(batch, count, dtype=torch.long), torch.zeros(batch, count, dtype=torch.long)
    for row, asked in enumerate(questions):
        for column, question in enumerate(asked):
            tokens = [*encode(question.text, words), words[ASSISTANT], words[question.answer]]
            ids[row, column, : len(tokens)] = torch.tensor(tokens)
            places[row, column], answers[row, column] = len(tokens) - 2, tokens[-1]
    return ids, places, answers


def _accuracies(correct: Tensor, questions: Sequence[Sequence[Asked]]) -> Metrics:
    by_type: defaultdict[str, list[float]] = defaultdict(list)
    for row, asked in zip(correct.tolist(), questions, strict=True):
        for hit, question in zip(row, asked, strict=True):
            by_type[question.type].append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in by_type.items()}


def qa_loss(model: PackedAnswerer, features: Tensor, questions: Sequence[Sequence[Asked]]) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the answers and, lightly, of the end after them."""
    logits, after, answers = model(features, questions)
    answer_loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    end_loss = F.cross_entropy(after.flatten(0, 1), torch.full_like(answers, WORD_IDS[EOS]).flatten())
    metrics = {"answer_loss": float(answer_loss.detach()), **_accuracies(logits.argmax(-1) == answers, questions)}
    return answer_loss + _EOS_WEIGHT * end_loss, metrics


@torch.no_grad()
def start_matching(llava: LlavaForConditionalGeneration, layers: int = 2) -> None:
    """Start keys equal to queries in the first layers: a word then attends to the patches that were aligned to it."""
    for layer in llava.model.language_model.layers[:layers]:
        attention = layer.self_attn
        attention.q_proj.weight.normal_(0, attention.q_proj.in_features**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def train_qa(worker: Worker, out: Path, recipe: Recipe) -> None:
    """Run the stage; the result is `qa.pt` with `projector.*` and `llama.*`."""
    torch.manual_seed(recipe.seed + 3)
    train, validation = open_split(out, "train"), open_split(out, "validation")
    cached, cached_validation = read_features(out, "train"), read_features(out, "validation")
    llava = new_llava(recipe)
    aligned = load(out / "align.pt")
    model = PackedAnswerer(llava)
    model.projector.load_state_dict({k.removeprefix("projector."): v for k, v in aligned.items() if "projector." in k})
    with torch.no_grad():
        model.llama.embed_tokens.weight.copy_(aligned["words"])
    start_matching(llava)
    model.to(worker.device)
    parameters = dict(model.named_parameters())
    matrices = [name for name, p in parameters.items() if p.ndim == 2 and "embed_tokens" not in name]
    muon = {name: _PROJECTOR_SPEED if name.startswith("projector.") else 1.0 for name in matrices}
    stage = recipe.qa
    optimizer = MixedOptimizer(parameters, muon, stage.lr, stage.muon_lr, stage.betas, worker)
    model.bfloat16()

    def compute(step: int, rng: random.Random) -> tuple[Tensor, Metrics]:
        indices = batch_indices(step, stage.batch, len(cached), recipe.seed + 3, worker)
        questions = [sample_questions(train.objects[i], recipe.questions, rng) for i in indices]
        return qa_loss(model, take(cached, indices, worker.device), questions)

    def validate() -> Metrics:
        chunks = (range(i, min(i + 32, len(cached_validation))) for i in range(0, len(cached_validation), 32))
        return mean_metrics(
            qa_loss(
                model,
                take(cached_validation, chunk, worker.device),
                [sample_questions(validation.objects[i], 7, random.Random(f"validation {i}")) for i in chunk],
            )[1]
            for chunk in chunks
        )

    run_stage("qa", out, stage, optimizer, compute, validate, worker, recipe.seed + 3)
