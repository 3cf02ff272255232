"""What benchmarks/levels.py learns from: answers of the embedded world, rated by people who err, and small encoders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from moslim.data import Example
from moslim.workbench.answers import best_of_records, corrupt, rate
from moslim.workbench.grammar import QUESTIONS, TOPICS, ask, build_tokenizer, draw_levels, gold_levels, write_answer

RATERS, NOISE = 3, 1.0
ROWS = {"train": 3000, "validation": 400, "test": 1000}
SPLITS = ("train", "train", "validation", "test")
"""Which split asks about a topic in which form: the one at the place of both their numbers' sum, modulo four."""
CHOICES = 150


def save_rated(folder: Path) -> None:
    """Writes a table per split and ``choices.jsonl`` with prompts of which one of four answers fits.

    A training row has its levels as ``votes``, as the level ``agreed`` on and as the ``exact`` one; elsewhere all are
    exact. A third of the answers are corrupted.
    """
    rng = random.Random(0)
    for split, count in ROWS.items():
        write_lines(folder / f"{split}.jsonl", [_row(split, rng) for _ in range(count)])
    write_lines(folder / "choices.jsonl", best_of_records(TOPICS, CHOICES, rng))


def save_encoder(folder: Path, width: int, layers: int, seed: int) -> int:
    """Writes a BERT with random weights and the world's tokenizer; returns its number of parameters."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _row(split: str, rng: random.Random) -> dict[str, Any]:
    number = rng.randrange(len(TOPICS))
    topic = TOPICS[number]
    form = rng.choice([form for form in range(len(QUESTIONS)) if SPLITS[(number + form) % len(SPLITS)] == split])
    question = ask(topic, form)
    wrong = rng.random() < 1 / 3
    answer = corrupt(topic, TOPICS, rng) if wrong else write_answer(topic, draw_levels({}, rng), rng)
    exact = gold_levels(question, answer)
    rated = rate(Example(question, answer, exact), RATERS if split == "train" else 1, NOISE * (split == "train"), rng)
    votes = {name: rated.votes.get(name, (level,)) for name, level in rated.levels.items()}
    return {"question": question, "answer": answer, "votes": votes, "agreed": rated.levels, "exact": exact}
