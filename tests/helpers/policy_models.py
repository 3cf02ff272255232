"""Tiny language models over the words of the embedded world, and a reward classifier over them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moslim.data.prompts import pad
from moslim.ops.models import Architecture, WorkbenchTokenizer
from moslim.ops.numerics import derive_seed
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier
from moslim.workbench.grammar import LEVELS, build_tokenizer

PAD, END = 0, 2
ENDS = list(range(40, 60))
"""Words that end an answer, besides the end token, which random weights would hardly ever draw."""
EOS = [END, *ENDS]

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
"""Options of most architectures, for models without a tokenizer."""
WIDE = {"initializer_range": 0.3, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
ARCHITECTURES = {
    "llama": ("llama", {**WIDE, "intermediate_size": 48}),
    "grouped": ("llama", {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2}),
    "sliding": ("mistral", {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 6}),
    "gpt2": ("gpt2", {"initializer_range": 0.3, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 96}),
}


def seeds(rows: int, samples: int) -> torch.Tensor:
    """A seed of each sample of each row."""
    return torch.tensor([[derive_seed(5, row, sample) for sample in range(samples)] for row in range(rows)])


def build_model(kind: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights, in eval mode; ``ENDS`` end its answers."""
    model_type, options = ARCHITECTURES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Architecture(model_type, WorkbenchTokenizer(), options).build(tokenizer)
    assert tokenizer.eos_token_id is not None
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ENDS]
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="session")
def models(tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedModel]:
    """One model per architecture; tests leave them as they are."""
    return {kind: build_model(kind, tokenizer) for kind in ARCHITECTURES}


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Five left-padded prompts of 3 to 15 tokens: ids and mask."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(6, len(tokenizer), (n,), generator=generator).tolist() for n in (3, 15, 7, 15, 4)]
    assert tokenizer.pad_token_id is not None
    return pad(rows, tokenizer.pad_token_id, left=True)


@pytest.fixture(scope="session")
def preferences() -> PreferenceSet:
    """Two of the classifier's dimensions, in another order than its own."""
    return PreferenceSet({name: LEVELS[name] for name in ("warmth", "verbosity")})


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    """Folder of a small grouped-query model and its tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    build_model("grouped", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    """Folder of a random classifier of all four dimensions, with clear-cut opinions."""
    return save_classifier(tmp_path_factory.mktemp("classifier"), tokenizer, seed=7)


def save_classifier(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    model = PreferenceClassifier.from_backbone(build_model("llama", tokenizer, seed), PreferenceSet(LEVELS))
    generator = torch.Generator().manual_seed(seed)
    model.head.weight.data.normal_(0, 0.5, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def enter_user_folder(
    folder: Path, patch: pytest.MonkeyPatch, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Changes into a folder with the models of the guides, ``start`` and ``outputs/mine/classifier``."""
    patch.chdir(folder)
    patch.setattr(sys, "path", sys.path.copy())
    patch.setattr(sys, "argv", ["main.py"])
    model.save_pretrained("start")
    tokenizer.save_pretrained("start")
    save_classifier(Path("outputs/mine/classifier"), tokenizer, seed=0)
