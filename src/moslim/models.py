"""Where language models and tokenizers come from: a Hub name, a local folder, or an architecture in the config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moslim.errors import MissingFileError, UsageError


class TokenizerSource(ABC):
    """Where the tokenizer of a model with random weights comes from."""

    @abstractmethod
    def load(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer."""


class PretrainedTokenizer(TokenizerSource):
    """The tokenizer of a Hub name or local folder.

    Args:
        path: Hub name or folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)


class WorkbenchTokenizer(TokenizerSource):
    """The word-level tokenizer of the embedded world."""

    def load(self) -> PreTrainedTokenizerBase:
        from moslim.workbench.tokenizer import build_tokenizer

        return build_tokenizer()


@dataclass
class Architecture:
    """A language model with random weights.

    Args:
        model_type: Architecture as transformers names it, e.g. ``llama``.
        tokenizer: Where its tokenizer comes from; vocabulary size and special ids are taken from it.
        options: Entries of that architecture's configuration, e.g. ``hidden_size``.
    """

    model_type: str
    tokenizer: TokenizerSource
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Builds the model from torch's global random state."""
        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **self.options,
        )
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hub name or folder.

    Raises:
        MissingFileError: There is none.
    """
    with named(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_causal_lm(path: str, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model from a Hub name or folder; weights must be safetensors.

    Raises:
        MissingFileError: There is none.
    """
    with named(path):
        return AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust_remote_code, dtype=dtype, use_safetensors=True
        )


@contextmanager
def named(path: str) -> Iterator[None]:
    """Says which model is meant where none can be loaded.

    Raises:
        MissingFileError: There is no such folder, and no such model on the Hub; or it cannot be reached.
    """
    folder = Path(path).is_dir()
    if not folder and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise MissingFileError(
            f"there is no folder '{path}' (looked in {Path.cwd()}): is what makes it still to be run?"
        )
    try:
        yield
    except OSError as error:
        where = "cannot be loaded" if folder else "is no folder here, and the Hub gives no such model"
        raise MissingFileError(f"the model '{path}' {where}: {error}") from error


def align(model: nn.Module) -> None:
    """Moves weights to addresses that are multiples of 64 bytes, where they are not.

    A loaded file is mapped into memory, where its weights lie by the length of its header, and a CPU's matrix product
    rounds by how they lie: the same weights in two files would give results that differ in the last bit.
    """
    for weight in model.parameters():
        if weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def eos_ids(model: PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes a model compute activations twice instead of keeping them for the backward pass."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # renamed within transformers 5
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})


def fuse_kernels(model: PreTrainedModel) -> None:
    """Puts Liger's fused Triton kernels in place of a model's norms, rotations and gated layers; CUDA only.

    Its fused losses stay out: log-probabilities here do not come from the model's own loss, and never hold all logits.

    Raises:
        UsageError: There is no CUDA device.
        ModuleNotFoundError: Liger is not installed.
    """
    if not torch.cuda.is_available():
        raise UsageError("model.liger is true, but Liger's kernels need a CUDA device, and there is none: leave it out")
    if find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("model.liger is true, but liger-kernel is not installed: pip install 'moslim[liger]'")
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
