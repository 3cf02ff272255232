"""Tokens and positions that a model can read, compared with those of a run before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from moslim.errors import UsageError
from moslim.loading import first_few, language_part
from moslim.processes import warn

_POSITION_LAYERS = ("wpe", "pos_emb")
_POSITION_TABLES = ("embed_positions", "pos_encoding")
_UNKNOWN = "\ue000"
"""A character for private use, which no vocabulary has. Tokenizers over bytes write it without an unknown token."""


@dataclass(frozen=True)
class Positions:
    """Number of tokens that a model can read at a time.

    Args:
        most: Rows of its table of positions: more tokens end in an index error. None = it has no such table.
        trained: Tokens that it was made for (``max_position_embeddings``): more are computed, but often badly. None =
            unknown.
    """

    most: int | None
    trained: int | None

    @classmethod
    def of(cls, model: Any) -> Positions:
        """Reads a model's limits from its layers and its configuration.

        Args:
            model: Transformer or language model, with or without adapter; of one of texts and images, its language
                model counts.
        """
        part = language_part(model)
        trained = getattr(part.config, "max_position_embeddings", None)
        trained = trained if isinstance(trained, int) and trained > 0 else None
        rows = [_rows(module) for name, module in part.named_modules() if _holds_positions(name, module)]
        rows += [
            len(b) for name, b in part.named_buffers() if name.rpartition(".")[2] in _POSITION_TABLES and b.ndim > 1
        ]
        return cls(min([*rows, *([trained] if rows and trained else [])], default=None), trained)

    def longest(self, wanted: int | None, path: str, completion: int = 0) -> int | None:
        """Returns the most tokens of a prompt or pair, and refuses more than the model can read.

        Args:
            wanted: What ``data.max_length`` says; None = no limit.
            path: The model's name, for messages.
            completion: Most tokens of an answer that is sampled after a prompt.

        Returns:
            ``wanted``; or, without it, what the model's table of positions leaves; None = no limit.

        Raises:
            UsageError: Prompt and answer, or a pair, would be longer than the table of positions.
        """
        if self.most is not None and self.most <= completion:
            raise UsageError(
                f"engine.max_new_tokens = {completion} leaves no room for a prompt, since '{path}' has {self.most} "
                f"positions: set it to less than {self.most}"
            )
        if wanted is None:
            return None if self.most is None else self.most - completion
        asked = f"data.max_length = {wanted}"
        if completion:
            asked += f" and engine.max_new_tokens = {completion} make {wanted + completion} tokens, which"
        if self.most is not None and wanted + completion > self.most:
            raise UsageError(
                f"{asked} is more than the {self.most} positions of '{path}': set data.max_length to "
                f"{self.most - completion} or less" + (", or engine.max_new_tokens lower" if completion else "")
            )
        if self.trained is not None and wanted + completion > self.trained:
            warn(
                f"{asked} is more than the {self.trained} tokens that '{path}' was made for (max_position_embeddings): "
                "what it computes of longer texts may be worthless"
            )
        return wanted


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any, path: str) -> PreTrainedTokenizerBase:
    """Checks that a model has an embedding of every token that its tokenizer can write.

    A padding token without one is given up, with a warning: padding is masked, and any other token can stand there.
    Other special tokens without one are accepted where no text and no template can lead to them.

    Args:
        tokenizer: The tokenizer; it is changed in place.
        model: Its model.
        path: The model's name, for messages.

    Returns:
        The tokenizer.

    Raises:
        UsageError: A token has no embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    outside = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not outside:
        return tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    frame = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token}
    if tokenizer.unk_token_id in tokenizer.encode(_UNKNOWN, add_special_tokens=False):
        frame.add(tokenizer.unk_token)
    template = str(tokenizer.chat_template or "")
    unfit = [
        f"'{token}' ({number})"
        for token, number in outside.items()
        if token not in special or token in frame or token in template
    ]
    if unfit:
        raise UsageError(
            f"the tokenizer of '{path}' has tokens whose ids are beyond the model's {rows} embeddings: "
            f"{first_few(unfit)}. They were added without resizing the model: call "
            "model.resize_token_embeddings(len(tokenizer)), train or set the new rows, and save model and tokenizer "
            "again; or take the tokens out of the tokenizer"
        )
    if tokenizer.pad_token in outside:
        warn(
            f"the padding token '{tokenizer.pad_token}' ({tokenizer.pad_token_id}) of '{path}' is beyond the model's "
            f"{rows} embeddings: padding, which is masked, is written with the end token instead"
        )
        tokenizer.pad_token = None
    return tokenizer


def _holds_positions(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return isinstance(module, nn.Embedding) and (last in _POSITION_LAYERS or "position" in last)


def _rows(layer: Any) -> int:
    """Texts that fit into a table of positions. RoBERTa counts from behind its padding id, OPT from 2."""
    first = getattr(layer, "offset", None)
    if first is None:
        first = 0 if layer.padding_idx is None else layer.padding_idx + 1
    return int(layer.num_embeddings - first)
