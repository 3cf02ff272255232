"""A language of nine words, models small enough to train in seconds, and a task that they can learn."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from moslim.data.types import Example, RowKind, Source, Split
from moslim.preferences import PreferenceSet

WORDS = ["how", "why", "cake", "boat", "good", "bad", "very", "so", "."]


class WordSource(Source):
    """Answers whose tone is one word and whose amount is a number of words. A third lack one label each."""

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        grid = itertools.product(["how cake", "why boat"], ["bad", "good"], range(3), ["very", "so"], range(3))
        rows = []
        for question, tone, amount, filler, drop in grid:
            levels = {"tone": ["bad", "good"].index(tone), "amount": amount}
            if drop < 2 and split is Split.TRAIN:
                levels.pop(["tone", "amount"][drop])
            rows.append(Example(question, " ".join([tone, *[filler] * amount, "."]), levels, subset=filler))
        return rows


class ComparedSource(Source):
    """The answers of :class:`WordSource`, each beside one of the other tone; a bad tone is rejected.

    Args:
        labelled: Whether rows have labels, and every third of them several votes, besides.
    """

    def __init__(self, labelled: bool = False) -> None:
        self.labelled = labelled

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        rows = []
        for i, row in enumerate(WordSource().rows(kind, split, preferences, seed)):
            tone, _, rest = (row.answer or "").partition(" ")
            if tone == "good":
                rows.append(replace(row, rejected=f"bad {rest}", comparison_dimensions=("tone",), margin=0.1 * (i % 3)))
            elif self.labelled:
                votes = {name: (level, level, 1) for name, level in row.levels.items()}
                rows.append(replace(row, votes={} if i % 3 else votes))
        return rows if self.labelled else [replace(row, levels={}) for row in rows]


def save_backbone(folder: Path, seed: int, dropout: float = 0.1) -> None:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def trainer(folder: Path, **options: object) -> Trainer:
    """A quiet trainer of a few steps."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {"enable_checkpointing": False, "num_sanity_val_steps": 1, "use_distributed_sampler": False}
    return Trainer(default_root_dir=folder, **{**quiet, **plain, "max_epochs": -1, "max_steps": 40, **options})
