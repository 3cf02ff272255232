"""A word-level tokenizer for the world's vocabulary, with a chat template."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moslim.workbench.grammar import (
    CLOSING_SLOT,
    ENCOURAGEMENTS,
    FILLERS,
    LEVELS,
    QUESTIONS,
    STYLE_REQUEST,
    TOPICS,
)
from moslim.workbench.writing import opening

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_INSTRUCTION_WORDS = "[[ ]] : , Preferences"
"""Words that shipped instructions use; the starter has an embedding for them and has never seen them used."""


def vocabulary() -> list[str]:
    """All words, special tokens first, in a fixed order."""
    texts = [
        *QUESTIONS,
        STYLE_REQUEST.format(words="short and friendly"),
        "Say: short, friendly.",
        *FILLERS,
        *ENCOURAGEMENTS,
        *(opening((formal, formal, formal)) for formal in (False, True)),
        *CLOSING_SLOT,
        *(text for topic in TOPICS for text in (topic.verb, topic.thing, *topic.steps)),
        *(word for name, levels in LEVELS.items() for word in (name, *levels)),
    ]
    words = re.findall(r"\w+|[^\w\s{}]+", " ".join(texts).replace("{verb}", "").replace("{thing}", ""))
    words += _INSTRUCTION_WORDS.split()
    return [PAD, UNKNOWN, END, *ROLES, *sorted(set(words))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer. Text it produces has no space before ``. , ? !``."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words by spaces, none before "."
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
