"""One vLLM server: its weights, its replies, and their validation.

What an inference server says, checked against what it was asked: the one place where replies are believed.

The policy's current weights in a folder that a server can read.

One vLLM server: which weights it answers with, and its answers (routes of vLLM 0.32).
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from moslim.generation.vllm_client import Client, Refused, ServerError, Unavailable

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


_KEPT = 2  # versions on disk: full weights of policy and reference take turns in a test


@dataclass(frozen=True)
class Version:
    """One state of the weights, saved.

    Args:
        name: A function of the weights: equal weights have equal names, in every process and run.
        folder: Where they lie, for the trainer.
        adapter: Whether they are an adapter's or the whole model's.
    """

    name: str
    folder: Path
    adapter: bool


class WeightFolder:
    """Saves what a model would answer with now, once per version, and forgets versions that are past.

    Args:
        folder: Where to save; several runs and processes may share it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._kept: list[Version] = []

    def save(self, model: Any) -> Version | None:
        """Saves the weights if they have changed.

        Args:
            model: A transformers model, or a peft model, of which the active adapter is saved.

        Returns:
            None where a peft model's adapter is switched off: the base is what the server started with.
        """
        if not hasattr(model, "peft_config"):
            return self._saved(model.state_dict(), False, model.save_pretrained)
        if _switched_off(model):
            return None
        from peft import get_peft_model_state_dict

        active = model.active_adapter
        own = {"adapter_name": active, "save_embedding_layers": False}
        scale = model.peft_config[active].lora_alpha
        state = {**get_peft_model_state_dict(model, **own), "alpha": torch.tensor(float(scale))}

        def write(folder: Path) -> None:
            model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
            if active != "default":  # peft puts it one folder deeper
                (folder / active).rename(folder.with_suffix(".inner"))
                shutil.rmtree(folder)
                folder.with_suffix(".inner").rename(folder)

        return self._saved(state, True, write)

    def forget(self) -> None:
        """Deletes all but the last versions; call it when no server needs older ones."""
        for version in self._kept[:-_KEPT]:
            shutil.rmtree(version.folder, ignore_errors=True)
        self._kept = self._kept[-_KEPT:]

    def _saved(self, state: dict[str, Tensor], adapter: bool, write: Callable[[Path], Any]) -> Version:
        name = f"moslim-{digest(state)}"
        version = Version(name, self.folder / name, adapter)
        self._kept = [*(kept for kept in self._kept if kept != version), version]
        if not version.folder.exists():
            part = self.folder / f".{name}-{uuid4().hex}"
            write(part)
            try:
                os.rename(part, version.folder)
            except OSError:  # another process was first
                shutil.rmtree(part)
        return version


def digest(state: dict[str, Tensor]) -> str:
    """Hash of every name, shape and bit, so that no change of the weights goes unnoticed."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _switched_off(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) and layer.disable_adapters for layer in model.modules())


_CONNECTIONS = 64
_NOT_FOUND, _ENGINE_DIED = 404, 500


class VLLMServer:
    """A running server.

    Args:
        client: Connection to it.
        folder: Where it sees the trainer's weight folder; None = under the same path.
    """

    def __init__(self, client: Client, folder: str | None) -> None:
        self.client = client
        self._folder = folder
        self._adapter: str | None = None  # the last one that this engine loaded

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    def answers(
        self, version: Version | None, requests: Sequence[CompletionRequest], limits: Limits
    ) -> list[list[Answer]]:
        """Generations prompts with the given weights, which are brought to the server first where it lacks them.

        When the server goes away in between, everything is done anew once it is back: it may have been restarted, and
        then it has the weights that it starts with.

        Args:
            version: The weights; None = those that the server was started with.
            requests: The prompts; all are sent at once, as the server batches them itself.
            limits: How to sample.

        Returns:
            For each prompt, its answers.

        Raises:
            ServerError: The server is not there, stayed away, or does not support what is asked of it.
        """

        def attempt() -> list[list[Answer]]:
            model = self._serve(version)
            with ThreadPoolExecutor(min(len(requests), _CONNECTIONS)) as pool:
                return list(pool.map(lambda request: self._complete(model, request, limits), requests))

        return self.client.patiently(attempt)

    def _serve(self, version: Version | None) -> str:
        """Makes the server hold the weights, and returns the name that they are asked for by."""
        base, names = self._models()
        if version is None:
            return base
        if not version.adapter:
            self._reload(version)  # each time: nothing shows whether the server was restarted since
            return base
        if version.name not in names:
            self._load(version)
            if version.name not in self._models()[1]:
                raise ServerError(
                    f"{self.url} accepted the adapter {version.name} but does not list it in /v1/models: is it vLLM?"
                )
        if self._adapter in names - {version.name}:
            self._unload(self._adapter)
        self._adapter = version.name
        return version.name

    def _models(self) -> tuple[str, set[str]]:
        return models_of(self.client.get("/v1/models"), self.client)

    def _seen(self, version: Version) -> str:
        return str(Path(self._folder) / version.name if self._folder else version.folder.absolute())

    def _load(self, version: Version) -> None:
        path = self._seen(version)
        try:
            self.client.order("/v1/load_lora_adapter", {"lora_name": version.name, "lora_path": path})
        except Refused as error:
            if "already been loaded" in str(error):  # by another process of this run
                return
            raise ServerError(
                f"the adapter was not loaded: {error}. The server must see the folder {path} (engine.server_folder), "
                "and be started with --enable-lora, --max-lora-rank of at least lora.rank and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; or train all weights"
            ) from error

    def _unload(self, name: str | None) -> None:
        try:
            self.client.order("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != _NOT_FOUND:  # by another process of this run
                raise

    def _reload(self, version: Version) -> None:
        path = self._seen(version)
        try:
            self.client.order("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            self.client.order("/reset_prefix_cache", {})  # it holds keys and values of the old weights
        except Refused as error:
            raise ServerError(
                f"the weights were not reloaded: {error}. The server must see the folder {path} "
                "(engine.server_folder), and be started with VLLM_SERVER_DEV_MODE=1; or train an adapter (lora)"
            ) from error

    def _complete(self, model: str, request: CompletionRequest, limits: Limits) -> list[Answer]:
        greedy = limits.temperature == 0  # of which vLLM gives one answer only
        sent = replace(request, samples=1) if greedy else request
        try:
            found = self.client.post("/v1/completions", _body(model, sent, limits), largest_reply(sent, limits))
        except Refused as error:
            if error.status in (_NOT_FOUND, _ENGINE_DIED):  # the first: it was restarted and knows no adapter
                raise Unavailable(str(error)) from error
            raise
        answers = answers_of(found, sent, limits, self.client)
        return answers * request.samples if greedy else answers


def _body(model: str, request: CompletionRequest, limits: Limits) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": request.prompt,
        "n": request.samples,
        "seed": request.seed,
        "max_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        # Written out, as the model's generation_config.json would otherwise change the distribution.
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"stop_token_ids": limits.eos_ids, "ignore_eos": True},
        **{"logprobs": 0, "return_token_ids": True},
    }
