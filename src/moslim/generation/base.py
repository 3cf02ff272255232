"""Interface of the rollout engines, and the completions that they return."""

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
    """``N`` sampled completions of at most ``T`` tokens, right-padded.

    Args:
        tokens: ``[N, T]`` int64 token ids, padding after the end.
        mask: ``[N, T]`` bool, true up to and including the token that ends the completion.
        logprobs: ``[N, T]`` float32 or float64, log-probability of each token under the tempered distribution; 0 where
            ``mask`` is false.
        ended: ``[N]`` bool, false where the completion was cut at the length limit.
        behavior_logprobs: ``[N, T]`` log-probabilities under the truncated distribution (top-k, top-p) that the tokens
            were drawn from; None if it was not truncated.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    ended: Tensor
    behavior_logprobs: Tensor | None = None


class RolloutEngine(ABC):
    """Base class of engines that sample completions from a policy.

    Args:
        max_new_tokens: Length limit of a completion, the end-of-sequence token included.
        temperature: Sampling temperature; 0 takes the most likely token. Log-probabilities, here and in
            training, are those of the tempered distribution, so that engine and trainer agree.
        stop_strings: Texts that end a completion, as end-of-sequence tokens do; its text excludes them.
        stop_ids: Tokens that end a completion, besides the model's own; its text excludes them.

    Raises:
        UsageError: An argument is out of range.
    """

    in_process: ClassVar[bool] = True
    """True if the engine computes with the given model itself, false if with copies of its weights elsewhere."""
    top_k: int | None = None
    """Number of most likely tokens that are drawn from; None = all."""
    top_p: float = 1.0
    """Total probability of the most likely tokens that are drawn from; 1 = all."""

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
            raise UsageError("engine.stop_strings holds an empty text: it would end every completion at once")
        self.temperature = temperature
        self.stop_strings = tuple(stop_strings)
        self.stop_ids = tuple(stop_ids)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets the tokenizer of the policy, which recognises ``stop_strings``."""
        self.tokenizer = tokenizer

    def before_stop(self, text: str) -> str:
        """Returns the text of a completion up to the first stop string."""
        return min((text.partition(stop)[0] for stop in self.stop_strings), key=len, default=text)

    @property
    def cuts(self) -> bool:
        """Whether the distribution is truncated (top-k, top-p) and so differs from the policy's."""
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
        """Samples ``n`` completions of each prompt.

        Args:
            model: Causal language model in the Hugging Face form, in eval mode.
            input_ids: ``[B, P]`` prompts, left-padded.
            attention_mask: ``[B, P]``.
            seeds: ``[B, n]`` int64, one per completion. A completion depends on its prompt and its seed alone, unless
                ``decoding.draw`` is ``multinomial``.
            eos_ids: Tokens that end a completion.
            pad_id: Token after the end.

        Returns:
            ``N = B * n`` completions, those of one prompt adjacent.
        """
