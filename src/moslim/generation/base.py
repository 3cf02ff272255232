"""The interface of every rollout engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.utils.errors import UsageError


@dataclass
class Completions:
    """Sampled answers, right-padded. ``N`` answers of at most ``T`` tokens.

    Args:
        tokens: ``[N, T]`` int64, pad after the end.
        mask: ``[N, T]`` bool, true up to and including the token that ends the answer.
        logprobs: ``[N, T]`` float32 or finer, log-probability of each token under the tempered distribution; 0 where
            masked.
        ended: ``[N]`` bool, false where the answer was cut at the length limit.
        behavior_logprobs: ``[N, T]`` under the distribution that it was drawn from, where that is another one (top-k,
            top-p); None = the same.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    ended: Tensor
    behavior_logprobs: Tensor | None = None


class RolloutEngine(ABC):
    """Samples answers from a policy.

    Args:
        max_new_tokens: Length limit of an answer, the end-of-sequence token included.
        temperature: Sampling temperature; 0 takes the most likely token. Log-probabilities, here and in
            training, are those of the tempered distribution, so that sampler and trainer agree.
        stop_strings: Texts that end an answer, as end-of-sequence tokens do; they are left out of its text.
        stop_ids: Tokens that end an answer, besides the model's own; they are left out of its text.
    """

    in_process: ClassVar[bool] = True
    """Whether it computes with the model that it is given, not with copies of the weights elsewhere."""
    top_k: int | None = None
    """Among how many of the most likely tokens it draws; None = among all."""
    top_p: float = 1.0
    """Probability of the most likely tokens among which it draws; 1 = among all."""

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        stop_strings: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        if max_new_tokens < 1:
            raise UsageError(f"engine.max_new_tokens is {max_new_tokens}: give at least 1")
        if temperature < 0:
            raise UsageError(f"engine.temperature is {temperature}: give 0 (greedy) or more")
        self.max_new_tokens = max_new_tokens
        if any(not text for text in stop_strings):
            raise UsageError("engine.stop_strings holds an empty text: it would end every answer at once")
        self.temperature = temperature
        self.stop_strings = tuple(stop_strings)
        self.stop_ids = tuple(stop_ids)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the policy's tokenizer, by which texts that end an answer are recognised."""
        self.tokenizer = tokenizer

    def before_stop(self, text: str) -> str:
        """An answer's text without what ended it."""
        return min((text.partition(stop)[0] for stop in self.stop_strings), key=len, default=text)

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn (top-k, top-p), so that answers are not the policy's own."""
        return False

    @abstractmethod
    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: Tensor,
        eos_ids: list[int],
        pad_id: int,
    ) -> Completions:
        """Samples ``n`` answers to each prompt.

        Args:
            model: Causal language model in the Hugging Face form, in eval mode.
            input_ids: ``[B, P]`` prompts, left-padded.
            attention_mask: ``[B, P]``.
            seeds: ``[B, n]`` int64, one per answer; an answer depends on its prompt and its seed alone, but
                where ``decoding.draw`` is ``multinomial``.
            eos_ids: Tokens that end an answer.
            pad_id: Token to put after the end.

        Returns:
            ``N = B * n`` answers, those of one prompt adjacent.
        """
