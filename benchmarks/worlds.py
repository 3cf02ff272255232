"""Models with random weights, tokenizer and prompts that several trainers can be run on alike."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moslim import PreferenceDataModule, PreferenceSet
from moslim.data import Source, Uniform, Workbench
from moslim.data.types import Example, RowKind, Split
from moslim.reward import PreferenceClassifier
from moslim.workbench.grammar import LEVELS, PAD, ROLES, UNKNOWN, build_tokenizer, vocabulary

RATE, KL = 1e-6, 0.05
"""Learning rate and weight of the KL divergence, for every trainer."""
STARTER = ROOT / "configs/quickstart/starter.yaml"
END_EVERY = 24
"""Every so manieth word ends an answer, which gives random weights answers of natural lengths: geometric, mean 24."""


@dataclass(frozen=True)
class World:
    """What is trained on what.

    Args:
        architecture: Options of the Llama that is the policy, and the backbone of the reward model.
        prompts: Per step.
        samples: Per prompt.
        new_tokens: Most tokens of an answer.
        words: Size of the vocabulary; None = the quickstart's tokenizer and questions.
        prompt_tokens: Length of a prompt, where the questions are not the quickstart's.
        heads: Dimensions of the reward classifier.
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    prompts: int = 4
    samples: int = 8
    new_tokens: int = 64
    words: int | None = 32000
    prompt_tokens: int = 128
    heads: int = 4

    @property
    def preferences(self) -> PreferenceSet:
        """The quickstart's four dimensions, or as many as there are heads."""
        if self.heads == len(LEVELS):
            return PreferenceSet(LEVELS)
        return PreferenceSet({f"d{i}": [f"d{i}l{level}" for level in range(5)] for i in range(self.heads)})


MEDIUM = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def worlds() -> dict[str, World]:
    """The two sizes at which trainers are compared."""
    starter = yaml.safe_load(STARTER.read_text(encoding="utf-8"))
    options = starter["model"]["init_args"]["architecture"]["options"]
    quickstart = World(options, prompts=16, new_tokens=48, words=None)
    return {"quickstart": quickstart, "medium": World(MEDIUM)}


class RandomQuestions(Source):
    """Questions of random words.

    Args:
        words: Size of the vocabulary.
        length: Words of a question.
    """

    def __init__(self, words: int, length: int) -> None:
        self.words = words
        self.length = length

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class."""
        draw = random.Random(seed)
        least = len(vocabulary())
        return [
            Example(" ".join(f"w{draw.randrange(least, self.words)}" for _ in range(self.length))) for _ in range(256)
        ]


def tokenizer_of(world: World) -> PreTrainedTokenizerBase:
    """The quickstart's tokenizer, with more words where the world has more."""
    plain = build_tokenizer()
    if world.words is None:
        return plain
    known = vocabulary()
    words = [*known, *(f"w{i}" for i in range(len(known), world.words))][: world.words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=plain.eos_token,
        additional_special_tokens=list(ROLES),
    )
    fast.chat_template = plain.chat_template
    return fast


def data_of(world: World) -> PreferenceDataModule:
    """Prompts that ask for one dimension each."""
    source: Source = Workbench()
    if world.words is not None:
        framing = 7  # two role tokens and a tag: brackets, name, colon, level
        source = RandomQuestions(world.words, world.prompt_tokens - framing)
    sampler = Uniform([0.0, 1.0])
    return PreferenceDataModule(world.preferences, source, sampler=sampler, batch_size=world.prompts)


def save(world: World, folder: Path) -> None:
    """Writes policy, reward classifier and TRL's one-label reward model, all on the same random weights."""
    tokenizer = tokenizer_of(world)
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **special, **world.architecture)
    policy = AutoModelForCausalLM.from_config(config)
    ends = list(range(len(ROLES) + END_EVERY, len(tokenizer), END_EVERY))
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    single = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_labels=1, **special, **world.architecture)
    )
    single.model.load_state_dict(policy.model.state_dict())
    classifier = PreferenceClassifier.from_backbone(policy, world.preferences)
    for name, model in (("policy", policy), ("classifier", classifier), ("single", single)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
