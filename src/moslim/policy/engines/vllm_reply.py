"""What an inference server says, checked against what it was asked: the one place where replies are believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moslim.policy.engines.vllm_client import Client, ServerError, Unavailable

_ROUNDING = 1e-3  # of a log-probability, which may so lie above 0
_LOWEST = -1e4  # what vLLM writes for a probability of 0; below it, float32 overflows in a ratio
_BYTES_PER_TOKEN, _BYTES_PER_PROMPT_TOKEN, _BYTES = 2048, 16, 1 << 18


@dataclass(frozen=True)
class CompletionRequest:
    """One prompt.

    Args:
        prompt: Token ids.
        samples: Number of answers.
        seed: Answer ``i`` is drawn with ``seed + i``.
    """

    prompt: list[int]
    samples: int
    seed: int


@dataclass(frozen=True)
class Limits:
    """How to sample.

    Args:
        max_new_tokens: Length limit.
        temperature: 0 takes the most likely token.
        eos_ids: Tokens that end an answer, and are part of it.
        vocabulary: Number of token ids.
    """

    max_new_tokens: int
    temperature: float
    eos_ids: list[int]
    vocabulary: int


@dataclass(frozen=True)
class Answer:
    """Token ids as the server drew them, with their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


def largest_reply(request: CompletionRequest, limits: Limits) -> int:
    """Bytes that the reply to a request may take, with room for long tokens in several places of it."""
    answers = request.samples * limits.max_new_tokens * _BYTES_PER_TOKEN
    return answers + (request.samples + 1) * len(request.prompt) * _BYTES_PER_PROMPT_TOKEN + _BYTES


def answers_of(reply: Any, request: CompletionRequest, limits: Limits, client: Client) -> list[Answer]:
    """Reads the reply of ``/v1/completions`` to one prompt.

    Args:
        reply: What came, decoded.
        request: What was asked.
        limits: How to sample.
        client: The server, for messages.

    Returns:
        The answers in the order of their seeds, as many as were asked for.

    Raises:
        Unavailable: The server broke an answer off, as it does when it ends or is paused.
        ServerError: The reply is no such thing: answers are missing, too many or counted twice, or are to another
            prompt; token ids are none, beyond the vocabulary, too many or go on after an end; log-probabilities are
            none of finite numbers up to 0, one per token; or the reason for the end does not fit the tokens.
    """

    def fail(what: str) -> ServerError:
        return ServerError(
            f"{client.url}/v1/completions was asked for {request.samples} answers of at most {limits.max_new_tokens} "
            f"tokens to one prompt of {len(request.prompt)} tokens, and {what}. Is it vLLM, 0.11 or later, and does "
            "nothing between here and there change what it says?"
        )

    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise fail(f"sent {client.said(reply)}")
    if len(choices) != request.samples:
        raise fail(f"gave {len(choices)} answers")
    by_index: dict[int, dict[str, Any]] = {}
    for choice in choices:
        index = choice.get("index")
        if not _whole(index) or not 0 <= index < request.samples or index in by_index:
            why = "twice" if _whole(index) and index in by_index else "which was not asked for"
            raise fail(f"gave an answer of index {client.said(index)}, {why}")
        by_index[index] = choice
    ordered = [by_index[index] for index in range(request.samples)]
    if any(choice.get("finish_reason") == "abort" for choice in ordered):
        raise Unavailable(f"{client.url}/v1/completions broke an answer off (finish_reason `abort`)")
    if ordered[0].get("prompt_token_ids") is None:
        raise fail("does not say which prompt it answered (prompt_token_ids)")
    for index, choice in enumerate(ordered):
        wrong = _wrong(choice, request.prompt, limits, client.said)
        if wrong is not None:
            raise fail(f"answer {index} {wrong}")
    return [Answer(choice["token_ids"], [float(p) for p in _logprobs(choice)]) for choice in ordered]


def models_of(reply: Any, client: Client) -> tuple[str, set[str]]:
    """Reads the reply of ``/v1/models``.

    Returns:
        The name of the model that the server was started with, and the names of all that it holds.

    Raises:
        ServerError: It is no list of models, or holds none that is no adapter.
    """
    cards = reply.get("data") if isinstance(reply, dict) else None
    good = isinstance(cards, list) and all(isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards)
    if not good or not cards:
        raise ServerError(
            f"{client.url}/v1/models was asked which models there are, and sent {client.said(reply)}: is it vLLM?"
        )
    base = next((card["id"] for card in cards if not card.get("parent")), None)
    if base is None:
        raise ServerError(
            f"{client.url}/v1/models names adapters only, and not the model that they belong on: is it vLLM?"
        )
    return base, {card["id"] for card in cards}


def _wrong(choice: dict[str, Any], prompt: Sequence[int], limits: Limits, said: Callable[[Any], str]) -> str | None:
    """The fault of one answer."""
    if choice.get("prompt_token_ids") not in (None, prompt):
        return "is to another prompt than was sent: does the server cut or extend prompts?"
    tokens, logprobs = choice.get("token_ids"), _logprobs(choice)
    if not isinstance(tokens, list) or not tokens:
        return f"has no token ids, but {said(tokens)}"
    strange = next((token for token in tokens if not _whole(token) or not 0 <= token < limits.vocabulary), None)
    if strange is not None or None in tokens:
        return f"holds the token {said(strange)}, which is none of the vocabulary of {limits.vocabulary}"
    if len(tokens) > limits.max_new_tokens:
        return f"has {len(tokens)} tokens"
    end = next((i for i, token in enumerate(tokens) if token in limits.eos_ids), None)
    if end is not None and end < len(tokens) - 1:
        return f"goes on after the token {tokens[end]} at place {end}, which ends answers"
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        count = len(logprobs) if isinstance(logprobs, list) else "no"
        return f"has {count} log-probabilities for {len(tokens)} tokens"
    bad = [p for p in logprobs if not _number(p) or not _LOWEST <= p <= _ROUNDING]  # so written, NaN is bad too
    if bad:
        return f"has a log-probability of {said(bad[0])}"
    match choice.get("finish_reason"):
        case "stop" if end is None:
            return "was ended (finish_reason `stop`) without a token that ends answers"
        case "length" if len(tokens) < limits.max_new_tokens:
            return (
                f"was cut after {len(tokens)} tokens (finish_reason `length`): start the server with a --max-model-len "
                f"of at least {len(prompt) + limits.max_new_tokens}"
            )
        case "stop" | "length":
            return None
        case reason:
            return f"ended for an unknown reason (finish_reason {said(reason)})"


def _logprobs(choice: dict[str, Any]) -> Any:
    found = choice.get("logprobs")
    return found.get("token_logprobs") if isinstance(found, dict) else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
